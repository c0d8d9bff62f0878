from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import open_clip
import pytest
import timm
from pins import knows

from vlm_vision import catalogue
from vlm_vision.catalogue import LICENCES, TowerFacts, describe, licence, list_towers, make
from vlm_vision.cli import main

# Of every kind that is built in its own way: native ViT, ModifiedResNet, CoCa, trunks of stages and of
# blocks, no square, a size that is no multiple of the patch; each family of transformers.
SAMPLE = (
    "open_clip:ViT-S-32-alt",
    "open_clip:ViT-B-16",
    "open_clip:ViT-H-14-378-quickgelu",
    "open_clip:RN50",
    "open_clip:coca_ViT-B-32",
    "open_clip:convnext_tiny",
    "open_clip:ViT-B-16-SigLIP",
    "open_clip:ViTamin-S",
    "open_clip:MobileCLIP2-S0",
    "timm:test_vit",
    "timm:vit_tiny_patch16_224",
    "timm:vit_small_patch14_dinov2",
    "timm:vit_small_patch16_dinov3",
    "timm:resnet18",
    "timm:swin_tiny_patch4_window7_224",
    "timm:convnext_atto",
    "timm:efficientnet_b0",
    "transformers:openai/clip-vit-base-patch32",
    "transformers:google/siglip-so400m-patch14-384",
    "transformers:google/siglip2-base-patch16-naflex",
    "transformers:facebook/dinov2-with-registers-small",
    "transformers:facebook/dinov3-vits16-pretrain-lvd1689m",
    "transformers:facebook/dinov3-convnext-tiny-pretrain-lvd1689m",
    "transformers:apple/aimv2-large-patch14-224",
    "transformers:facebook/vit-mae-base",
)

# Of those that older versions of transformers do not have.
MODEL_TYPES = {
    "transformers:google/siglip2-base-patch16-naflex": "siglip2_vision_model",
    "transformers:facebook/dinov2-with-registers-small": "dinov2_with_registers",
    "transformers:facebook/dinov3-vits16-pretrain-lvd1689m": "dinov3_vit",
    "transformers:facebook/dinov3-convnext-tiny-pretrain-lvd1689m": "dinov3_convnext",
    "transformers:apple/aimv2-large-patch14-224": "aimv2_vision_model",
}


def by_name() -> dict[str, TowerFacts]:
    return {facts.tower: facts for facts in list_towers()}


@pytest.mark.parametrize("tower", SAMPLE)
def test_a_row_is_what_building_the_tower_gives(tower: str) -> None:
    model_type = MODEL_TYPES.get(tower)
    if model_type is not None and not knows(model_type):
        pytest.skip(f"this transformers has no {model_type}")
    assert by_name()[tower] == describe(tower)


def test_the_towers_listed_are_those_of_the_libraries_in_their_order() -> None:
    """In a process of its own: other tests make models of their own known to timm."""
    code = (
        "from vlm_vision import list_backbones; from vlm_vision.catalogue import list_towers; "
        "assert [facts.tower for facts in list_towers()] == list_backbones()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=900)


def test_every_tower_of_ours_has_facts() -> None:
    bare = [facts.tower for facts in list_towers() if "-" in facts[1:-1]]
    # These ask tensors for numbers as they run, so they cannot be measured without memory.
    assert [tower for tower in bare if not tower.startswith("timm:gemma4_vit")] == ["fused"]


def test_another_version_of_a_library_is_asked_for_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that the catalogue lacks are listed without facts, names that the library lacks are not."""
    made_with, known = catalogue._read()
    gone = TowerFacts("timm:gone", "224", "16", "14x14", "64", "2", "mit")
    new = {tower: facts for tower, facts in known.items() if tower != "timm:test_vit"}
    monkeypatch.setattr(catalogue, "_read", lambda: ({**made_with, "timm": "0"}, {**new, gone.tower: gone}))
    listed = {facts.tower: facts for facts in list_towers("timm")}
    assert list(listed) == [f"timm:{model}" for model in timm.list_models()]
    assert listed["timm:test_vit"] == TowerFacts("timm:test_vit")
    assert listed["timm:test_vit2"] == known["timm:test_vit2"]


def test_a_source_without_models_stands_alone() -> None:
    assert list_towers("fused") == [TowerFacts("fused")]
    assert list_towers("fused", "ViT*") == []


def test_licences_are_of_every_tag_in_order() -> None:
    assert licence("open_clip:RN50") == "mit"
    assert licence("open_clip:ViT-B-16-SigLIP2") == "apache-2.0"
    assert licence("open_clip:ViT-H-14").split(",") == ["mit", "cc-by-nc-4.0", "apple-amlr"]
    assert licence("open_clip:ViT-S-32") == "-", "no weights are published"
    assert licence("timm:vit_base_patch16_224").split(",")[0] == "apache-2.0", "of the default tag"
    assert licence("transformers:openai/clip-vit-base-patch32") == "-", "its publisher names none"
    assert licence("transformers:apple/aimv2-large-patch14-224") == "apple-amlr"


def test_every_line_of_licences_is_of_some_weights() -> None:
    repositories = [
        open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/")
        for model, tag in open_clip.list_pretrained()
    ]
    repositories += [facts.tower.partition(":")[2] for facts in list_towers("transformers")]
    for glob, _ in LICENCES:
        assert any(fnmatchcase(name, glob) for name in repositories), glob


def test_the_catalogue_is_made_of_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function behind `python -m vlm_vision.catalogue`, cut to a few models of which one fails."""
    names = {"open_clip": ["open_clip:ViT-S-32"], "timm": ["timm:test_vit", "timm:absent"]}
    monkeypatch.setattr(catalogue, "list_source", lambda source: names.get(source, []))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    make(tmp_path / "catalogue.csv")
    lines = (tmp_path / "catalogue.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# open_clip {open_clip.__version__}, timm {timm.__version__}"
    assert lines[1] == "tower,size,patch,grid,width,layers,licence"
    assert lines[2:] == [
        "open_clip:ViT-S-32,224,32,7x7,384,12,-",
        "timm:test_vit,160,16,10x10,64,6,apache-2.0",
        "timm:absent,-,-,-,-,-,-",
    ]


# The command --------------------------------------------------------------------------------------------


def test_a_glob_that_nothing_matches_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["towers", "--match", "no such model"]) == 2
    assert "error: no tower's name matches 'no such model'" in capsys.readouterr().err


def test_the_table_is_aligned_and_its_first_column_is_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["towers", "--source", "open_clip", "--match", "*L-14*"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["source:model", "size", "patch", "grid", "width", "layers", "licence"]
    assert max(map(len, rows)) <= 110
    start = header.index(" licence")
    assert all(row[start] == " " and row[start + 1] != " " for row in rows)
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(table) == [f"open_clip:{name}" for name in open_clip.list_models() if "L-14" in name]
    assert table["open_clip:ViT-L-14-336-quickgelu"][:5] == ["336", "14", "24x24", "1024", "24"]
    assert table["open_clip:EVA02-L-14"][:5] == ["224", "14", "16x16", "1024", "24"]


def test_rows_without_facts_are_counted_beside_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["towers", "--source", "fused"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split() == ["fused", *"------"]
    assert "1 without facts" in printed.err


def test_the_list_imports_no_library() -> None:
    code = (
        "import sys; from vlm_vision.cli import main; main(['towers']); print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "timm", "open_clip", "transformers"} & set(result.stderr.split())
