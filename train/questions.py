"""Questions about pictures to evaluate a model by, from plain JSON or JSONL. No torch runs here.

A record holds `image` (a name or a list of them, or none for text alone) and, by kind,

    vqa       `question`, and `answers` (people's, as VQAv2's) or the one true `answer`
    yes_no    `question`, and `label` or `answer`: yes or no
    choice    `question`, `choices`, and `answer`: the letter, the place from 0, or the text of one
    captions  `caption`, and perhaps `question`

or LLaVA's `conversations`, each question of which is asked by itself. `text` may stand for `question`, as in
LLaVA's and POPE's files. `id` (or `question_id`) and `category` are optional.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from vlm_vision.errors import DataError, nearest
from vlm_vision.pictures import picture_size
from vlm_vision.preprocess import open_image
from vlm_vision.train.chat_format import check_text
from vlm_vision.train.conversations import IMAGE_TOKEN, Turn, parse_record, separate_questions
from vlm_vision.train.question_scores import letter, normalise_vqa

Kind = Literal["vqa", "yes_no", "captions", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CAPTION_PROMPT = "Describe the image."
CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5's
# Where a record of each kind has its truth: the first of these that is there.
_TRUTHS: dict[Kind, tuple[str, ...]] = {
    "vqa": ("answers", "answer", "label"),
    "yes_no": ("label", "answer"),
    "captions": ("caption", "answer"),
    "choice": ("answer", "label"),
}
_FIELDS = ("question", "answer", "answers", "label", "choices", "caption", "conversations", "image")


@dataclass(frozen=True)
class Question:
    """One question about pictures.

    Attributes:
        turns: the talk up to the question, with an `<image>` for each picture.
        truths: people's answers, the one true answer, a choice's letter, or a caption.
        choices: their texts, where there are some.
        category: what figures are split by.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    truths: tuple[str, ...]
    choices: tuple[str, ...] = ()
    category: str | None = None

    @property
    def words(self) -> str:
        """What is asked, without marks of pictures."""
        return self.turns[-1].words


