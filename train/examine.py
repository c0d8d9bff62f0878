"""A vision-language model asked a file of questions: answers, scores with intervals, a page of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from vlm_vision.errors import DataError
from vlm_vision.progress import progress_bar
from vlm_vision.train.conversations import Sample, Turn, collate
from vlm_vision.train.question_scores import (
    Score,
    caption_scores,
    choice_scores,
    chosen,
    consensus,
    is_yes_or_no,
    letter,
    says_no,
    vqa_scores,
    yes_no_scores,
)
from vlm_vision.train.questions import Kind, Question, Questions
from vlm_vision.train.report import Answered, Report
from vlm_vision.train.vlm import VisionLanguageModel

SHOWN = 24  # samples of a page, of right and of wrong answers each
INTERVALS = "95 %: Wilson's for shares, else from 1000 resamples of the pictures"


@dataclass(frozen=True)
class Result:
    """What became of one question.

    Attributes:
        answer: the model's, or empty for captions.
        credit: 1 for right, 0 for wrong, between them in VQA; of captions the loss per token, in nats.
        tokens: of the caption, that the loss is over.
        clear: whether the answer could be read as yes or no, or as one of the choices.
    """

    question: Question
    answer: str
    credit: float
    tokens: int = 0
    clear: bool = True


@dataclass(frozen=True)
class Examination:
    """Scores over all questions, and by category where there are several."""

    kind: Kind
    results: tuple[Result, ...]
    scores: dict[str, Score]
    categories: dict[str, dict[str, Score]]

    def table(self) -> list[tuple[str, str, Score]]:
        """Rows of (category, name of the score, score)."""
        rows = [("all", name, score) for name, score in self.scores.items()]
        return rows + [
            (category, name, score)
            for category, scores in self.categories.items()
            for name, score in scores.items()
        ]


def examine(
    model: VisionLanguageModel,
    questions: Questions,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    max_length: int = 2048,
) -> Examination:
    """Ask every question by itself, greedily, and score the answers; for captions, the loss of the true ones.

    Args:
        max_length: tokens of a caption with its question and pictures; a longer one is refused.

    Raises:
        DataError: a picture that cannot be read, a caption that is too long.
    """
    was_training = model.training
    model.eval()
    if questions.kind == "captions":
        results = _caption_results(model, questions, batch_size, max_length)
    else:
        results = _answer_results(model, questions, batch_size, max_new_tokens)
    model.train(was_training)
    names = dict.fromkeys(question.category for question in questions)
    split = {
        name: _scores(questions.kind, [result for result in results if result.question.category == name])
        for name in names
        if name is not None and len(names) > 1
    }
    return Examination(questions.kind, tuple(results), _scores(questions.kind, results), split)


def write_examination(
    found: Examination, questions: Questions, folder: str | Path, about: dict[str, Any]
) -> Path:
    """Write `scores.json`, `answers.jsonl` and `report.html`; returns the page.

    Args:
        about: what the scores are of, such as the model's folder; it is written beside them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **about,
        "questions": str(questions.path),
        "kind": found.kind,
        "prompt": questions.prompt,
        "count": len(found.results),
        "intervals": INTERVALS,
        "scores": {name: asdict(score) for name, score in found.scores.items()},
        "categories": {
            category: {name: asdict(score) for name, score in scores.items()}
            for category, scores in found.categories.items()
        },
    }
    (folder / "scores.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for result in found.results:
            question = result.question
            line = {
                "id": question.id,
                "images": question.images,
                "question": question.words,
                "answer": result.answer,
                "truths": question.truths,
                "credit": result.credit,
                "category": question.category,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return _page(found, questions, about).save(folder / "report.html")


def _answer_results(
    model: VisionLanguageModel, questions: Questions, batch_size: int, max_new_tokens: int
) -> list[Result]:
    results: list[Result] = []
    with progress_bar(len(questions), questions.kind) as bar:
        for batch in _batches(questions, batch_size):
            pictures = [picture for question in batch for picture in questions.pictures(question)]
            pixels, sizes = model.prepare_pictures(pictures)
            said = model.answer(
                pixels, [question.turns for question in batch], max_new_tokens, image_sizes=sizes
            )
            results += [
                _graded(questions.kind, question, answer)
                for question, answer in zip(batch, said, strict=True)
            ]
            bar.update(len(batch))
    return results


def _graded(kind: Kind, question: Question, answer: str) -> Result:
    if kind == "vqa":
        return Result(question, answer, consensus(answer, question.truths))
    if kind == "yes_no":
        right = says_no(answer) == (question.truths[0] == "no")
        return Result(question, answer, float(right), clear=is_yes_or_no(answer))
    choice = chosen(answer, question.choices)
    right = choice is not None and letter(choice) == question.truths[0]
    return Result(question, answer, float(right), clear=choice is not None)


@torch.no_grad()
def _caption_results(
    model: VisionLanguageModel, questions: Questions, batch_size: int, max_length: int
) -> list[Result]:
    results: list[Result] = []
    device = next(model.parameters()).device
    with progress_bar(len(questions), questions.kind) as bar:
        for batch in _batches(questions, batch_size):
            rows = collate(
                [_caption_sample(model, questions, one, max_length) for one in batch], model.chat.pad_id
            )
            output = model(
                rows.input_ids.to(device),
                rows.attention_mask.to(device),
                pixels=None if rows.pixels is None else rows.pixels.to(device),
                text=None if rows.text is None else {name: ids.to(device) for name, ids in rows.text.items()},
                image_sizes=rows.image_sizes,
            )
            for question, logits, labels in zip(batch, output.logits, rows.labels.to(device), strict=True):
                learnt = labels[1:] >= 0
                losses = F.cross_entropy(
                    logits[:-1][learnt].float(), labels[1:][learnt], reduction="none"
                ).double()
                results.append(Result(question, "", float(losses.mean()), tokens=int(learnt.sum())))
            bar.update(len(batch))
    return results


def _caption_sample(
    model: VisionLanguageModel, questions: Questions, question: Question, max_length: int
) -> Sample:
    turns = (*question.turns, Turn("assistant", question.truths[0]))
    pictures = questions.pictures(question)
    tiles = None if model.tiles is None else model.tiles.form
    try:
        counts = None if tiles is None else [tiles.num_tokens(picture.size) for picture in pictures]
        encoded = model.chat.encode(turns, max_length, "refuse", counts)
    except DataError as error:
        raise DataError(f"{questions.path}: question {question.id!r}: {error}") from error
    pixels, sizes = model.prepare_pictures(pictures)
    return Sample(
        torch.tensor(encoded.input_ids),
        torch.tensor(encoded.labels),
        pixels,
        instructions=() if model.instructions is None else tuple(model.instructions(turns)),
        image_sizes=sizes,
    )


def _scores(kind: Kind, results: Sequence[Result]) -> dict[str, Score]:
    """Questions about the same pictures are no independent draws, so they are one group."""
    groups = [result.question.images or (result.question.id,) for result in results]
    credits, clear = [result.credit for result in results], [result.clear for result in results]
    if kind == "vqa":
        return vqa_scores(credits, groups, exact=all(len(r.question.truths) == 1 for r in results))
    if kind == "choice":
        return choice_scores([credit == 1 for credit in credits], clear)
    if kind == "yes_no":
        truths = [result.question.truths[0] == "no" for result in results]
        said = [truth == (credit == 1) for truth, credit in zip(truths, credits, strict=True)]
        return yes_no_scores(said, truths, clear, groups)
    tokens = [result.tokens for result in results]
    return caption_scores(
        [credit * count for credit, count in zip(credits, tokens, strict=True)], tokens, groups
    )


def _page(found: Examination, questions: Questions, about: dict[str, Any]) -> Report:
    title = ", ".join(map(str, about.values()))
    report = Report(f"{found.kind}: {title}", f"{len(found.results):,} questions of {questions.path.name}.")
    report.heading("Scores")
    report.text(f"Intervals are of {INTERVALS}.")
    cells = [
        (category, name, *(("-",) * 3 if score.value is None else (score.value, score.low, score.high)))
        for category, name, score in found.table()
    ]
    report.table(cells, header=("questions", "score", "value", "from", "to"))
    if found.kind == "captions":
        ranked = sorted((r for r in found.results if r.question.images), key=lambda result: result.credit)
        _add_captions(report, questions, "Captions that surprise it least", ranked[:SHOWN])
        _add_captions(report, questions, "Captions that surprise it most", ranked[::-1][:SHOWN])
        return report
    _add_answers(report, questions, "Right answers", found.results, lambda credit: credit >= 0.5)
    _add_answers(report, questions, "Wrong answers", found.results, lambda credit: credit < 0.5)
    return report


def _add_answers(
    report: Report,
    questions: Questions,
    heading: str,
    results: Iterable[Result],
    is_meant: Callable[[float], bool],
) -> None:
    """Evenly over the file; those about text alone have no picture to show."""
    meant = [result for result in results if result.question.images and is_meant(result.credit)]
    report.heading(f"{heading}: {len(meant):,} about pictures")
    if meant:
        report.answers([_answered(questions, result) for result in _spread(meant)])


def _answered(questions: Questions, result: Result) -> Answered:
    question = result.question
    truth = " / ".join(dict.fromkeys(question.truths))
    if question.choices:
        truth = f"{truth}. {question.choices[ord(truth) - ord('A')]}"
    right = result.credit >= 0.5
    turn = (question.words, result.answer, result.answer if right else truth)
    return Answered(questions.pictures(question)[0], [turn])


def _add_captions(report: Report, questions: Questions, heading: str, results: Sequence[Result]) -> None:
    report.heading(heading)
    report.picture_grid(
        [questions.pictures(result.question)[0] for result in results],
        [f"{result.credit:.3f} nats a token: {result.question.truths[0]}" for result in results],
    )


def _spread(results: Sequence[Result]) -> Sequence[Result]:
    step = max(1, len(results) // SHOWN)
    return results[::step][:SHOWN]


def _batches(questions: Questions, size: int) -> Iterable[list[Question]]:
    for first in range(0, len(questions), size):
        yield questions[first : first + size]
