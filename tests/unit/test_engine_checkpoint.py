"""A stage's checkpoint: bit-exact in every precision and place, whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import colour_records, tiny_llm, tiny_tower

from vlm_vision.config import load_config
from vlm_vision.errors import DataError, WeightsError
from vlm_vision.train import engine_checkpoint
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.checkpoint import latest_checkpoint
from vlm_vision.train.engine_checkpoint import check_whole
from vlm_vision.train.run import read_metrics

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_llm(folder / "llm")
    colour_records(folder, 16)
    tiny_tower().save_pretrained(folder / "tower")
    return folder


def config(data: Path, **stage: Any) -> AlignConfig:
    settings = {
        "name": "one",
        "data": {"file": str(data / "train.json"), "image_folder": str(data / "images"), "workers": 0},
        "learn": [{"match": "projector.*", "lr": 1e-2}, {"match": "llm.*"}],
        "lr": 3e-3,
        "weight_decay": 0.1,
        "steps": 4,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_length": 64,
        "log_every": 1,
        "save_every": 2,
        **stage,
    }
    parts = {"tower": str(data / "tower"), "llm": str(data / "llm"), "projector": "mlp2x_gelu"}
    return load_config(AlignConfig, {"model": parts, "stages": [settings]})


def outcome(run: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    weights = {
        f"{part}.{name}": tensor
        for part in ("projector", "llm")
        for name, tensor in load_file(run / "model" / part / "model.safetensors").items()
    }
    return [line["loss"] for line in read_metrics(run / "one" / "metrics.jsonl")], weights


def undo(run: Path) -> None:
    """As if killed after the checkpoint in the middle."""
    (run / "one" / "done.json").unlink()
    (run / "model").rename(run / "before")


CASES: list[dict[str, Any]] = [
    *({"zero_stage": zero_stage, "precision": "bf16"} for zero_stage in (0, 1, 2, 3)),
    {"zero_stage": 2, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "parameters", "precision": "bf16"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_goes_on_bit_exact(data: Path, tmp_path: Path, case: dict[str, Any]) -> None:
    align(config(data, **case), tmp_path)
    losses, weights = outcome(tmp_path)
    undo(tmp_path)
    align(config(data, **case), tmp_path, resume=True)
    resumed_losses, resumed = outcome(tmp_path)
    assert resumed_losses == losses
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_gradients_in_fp32_under_zero_1(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where DeepSpeed takes another optimizer."""
    from deepspeed.runtime import bf16_optimizer

    # Prints what memory is used, and collects garbage first, a second each time.
    monkeypatch.setattr(bf16_optimizer, "see_memory_usage", lambda *args, **options: None)
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"data_types": {"grad_accum_dtype": "fp32"}}), encoding="utf-8")
    test_a_run_goes_on_bit_exact(
        data, tmp_path, {"zero_stage": 1, "precision": "bf16", "deepspeed": str(own)}
    )


def test_other_parameters_are_refused(data: Path, tmp_path: Path) -> None:
    align(config(data), tmp_path)
    undo(tmp_path)
    with pytest.raises(DataError, match="begun with another config"):
        align(config(data, learn=[{"match": "projector.*"}]), tmp_path, resume=True)


def test_a_dropped_parameter_leaves_no_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = engine_checkpoint.hold

    def drop(engine: Any) -> Any:
        held = hold(engine)
        del held.pieces["projector.0.bias"]
        return held

    monkeypatch.setattr(engine_checkpoint, "hold", drop)
    with pytest.raises(WeightsError, match=r"0 of the 32 elements of projector\.0\.bias"):
        align(config(data), tmp_path)
    assert latest_checkpoint(tmp_path / "one" / "checkpoints") is None


def files(*spans: tuple[int, int], size: int = 6) -> list[dict[str, Any]]:
    """Each rank with one span of a parameter of 2 x 3."""
    flat = {key: torch.zeros(size) for key in ("fp32", "exp_avg", "exp_avg_sq")}
    return [{"pieces": {"w": (0, 0, start, count)}, "flats": [flat]} for start, count in spans]


def test_what_is_not_whole_is_refused() -> None:
    check_whole(files((0, 4), (4, 2)), {"w": [2, 3]})
    for saved, reached in ((files((0, 4)), 4), (files((0, 2), (3, 3)), 2), (files((0, 4), (3, 3)), 4)):
        with pytest.raises(WeightsError, match=f"{reached} of the 6 elements of w"):
            check_whole(saved, {"w": [2, 3]})
    with pytest.raises(WeightsError, match="w, which does not learn"):
        check_whole(files((0, 6)), {})
    with pytest.raises(WeightsError, match="w without its fp32"):
        check_whole(files((0, 6), size=3), {"w": [2, 3]})
