"""Conversations about pictures: LLaVA's JSON in, token ids with labels and pixels out.

A record is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."},
{"from": "gpt", "value": "..."}, ...]}`; `image` may be a list, or absent for text alone.
"""

from __future__ import annotations

import codecs
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from vlm_vision.errors import DataError
from vlm_vision.feature_shards import FeatureShards
from vlm_vision.files import is_inside
from vlm_vision.picture_list import ListedPicture
from vlm_vision.preprocess import ImageProcessor, open_image
from vlm_vision.train.chat_format import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    ChatFormat,
    Encoded,
    Instructions,
    Turn,
    read_template,
    stack_instructions,
)

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "IMAGE_TOKEN_ID",
    "Batch",
    "ChatFormat",
    "ConversationDataset",
    "Conversations",
    "Encoded",
    "Instructions",
    "Record",
    "Sample",
    "Turn",
    "collate",
    "parse_record",
    "read_template",
    "separate_questions",
    "stack_instructions",
]

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_CHUNK = 1 << 20
_KEPT = 2000  # encoded conversations


@dataclass(frozen=True)
class Record:
    """One conversation and the pictures that its `<image>` marks stand for, in order."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def separate_questions(record: Record) -> list[Record]:
    """A record for each question of a record: a system turn if there is one, all its pictures, the words."""
    marks = IMAGE_TOKEN * len(record.images)
    system = tuple(turn for turn in record.turns if turn.role == "system")
    talk = record.turns[len(system) :]
    separate = []
    for number, (question, answer) in enumerate(zip(talk[::2], talk[1::2], strict=True)):
        asked = replace(question, text="\n".join(part for part in (marks, question.words) if part))
        separate.append(Record(f"{record.id}#{number}", record.images, (*system, asked, answer)))
    return separate


def parse_record(raw: Any, number: int, file: str | Path) -> Record:
    """Check one LLaVA record. A leading answer or a closing question, which teach nothing, are left out.

    Raises:
        DataError: names the file, the record and what is wrong with it.
    """
    identity = raw.get("id", number) if isinstance(raw, Mapping) else number

    def wrong(what: str) -> DataError:
        return DataError(f"{file}: record {str(identity)!r}: {what}")

    if not isinstance(raw, Mapping):
        raise wrong(f"must be an object with `conversations`, got {type(raw).__name__}")
    image = raw.get("image")
    images = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name for name in images):
        raise wrong(f"`image` must be a file name or a list of them, got {image!r:.80}")
    spoken = raw.get("conversations")
    if not isinstance(spoken, list):
        raise wrong("`conversations` must be a list of turns")
    turns = []
    for position, turn in enumerate(spoken):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise wrong(f"turn {position} must hold `from` and `value`")
        if turn.get("from") not in _ROLES:
            raise wrong(f"turn {position} is from {turn.get('from')!r}, expected one of {', '.join(_ROLES)}")
        turns.append(Turn(_ROLES[turn["from"]], turn["value"], turn.get("type")))
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
    talk = [turn.role for turn in turns[turns[0].role == "system" :]] if turns else []
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        raise wrong(f"turns must alternate between human and gpt, got {', '.join(talk) or 'none'}")
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role == "assistant"):
        raise wrong(f"{IMAGE_TOKEN} stands in an answer")
    marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if marks != len(images):
        raise wrong(f"{marks} {IMAGE_TOKEN} in the text, but {len(images)} picture(s)")
    return Record(str(identity), tuple(images), tuple(turns))


class Conversations(Sequence[Record]):
    """Records of a JSON list or a JSONL file, all checked once, then read one by one; memory holds offsets.

    Args:
        separate: give every question of a record as a record of its own.

    Attributes:
        bad: index of a record that cannot be used, to the reason.

    Raises:
        DataError: the file is missing, is not JSON or is empty, or more than `max_bad_share` of its records
            are bad; lists the first ones.
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path | None = None,
        *,
        max_bad_share: float = 0.0,
        follow_links: bool = False,
        separate: bool = False,
    ) -> None:
        self.path = Path(path)
        self.image_folder = None if image_folder is None else Path(image_folder)
        self._real_folder = os.path.realpath(image_folder or os.curdir)
        self.follow_links, self.separate = follow_links, separate
        self.bad: dict[int, str] = {}
        # Of every record: where it begins in the file, its bytes, and which of its questions it is.
        self._starts, self._sizes, self._questions = array("Q"), array("Q"), array("L")
        if not self.path.is_file():
            raise DataError(f"conversation file {str(path)!r} does not exist")
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise DataError(f"image folder {str(image_folder)!r} does not exist")
        for number, (start, size, raw) in enumerate(_scan(self.path)):
            questions = 1
            try:
                record = parse_record(raw, number, self.path)
                for name in record.images:
                    if not os.path.exists(self._inside(name, record.id)):
                        raise DataError(
                            f"{path}: record {record.id!r}: picture {name!r} is not in {self.image_folder}"
                        )
                questions = len(separate_questions(record)) if separate else 1
            except DataError as error:
                self.bad[len(self)] = str(error)
            for question in range(questions):
                self._starts.append(start)
                self._sizes.append(size)
                self._questions.append(question)
        if not len(self):
            raise DataError(f"{path} holds no record")
        self.max_bad = int(max_bad_share * len(self))
        if len(self.bad) > self.max_bad:
            listed = "\n".join(f"  {reason}" for reason in list(self.bad.values())[:5])
            raise DataError(
                f"{path}: {len(self.bad)} of {len(self)} records cannot be used, "
                f"max_bad_share allows {self.max_bad}:\n{listed}"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            raw = json.loads(file.read(self._sizes[index]))
        record = parse_record(raw, range(len(self))[index], self.path)
        return separate_questions(record)[self._questions[index]] if self.separate else record

    def readings(self) -> Counter[ListedPicture]:
        """Every picture that can be read, and by how many records; known by the name that records give."""
        names = Counter[str]()
        for index in range(len(self)):
            if index not in self.bad:
                names.update(self[index].images)
        readings = Counter[ListedPicture]()
        for name, count in sorted(names.items()):
            with suppress(DataError):  # a picture outside the folder is told of when its record comes up
                readings[ListedPicture(name, self._resolve(name, ""))] = count
        return readings

    def pictures(self, record: Record) -> list[Image.Image]:
        """The record's pictures, opened.

        Raises:
            DataError: a picture is missing, broken, or lies outside the image folder; names the record.
        """
        try:
            return [open_image(self._resolve(name, record.id)) for name in record.images]
        except DataError as error:
            raise DataError(f"{self.path}: record {record.id!r}: {error}") from error

    def _inside(self, name: str, identity: str) -> str:
        """The path of a picture, which must not lead out of the folder by its wording."""
        if self.image_folder is None:
            raise DataError(f"record {identity!r} names picture {name!r}, but no image_folder is given")
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir or "://" in name:
            raise DataError(
                f"{self.path}: record {identity!r}: picture {name!r} lies outside the image folder"
            )
        return os.path.join(self.image_folder, name)

    def _resolve(self, name: str, identity: str) -> str:
        """The path of a picture, which must not lead out of the folder by a link either."""
        path = self._inside(name, identity)
        if not self.follow_links and not is_inside(path, self._real_folder):
            raise DataError(
                f"picture {name!r} is a link that leads out of the image folder; "
                "set follow_links: true if you trust it"
            )
        return path


def _scan(path: Path) -> Iterator[tuple[int, int, Any]]:
    """(first byte, size in bytes, parsed value) of every record, reading the file once in pieces."""
    with path.open("rb") as file:
        is_list = file.read(_CHUNK).lstrip()[:1] == b"["
    yield from _scan_list(path) if is_list else _scan_lines(path)


def _scan_lines(path: Path) -> Iterator[tuple[int, int, Any]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield start, len(line), json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}: line {number} is not JSON: {error}") from None
            start += len(line)


def _scan_list(path: Path) -> Iterator[tuple[int, int, Any]]:
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, at, byte = "", 0, 0  # `text[at:]` is not parsed yet, and begins at `byte` of the file
    count = 0
    with path.open("rb") as file:
        while True:
            stop = at
            while stop < len(text) and text[stop] in (" \t\r\n," if count else " \t\r\n,["):
                stop += 1
            byte, at = byte + stop - at, stop  # what was passed over is ASCII
            if text[at : at + 1] == "]":
                return
            try:
                raw, end = decoder.raw_decode(text, at)
            except ValueError as error:
                more = file.read(_CHUNK)
                if not more:
                    raise DataError(f"{path}: is no JSON list after {count} records: {error}") from None
                try:
                    text, at = text[at:] + utf8.decode(more), 0
                except UnicodeDecodeError as wrong:
                    raise DataError(f"{path}: is not UTF-8: {wrong}") from None
                continue
            size = len(text[at:end].encode())
            yield byte, size, raw
            byte, at, count = byte + size, end, count + 1


@dataclass(frozen=True)
class Sample:
    """One conversation ready for the model.

    Attributes:
        input_ids, labels: [T].
        pixels: [pictures, 3, H, W], or None for text alone.
        patches: [pictures, N, D], what the tower makes of them, where that is kept; pixels are None then.
        instruction: [tokens] that the projector reads, if it reads text.
        replaced: (record index, reason) of bad records that this one stands in for.
        truncated: whether its text was cut at max_length.
    """

    input_ids: Tensor
    labels: Tensor
    pixels: Tensor | None
    patches: Tensor | None = None
    instruction: Tensor | None = None
    replaced: tuple[tuple[int, str], ...] = ()
    truncated: bool = False

    @property
    def num_pictures(self) -> int:
        seen = self.patches if self.pixels is None else self.pixels
        return 0 if seen is None else len(seen)


class ConversationDataset(Dataset[Sample]):
    """Samples of a conversation file. A bad record is replaced by the next good one, the same at every visit.

    Args:
        features: patches by the name of the picture, in place of pixels; a picture that has none is bad.
        instructions: for a projector that reads text.

    Raises (on access):
        DataError: more bad records than the conversations allow.
    """

    def __init__(
        self,
        conversations: Conversations,
        chat: ChatFormat,
        image_processor: ImageProcessor,
        *,
        max_length: int,
        too_long: Literal["truncate", "refuse"] = "truncate",
        features: FeatureShards | None = None,
        instructions: Instructions | None = None,
    ) -> None:
        self.conversations, self.chat, self.image_processor = conversations, chat, image_processor
        self.features, self.instructions = features, instructions
        self.max_length, self.too_long = max_length, too_long
        self._encoded: dict[tuple[Turn, ...], Encoded] = {}

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Sample]:
        """Samples of (epoch, index) keys; a conversation is the same in every epoch."""
        return [self[index] for _, index in keys]

    def __getitem__(self, index: int) -> Sample:
        replaced: list[tuple[int, str]] = []
        while True:
            candidate = (index + len(replaced)) % len(self)
            reason = self.conversations.bad.get(candidate)
            if reason is None:
                try:
                    return self._sample(self.conversations[candidate], tuple(replaced))
                except DataError as error:
                    reason = str(error)
            replaced.append((candidate, reason))
            if len(replaced) > self.conversations.max_bad:
                raise DataError(f"{reason}\nmax_bad_share sets how many bad records may be replaced")

    def _sample(self, record: Record, replaced: tuple[tuple[int, str], ...]) -> Sample:
        try:
            encoded = self._encode(record.turns)
        except DataError as error:
            raise DataError(f"{self.conversations.path}: record {record.id!r}: {error}") from error
        return Sample(
            torch.tensor(encoded.input_ids),
            torch.tensor(encoded.labels),
            self._pixels(record) if self.features is None else None,
            None if self.features is None else self._patches(self.features, record),
            None if self.instructions is None else self.instructions(record.turns),
            replaced,
            encoded.truncated,
        )

    def _pixels(self, record: Record) -> Tensor | None:
        squares = [self.image_processor.to_square(picture) for picture in self.conversations.pictures(record)]
        return self.image_processor.normalise(squares) if squares else None

    def _patches(self, features: FeatureShards, record: Record) -> Tensor:
        for name in record.images:
            if name not in features:
                self.conversations.pictures(record)  # says what is wrong with it
                raise DataError(f"{self.conversations.path}: {name!r} has no features in {features.folder}")
        rows = [features[name] for name in record.images]
        return torch.stack(rows) if rows else torch.empty(0, *features.manifest.shape)

    def _encode(self, turns: tuple[Turn, ...]) -> Encoded:
        """Tokens of a conversation; kept for the next time, as the same is asked about many pictures."""
        if turns not in self._encoded:
            if len(self._encoded) == _KEPT:
                self._encoded.clear()
            self._encoded[turns] = self.chat.encode(turns, self.max_length, self.too_long)
        return self._encoded[turns]


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to the longest.

    Attributes:
        input_ids, attention_mask, labels: [B,T].
        pixels: [P,3,H,W], pictures of all samples in order, or None.
        patches: [P,N,D] in their place where a tower's features are kept, P = 0 for text alone; or None.
        text: `text_ids` and `text_mask` [P,T], what is asked about each picture; or None.
        replaced, truncated: what happened to its samples.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixels: Tensor | None
    patches: Tensor | None
    text: dict[str, Tensor] | None
    replaced: tuple[tuple[int, str], ...]
    truncated: int

    @property
    def num_labels(self) -> int:
        """Tokens that the loss is taken over; the first of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad and stack samples."""
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    pictures = [sample.pixels for sample in samples if sample.pixels is not None]
    patches = [sample.patches for sample in samples if sample.patches is not None]
    instructions = [
        sample.instruction
        for sample in samples
        if sample.instruction is not None
        for _ in range(sample.num_pictures)
    ]
    input_ids = pad_sequence([s.input_ids for s in samples], batch_first=True, padding_value=pad_id)
    return Batch(
        input_ids=input_ids,
        attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        labels=pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
        pixels=torch.cat(pictures) if pictures else None,
        patches=torch.cat(patches) if patches else None,
        text=stack_instructions(instructions) if instructions else None,
        replaced=tuple(entry for sample in samples for entry in sample.replaced),
        truncated=sum(sample.truncated for sample in samples),
    )
