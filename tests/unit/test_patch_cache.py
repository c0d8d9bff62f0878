"""Features that a stage keeps: the same losses without the tower, and none of another tower or picture."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import COLOURS, colour_records, tiny_llm, tiny_tower

from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError
from vlm_vision.tower import VisionTower
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.run import read_metrics

pytest.importorskip("deepspeed")

SIZES = [(40, 36), (20, 90), (131, 30), (64, 64), (7, 5)]
ANYRES = {
    "mode": "anyres",
    "merge": "spatial_unpad",
    "grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]],
}
# Of each of SIZES: the whole, and the parts of its pinpoint.
TILES = [5, 4, 4, 5, 3]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tiny_llm(tmp_path / "llm", max_position_embeddings=1024)
    tiny_tower().save_pretrained(tmp_path / "tower")
    write_records(tmp_path)
    return tmp_path


def write_records(data: Path) -> None:
    """16 records, 14 of them with a picture that no other is equal to."""
    colour_records(data, 16, text_only=2)
    for number in range(14):
        size, colour = SIZES[number % len(SIZES)], list(COLOURS.values())[number % len(COLOURS)]
        picture = Image.new("RGB", size, colour)
        picture.putpixel((0, 0), (number, 0, 0))
        picture.save(data / "images" / f"{number}.png")


def config(
    data: Path,
    *,
    keep: bool = True,
    max_bad_share: float = 0,
    model: dict[str, Any] | None = None,
    file: str = "train.json",
    **stage: Any,
) -> AlignConfig:
    files = {
        "file": str(data / file),
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
        "max_length": 400,
        "log_every": 1,
        **stage,
    }
    parts = {"tower": str(data / "tower"), "llm": str(data / "llm"), "projector": "linear", **(model or {})}
    return load_config(AlignConfig, {"model": parts, "stages": [settings]})


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "one" / "metrics.jsonl")]


def runs_of_the_tower(monkeypatch: pytest.MonkeyPatch, *, apart: bool = False) -> list[int]:
    """Pictures of every call from now on; run one by one, where they are to round as in any other batch."""
    calls: list[int] = []
    forward = VisionTower.forward

    def counted(self: VisionTower, pixels: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(len(pixels))
        if not apart:
            return forward(self, pixels, *arguments, **options)
        return torch.cat([forward(self, one, *arguments, **options) for one in pixels.split(1)])

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
    assert "reads a picture 4.0 times; features of 14 (" in said
    assert "readings on" in said or "never pays" in said
    align(config(data, precision=precision), data / "second")
    assert sum(calls) == 14
    assert "features of 14 " in (said := capsys.readouterr().out)
    assert " are in " in said
    # Batches of another size round differently: worst difference measured 1.2e-7 in fp32, 1.1e-3 in bf16.
    room = 1e-6 if precision == "fp32" else 1e-2
    assert losses(data / "first") == pytest.approx(losses(data / "plain"), abs=room)
    assert losses(data / "second") == losses(data / "first")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tiling", [None, {"mode": "pad"}, ANYRES])
def test_where_batches_round_alike_losses_are_equal_bit_for_bit(
    data: Path, monkeypatch: pytest.MonkeyPatch, precision: str, tiling: dict[str, Any] | None
) -> None:
    calls = runs_of_the_tower(monkeypatch, apart=True)
    settings = {"precision": precision, "model": {"tiling": tiling}, "packing": True}
    align(config(data, keep=False, **settings), data / "plain")
    assert max(calls) > 1
    calls.clear()
    align(config(data, **settings), data / "kept_run")
    every = sum(TILES[number % len(TILES)] for number in range(14))
    assert sum(calls) == (every if tiling == ANYRES else 14)
    assert losses(data / "kept_run") == losses(data / "plain")


def test_tiles_are_counted_and_kept_by_how_they_are_cut(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = runs_of_the_tower(monkeypatch)
    align(config(data, model={"tiling": ANYRES}), data / "first")
    every = sum(TILES[number % len(TILES)] for number in range(14))
    said = capsys.readouterr().out
    assert f"reads a tile 4.0 times; features of {every} tiles of 14 pictures (" in said
    assert "readings on" in said or "never pays" in said
    merged_otherwise = {**ANYRES, "merge": "flat"}
    align(config(data, model={"tiling": merged_otherwise}), data / "second")
    assert sum(calls) == every  # a merge comes after the tower
    cut_otherwise = {**ANYRES, "grid_pinpoints": [[64, 64]]}
    align(config(data, model={"tiling": cut_otherwise}), data / "third")
    assert sum(calls) == every + 14 * 5
    assert len(list((data / "kept").iterdir())) == 2


def test_pictures_within_the_data_are_kept_as_those_in_files(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    records = json.loads((data / "train.json").read_text())
    talks, rows = [], []
    for record in records:
        content = (data / "images" / record["image"]).read_bytes() if "image" in record else None
        question, answer = (turn["value"] for turn in record["conversations"])
        parts: list[dict[str, Any]] = [{"type": "text", "text": question.removeprefix("<image>\n")}]
        if content is not None:
            url = "data:image/png;base64," + base64.b64encode(content).decode()
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        talks.append({"id": record["id"], "messages": talk})
        rows.append({**record, "image": content})
    (data / "urls.jsonl").write_text("".join(f"{json.dumps(talk)}\n" for talk in talks))
    datasets.Dataset.from_list(rows).to_parquet(data / "table.parquet")
    calls = runs_of_the_tower(monkeypatch, apart=True)
    tiles = {"model": {"tiling": ANYRES}, "steps": 4}
    for file in ("table.parquet", "urls.jsonl"):
        align(config(data, keep=False, file=file, **tiles), data / f"plain {file}")
        calls.clear()
        align(config(data, file=file, **tiles), data / f"kept {file}")
        assert losses(data / f"kept {file}") == losses(data / f"plain {file}")
        assert (sum(calls) > 0) == (file == "table.parquet")  # then they are there
    align(config(data, **tiles), data / "files")
    assert not calls


def test_a_picture_of_two_names_is_kept_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        (data / "images" / f"{number}.png").write_bytes((data / "images" / f"{number + 7}.png").read_bytes())
    calls = runs_of_the_tower(monkeypatch, apart=True)
    align(config(data), data / "first")
    assert sum(calls) == 7
    align(config(data, keep=False), data / "plain")
    assert losses(data / "first") == losses(data / "plain")


def test_another_picture_or_layer_has_features_of_its_own(data: Path) -> None:
    align(config(data), data / "first")
    (data / "images" / "1.png").write_bytes((data / "images" / "2.png").read_bytes())
    align(config(data), data / "second")
    assert len(list((data / "kept").iterdir())) == 2
    tiny_tower(layer=-1).save_pretrained(data / "other")
    align(config(data, model={"tower": str(data / "other")}), data / "third")
    assert len(list((data / "kept").iterdir())) == 3


def test_what_is_read_once_is_not_kept(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    align(config(data, steps=2), data / "run")
    assert "reads a picture 1.0 times: features are not kept" in capsys.readouterr().out
    assert not (data / "kept").exists()


@pytest.mark.parametrize("tiling", [None, ANYRES])
@pytest.mark.parametrize("left", [None, 60])  # of a PNG's bytes: it is none, or its header alone is whole
def test_a_bad_picture_is_replaced_as_without(
    data: Path, tiling: dict[str, Any] | None, left: int | None
) -> None:
    bad = data / "images" / "3.png"
    bad.write_bytes(b"no picture" if left is None else bad.read_bytes()[:left])
    settings = {"max_bad_share": 0.2, "model": {"tiling": tiling}}
    runs = {keep: align(config(data, keep=keep, **settings), data / f"run{keep}") for keep in (False, True)}
    assert runs[True]["one"]["replaced"] == runs[False]["one"]["replaced"] == 4
    told = {keep: (data / f"run{keep}" / "one" / "bad_samples.jsonl").read_text() for keep in runs}
    assert told[True] == told[False]
    assert "'r3'" in told[True]
    assert "3.png" in told[True]
    assert losses(data / "runTrue") == pytest.approx(losses(data / "runFalse"), abs=1e-6)


def test_a_picture_that_changes_under_the_stage_is_bad(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_vision.train import stage

    kept = stage.kept_features

    def then_changed(*arguments: Any) -> Any:
        features = kept(*arguments)
        Image.new("RGB", (9, 9)).save(data / "images" / "3.png")
        return features

    monkeypatch.setattr(stage, "kept_features", then_changed)
    align(config(data, max_bad_share=0.2), data / "run")
    (line,) = (data / "run" / "one" / "bad_samples.jsonl").read_text().splitlines()
    assert "record 'r3': picture 3.png has no features in" in line


def test_a_tower_that_learns_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="feature_cache keeps the features of a frozen tower"):
        align(config(data, learn=[{"match": "*"}]), data / "run")
