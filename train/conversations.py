"""Conversations about pictures: records in, token ids with labels and pixels out.

A record is LLaVA's, `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value":
"<image>\\n..."}, {"from": "gpt", "value": "..."}, ...]}`, or holds chat `messages` in their place,
`[{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "..."}]}, ...]`.
`image` (or `images`) may be a list, or absent for text alone; pictures without a name of their own in
`messages` are those of `image` in order.
"""

from __future__ import annotations

import base64
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from vlm_vision.errors import DataError
from vlm_vision.feature_shards import FeatureShards
from vlm_vision.files import is_inside
from vlm_vision.picture_list import NamedBytes
from vlm_vision.pictures import picture_size
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
from vlm_vision.train.conversations_config import ConversationData, conversation_sources
from vlm_vision.train.file_cache import file_key
from vlm_vision.train.order import EpochOrder, UniformShuffle
from vlm_vision.train.packing import pack
from vlm_vision.train.record_files import WITHIN, open_records
from vlm_vision.train.tiles import TileFormat

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
    "MixedConversations",
    "Record",
    "Sample",
    "Turn",
    "collate",
    "open_conversations",
    "parse_record",
    "picture_tokens",
    "read_template",
    "separate_questions",
    "stack_instructions",
]

DATA_URL = "data:"

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_KEPT = 2000  # encoded conversations


@dataclass(frozen=True)
class Record:
    """One conversation and the pictures that its `<image>` marks stand for, in order; and its source."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    file: str = ""


def separate_questions(record: Record) -> list[Record]:
    """A record for each question of a record: a system turn if there is one, all its pictures, the words."""
    marks = IMAGE_TOKEN * len(record.images)
    system = tuple(turn for turn in record.turns if turn.role == "system")
    talk = record.turns[len(system) :]
    separate = []
    for number, (question, answer) in enumerate(zip(talk[::2], talk[1::2], strict=True)):
        asked = replace(question, text="\n".join(part for part in (marks, question.words) if part))
        separate.append(replace(record, id=f"{record.id}#{number}", turns=(*system, asked, answer)))
    return separate


def parse_record(raw: Any, number: int, file: str | Path) -> Record:
    """Check one record. A leading answer or a closing question, which teach nothing, are left out.

    Raises:
        DataError: names the file, the record and what is wrong with it.
    """
    identity = raw.get("id", number) if isinstance(raw, Mapping) else number

    def wrong(what: str) -> DataError:
        return DataError(f"{file}: record {str(identity)!r}: {what}")

    if not isinstance(raw, Mapping):
        raise wrong(f"must be an object with `conversations` or `messages`, got {type(raw).__name__}")
    spoken = {key: raw[key] for key in ("conversations", "messages") if raw.get(key) is not None}
    if len(spoken) != 1 or not all(isinstance(turns, list) for turns in spoken.values()):
        raise wrong("`conversations` must be a list of turns, or `messages` in their place")
    shown = {key: raw[key] for key in ("image", "images") if raw.get(key) is not None}
    if len(shown) > 1:
        raise wrong("names pictures twice, in `image` and in `images`")
    images = [_picture_name(image, wrong) for value in shown.values() for image in _as_list(value)]
    turns, named = [], list[str]()
    for position, said in enumerate(*spoken.values()):
        turn, pictures = (_turn if "conversations" in spoken else _message)(said, position, wrong)
        turns.append(turn)
        named += pictures
    if named and images:
        raise wrong(f"`messages` name {len(named)} picture(s), and {min(shown)!r} names others")
    images = named or images
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
    talk = [turn.role for turn in turns[turns[0].role == "system" :]] if turns else []
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        raise wrong(f"turns must alternate between human and gpt, got {', '.join(talk) or 'none'}")
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if any(IMAGE_TOKEN in turns[place].text for place in answers):
        raise wrong(f"{IMAGE_TOKEN} stands in an answer")
    marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if marks != len(images):
        raise wrong(f"{marks} {IMAGE_TOKEN} in the text, but {len(images)} picture(s)")
    return Record(str(identity), tuple(images), tuple(turns), str(file))


Wrong = Callable[[str], DataError]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _picture_name(value: Any, wrong: Wrong) -> str:
    """A path, a `data:` URL or a table's own name for its bytes; a dict names it by one of these keys."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("image", "path", "url", "image_url") if value.get(key)), None)
        if isinstance(value, Mapping):
            value = value.get("url")
    if not (isinstance(value, str) and value):
        raise wrong(f"`image` must be a file name or a list of them, got {value!r:.80}")
    return value


