"""Features that a stage keeps: the same losses without the tower, and none of another tower or picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import colour_records, tiny_llm, tiny_tower

from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError
from vlm_vision.tower import VisionTower
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.run import read_metrics

pytest.importorskip("deepspeed")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tiny_llm(tmp_path / "llm")
    colour_records(tmp_path, 16, text_only=2)
    tiny_tower().save_pretrained(tmp_path / "tower")
    return tmp_path


def config(data: Path, *, keep: bool = True, max_bad_share: float = 0, **stage: Any) -> AlignConfig:
    files = {
        "file": str(data / "train.json"),
        "image_folder": str(data / "images"),
        "workers": 0,
        "max_bad_share": max_bad_share,
        "feature_cache": str(data / "kept") if keep else None,
    }
    settings = {
        "name": "one",
        "data": files,
        "learn": [{"match": "projector.*"}],
        "lr": 1e-2,
        "steps": 8,
        "batch_size": 8,
        "max_length": 64,
        "log_every": 1,
        **stage,
    }
    model = {"tower": str(data / "tower"), "llm": str(data / "llm"), "projector": "linear"}
    return load_config(AlignConfig, {"model": model, "stages": [settings]})


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "one" / "metrics.jsonl")]


def runs_of_the_tower(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures of every call from now on."""
    calls: list[int] = []
    forward = VisionTower.forward

    def counted(self: VisionTower, pixels: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(len(pixels))
        return forward(self, pixels, *arguments, **options)

    monkeypatch.setattr(VisionTower, "forward", counted)
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_features_give_the_same_losses_and_the_tower_runs_once_per_picture(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    align(config(data, keep=False, precision=precision), data / "plain")
    calls = runs_of_the_tower(monkeypatch)
    align(config(data, precision=precision), data / "first")
    assert sum(calls) == 14  # each picture once; text alone runs no blank picture through it
    said = capsys.readouterr().out
    assert "reads a picture 4.0 times; features of 14 " in said
    assert "readings on" in said or "never pays" in said
    align(config(data, precision=precision), data / "second")
    assert sum(calls) == 14
    assert "features of 14 " in (said := capsys.readouterr().out)
    assert " are in " in said
    # Batches of another size round differently: worst difference measured 1.2e-7 in fp32, 1.1e-3 in bf16.
    room = 1e-6 if precision == "fp32" else 1e-2
    assert losses(data / "first") == pytest.approx(losses(data / "plain"), abs=room)
    assert losses(data / "second") == losses(data / "first")


def test_another_picture_or_layer_has_features_of_its_own(data: Path) -> None:
    align(config(data), data / "first")
    colour_records(data, 16, text_only=2)
    (data / "images" / "1.png").write_bytes((data / "images" / "2.png").read_bytes())
    align(config(data), data / "second")
    assert len(list((data / "kept").iterdir())) == 2
    tiny_tower(layer=-1).save_pretrained(data / "other")
    changed = config(data).model_copy(
        update={"model": config(data).model.model_copy(update={"tower": str(data / "other")})}
    )
    align(changed, data / "third")
    assert len(list((data / "kept").iterdir())) == 3


def test_what_is_read_once_is_not_kept(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    align(config(data, steps=2), data / "run")
    assert "reads a picture 1.0 times: features are not kept" in capsys.readouterr().out
    assert not (data / "kept").exists()


def test_a_bad_picture_is_replaced_as_without(data: Path) -> None:
    (data / "images" / "3.png").write_bytes(b"no picture")
    runs = {}
    for keep in (False, True):
        runs[keep] = align(config(data, keep=keep, max_bad_share=0.2), data / f"run{keep}")
    assert runs[True]["one"]["replaced"] == runs[False]["one"]["replaced"] == 4
    listed = (data / "runTrue" / "one" / "bad_samples.jsonl").read_text()
    assert "'r3'" in listed
    assert "3.png" in listed
    assert losses(data / "runTrue") == pytest.approx(losses(data / "runFalse"), abs=1e-6)


def test_a_tower_that_learns_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="feature_cache keeps the features of a frozen tower"):
        align(config(data, learn=[{"match": "*"}]), data / "run")
