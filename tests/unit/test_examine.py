from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import colour_records, tiny_llm, tiny_tower

from vlm_vision.adapters.build import build_projector
from vlm_vision.cli import main
from vlm_vision.errors import DataError
from vlm_vision.train.conversations import Conversations
from vlm_vision.train.evaluate import caption_loss
from vlm_vision.train.examine import examine
from vlm_vision.train.questions import Questions
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured pictures, and a model that knows nothing of them, in `model`."""
    folder = tmp_path_factory.mktemp("examine")
    colour_records(folder, 8, text_only=1)
    tower, llm = tiny_tower(), tiny_llm(folder / "llm")
    projector = build_projector("mlp2x_gelu", tower.hidden_size, 32, tower.grid)
    model = VisionLanguageModel(tower, projector, load_llm(llm), load_tokenizer(llm))
    model.save_pretrained(folder / "model")
    return folder


def write(folder: Path, name: str, fields: Any) -> Path:
    records = [{"id": n, "image": f"{n % 3}.png", "question": "what is it ?", **fields(n)} for n in range(6)]
    (folder / name).write_text(json.dumps(records), encoding="utf-8")
    return folder / name


KINDS = {
    "vqa": lambda n: {"answers": ["red"] * 6 + ["green"] * 4, "category": ["one", "other"][n % 2]},
    "yes_no": lambda n: {"label": ["yes", "no"][n % 2]},
    "choice": lambda n: {"choices": ["red", "blue"], "answer": "A"},
    "captions": lambda n: {"caption": "a red picture"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_eval_writes_scores_answers_and_a_page(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, f"{kind}.json", KINDS[kind])
    arguments = ["eval", folder / "model", "--questions", path, "--images", folder / "images", "-o", tmp_path]
    assert main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert f"{kind}: 6 questions" in printed
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert (scores["kind"], scores["count"]) == (kind, 6)
    for score in scores["scores"].values():
        assert score["value"] is None or score["low"] <= score["value"] <= score["high"]
    assert list(scores["categories"]) == (["one", "other"] if kind == "vqa" else [])
    lines = [
        json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["id"] for line in lines] == list("012345")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<img class="picture"') >= 3
    assert main(list(map(str, arguments))) == 0
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8")) == scores


def test_right_answers_are_counted(folder: Path) -> None:
    """What the model says, as it does for no reason, is right where the file says so."""
    model = VisionLanguageModel.from_pretrained(folder / "model")
    path = write(folder, "any.json", lambda n: {"answer": "zebra"})
    said = [result.answer for result in examine(model, Questions(path, folder / "images")).results]
    path = write(folder, "own.json", lambda n: {"answer": said[n] if n < 4 and said[n] else "zebra"})
    found = examine(model, Questions(path, folder / "images"), batch_size=4)
    assert found.scores["accuracy"].value == pytest.approx(sum(map(bool, said[:4])) / 6)
    assert [result.credit for result in found.results[4:]] == [0, 0]


def test_the_loss_of_captions_is_that_of_training(folder: Path) -> None:
    model = VisionLanguageModel.from_pretrained(folder / "model")
    questions = Questions(folder / "train.json", folder / "images", kind="captions")
    expected = caption_loss(model, Conversations(folder / "train.json", folder / "images"))
    for batch_size in (1, 3):
        found = examine(model, questions, batch_size=batch_size).scores["loss"]
        # Worst difference measured: 1.8e-7.
        assert found.value == pytest.approx(expected, abs=2e-6)


def test_a_caption_that_is_too_long_is_named(folder: Path) -> None:
    model = VisionLanguageModel.from_pretrained(folder / "model")
    path = write(folder, "long.json", lambda n: {"caption": "red " * (1 + 3000 * (n == 4))})
    with pytest.raises(DataError, match=r"long\.json: question '4': \d+ tokens, max_length is 2048"):
        examine(model, Questions(path, folder / "images"))


def test_a_wrong_file_is_told_before_the_model_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "absent", "--questions", str(folder / "none.json")]) == 2
    assert "none.json' does not exist" in capsys.readouterr().err