def _turn(turn: Any, position: int, wrong: Wrong) -> tuple[Turn, list[str]]:
    """One of LLaVA's `conversations`."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise wrong(f"turn {position} must hold `from` and `value`")
    if turn.get("from") not in _ROLES:
        raise wrong(f"turn {position} is from {turn.get('from')!r}, expected one of {', '.join(_ROLES)}")
    return _said(_ROLES[turn["from"]], turn["value"], turn, position, wrong), []


def _message(message: Any, position: int, wrong: Wrong) -> tuple[Turn, list[str]]:
    """One of a chat's `messages`, and the pictures that its parts name."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in _ROLES.values():
        raise wrong(f"message {position} is by {role!r}, expected one of {', '.join(_ROLES.values())}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise wrong(f"message {position}: `content` must be text or a list of parts")
    text, pictures = "", list[str]()
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            text += IMAGE_TOKEN
            if any(part.get(key) for key in ("image", "path", "url", "image_url")):
                pictures.append(_picture_name(part, wrong))
        else:
            raise wrong(f"message {position}: a part must be of type text or image, got {part!r:.80}")
    return _said(role, text, message, position, wrong), pictures


def _said(role: str, text: str, raw: Mapping[str, Any], position: int, wrong: Wrong) -> Turn:
    try:
        return Turn(role, text, raw.get("type"))
    except DataError as error:
        raise wrong(f"turn {position}: {error}") from None


class Conversations(Sequence[Record]):
    """Records of one source, all checked once, then read one by one; memory holds where they are.

    Args:
        path: as `ConversationConfig.file`.
        weight: how often an epoch shows each record.
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
        weight: float = 1.0,
    ) -> None:
        self.path = str(path)
        self.image_folder = None if image_folder is None else Path(image_folder)
        self._real_folder = os.path.realpath(image_folder or os.curdir)
        self.follow_links, self.separate, self.weight = follow_links, separate, weight
        self.bad: dict[int, str] = {}
        # Of every record: its number in the file, and which of its questions it is.
        self._numbers, self._questions = array("Q"), array("L")
        self._file = open_records(path)
        _check_folder(self.image_folder)
        for number, raw in enumerate(self._file):
            questions = 1
            try:
                record = parse_record(raw, number, self.path)
                for name in record.images:
                    if not _is_within(name) and not os.path.exists(self._inside(name, record.id)):
                        raise DataError(
                            f"{path}: record {record.id!r}: picture {name!r} is not in {self.image_folder}"
                        )
                questions = len(separate_questions(record)) if separate else 1
            except DataError as error:
                self.bad[len(self)] = str(error)
            for question in range(questions):
                self._numbers.append(number)
                self._questions.append(question)
        if not len(self):
            raise DataError(f"{path} holds no record")
        self.max_bad = int(max_bad_share * len(self))
        self.refuse(self.bad)

    def __len__(self) -> int:
        return len(self._numbers)

    def digest(self) -> str:
        """A hash of all that a look at the records depends on, but for the picture files' own."""
        settings = (self.path, str(self.image_folder), self.follow_links, self.separate, sorted(self.bad))
        return file_key(self._file.digest(), *settings)

    def refuse(self, bad: Mapping[int, str]) -> None:
        """Take these records for bad.

        Raises:
            DataError: there are more than `max_bad_share` allows; lists the first ones.
        """
        self.bad = dict(sorted({**self.bad, **bad}.items()))
        _check_share(self.path, self.bad, len(self), self.max_bad)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = self._numbers[index]
        record = parse_record(self._file[number], number, self.path)
        return separate_questions(record)[self._questions[index]] if self.separate else record

    @property
    def epoch_size(self) -> int:
        """Records that an epoch shows, by the weight."""
        return self.order(seed=0).size

    def order(self, seed: int) -> EpochOrder:
        """Which records each epoch shows, and where; a function of the seed alone."""
        return EpochOrder([UniformShuffle(len(self), seed)], seed, weights=[self.weight])

    def content(self, record: Record, place: int) -> bytes:
        """The bytes of the record's picture at a place, encoded as they lie there; raises as `pictures`."""
        try:
            source = self._source(record.images[place], record.id)
            return source.getvalue() if isinstance(source, NamedBytes) else Path(source).read_bytes()
        except (DataError, OSError) as error:
            raise DataError(f"{self.path}: record {record.id!r}: {error}") from error

    def pictures(self, record: Record) -> list[Image.Image]:
        """The record's pictures, opened.

        Raises:
            DataError: a picture is missing, broken, or lies outside the image folder; names the record.
        """
        try:
            return [open_image(self._source(name, record.id)) for name in record.images]
        except DataError as error:
            raise DataError(f"{self.path}: record {record.id!r}: {error}") from error

    def sizes(self, record: Record) -> list[tuple[int, int]]:
        """(width, height) of the record's pictures, told by their headers; raises as `pictures`."""
        try:
            return [picture_size(self._source(name, record.id)) for name in record.images]
        except DataError as error:
            raise DataError(f"{self.path}: record {record.id!r}: {error}") from error

    def check_paths(self, record: Record) -> None:
        """See that its pictures lie in the image folder, without opening them; raises as `pictures`."""
        for name in record.images:
            if not _is_within(name):
                try:
                    self._resolve(name, record.id)
                except DataError as error:
                    raise DataError(f"{self.path}: record {record.id!r}: {error}") from error

    def _source(self, name: str, identity: str) -> str | NamedBytes:
        if name.startswith(WITHIN):
            return NamedBytes(self._file.picture(name), f"picture {name}")
        if name.startswith(DATA_URL):
            return NamedBytes(_decoded(name), f"picture {name:.40}")
        return self._resolve(name, identity)

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


class MixedConversations(Sequence[Record]):
    """Several sources one after another, mixed in an order by their weights.

    A picture is named `source:name`, for sources may have different folders.

    Attributes:
        bad, max_bad: those of all sources.
        path: of all sources, for titles.
    """

    def __init__(self, sources: Sequence[Conversations]) -> None:
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        firsts = [int(end) - len(source) for end, source in zip(self._ends, sources, strict=True)]
        self.bad = {
            first + index: reason
            for first, source in zip(firsts, sources, strict=True)
            for index, reason in source.bad.items()
        }
        self.max_bad = sum(source.max_bad for source in sources)
        self.path = ", ".join(source.path for source in sources)

    def __len__(self) -> int:
        """Records, each counted once whatever its weight."""
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        record = source[index - int(self._ends[number]) + len(source)]
        return replace(record, images=tuple(f"{number}:{name}" for name in record.images))

    @property
    def epoch_size(self) -> int:
        """Records that an epoch shows, by the sources' weights."""
        return self.order(seed=0).size

    def order(self, seed: int) -> EpochOrder:
        """Which records each epoch shows, and where; a function of the seed alone."""
        return EpochOrder(
            [UniformShuffle(len(source), seed, number) for number, source in enumerate(self.sources)],
            seed,
            weights=[source.weight for source in self.sources],
        )

    def digest(self) -> str:
        """As `Conversations.digest`."""
        return file_key(*(source.digest() for source in self.sources))

    def refuse(self, bad: Mapping[int, str]) -> None:
        """As `Conversations.refuse`, of all sources together."""
        self.bad = dict(sorted({**self.bad, **bad}.items()))
        _check_share(self.path, self.bad, len(self), self.max_bad)

    def check_paths(self, record: Record) -> None:
        """As `Conversations.check_paths`."""
        for source, own in self._by_source(record):
            source.check_paths(own)

    def content(self, record: Record, place: int) -> bytes:
        """As `Conversations.content`."""
        ((source, own),) = self._by_source(replace(record, images=(record.images[place],)))
        return source.content(own, 0)

    def pictures(self, record: Record) -> list[Image.Image]:
        """As `Conversations.pictures`."""
        return [picture for source, own in self._by_source(record) for picture in source.pictures(own)]

    def sizes(self, record: Record) -> list[tuple[int, int]]:
        """As `Conversations.sizes`."""
        return [size for source, own in self._by_source(record) for size in source.sizes(own)]

    def _by_source(self, record: Record) -> Iterator[tuple[Conversations, Record]]:
        """Each picture as a record's only one, with its source."""
        for image in record.images:
            number, _, name = image.partition(":")
            yield self.sources[int(number)], replace(record, images=(name,))


def check_sources(data: ConversationData) -> None:
    """Whether all files and image folders are there, without a look at their records.

    Raises:
        DataError, MissingExtraError: as `open_conversations`.
    """
    for node in conversation_sources(data):
        open_records(node.file)
        _check_folder(node.image_folder)


def open_conversations(data: ConversationData) -> Conversations | MixedConversations:
    """The conversations of a stage, all checked.

    Raises:
        DataError: as `Conversations`.
        MissingExtraError: parquet files or a hub data set without the packages that read them.
    """
    sources = [
        Conversations(
            node.file,
            node.image_folder,
            max_bad_share=node.max_bad_share,
            follow_links=node.follow_links,
            separate=node.separate,
            weight=node.weight,
        )
        for node in conversation_sources(data)
    ]
    return sources[0] if len(sources) == 1 else MixedConversations(sources)


def _check_share(path: str, bad: Mapping[int, str], count: int, allowed: int) -> None:
    if len(bad) > allowed:
        listed = "\n".join(f"  {reason}" for reason in list(bad.values())[:5])
        raise DataError(
            f"{path}: {len(bad)} of {count} records cannot be used, max_bad_share allows {allowed}:\n{listed}"
        )


def _check_folder(folder: str | Path | None) -> None:
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"image folder {str(folder)!r} does not exist")


