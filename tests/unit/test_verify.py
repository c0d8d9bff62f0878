from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLIP_VISION
from torch import nn

from vlm_vision import verify as module
from vlm_vision import verify_page
from vlm_vision.cli import main
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.tower import describe_tower
from vlm_vision.verify import TOLERANCE, Facts, Verification, check_names, fill_with_noise, verify
from vlm_vision.verify_page import VerifyPage, describe_run

VIT = "open_clip:ViT-S-32-alt"
RUN = "2026-01-01, `vlm-vision towers verify`; a machine, 1 thread(s); torch 2"


def clip(folder: Path) -> str:
    """A tiny CLIP of transformers, whose folder holds a config alone."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "clip_vision_model", **CLIP_VISION}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"transformers:{folder}"


def verified(name: str) -> Verification:
    (found,) = verify([name])
    return found


# What is found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [VIT, "open_clip:RN50", "open_clip:PE-Core-T-16-384", "timm:test_vit", "timm:test_convnext"]
)
def test_towers_equal_their_libraries(name: str) -> None:
    found = verified(name)
    assert (found.verdict, found.passed) == ("equal", True)
    assert found.patches is not None
    assert found.pooled is not None
    assert max(found.patches, found.pooled) <= 2e-6  # measured 8e-7


def test_facts_are_of_the_layer_that_is_compared(tmp_path: Path) -> None:
    name = clip(tmp_path)
    parameters = describe_tower(f"{name}@none", pooled_head=True).num_parameters
    expected = Facts(size=(32, 32), patch=8, grid=(4, 4), layers=3, layer=2, width=32, parameters=parameters)
    assert verified(name).facts == expected


def after(change: Callable[[Any], None], name: str, monkeypatch: pytest.MonkeyPatch) -> Verification:
    """What is found of a tower that changed after its library's model took its weights."""
    source = name.partition(":")[0]
    build = module._REFERENCES[source]

    def build_and_change(backbone: Any) -> module.Reference:
        reference = build(backbone)
        change(backbone)
        return reference

    monkeypatch.setitem(module._REFERENCES, source, build_and_change)
    return verified(name)


def tanh_gelu(backbone: Any) -> None:
    for block in backbone.visual.transformer.resblocks:
        block.mlp.gelu = nn.GELU(approximate="tanh")


def other_eps(backbone: Any) -> None:
    backbone.visual.ln_pre.eps = 1e-6


def one_weight(backbone: Any) -> None:
    weight = backbone.visual.transformer.resblocks[5].mlp.c_fc.weight
    weight.data = weight.data.clone()  # its memory is others' too
    weight.data[7, 11] += 0.1


def blocks_swapped(backbone: Any) -> None:
    blocks = backbone.visual.transformer.resblocks
    blocks[4], blocks[5] = blocks[5], blocks[4]


def positions_swapped(backbone: Any) -> None:
    positions = backbone.visual.positional_embedding
    positions.data = positions.data[[0, 2, 1, *range(3, len(positions))]]


