"""Projectors compared: every one trained alike, finished runs kept, mistakes told before anything trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import colour_records, tiny_llm, tiny_tower

from vlm_vision.cli import main
from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train import compare_projectors as comparison
from vlm_vision.train.compare_config import CompareConfig

pytest.importorskip("deepspeed")
QFORMER = {"name": "qformer", "layers": 1, "heads": 2, "hidden_size": 16, "num_queries": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny_llm(folder / "llm")
    colour_records(folder, 16)
    tiny_tower().save_pretrained(folder / "tower")
    return folder


def settings(data: Path, **changes: Any) -> dict[str, Any]:
    files = {"file": str(data / "train.json"), "image_folder": str(data / "images")}
    return {
        "model": {"tower": str(data / "tower"), "llm": str(data / "llm")},
        "projectors": {"mlp": "mlp2x_gelu", "queries": QFORMER},
        "stages": [
            {
                "name": "stage1",
                "data": {**files, "workers": 0},
                "learn": [{"match": "projector.*"}, {"match": "llm.*"}],
                "lr": 1e-2,
                "steps": 30,
                "batch_size": 8,
                "max_length": 64,
            }
        ],
        "questions": {**files, "max_new_tokens": 4},
        **changes,
    }


def test_the_command_compares_and_continues(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(json.dumps(settings(data)))
    command = ["compare-projectors", str(path), "-o", str(tmp_path / "run"), "--ranks", "1"]
    # In this process; the demo's test runs stages on processes of their own.
    monkeypatch.setattr(comparison, "run_on_ranks", lambda _, function, *given: function(*given))
    assert main([*command, "projectors.queries.num_queries=2"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines()[-4:-1]] == [
        ["projector", "tokens"],
        ["mlp", "16"],
        ["queries", "2"],
    ]
    rows = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [row["tokens"] for row in rows] == [16, 2]
    assert rows[0]["parameters"] == (64 + 1) * 32 + (32 + 1) * 32
    assert rows[0]["accuracy"] == [1.0]  # a projector and a language model that learn tell colours apart
    assert rows[0]["loss"][0] < 0.3
    assert len(list((tmp_path / "run" / "features").iterdir())) == 1  # one tower, one set of pictures
    assert (tmp_path / "run" / "comparison.png").stat().st_size > 5000
    assert "queries" in (tmp_path / "run" / "report.html").read_text()
    assert sorted(p.name for p in (tmp_path / "run" / "mlp-0").iterdir()) == [
        "config.yaml",
        "projector",
        "result.json",
        "stage1",
    ]

    assert main(command) == 2
    assert "holds an earlier comparison: use --resume" in capsys.readouterr().err
    monkeypatch.setattr(comparison, "run_on_ranks", lambda *_: pytest.fail("trained what is finished"))
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"projectors": {}}, "projectors"),
        ({"projectors": {"a/b": "linear"}}, "projectors"),
        ({"projectors": {"a": "lineal"}}, "did you mean 'linear'"),
        ({"seeds": [1, 1]}, "seeds name one twice"),
        ({"seed": 1}, "`seeds` lists them"),
        ({"model": {"tower": "t", "llm": "l", "projector": "linear"}}, "name it under `projectors`"),
    ],
)
def test_wrong_settings_are_refused(data: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CompareConfig, settings(data, **changes))
    assert said in str(error.value)


def test_wrong_questions_are_told_before_training(data: Path, tmp_path: Path) -> None:
    config = load_config(CompareConfig, settings(data, questions={"file": str(data / "nowhere.json")}))
    with pytest.raises(DataError, match=r"nowhere.json' does not exist"):
        comparison.compare_projectors(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_shipped_config_loads() -> None:
    path = Path(__file__).parents[2] / "configs" / "demo_projectors.yaml"
    assert load_config(CompareConfig, path).projectors
