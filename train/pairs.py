"""Pictures with captions from files, read in an order that depends only on (seed, epoch)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vlm_vision.errors import DataError, nearest, require
from vlm_vision.files import is_inside
from vlm_vision.preprocess import ImageProcessor, open_image
from vlm_vision.text import Tokenizer
from vlm_vision.train.augment import augment
from vlm_vision.train.pairs_config import AugmentConfig, PairsConfig

if TYPE_CHECKING:
    import datasets

SampleKey = tuple[int, int]  # (epoch, index)

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class Pairs:
    """The table behind a `PairsConfig`: pictures, each with its captions. Memory-mapped, never all in memory.

    Attributes:
        num_pairs: rows with a caption.
        dropped: rows left out for an empty caption.
    """

    def __init__(self, config: PairsConfig) -> None:
        """Read the table and check it.

        Raises:
            DataError: no such file or column, or nothing left to read.
        """
        self.config = config
        self.root = Path(
            config.image_folder or (path if (path := Path(config.path)).is_dir() else path.parent)
        )
        self._real_root = os.path.realpath(self.root)
        self._table = _load_table(config)
        for column in (config.image_column, config.caption_column):
            if column not in self._table.column_names:
                raise DataError(
                    f"{config.path}: no column {column!r}{nearest(column, self._table.column_names)} "
                    f"(columns: {', '.join(self._table.column_names)})"
                )
        self._captions: list[str] = [
            "" if text is None else str(text).strip() for text in self._table[config.caption_column]
        ]
        self._rows = self._group_by_picture()
        self.num_pairs = sum(len(rows) for rows in self._rows)
        self.dropped = len(self._captions) - self.num_pairs
        if not self._rows:
            raise DataError(f"{config.path}: no row has a caption in column {config.caption_column!r}")

    def __len__(self) -> int:
        return len(self._rows)

    def captions(self, index: int) -> list[str]:
        """Every caption of a picture, without templates."""
        return [self._captions[row] for row in self._rows[index]]

    def open(self, index: int) -> Image.Image:
        """Decode a picture.

        Raises:
            DataError: names the file or row.
        """
        row = int(self._rows[index][0])
        value = self._table[row][self.config.image_column]
        if isinstance(value, dict):  # the layout of Hugging Face image columns
            value = value.get("bytes") or value.get("path")
        try:
            if not value:
                raise DataError(f"column {self.config.image_column!r} is empty")
            return open_image(value if isinstance(value, bytes) else self._inside_root(str(value)))
        except DataError as error:
            raise DataError(f"{self.config.path}, row {row + 1}: {error}") from error

    def name(self, index: int) -> str:
        """A picture's path, or its row where the table holds the bytes."""
        row = int(self._rows[index][0])
        value = self._table[row][self.config.image_column]
        return value if isinstance(value, str) else f"row {row + 1}"

    def _inside_root(self, name: str) -> str:
        path = os.path.join(self._real_root, name)
        if not is_inside(path, self._real_root):
            raise DataError(f"picture {name!r} lies outside the image folder {self.root}; set image_folder")
        return path

    def _group_by_picture(self) -> list[np.ndarray[Any, Any]]:
        kept = [row for row, caption in enumerate(self._captions) if caption]
        column = self._table.select_columns([self.config.image_column])
        if not kept or not isinstance(column[kept[0]][self.config.image_column], str):
            return [np.array([row]) for row in kept]
        paths = column[self.config.image_column]
        groups: dict[str, list[int]] = {}
        for row in kept:
            groups.setdefault(paths[row], []).append(row)
        return [np.array(rows) for rows in groups.values()]


class TrainingPairs(Dataset[Any]):
    """Augmented squares and tokens for a list of (epoch, index) keys, each drawn from its own generator.

    A picture that cannot be read is replaced by the next one that can, if the config allows any; the batch
    tells which. An error comes back in place of the batch: one raised in a worker turns into a traceback.
    """

    def __init__(
        self, pairs: Pairs, processor: ImageProcessor, tokenizer: Tokenizer, config: AugmentConfig, seed: int
    ) -> None:
        self.pairs, self.augment, self.seed = pairs, config, seed
        self.size = processor.config.image_size
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch | DataError:
        try:
            return self._batch(keys)
        except DataError as error:
            return error

    def _batch(self, keys: Sequence[SampleKey]) -> Batch:
        squares: list[np.ndarray[Any, Any]] = []
        texts: list[str] = []
        bad: list[str] = []
        for epoch, index in keys:
            random = np.random.default_rng([self.seed, epoch, index])
            image, used = self._open(index, bad)
            squares.append(np.asarray(augment(image, self.size, self.augment, random)))
            captions, templates = self.pairs.captions(used), self.pairs.config.templates
            caption = captions[random.integers(len(captions))]
            texts.append(templates[random.integers(len(templates))].replace("{}", caption))
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        is_truncated = [self.tokenizer.is_truncated(text) for text in distinct]
        which = [distinct[text] for text in texts]
        return Batch(
            squares=torch.from_numpy(np.stack(squares)),
            tokens=self.tokenizer(list(distinct)),
            captions=torch.tensor(which),
            bad=bad,
            truncated=sum(is_truncated[number] for number in which),
            indices=torch.tensor([index for _, index in keys]),
            names=[self.pairs.name(index) for _, index in keys],
            texts=texts,
            identities=torch.stack([torch.tensor(which), torch.tensor([i for _, i in keys])], 1),
        )

    def _open(self, index: int, bad: list[str]) -> tuple[Image.Image, int]:
        for step in range(len(self.pairs)):
            candidate = (index + step) % len(self.pairs)
            try:
                return self.pairs.open(candidate), candidate
            except DataError as error:
                if self.pairs.config.max_bad_share == 0:
                    raise
                bad.append(str(error))
        raise DataError(f"{self.pairs.config.path}: not one picture can be read; the last says: {bad[-1]}")