class Questions(Sequence[Question]):
    """The questions of a file, all checked: every field, and that every picture is there and begins as one.

    Args:
        image_folder: what pictures' names are relative to.
        kind: by default what the first record's fields say.
        prompt: is written under every question; by default LLaVA-1.5's for choices, nothing for others.

    Raises:
        DataError: a file that is missing, no JSON or empty; a record without what its kind takes, with an
            answer that is none of its kind, with the id of another, or a picture that is not in the folder or
            is none by its header.
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path | None = None,
        *,
        kind: Kind | None = None,
        prompt: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.image_folder = None if image_folder is None else Path(image_folder)
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise DataError(f"picture folder {str(image_folder)!r} does not exist")
        records = _read(self.path)
        self.kind: Kind = _kind_of(records[0], self.path) if kind is None else kind
        self.prompt = (CHOICE_PROMPT if self.kind == "choice" else "") if prompt is None else prompt
        self._questions = [
            question for number, raw in enumerate(records) for question in self._parse(raw, number)
        ]
        self._check()

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: Any) -> Any:
        return self._questions[index]

    def pictures(self, question: Question) -> list[Image.Image]:
        """The question's pictures, opened.

        Raises:
            DataError: one is broken; names the question.
        """
        try:
            return [open_image(self._place(name, question.id)) for name in question.images]
        except DataError as error:
            raise DataError(f"{self.path}: question {question.id!r}: {error}") from error

    def _parse(self, raw: Any, number: int) -> Iterator[Question]:
        identity = (
            str(raw.get("id", raw.get("question_id", number))) if isinstance(raw, Mapping) else str(number)
        )

        def wrong(what: str) -> DataError:
            return DataError(f"{self.path}: question {identity!r}: {what}")

        if not isinstance(raw, Mapping):
            raise wrong(f"must be an object, got {type(raw).__name__}")
        try:
            check_text(json.dumps(raw, ensure_ascii=False))
        except DataError as error:
            raise wrong(str(error)) from None
        if "conversations" in raw:
            yield from self._of_conversation(raw, number, wrong)
            return
        images = raw.get("image", raw.get("images"))
        images = [] if images is None else images if isinstance(images, list) else [images]
        if not all(isinstance(name, str) and name for name in images):
            raise wrong(f"`image` must be a file name or a list of them, got {images!r:.80}")
        asked = raw.get("question", raw.get("text", CAPTION_PROMPT if self.kind == "captions" else None))
        if not isinstance(asked, str) or not asked.replace(IMAGE_TOKEN, "").strip():
            raise wrong(f"`question` must be a text, got {asked!r:.80}{_hint('question', raw)}")
        choices = self._choices(raw, wrong)
        category = raw.get("category")
        yield Question(
            identity,
            tuple(images),
            (Turn("user", self._written(asked, len(images), choices)),),
            self._truths(raw, choices, wrong),
            choices,
            None if category is None else str(category),
        )

    def _of_conversation(self, raw: Any, number: int, wrong: Any) -> Iterator[Question]:
        if self.kind == "choice":
            raise wrong("`conversations` hold no `choices`: give `question`, `choices` and `answer`")
        record = parse_record(raw, number, self.path)
        for place, single in enumerate(separate_questions(record)):
            *before, asked, truth = single.turns
            text = self._written(asked.text, len(record.images), ())
            yield Question(
                f"{record.id}#{place}" if len(record.turns) > 2 else record.id,
                record.images,
                (*before, replace(asked, text=text)),
                self._checked("the answer", (truth.text,), wrong),
                category=truth.kind,
            )

    def _written(self, asked: str, pictures: int, choices: Sequence[str]) -> str:
        """The user's turn: marks of pictures, the question, its choices by letter, the prompt."""
        listed = [f"{letter(place)}. {choice}" for place, choice in enumerate(choices)]
        words = asked.replace(IMAGE_TOKEN, "").strip()
        return "\n".join([*[IMAGE_TOKEN] * pictures, words, *listed, *filter(None, [self.prompt])])

    def _choices(self, raw: Mapping[str, Any], wrong: Any) -> tuple[str, ...]:
        if self.kind != "choice":
            return ()
        choices = raw.get("choices", raw.get("options"))
        if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
            raise wrong(
                f"`choices` must be a list of 2 to 26 texts, got {choices!r:.80}{_hint('choices', raw)}"
            )
        if not all(isinstance(choice, (str, int, float)) and str(choice).strip() for choice in choices):
            raise wrong(f"`choices` must be texts, got {choices!r:.80}")
        return tuple(str(choice).strip() for choice in choices)

    def _truths(self, raw: Mapping[str, Any], choices: Sequence[str], wrong: Any) -> tuple[str, ...]:
        fields = _TRUTHS[self.kind]
        field = next((name for name in fields if name in raw), None)
        if field is None:
            named = " or ".join(f"`{name}`" for name in fields)
            raise wrong(f"has no {named}{_hint(fields[0], raw)}")
        given = raw[field]
        if self.kind == "choice":
            return (_choice(given, choices, wrong),)
        if self.kind != "vqa":
            return self._checked(f"`{field}`", (given,), wrong)
        people = given if isinstance(given, list) else [given]
        told = [person.get("answer") if isinstance(person, Mapping) else person for person in people]
        if len(told) != 1 and len(told) < 4:
            raise wrong(f"{len(told)} `answers`: give four or more (VQAv2 has ten), or the one true `answer`")
        name = f"`{field}`" if len(told) == 1 else f"each of `{field}`"
        return self._checked(name, tuple(told), wrong)

    def _checked(self, name: str, truths: tuple[Any, ...], wrong: Any) -> tuple[str, ...]:
        if self.kind == "yes_no":
            said = normalise_vqa(truths[0]) if isinstance(truths[0], str) else None
            if said not in ("yes", "no"):
                raise wrong(
                    f"{name} must be yes or no, got {truths[0]!r:.80}; --kind vqa takes other answers"
                )
            return (said,)
        for truth in truths:
            is_text = isinstance(truth, (str, int, float)) and not isinstance(truth, bool)
            if not is_text or not str(truth).strip():
                raise wrong(f"{name} must be a text, got {truth!r:.80}")
        return tuple(map(str, truths))

    def _check(self) -> None:
        seen: set[str] = set()
        looked: set[str] = set()
        for question in self._questions:
            if question.id in seen:
                raise DataError(f"{self.path}: question {question.id!r} is there twice")
            seen.add(question.id)
            for name in question.images:
                if name not in looked:
                    self._look(name, question.id)
                    looked.add(name)

    def _look(self, name: str, identity: str) -> None:
        """See that a picture is there and, by its header, is one; what only decoding shows is told later."""
        place = self._place(name, identity)
        if not os.path.isfile(place):
            raise DataError(
                f"{self.path}: question {identity!r}: picture {name!r} is not in {self.image_folder}"
            )
        try:
            picture_size(place)
        except DataError as error:
            raise DataError(f"{self.path}: question {identity!r}: {error}") from error

    def _place(self, name: str, identity: str) -> str:
        if self.image_folder is None:
            raise DataError(
                f"{self.path}: question {identity!r} names picture {name!r}, but no folder is given: "
                "--images FOLDER"
            )
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise DataError(f"{self.path}: question {identity!r}: picture {name!r} lies outside the folder")
        return os.path.join(self.image_folder, name)


