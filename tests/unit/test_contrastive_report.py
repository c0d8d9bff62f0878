"""The page of a run: every part where there is something to tell, and none where there is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import Reader
from tiny import COLOURS, captioned_pictures, tiny_dual_encoder

from vlm_vision import DualEncoder
from vlm_vision.adapters import build_projector
from vlm_vision.adapters.build import save_projector
from vlm_vision.config import load_config
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.contrastive_report import write_contrastive_report
from vlm_vision.train.validation import evaluate

NASTY = "<b>row</b> 3: x.jpg & y"


@pytest.fixture
def before() -> DualEncoder:
    return tiny_dual_encoder().eval()


@pytest.fixture
def after() -> DualEncoder:
    model = tiny_dual_encoder().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def config(folder: Path, **changes: Any) -> ContrastiveConfig:
    classes = folder / "data" / "train.csv"
    if not classes.exists():
        captioned_pictures(folder / "data", 16)
        lines = [f"{number}.png,number {number} is {list(COLOURS)[number % 4]}" for number in range(16)]
        (folder / "data" / "captions.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    tree = {
        "model": "base/model",
        "recipe": "full",
        "steps": 4,
        "data": {"path": str(classes)},
        "validation": {
            "zero_shot": {"path": str(classes), "templates": "openai_7"},
            "retrieval": {"path": str(folder / "data" / "captions.csv")},
        },
    }
    return load_config(ContrastiveConfig, {**tree, **changes})


def write_metrics(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    lines = [
        {"step": step, "time": 100.0 + 40 * step, "loss": 4 / step, "truncated_captions": 0.125}
        for step in (1, 2, 3, 4)
    ]
    lines += [{"step": step, "time": 261.0, "zero_shot_top1": 0.1 * step} for step in (2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "bad_samples.jsonl").write_text(json.dumps({"error": NASTY}) + "\n")


def test_a_whole_page(before: DualEncoder, after: DualEncoder, tmp_path: Path) -> None:
    write_metrics(tmp_path / "run")
    torch.manual_seed(0)
    save_projector(build_projector("linear", 64, 8, (4, 4)), tmp_path / "projector")
    asked = config(tmp_path)
    path = write_contrastive_report(tmp_path / "run", before, after, asked, projector=tmp_path / "projector")
    assert path == tmp_path / "run" / "report.html"
    page = Reader(path.read_text(encoding="utf-8"))
    for heading in (
        "The run",
        "Scores on held-out data",
        "Training curves",
        "Scores on the way",
        "Zero-shot: what is taken for what",
        "Retrieval: from caption to picture",
        "Drift of the patch features",
        "What of the data did not count",
    ):
        assert heading in page.shown
    scores = [evaluate(model, asked.validation).scores for model in (before, after)]
    for name, value in scores[1].items():
        change = value - scores[0][name]
        row = f"{name.replace('_', ' ')}{scores[0][name]:.4f}{value:.4f}{change:+.4f}"
        assert row in page.shown
    assert any(scores[0][name] != scores[1][name] for name in scores[0])
    assert page.count("better") + page.count("worse") > 0
    assert "2 min 01 s" in page.shown
    assert "behind the projector" in page.shown
    assert NASTY in page.shown
    assert "truncated captions0.1250" in page.shown
    images = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert sum("svg" in source[:20] for source in images) == 4  # curves, scores, confusion, drift
    assert page.count("true") >= 3  # each query's true picture


def test_found_before_is_taken_as_it_is(
    before: DualEncoder, after: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path)
    whole = Reader(write_contrastive_report(tmp_path / "one", before, after, asked).read_text()).shown
    found = [evaluate(model, asked.validation) for model in (before, after)]
    monkeypatch.setattr("vlm_vision.train.contrastive_report.evaluate", None)
    again = write_contrastive_report(
        tmp_path / "two", before, after, asked, found_before=found[0], found_after=found[1]
    )
    assert Reader(again.read_text()).shown.replace("run: two", "run: one") == whole


@pytest.mark.parametrize("changes", [{"recipe": "scratch"}, {}])
def test_without_a_model_before_nothing_is_compared(
    changes: dict[str, str], before: DualEncoder, after: DualEncoder, tmp_path: Path
) -> None:
    start = before if changes else None
    path = write_contrastive_report(tmp_path / "run", start, after, config(tmp_path, **changes))
    page = Reader(path.read_text(encoding="utf-8"))
    assert "zero shot top1" in page.shown
    assert "Retrieval: from caption to picture" in page.shown
    for absent in ("Drift", "before:", "change", "Gained", "did not count", "curves"):
        assert absent not in page.shown


def test_a_frozen_tower_is_said_to_be_what_it_was(before: DualEncoder, tmp_path: Path) -> None:
    after = tiny_dual_encoder().eval()
    with torch.no_grad():
        after.logit_scale += 1
    path = write_contrastive_report(
        tmp_path / "run", before, after, config(tmp_path, validation={"zero_shot": None})
    )
    page = Reader(path.read_text(encoding="utf-8"))
    assert "patch features of every layer are what they were, to the bit" in page.shown
    assert "Scores" not in page.shown