def _is_within(name: str) -> bool:
    """Whether a picture lies in the data itself."""
    return name.startswith((WITHIN, DATA_URL))


def _decoded(url: str) -> bytes:
    head, _, content = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise DataError(f"picture {url:.40} is no base64 data URL ({error})") from None


def feature_names(content: bytes, tiles: int) -> list[str]:
    """What the features of a picture are known by where they are kept: its bytes, and which tile it is."""
    digest = sha256(content).hexdigest()
    return [f"{digest}.{tile}" for tile in range(tiles)]


@dataclass(frozen=True)
class Sample:
    """One conversation ready for the model.

    Attributes:
        input_ids, labels: [T].
        pixels: [pictures, 3, H, W], of all their tiles where there are tiles; or None for text alone.
        patches: [pictures, N, D], or of all their tiles, what the tower makes of them, where that is kept;
            pixels are None then.
        image_sizes: [pictures, 2], their (height, width) where they are in tiles.
        instructions: [tokens] that the projector reads with each picture, if it reads text.
        replaced: (record index, reason) of bad records that this one stands in for.
        truncated: whether its text was cut at max_length.
    """

    input_ids: Tensor
    labels: Tensor
    pixels: Tensor | None
    patches: Tensor | None = None
    instructions: tuple[Tensor, ...] = ()
    replaced: tuple[tuple[int, str], ...] = ()
    truncated: bool = False
    image_sizes: Tensor | None = None

    @property
    def num_pictures(self) -> int:
        seen = self.patches if self.pixels is None else self.pixels
        if self.image_sizes is not None:
            seen = self.image_sizes
        return 0 if seen is None else len(seen)