def _read(path: Path) -> list[Any]:
    """The records of a JSON list or of JSON lines."""
    if not path.is_file():
        raise DataError(f"question file {str(path)!r} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: {error}") from None
    if text.lstrip().startswith("["):
        try:
            records: list[Any] = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}: is no JSON list: {error}") from None
    else:
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                records += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise DataError(
                    f"{path}: line {number} is not JSON: {error}; give a list, or a record on each line"
                ) from None
    if not records:
        raise DataError(f"{path}: holds no question")
    return records


def _kind_of(raw: Any, path: Path) -> Kind:
    """What the fields of the first record say."""
    fields = raw if isinstance(raw, Mapping) else {}
    if "choices" in fields or "options" in fields:
        return "choice"
    if "caption" in fields:
        return "captions"
    if str(fields.get("label", fields.get("answer", ""))).strip().lower() in ("yes", "no"):
        return "yes_no"
    if "answers" in fields or "answer" in fields or "conversations" in fields:
        return "vqa"
    if "label" in fields:
        return "yes_no"
    names = ", ".join(map(str, fields)) or type(raw).__name__
    raise DataError(
        f"{path}: the first record ({names}) has no answer to score by: `answers`, `answer`, `label`, "
        "`choices`, `caption` or `conversations`; the file is a list of records, or has one on each line"
    )


def _choice(given: Any, choices: Sequence[str], wrong: Any) -> str:
    """The letter of the true choice."""
    letters = [letter(place) for place in range(len(choices))]
    if isinstance(given, bool) or not isinstance(given, (int, str)):
        raise wrong(f"`answer` must be a letter, a place from 0 or a choice's text, got {given!r:.80}")
    if isinstance(given, int):
        if not 0 <= given < len(choices):
            raise wrong(f"`answer` {given} is no place among {len(choices)} choices, counted from 0")
        return letters[given]
    if given.strip() in choices:
        return letters[choices.index(given.strip())]
    if given.strip().upper() in letters:
        return given.strip().upper()
    raise wrong(f"`answer` {given!r:.80} is none of the choices {', '.join(choices):.200}")


def _hint(field: str, raw: Mapping[str, Any]) -> str:
    """Which of a record's fields may have been meant."""
    return "" if field in raw else nearest(field, [name for name in raw if name not in _FIELDS])
