from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import colour_records

from vlm_vision.errors import DataError
from vlm_vision.train.question_scores import (
    bootstrap,
    caption_scores,
    choice_scores,
    chosen,
    consensus,
    is_yes_or_no,
    mean_score,
    normalise_vqa,
    says_no,
    wilson,
    yes_no_scores,
)
from vlm_vision.train.questions import Questions


@pytest.mark.parametrize(
    ("given", "normal"),
    # What vqaEval.py of GT-Vision-Lab/VQA makes of them.
    [
        ("Two dogs.", "2 dogs"),
        ("a cat, the dog", "cat dog"),
        ("t-shirt", "t shirt"),
        ("3,000", "3000"),
        ("1.5", "1.5"),
        ("dont", "don't"),
        ("yall'd've", "y'all'd've"),
        ("None", "0"),
        ("yes! ", "yes"),
        ("b/c", "b c"),
        ("An\\tapple\\n".replace("\\t", "\t").replace("\\n", "\n"), "apple"),
    ],
)
def test_answers_are_normalised_as_vqav2_does(given: str, normal: str) -> None:
    assert normalise_vqa(given) == normal
    assert normalise_vqa(normal) == normal


def test_consensus_leaves_each_person_out() -> None:
    people = ["red"] * 3 + ["blue"] * 7
    # Of ten, the three who say so see two others: (3 * 2/3 + 7 * 1) / 10.
    assert consensus("Red.", people) == pytest.approx(0.9)
    assert consensus("blue", people) == 1
    assert consensus("green", people) == 0
    assert consensus("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert (consensus("a Cat", ["cat"]), consensus("dog", ["cat"])) == (1, 0)
    with pytest.raises(DataError, match="2 answers: VQAv2's consensus needs 4"):
        consensus("red", ["red", "blue"])


@pytest.mark.parametrize(
    ("answer", "no", "clear"),
    [
        ("Yes", False, True),
        ("No, there is none.", True, True),
        ("There is not.", True, True),
        ("Yes. But no dog.", False, True),
        ("Not at all", True, True),
        ("a dog", False, False),
        ("nothing", False, False),
        ("", False, False),
    ],
)
def test_yes_and_no_are_read_as_pope_reads_them(answer: str, no: bool, clear: bool) -> None:
    assert (says_no(answer), is_yes_or_no(answer)) == (no, clear)


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        *[
            ("B", 1),
            ("b", 1),
            ("(B)", 1),
            ("B. a cat", 1),
            ("B: cat", 1),
            ("The answer is B.", 1),
            ("a cat", 1),
        ],
        *[("Cat.", 1), ("A", 0), ("A cat", 1), ("C", None), ("Both", None), ("", None), ("Because", None)],
    ],
)
def test_a_choice_is_read_by_letter_or_by_text(answer: str, place: int | None) -> None:
    assert chosen(answer, ("a dog", "a cat")) == place


def test_popes_figures() -> None:
    no, truth = [False, False, True, True, False], [False, True, True, False, False]
    scores = yes_no_scores(no, truth, [True] * 4 + [False], groups=range(5))
    # TP 2, FP 1, TN 1, FN 1
    values = {name: score.value for name, score in scores.items()}
    assert values == pytest.approx(
        {"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.6, "unclear": 0.2}
    )
    silent = yes_no_scores([True], [False], [True], groups=[0])
    assert silent["precision"].value is None
    assert str(silent["precision"]) == "-"
    assert silent["f1"].value == 0


def test_wilsons_interval() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20.
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        score = wilson(right, count)
        assert (score.low, score.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0).value is None
    assert wilson(7, 7).high == pytest.approx(1)


def test_the_bootstrap_is_deterministic_and_about_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(3).normal(size=400).tolist()
    score = mean_score(values, range(400))
    assert score == mean_score(values, range(400))
    assert score.low is not None
    assert score.high is not None
    assert score.high - score.low == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.1)


def test_questions_about_one_picture_are_drawn_together() -> None:
    values = [0.0, 1.0] * 50
    apart, together = mean_score(values, range(100)), mean_score(values, [n % 2 for n in range(100)])
    assert apart.value == together.value == 0.5
    assert apart.low is not None
    assert (together.low, together.high) == (0, 1)
    assert apart.low > 0.3
    assert caption_scores([2.0, 4.0], [2, 1], [0, 1])["loss"].value == 2
    assert bootstrap(np.zeros((1, 1)), [0], lambda sums: None).value is None
    assert choice_scores([True, False], [True, False])["unclear"].value == 0.5


def write(folder: Path, records: Any, lines: bool = False) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "0.png")
    content = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    (folder / "q.json").write_text(content, encoding="utf-8")
    return folder / "q.json"


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    ("record", "kind", "text", "truths"),
    [
        ({"question": "q", "answers": ["a"] * 10}, "vqa", "<image>\nq", ("a",) * 10),
        ({"question_id": 7, "text": "q", "answers": [{"answer": "a"}] * 4}, "vqa", "<image>\nq", ("a",) * 4),
        ({"question": "q", "answer": 3}, "vqa", "<image>\nq", ("3",)),
        ({"text": "<image>\nIs it?", "label": "No"}, "yes_no", "<image>\nIs it?", ("no",)),
        ({"question": "q", "answer": "a", "label": "yes"}, "yes_no", "<image>\nq", ("yes",)),
        ({"caption": "a dog"}, "captions", "<image>\nDescribe the image.", ("a dog",)),
        (
            {"question": "q", "choices": ["x", "y"], "answer": 1},
            "choice",
            "<image>\nq\nA. x\nB. y\nAnswer with the option's letter from the given choices directly.",
            ("B",),
        ),
    ],
)
def test_kinds_are_told_by_their_fields(
    tmp_path: Path, lines: bool, record: Any, kind: str, text: str, truths: Any
) -> None:
    questions = Questions(write(tmp_path, [{"image": "0.png", **record}], lines), tmp_path / "images")
    assert questions.kind == kind
    assert questions[0].turns[-1].text == text
    assert questions[0].truths == truths
    assert questions[0].images == ("0.png",)
    assert len(questions.pictures(questions[0])) == 1


