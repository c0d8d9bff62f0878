"""The demo from scenes to report, every stage for a few steps, on data that others could have drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import DataError
from vlm_vision.tower import VisionTower
from vlm_vision.train import demo
from vlm_vision.train.scenes import SceneConfig, write_scenes
from vlm_vision.train.vlm import VisionLanguageModel

SHORT = {
    "demo_contrastive.yaml": ["steps=2", "batch_size=8", "warmup=1"],
    "demo_language.yaml": ["steps=2", "batch_size=2"],
    "demo_align.yaml": [
        "stages.0.steps=2",
        "stages.1.steps=2",
        "stages.0.batch_size=4",
        "stages.1.batch_size=4",
    ],
}
SCORES = (
    "zero_shot_top1",
    "retrieval_r1",
    "vqa_accuracy",
    "vqa_accuracy_wrong_image",
    "vqa_accuracy_unseen_pairs",
)
STAGES = ("scenes", "contrastive", "tower", "language", "align", "stage1", "stage2", "answers", "report")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(
        SceneConfig(train_pictures=48, val_pictures=24, unseen_pictures=8, pictures_per_class=1), folder
    )
    return folder


def test_the_demo_leaves_what_it_promises(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = demo.shipped_config

    def short(config_class: Any, name: str, overrides: list[str]) -> Any:
        return whole(config_class, name, overrides + SHORT[name])

    monkeypatch.setattr(demo, "shipped_config", short)
    run = tmp_path / "demo"
    returned = demo.run_demo(run, seed=3, data=scenes)

    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == returned
    assert all(0 <= metrics[score] <= 1 for score in SCORES)
    assert tuple(sorted(metrics["stage_seconds"])) == tuple(sorted(STAGES))
    assert 300 < metrics["peak_memory_mb"] < 20_000
    assert metrics["seed"] == 3
    printed = capsys.readouterr().out
    assert re.search(rf"vqa_accuracy +{metrics['vqa_accuracy']:.3f}", printed)
    assert str(run / "report.html") in printed
    assert (run / "report.html").stat().st_size > 10_000

    assert DualEncoder.from_pretrained(run / "clip").tower.grid == (4, 4)
    assert VisionTower.from_pretrained(run / "tower").num_tokens == 16
    model = VisionLanguageModel.from_pretrained(run / "model")
    assert len(model.answer(None, ["What is there?"], max_new_tokens=2)) == 1
    with pytest.raises(DataError, match="holds an earlier demo"):
        demo.run_demo(run)


def test_broken_data_is_told_before_training(scenes: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    broken.mkdir()
    for file in scenes.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "val.json").unlink()
    (broken / "val.json").write_text("[{]")
    with pytest.raises(DataError, match=r"val\.json"):
        demo.run_demo(tmp_path / "run", data=broken)
    assert not (tmp_path / "run" / "contrastive").exists()