@pytest.mark.parametrize(
    "change", [tanh_gelu, other_eps, one_weight, blocks_swapped, positions_swapped], ids=lambda c: c.__name__
)
def test_the_least_difference_is_found(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = after(change, VIT, monkeypatch)
    assert (found.verdict, found.passed) == ("DIFFERS", False)
    assert found.patches is not None
    assert found.patches > 5 * TOLERANCE


def test_a_head_alone_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_head(backbone: Any) -> None:
        backbone.norm.eps = 1e-2

    found = after(other_head, clip(tmp_path), monkeypatch)
    assert found.verdict == "DIFFERS"
    assert found.patches is not None
    assert found.patches <= 1e-6  # measured 2.3e-7
    assert found.pooled is not None
    assert found.pooled > TOLERANCE


def test_what_cannot_be_compared_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_token_more(backbone: Any) -> None:
        backbone.info = replace(backbone.info, prefix_tokens=2)

    def infinite(backbone: Any) -> None:
        backbone.norm.weight.data = torch.full_like(backbone.norm.weight, torch.inf)

    def headless(backbone: Any) -> None:
        backbone.info = replace(backbone.info, embed_dim=None)

    name = clip(tmp_path)
    for change, reason in (
        (one_token_more, "features are [1, 15, 32], the library's [1, 16, 32]"),
        (infinite, "features are not finite"),
        (headless, "pooled output: none, unlike the library's model"),
    ):
        with monkeypatch.context() as patch:
            found = after(change, name, patch)
        assert (found.verdict, found.passed) == (f"FAILED {reason}", False)


def test_a_tensor_that_one_side_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(backbone: Any) -> module.Reference:
        backbone.embeddings.patch_embedding.bias = nn.Parameter(torch.zeros(32))
        return module._transformers(backbone)

    monkeypatch.setitem(module._REFERENCES, "transformers", build)
    told = verified(clip(tmp_path)).failure
    assert told == "only the library has [], only the tower ['embeddings.patch_embedding.bias']"


def test_what_does_not_fit_into_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 28)
    monkeypatch.setitem(module._REFERENCES, "transformers", lambda _: pytest.fail("was built"))
    found = verified(clip(tmp_path))
    assert (found.verdict, found.passed) == ("SKIPPED needs 0.5 GiB, 0.2 GiB are free", False)
    assert found.facts is not None


def test_free_memory_is_known_with_and_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.free_memory() > 1 << 20
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    assert module.free_memory() > 1 << 20


# Names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clap:ViT-B-32", "unknown backbone 'open_clap'; did you mean 'open_clip'?"),
        ("open_clip:ViTB-32", "open_clip has no model 'ViTB-32'; did you mean 'ViT-B-32'?"),
        ("open_clip:ViT-B-32@openai", "open_clip has no model 'ViT-B-32@openai'; did you mean 'ViT-B-32'?"),
        ("timm:test_wit", "timm has no model 'test_wit'"),
        ("fused:x", "fused:x: 'fused' has no other library to compare with"),
    ],
)
def test_wrong_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_names([VIT, name])
    assert str(refused.value).startswith(message)


# Noise ---------------------------------------------------------------------------------------------------


def test_noise_is_the_same_every_time_and_takes_a_shapes_memory_once() -> None:
    def noisy() -> nn.Module:
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(50)], nn.LayerNorm(64), nn.BatchNorm2d(64))
        fill_with_noise(model)
        return model

    one, other = noisy().requires_grad_(False), noisy()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    weights = [linear.weight for linear in list(one)[:50]]  # type: ignore[call-overload]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert len({float(weight.double().sum()) for weight in weights}) == 50
    product = weights[0] @ weights[1]
    assert 0.5 < float(product.std() / weights[0].std()) < 2  # as of matrices that have nothing in common
    assert float(one[50].weight.min()) >= 0.9
    assert float(one[51].running_var.min()) >= 0.9
    assert 0.01 < float(one[50].bias.std()) < 0.03


# The page ------------------------------------------------------------------------------------------------


def row(name: str, patches: float | None = 1e-6, **fields: Any) -> Verification:
    facts = Facts((224, 336), 16, (14, 21), 12, 11, 768, 86_000_000)
    return Verification(name, 1.0, facts, **{"patches": patches, **fields})


