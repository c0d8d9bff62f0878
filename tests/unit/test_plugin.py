from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_vision.errors import ConfigError
from vlm_vision.plugin import write_plugin


def install(folder: Path, name: str) -> None:
    """What `pip install --editable` leaves of a package: a path to its source, and what it offers."""
    settings = (folder / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"$', settings, re.MULTILINE)
    assert found is not None
    group, source, target = found.groups()
    information = folder / "src" / f"{name}-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n", encoding="utf-8"
    )
    (information / "entry_points.txt").write_text(f"[{group}]\n{source} = {target}\n", encoding="utf-8")


def run(folder: Path, *command: str) -> str:
    """Run a module in the plug-in's folder, in a fresh interpreter that has it installed."""
    paths = [str(folder / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_new_plug_in_passes_its_own_tests_and_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "my_vit"
    written = write_plugin(folder)
    assert sorted(written) == sorted(path for path in folder.rglob("*") if path.is_file())
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert "scaffold" not in text
        assert "my_vit" in text or path.name == "__init__.py"
    install(folder, "my_vit")
    assert "5 passed" in run(folder, "pytest")
    assert "196 (14 x 14, every 16 pixels)" in run(folder, "vlm_vision.cli", "towers", "show", "my_vit:small")
    rows = run(folder, "vlm_vision.cli", "towers", "--source", "my_vit").splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["my_vit:small", "my_vit:base"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("My-ViT", "'My-ViT' is no name for a package"),
        ("class", "'class' is no name for a package"),
        ("timm", "a source 'timm' is there already"),
        ("json", "a package 'json' is installed already"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        write_plugin(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "my_vit"
    folder.mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        write_plugin(folder)
    assert not list(folder.iterdir())