class ConversationDataset(Dataset[Sample]):
    """Samples of conversations. A bad record is replaced by the next good one, the same at every visit.

    Args:
        features: patches by `feature_names`, in place of pixels; a picture that has none is bad.
        instructions: for a projector that reads text.
        tiles: how pictures are cut, where they are.

    Raises (on access):
        DataError: more bad records than the conversations allow.
    """

    def __init__(
        self,
        conversations: Conversations | MixedConversations,
        chat: ChatFormat,
        image_processor: ImageProcessor,
        *,
        max_length: int,
        too_long: Literal["truncate", "refuse"] = "truncate",
        features: FeatureShards | None = None,
        instructions: Instructions | None = None,
        tiles: TileFormat | None = None,
    ) -> None:
        self.conversations, self.chat, self.image_processor = conversations, chat, image_processor
        self.features, self.instructions, self.tiles = features, instructions, tiles
        self.max_length, self.too_long = max_length, too_long
        self._encoded: dict[tuple[Any, ...], Encoded] = {}

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Sample]:
        """Samples of (epoch, draw) keys; a conversation is the same in every epoch."""
        return [self[draw % len(self)] for _, draw in keys]

    def __getitem__(self, index: int) -> Sample:
        replaced: list[tuple[int, str]] = []
        while True:
            candidate = (index + len(replaced)) % len(self)
            reason = self.conversations.bad.get(candidate)
            if reason is None:
                try:
                    return self.sample(self.conversations[candidate], tuple(replaced))
                except DataError as error:
                    reason = str(error)
            replaced.append((candidate, reason))
            if len(replaced) > self.conversations.max_bad:
                raise DataError(f"{reason}\nmax_bad_share sets how many bad records may be replaced")

    def sample(self, record: Record, replaced: tuple[tuple[int, str], ...] = ()) -> Sample:
        """One record's sample.

        Raises:
            DataError: it cannot be used; names it.
        """
        counts = picture_tokens(self.conversations, record, self.tiles)
        try:
            encoded = self._encode(record.turns, counts)
        except DataError as error:
            raise DataError(f"{record.file}: record {record.id!r}: {error}") from error
        patches = None
        if self.features is None:
            pixels, sizes = self._pixels(record)
        else:
            pixels, (patches, sizes) = None, self._patches(self.features, record)
        return Sample(
            torch.tensor(encoded.input_ids),
            torch.tensor(encoded.labels),
            pixels,
            patches,
            () if self.instructions is None else tuple(self.instructions(record.turns)),
            replaced,
            encoded.truncated,
            sizes,
        )

    def _pixels(self, record: Record) -> tuple[Tensor | None, Tensor | None]:
        pictures = self.conversations.pictures(record)
        if not pictures:
            return None, None
        if self.tiles is not None:
            return self.tiles(pictures)
        return self.image_processor.normalise(
            [self.image_processor.to_square(picture) for picture in pictures]
        ), None

    def _patches(self, features: FeatureShards, record: Record) -> tuple[Tensor, Tensor | None]:
        if not record.images:
            return torch.empty(0, *features.manifest.shape), None
        sizes = None if self.tiles is None else self.conversations.sizes(record)
        rows = []
        for place, shown in enumerate(record.images):
            count = 1 if sizes is None or self.tiles is None else self.tiles.num_tiles(sizes[place])
            names = feature_names(self.conversations.content(record, place), count)
            if not all(name in features for name in names):
                self.conversations.pictures(record)  # says what is wrong with it
                raise DataError(
                    f"{record.file}: record {record.id!r}: picture {shown:.40} has no features in "
                    f"{features.folder}: it was not there, or another, when the stage began"
                )
            rows += [features[name] for name in names]
        heights = None if sizes is None else torch.tensor([(height, width) for width, height in sizes])
        return torch.stack(rows), heights

    def _encode(self, turns: tuple[Turn, ...], counts: tuple[int, ...] | None) -> Encoded:
        """Tokens of a conversation; kept for the next time, as the same is asked about many pictures."""
        key = turns, counts
        if key not in self._encoded:
            if len(self._encoded) == _KEPT:
                self._encoded.clear()
            self._encoded[key] = self.chat.encode(turns, self.max_length, self.too_long, counts)
        return self._encoded[key]