def test_runs_merge_into_one_page(tmp_path: Path) -> None:
    path = tmp_path / "new" / "towers.md"
    page = VerifyPage.read(path)
    page.add(row("timm:b"), RUN)
    page.add(row("timm:a", 0.5), RUN)
    page.add(Verification("open_clip:z", 1.0, failure="a | b: `c`"), RUN)
    page.write()
    again = VerifyPage.read(path)
    assert (again.rows, again.run_of) == (page.rows, page.run_of)
    later = RUN.replace("2026-01-01", "2026-01-02")
    again.add(row("timm:a", 0.0, pooled=2e-6), later)
    again.add(row("open_clip:b", None, skipped="needs 9 GiB, 1 GiB are free"), later)
    again.write()
    text = path.read_text(encoding="utf-8")
    assert f"\n1. {RUN}\n2. {later}\n" in text
    tables = [line for line in text.splitlines() if line.startswith("| `")]
    assert tables == [
        "| `open_clip:b` | 224x336 | 16 | 14x21 | 12 | 768 | 11 | - | - | 86.0 M "
        "| SKIPPED needs 9 GiB, 1 GiB are free | 2 |",
        r"| `open_clip:z` | - | - | - | - | - | - | - | - | - | FAILED a \| b: `c` | 1 |",
        "| `timm:a` | 224x336 | 16 | 14x21 | 12 | 768 | 11 | 0 | 2.0e-06 | 86.0 M | equal | 2 |",
        "| `timm:b` | 224x336 | 16 | 14x21 | 12 | 768 | 11 | 1.0e-06 | - | 86.0 M | equal | 1 |",
    ]
    assert "\n| open_clip | 2 | 0 | 2 | - | - |\n| timm | 2 | 2 | 0 | 1.0e-06 | 2.0e-06 |\n" in text
    for name in ("timm:b", "open_clip:z"):  # the last rows of the first run
        again.add(row(name), later)
    again.write()
    assert f"\n1. {later}\n\n" in path.read_text(encoding="utf-8")


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Ours\n", encoding="utf-8")
    with pytest.raises(DataError, match="no page of verified towers"):
        VerifyPage.read(path)
    page = VerifyPage(tmp_path / "towers.md")
    page.add(row("timm:a"), RUN)
    page.write()
    page.path.write_text(page.path.read_text(encoding="utf-8").replace("\n1. ", "\n7. "), encoding="utf-8")
    with pytest.raises(DataError, match="timm:a came from run '1', which is not listed"):
        VerifyPage.read(page.path)


def test_a_run_is_told_with_machine_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    told = describe_run("vlm-vision towers verify --match '*B*'")
    assert "`vlm-vision towers verify --match '*B*'`" in told
    assert f"{torch.get_num_threads()} thread(s); torch " in told
    assert verify_page._processor()
    monkeypatch.setattr(verify_page, "Path", lambda _: Path("absent"))
    assert verify_page._processor()


# The command ---------------------------------------------------------------------------------------------


def test_one_failure_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Any) -> module.Reference:
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setitem(module._REFERENCES, "timm", refuse)
    name, page = clip(tmp_path / "clip"), tmp_path / "towers.md"
    status = main(["towers", "verify", "timm:test_vit", name, "timm:test_vit", "--table", str(page)])
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert status == 2
    assert "error: 1 of 2 towers could not be compared" in output.err
    assert [line.split()[0] for line in lines[1:3]] == ["timm:test_vit", name]
    assert lines[3:] == ["2 verified: 1 FAILED, 1 equal", "timm:test_vit: FAILED no such thing"]
    rows = VerifyPage.read(page).rows
    assert [rows[key][-1] for key in ("timm:test_vit", name)] == ["FAILED no such thing", "equal"]


def test_what_was_skipped_is_told_and_alone_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, other = clip(tmp_path / "clip"), clip(tmp_path / "other")
    sizes = iter([0, 1 << 40, 0])
    monkeypatch.setattr(module, "free_memory", lambda: next(sizes))
    assert main(["towers", "verify", tiny, other]) == 0
    told = capsys.readouterr().out
    assert "2 verified: 1 SKIPPED, 1 equal" in told
    assert f"\n{tiny}: SKIPPED needs 0.5 GiB, 0.0 GiB are free\n" in told
    assert main(["towers", "verify", tiny]) == 2
    assert "1 of 1 towers could not be compared" in capsys.readouterr().err


def test_nothing_to_verify_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["towers", "verify", "--match", "no such model"]) == 2
    assert "error: no tower to verify (no such model)" in capsys.readouterr().err
    assert main(["towers", "verify", "--source", "fused"]) == 2
    assert "error: no tower to verify (fused)" in capsys.readouterr().err
    assert main(["towers", "--table", "towers.md"]) == 2
    assert "error: --table is for towers verify" in capsys.readouterr().err


def test_sources_of_their_own_are_told_where_all_are_meant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlm_vision.tower.list_backbones", lambda: ["timm:test_vit", "fused"])
    assert main(["towers", "verify"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "1 verified: 1 equal",
        "fused: has no other library to compare with",
    ]
