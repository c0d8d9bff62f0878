"""Imports run one way, configs load without torch, and the package list is the folders on disk."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "vlm_vision": ROOT / "vlm_vision",
    "vlm_vision.adapters": ROOT / "adapters",
    "vlm_vision.train": ROOT / "train",
}

# From the bottom up: a module imports from its own row and those before it. The longest prefix tells its row.
ORDER: tuple[tuple[str, ...], ...] = (
    ("vlm_vision.errors",),
    ("vlm_vision.config",),
    ("vlm_vision.registry",),
    ("vlm_vision.tiling_config", "vlm_vision.tower_config"),
    (
        "vlm_vision.architectures",
        "vlm_vision.backbone",
        "vlm_vision.compat",
        "vlm_vision.device_map",
        "vlm_vision.features",
        "vlm_vision.files",
        "vlm_vision.layouts",
        "vlm_vision.pictures",
        "vlm_vision.picture_list",
        "vlm_vision.preprocess",
        "vlm_vision.preprocessor_file",
        "vlm_vision.progress",
        "vlm_vision.text",
        "vlm_vision.tiling",
        "vlm_vision.tokenizer_files",
        "vlm_vision.torchscript",
        "vlm_vision.tower",
        "vlm_vision.weights",
    ),
    ("vlm_vision.backbones",),
    (
        "vlm_vision.catalogue",
        "vlm_vision.dual_encoder",
        "vlm_vision.export",
        "vlm_vision.integrations",
        "vlm_vision.extract",
        "vlm_vision.feature_shards",
        "vlm_vision.feature_stream",
        "vlm_vision.metrics",
        "vlm_vision.multiscale",
        "vlm_vision.plugin",
        "vlm_vision.prompts",
        "vlm_vision.search",
        "vlm_vision.testing",
        "vlm_vision.text_embeddings",
        "vlm_vision.verify",
        "vlm_vision.verify_page",
        "vlm_vision.zero_shot",
    ),
    ("vlm_vision", "vlm_vision.scaffold"),
    ("vlm_vision.adapters",),
    ("vlm_vision.train",),
    ("vlm_vision.cli", "vlm_vision.commands"),
)
# A backbone config builds its backbone, a lazy name loads its module: by name, when asked, not on import.
HEAVY = {
    "accelerate",
    "transformers",
    "open_clip",
    "timm",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "gradio",
    "faiss",
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder).with_suffix("").parts
            if package == "vlm_vision" and inside[0] in ("adapters", "train"):  # links for static checkers
                continue
            parts = inside[:-1] if inside[-1] == "__init__" else inside
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def row(module: str) -> int:
    while module:
        for number, names in enumerate(ORDER):
            if module in names:
                return number
        module = module.rpartition(".")[0]
    raise AssertionError("no row")


def imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Modules that a file imports, but for those for type checkers; `lazy` adds those inside functions."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    for imported in imports(MODULES[module], lazy=False):
        if imported.split(".")[0] == "vlm_vision":
            assert imported in MODULES, f"{module} imports {imported}, which is not there"
            assert row(imported) <= row(module), f"{module} must not import {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_lazy_imports_do_not_reach_up_into_training(module: str) -> None:
    """Inside functions too, only the command line and what is above may know of what stands below it."""
    for imported in imports(MODULES[module], lazy=True):
        for package in ("vlm_vision.adapters", "vlm_vision.train", "vlm_vision.cli"):
            if imported.startswith(package):
                assert row(module) >= row(package), f"{module} must not import {imported}"


def test_the_order_finds_a_wrong_import(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("from vlm_vision.train import optim\ndef f():\n    import torch\n", encoding="utf-8")
    assert list(imports(path, lazy=False)) == ["vlm_vision.train.optim"]
    assert set(imports(path, lazy=True)) == {"vlm_vision.train.optim", "torch"}
    assert row("vlm_vision.train.optim") > row("vlm_vision.tower") > row("vlm_vision.config")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_the_package_pulls_in_nothing_heavy() -> None:
    assert not loaded_by("import vlm_vision") & {*HEAVY, "torch"}


def test_importing_the_public_names_pulls_in_no_backbone_library() -> None:
    assert not loaded_by("from vlm_vision import *") & HEAVY


def test_config_modules_load_without_torch() -> None:
    configs = [name for name in MODULES if name.endswith("config")]
    assert "vlm_vision.tower_config" in configs
    assert not loaded_by("\n".join(f"import {name}" for name in configs)) & {*HEAVY, "torch"}


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda script: script.stem)
def test_benchmarks_import_names_that_are_there(script: Path) -> None:
    """No test runs them, so that a renamed class would only be missed by whoever measures next."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm_vision"):
            module = import_module(str(node.module))
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_public_names_are_there() -> None:
    import vlm_vision

    for name in vlm_vision.__all__:
        assert getattr(vlm_vision, name).__name__ == name
    assert set(vlm_vision.__all__) <= set(dir(vlm_vision))
    with pytest.raises(AttributeError, match="has no attribute 'lode_tower'"):
        vlm_vision.lode_tower  # noqa: B018


def test_the_package_list_is_the_folders_on_disk() -> None:
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    settings = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    on_disk = {
        module if path.name == "__init__.py" else module.rpartition(".")[0]
        for module, path in MODULES.items()
    }
    listed = set(settings["packages"])
    assert {name for name in listed if not name.startswith("vlm_vision.configs")} == on_disk
    for package in listed:
        folder = settings["package-dir"].get(package)
        assert (ROOT / (folder or package.replace(".", "/")) / "__init__.py").is_file(), package