@dataclass
class Batch:
    """B pairs, which have C distinct captions: class names in templates repeat, and embed alike.

    Attributes:
        squares: pictures as bytes.
        tokens: of the distinct captions.
        captions: for each picture, which of them is its own.
        bad: pictures that were replaced, each with its error.
        truncated: pairs whose caption is longer than the text tower takes.
    """

    squares: UInt8[Tensor, "b h w 3"]
    tokens: Int[Tensor, "c t"]
    captions: Int[Tensor, " b"]
    bad: list[str]
    truncated: int
    indices: Any = None
    names: Any = None
    texts: Any = None
    identities: Any = None
    negatives: Any = None
    replay: Any = None

    @property
    def num_captions(self) -> int:
        return len(self.tokens)

    def part(self, rows: slice) -> Batch:
        """Some of the pairs, with their distinct captions."""
        kept, captions = self.captions[rows].unique(return_inverse=True)
        return replace(
            self,
            squares=self.squares[rows],
            tokens=self.tokens[kept],
            captions=captions,
            indices=self.indices[rows],
            names=self.names[rows],
            texts=self.texts[rows],
            identities=self.identities[rows],
        )

    def pin_memory(self) -> Batch:
        return replace(
            self,
            squares=self.squares.pin_memory(),
            tokens=self.tokens.pin_memory(),
            captions=self.captions.pin_memory(),
        )


class EpochBatches(Sampler[list[SampleKey]]):
    """This rank's keys of every global batch from a step on; order depends only on (seed, epoch).

    Each epoch is a permutation; pictures that do not fill its last batch sit that epoch out.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, start: int, stop: int, rank: int, world: int
    ) -> None:
        """Batches of global steps `start` to `stop`.

        Raises:
            DataError: fewer pictures than one batch, or a batch that does not divide among the ranks.
        """
        if size < batch_size:
            raise DataError(
                f"the data has {size} pictures, fewer than one batch of {batch_size}: lower batch_size"
            )
        if batch_size % world:
            raise DataError(f"batch_size {batch_size} does not divide among {world} ranks")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[SampleKey]]:
        per_epoch, share = self.size // self.batch_size, self.batch_size // self.world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            first = (step % per_epoch) * self.batch_size + self.rank * share
            yield [(epoch, int(index)) for index in order[first : first + share]]


def _load_table(config: PairsConfig) -> datasets.Dataset:
    require("train", "datasets")
    import datasets

    datasets.disable_progress_bars()
    path = Path(config.path)
    if path.is_dir():
        return _folder_table(path, config)
    if not path.is_file():
        siblings = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"data file {str(path)!r} does not exist{nearest(str(path), siblings)}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: data must be a folder or one of {', '.join(_READERS)}")
    options = _csv_options(path) if reader == "csv" else {}
    try:
        table = datasets.load_dataset(reader, data_files=str(path.resolve()), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as {reader}: {cause}") from error
    image = table.features.get(config.image_column)
    if isinstance(image, datasets.Image):  # decoded by our own rule instead
        table = table.cast_column(config.image_column, datasets.Image(decode=False))
    return table


def _folder_table(folder: Path, config: PairsConfig) -> datasets.Dataset:
    import datasets

    suffixes = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in suffixes)
    if not files:
        raise DataError(f"{folder}: no pictures in class folders (expected {folder}/CLASS/PICTURE.jpg)")
    return datasets.Dataset.from_dict(
        {
            config.image_column: [path.relative_to(folder).as_posix() for path in files],
            config.caption_column: [path.parent.name.replace("_", " ") for path in files],
        }
    )


def _csv_options(path: Path) -> dict[str, Any]:
    """How to read a CSV: separator from the header, for open_clip's default is the tab and most files have
    commas; every column as text, for else a picture `0001` becomes a number.
    """
    import datasets

    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    try:
        separator = csv.Sniffer().sniff(header, delimiters=",\t;|").delimiter
    except csv.Error:  # a single column
        separator = ","
    columns = next(csv.reader([header], delimiter=separator), [])
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    return {"sep": separator, "keep_default_na": False, "features": features}


def write_bad_list(path: Path, bad: Sequence[str]) -> None:
    """Append what could not be read, one JSON line each."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"error": error}) + "\n" for error in bad)