def test_llavas_conversations_are_questions(tmp_path: Path) -> None:
    questions = Questions(colour_records(tmp_path, 4, text_only=1), tmp_path / "images", prompt="Be brief.")
    assert len(questions) == 4
    assert questions[0].turns[-1].text == "<image>\nwhat colour is it ?\nBe brief."
    assert (questions[0].truths, questions[0].category) == (("red",), "colour")
    assert questions[3].images == ()


GOOD = {"image": "0.png", "question": "q", "answer": "a"}
YES = {"image": "0.png", "question": "q", "label": "yes"}


@pytest.mark.parametrize(
    ("records", "kind", "said"),
    [
        ([], None, "holds no question"),
        ([{"image": "0.png", "question": "q"}], None, "has no answer to score by"),
        ([{**GOOD, "question": " "}], None, "question '0': `question` must be a text"),
        ([{"image": "0.png", "qestion": "q", "answer": "a"}], None, "did you mean 'qestion'"),
        ([GOOD, "x"], None, "question '1': must be an object, got str"),
        ([{**GOOD, "id": 3}, {**GOOD, "id": "3"}], None, "question '3' is there twice"),
        ([{**GOOD, "image": "1.png"}], None, "picture '1.png' is not in"),
        ([{**GOOD, "image": "../q.json"}], None, "lies outside the folder"),
        ([{**GOOD, "image": 3}], None, "`image` must be a file name"),
        ([{**GOOD, "answers": ["a", "b"]}], None, "2 `answers`: give four or more"),
        ([{**GOOD, "answers": []}], None, "0 `answers`: give four or more"),
        ([{**GOOD, "answers": ["a", "b", "c", None]}], None, "each of `answers` must be a text, got None"),
        ([{**GOOD, "answer": True}], None, "`answer` must be a text, got True"),
        ([GOOD, {"image": "0.png", "question": "q"}], None, "'1': has no `answers` or `answer` or `label`"),
        ([{"questions": [GOOD]}], None, "the file is a list of records, or has one on each line"),
        ([GOOD], "yes_no", "`answer` must be yes or no, got 'a'; --kind vqa takes other answers"),
        ([{**YES, "label": "maybe"}], None, "`label` must be yes or no, got 'maybe'"),
        ([{**YES, "label": ["yes"]}], None, "`label` must be yes or no, got ['yes']"),
        ([YES, {**YES, "label": None}], None, "'1': `label` must be yes or no, got None"),
        (
            [YES, {"question": "q", "lable": "no"}],
            None,
            "'1': has no `label` or `answer`; did you mean 'lable'",
        ),
        ([GOOD], "choice", "`choices` must be a list of 2 to 26 texts"),
        ([{**GOOD, "choices": ["x", "y"], "answer": "z"}], None, "`answer` 'z' is none of the choices x, y"),
        ([{**GOOD, "choices": ["x", "y"], "answer": 2}], None, "is no place among 2 choices"),
        ([{"image": "0.png", "caption": " "}], None, "`caption` must be a text"),
        ([GOOD, {**GOOD, "question": "q \ud83d"}], None, r"question '1': '\ud83d' is a part of a character"),
        ([{"conversations": []}], "choice", "`conversations` hold no `choices`"),
    ],
)
def test_odd_records_are_refused(tmp_path: Path, records: Any, kind: Any, said: str) -> None:
    with pytest.raises(DataError) as error:
        Questions(write(tmp_path, records), tmp_path / "images", kind=kind)
    assert said in str(error.value)
    assert "q.json" in str(error.value)


def test_a_picture_that_is_none_shows_before_a_model_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD, {**GOOD, "image": "1.png"}])
    Image.new("RGB", (2000, 2)).save(tmp_path / "images" / "1.png")
    with pytest.raises(DataError, match=r"question '1': .*1\.png: 2000x2 is over the aspect limit"):
        Questions(path, tmp_path / "images")
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"question '1': .*1\.png: is not a picture"):
        Questions(path, tmp_path / "images")


def test_odd_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD])
    with pytest.raises(DataError, match="no folder is given: --images FOLDER"):
        Questions(path)
    with pytest.raises(DataError, match="picture folder 'absent' does not exist"):
        Questions(path, "absent")
    with pytest.raises(DataError, match=r"question file 'absent.json' does not exist"):
        Questions("absent.json")
    for content, said in (
        ("[{", "is no JSON list"),
        ('{"a": 1}\nx', "line 2 is not JSON"),
        ("\ufeff", "no question"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=said):
            Questions(path)
    path.write_bytes(b"\xff\xfe[")
    with pytest.raises(DataError, match="is not UTF-8"):
        Questions(path)