def picture_tokens(
    conversations: Conversations | MixedConversations, record: Record, tiles: TileFormat | None
) -> tuple[int, ...] | None:
    """Tokens of each of a record's pictures, by their headers; None where all pictures take the same.

    Raises:
        DataError: a picture that cannot be read, or is too thin for every size of tiles.
    """
    if tiles is None:
        return None
    sizes = conversations.sizes(record)
    try:
        return tuple(map(tiles.num_tokens, sizes))
    except DataError as error:
        raise DataError(f"{record.file}: record {record.id!r}: {error}") from error


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to the longest, one in a row or, packed, several.

    Attributes:
        input_ids, attention_mask, labels: [B,T]; packed, the mask counts the samples of a row from 1.
        position_ids: [B,T], anew with each sample; None where they are not packed.
        pixels: [P,3,H,W], pictures of all samples in order, or all their tiles; or None.
        patches: [P,N,D] in their place, a tile each as well, where a tower's features are kept; P = 0 for
            text alone; or None.
        text: `text_ids` and `text_mask` [P,T], what is asked about each picture; or None.
        replaced, truncated: what happened to its samples.
        image_sizes: [P,2], (height, width) of all pictures in order, where they are in tiles; or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixels: Tensor | None
    patches: Tensor | None
    text: dict[str, Tensor] | None
    replaced: tuple[tuple[int, str], ...]
    truncated: int
    position_ids: Tensor | None = None
    padded_positions: int = 0
    """Places that the samples would take one in a row."""
    image_sizes: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Places that hold no padding."""
        return int((self.attention_mask > 0).sum())

    @property
    def num_labels(self) -> int:
        """Tokens that the loss is taken over; the first of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


