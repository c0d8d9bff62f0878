"""VQAv2's accuracy against the official code, of which LAVIS holds a copy.

VLM_VISION_PROJECTOR_REFERENCES is a folder with a checkout of salesforce/LAVIS; else nothing is compared.
"""

from __future__ import annotations

import random
import types
import warnings
from typing import Any

import pytest
from references import PROJECTORS, checkout

from vlm_vision.train.question_scores import consensus, normalise_vqa

MARKS = [" ", "", " ", "-", ", ", ".", "/", "? ", " (", "3,000", "1.5", "\n"]
WORDS = ["two", "None", "The", "a", "cat", "dr", "t-shirt", "U.S.A.", "10", "don't"]


@pytest.fixture(scope="module")
def official() -> Any:
    path = checkout(PROJECTORS) / "LAVIS" / "lavis" / "common" / "vqa_tools" / "vqa_eval.py"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    module = types.ModuleType("vqa_eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its escapes
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module


def test_normalisation_is_the_official_one(official: Any) -> None:
    theirs = official.VQAEval()
    draw = random.Random(0)
    words = WORDS + [word for word in theirs.contractions if word != "somebody'd"]  # which it turns round
    for _ in range(20_000):
        text = "".join(draw.choice(words) + draw.choice(MARKS) for _ in range(draw.randint(1, 4)))
        given = text.replace("\n", " ").replace("\t", " ").strip()
        assert normalise_vqa(text) == theirs.processDigitArticle(theirs.processPunctuation(given))


def test_accuracy_is_the_official_one(official: Any, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    for _ in range(1000):
        people = [draw.choice(["red", "blue", "light blue", "2", "yes", "no"]) for _ in range(10)]
        said = draw.choice(["Red.", "the blue", "light-blue", "two", "Yes!", "no", "green"])
        answers = [{"answer": text, "answer_id": number} for number, text in enumerate(people)]
        truth = {1: {"answers": answers, "question_type": "", "answer_type": ""}}
        asked = types.SimpleNamespace(qa=truth, getQuesIds=lambda: [1])
        theirs = official.VQAEval(asked, types.SimpleNamespace(qa={1: {"answer": said}}), n=12)
        theirs.evaluate()
        # Worst difference measured: 2.2e-16.
        assert consensus(said, people) == pytest.approx(theirs.accuracy["overall"] / 100, abs=1e-12)
