"""Mixed weights by the formula, to the bit at the ends; and the sweep over mixes."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import RESNET, TOWER, captioned_pictures, tiny_dual_encoder
from torch import Tensor, nn

from vlm_vision import DualEncoder, load_dual_encoder
from vlm_vision.cli import main
from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.train.merge import best_alpha, merge, mixed, plot_sweep, sweep
from vlm_vision.train.validation import validate_dual_encoder
from vlm_vision.train.validation_config import ValidationConfig

ALPHAS = (0.0, 0.25, 0.5, 1.0)


def changed(model: DualEncoder) -> DualEncoder:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            elif name.endswith("num_batches_tracked"):
                tensor += 7
    return model


def bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("source", [TOWER, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_weight_is_mixed(source: dict, dtype: str) -> None:
    torch.manual_seed(0)
    base = load_dual_encoder({**source, "dtype": dtype})
    tuned = changed(deepcopy(base))
    start, end = base.state_dict(), deepcopy(tuned.state_dict())
    for alpha in ALPHAS:
        found = merge(base, deepcopy(tuned), alpha)
        assert not found.training
        state = found.state_dict()
        if alpha in (0, 1):
            assert bits(state, end if alpha else start)
            continue
        for name, tensor in state.items():
            if tensor.is_floating_point():
                expected = (1 - alpha) * start[name].double() + alpha * end[name].double()
                assert tensor.dtype == start[name].dtype
                tolerance = 4e-3 if tensor.dtype == torch.bfloat16 else 2e-7  # measured 3.9e-3, 8e-8
                assert float((tensor - expected).abs().max() / expected.abs().max()) <= tolerance, name
            else:
                assert torch.equal(tensor, end[name]), name
        scale = (1 - alpha) * float(start["logit_scale"]) + alpha * float(end["logit_scale"])
        assert float(state["logit_scale"]) == pytest.approx(scale, rel=1e-6)
    assert bits(tuned.state_dict(), end)


def test_models_of_other_make_are_refused() -> None:
    base = tiny_dual_encoder()
    fast = deepcopy(TOWER)
    fast["backbone"]["architecture"]["quick_gelu"] = True  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"differ in backbone.architecture.quick_gelu \(None, True\)"):
        merge(base, load_dual_encoder(fast), 0.5)
    with pytest.raises(ConfigError, match="only a model and one tuned from it"):
        merge(base, load_dual_encoder(RESNET), 0.5)
    extra = tiny_dual_encoder()
    extra.text.more = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(WeightsError, match=r"2 weight\(s\) cannot be merged: text.more.bias in one only"):
        merge(base, extra, 0.5)
    half = load_dual_encoder({**TOWER, "dtype": "bfloat16"})
    with pytest.raises(WeightsError, match=r"of float32 \[\d+.*\] and bfloat16"):
        merge(base, half, 0.5)
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="alpha must be from 0"):
            merge(base, tiny_dual_encoder(), alpha)


def test_a_sweep_scores_each_mix_and_leaves_the_model(tmp_path: Path) -> None:
    base, tuned = tiny_dual_encoder().eval(), changed(tiny_dual_encoder()).eval()
    config = load_config(ValidationConfig, {"retrieval": {"path": str(captioned_pictures(tmp_path))}})
    end = deepcopy(tuned.state_dict())
    found = sweep(base, tuned, ALPHAS, lambda model: validate_dual_encoder(model, config))
    assert bits(tuned.state_dict(), end)
    for alpha in ALPHAS:
        model = tiny_dual_encoder().eval()
        model.load_state_dict(mixed(base.state_dict(), end, alpha))
        assert found[alpha] == validate_dual_encoder(model, config)
    with pytest.raises(ConfigError, match="a sweep needs scores"):
        sweep(base, tuned, ALPHAS, lambda model: {})


def test_the_best_of_equal_mixes_changes_least() -> None:
    found = {1.0: {"a": 0.5, "b": 0.1}, 0.5: {"a": 0.7, "b": 0.1}, 0.25: {"a": 0.7, "b": 0.2}}
    assert [best_alpha(found, name) for name in ("a", "b")] == [0.25, 0.25]
    with pytest.raises(ConfigError, match=r"no score is called 'c'.*scores: a, b"):
        best_alpha(found, "c")


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    plot_sweep({0.0: {"a": 0.1, "b": 0.3}, 1.0: {"a": 0.4, "b": 0.2}}, tmp_path / "new" / "plot.png")
    with Image.open(tmp_path / "new" / "plot.png") as picture:
        assert np.asarray(picture).std() > 1
    with pytest.raises(ConfigError, match=r"a plot is one of .*png"):
        plot_sweep({0.0: {"a": 0.1}}, tmp_path / "plot.doc")


# The command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `tuned`, and pictures with captions in `data`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_dual_encoder().save_pretrained(folder / "base")
    changed(tiny_dual_encoder()).save_pretrained(folder / "tuned")
    captioned_pictures(folder / "data")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_merge_writes_one_mix(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("merge", models / "base", models / "tuned", "--alpha", 0.5, "-o", tmp_path / "merged")
    assert run(capsys, *command) == (0, f"{tmp_path / 'merged'}: alpha 0.5\n", "")
    ends = [DualEncoder.from_pretrained(models / name).state_dict() for name in ("base", "tuned")]
    found = DualEncoder.from_pretrained(tmp_path / "merged")
    assert bits(found.state_dict(), mixed(*ends, 0.5))
    status, _, error = run(capsys, *command)
    assert (status, "is there already" in error) == (2, True)


def test_merge_writes_the_best_mix(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys,
        *("merge", models / "base", models / "tuned", "--alpha", "0,0.5,1"),
        *("--retrieval", models / "data" / "train.csv", "--by", "text_to_image_r5"),
        *("--json", tmp_path / "s.json", "--plot", tmp_path / "s.png", "-o", tmp_path / "best"),
    )
    assert status == 0, err
    rows = json.loads((tmp_path / "s.json").read_text())["sweep"]
    assert [row["alpha"] for row in rows] == [0, 0.5, 1]
    best = best_alpha({row["alpha"]: row for row in rows}, "text_to_image_r5")
    assert f"alpha {best:g}, the best by text_to_image_r5" in out
    config = load_config(ValidationConfig, {"retrieval": {"path": str(models / "data" / "train.csv")}})
    scores = validate_dual_encoder(DualEncoder.from_pretrained(tmp_path / "best"), config)
    assert scores["text_to_image_r5"] == max(row["text_to_image_r5"] for row in rows)
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_merge_takes_a_runs_validation(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = models / "data" / "train.csv"
    (tmp_path / "run.yaml").write_text(
        f"model: {models / 'base'}\ndata: {{path: {table}}}\nsteps: 1\n"
        f"validation: {{retrieval: {{path: {table}}}}}\n"
    )
    sources = (models / "base", models / "tuned")
    status, out, err = run(capsys, "merge", *sources, "--alpha", "0,1", "--config", tmp_path / "run.yaml")
    assert status == 0, err
    assert "text_to_image_r10" in out
    assert "zero_shot" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--alpha 0.5", "merge writes a model: -o FOLDER"),
        ("--alpha 0,1", "several alphas are scored: give --zero-shot"),
        ("--alpha 0,1 --retrieval data/train.csv -o x", "-o FOLDER --by SCORE"),
        ("--alpha 2 -o x", "must be a number from 0 to 1"),
        ("--alpha 0,1 --retrieval data/train.csv --by r1 -o x", "no score is called 'r1'"),
        ("--alpha 0.5 -o x --plot x.png", "--json and --plot are of scores"),
        ("--alpha 0,1 --retrieval absent.csv", "'absent.csv' does not exist"),
        ("--alpha 0,1 --retrieval data/train.csv --config x.yaml", "--retrieval and --config both say"),
    ],
)
def test_merge_says_what_is_wrong(
    arguments: str,
    message: str,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    status, _, error = run(capsys, "merge", "base", "tuned", *arguments.split())
    assert status == 2
    assert message in error
    assert not (models / "x").exists()