def collate(samples: Sequence[Sample], pad_id: int, pack_to: int | None = None) -> Batch:
    """Pad and stack samples.

    Args:
        pack_to: put several samples into a row, of so many tokens at most; its first token is never learnt.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    rows = [[place] for place in range(len(samples))]
    if pack_to is not None:
        rows = pack([len(sample.input_ids) for sample in samples], pack_to)
        samples = [samples[place] for row in rows for place in row]  # pictures in the order of the rows
    members, at = [], 0
    for row in rows:
        members.append(samples[at : at + len(row)])
        at += len(row)
    ids = [torch.cat([sample.input_ids for sample in row]) for row in members]
    labels = [torch.cat([_without_first(sample.labels) for sample in row]) for row in members]
    numbers = [
        torch.cat([torch.full_like(sample.input_ids, n) for n, sample in enumerate(row, start=1)])
        for row in members
    ]
    positions = [torch.cat([torch.arange(len(sample.input_ids)) for sample in row]) for row in members]
    pictures = [sample.pixels for sample in samples if sample.pixels is not None]
    patches = [sample.patches for sample in samples if sample.patches is not None]
    sizes = [sample.image_sizes for sample in samples if sample.image_sizes is not None]
    instructions = [tokens for sample in samples for tokens in sample.instructions]
    return Batch(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad_id),
        attention_mask=pad_sequence(numbers, batch_first=True),
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        pixels=torch.cat(pictures) if pictures else None,
        patches=torch.cat(patches) if patches else None,
        text=stack_instructions(instructions) if instructions else None,
        replaced=tuple(entry for sample in samples for entry in sample.replaced),
        truncated=sum(sample.truncated for sample in samples),
        position_ids=None if pack_to is None else pad_sequence(positions, batch_first=True),
        padded_positions=longest * len(samples),
        image_sizes=torch.cat(sizes) if sizes else None,
    )


def _without_first(labels: Tensor) -> Tensor:
    """Labels of a sample, the first of which nothing before it predicts."""
    return torch.cat([labels.new_full((1,), IGNORE_INDEX), labels[1:]])
