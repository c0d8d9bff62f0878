"""Where pictures with captions come from: tables in files, folders, hub data sets; tars are in `shards`."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_vision.errors import DataError, first_line, nearest, require
from vlm_vision.files import is_inside
from vlm_vision.picture_list import expand_braces
from vlm_vision.pictures import PICTURE_SUFFIXES
from vlm_vision.train.file_cache import FileCache, file_key
from vlm_vision.train.order import Shuffle, UniformShuffle
from vlm_vision.train.pairs_config import PairsConfig

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

HUB = "hub:"
_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class SourceError(DataError):
    """A source, or a whole tar of it, cannot be read: no other sample can take its place."""


class Source(Protocol):
    """Pictures by their number, each with its captions. One may turn out unreadable when it is read.

    Attributes:
        config: what was asked for.
        num_pairs: captions of all pictures; of tars, whose captions are not read beforehand, the samples.
        bad_rows: rows left out, each with its reason.
        lanes: that `order` deals the pictures to; 1 where any process may read any picture.
    """

    config: PairsConfig
    num_pairs: int
    bad_rows: Sequence[str]
    lanes: int

    def __len__(self) -> int: ...

    def texts(self, index: int) -> tuple[list[str], list[str]]:
        """Captions, and for each its hard negative; none of those without `negative_column`.

        Raises:
            DataError: names the sample.
            SourceError: not one of its neighbours can be read either.
        """
        ...

    def content(self, index: int) -> bytes:
        """The bytes of the picture's file; raises as `texts`."""
        ...

    def name(self, index: int) -> str:
        """What the picture is called."""
        ...

    def place(self, index: int) -> str:
        """What the picture is called, and where."""
        ...

    def replacements(self, index: int) -> Iterator[int]:
        """A picture and those to take where it cannot be read, one after another."""
        ...

    def shuffle(self, seed: int, source: int) -> Shuffle:
        """The order of its pictures, where it is the run's source number so many."""
        ...


def open_source(config: PairsConfig) -> Source:
    """The source that a config describes.

    Raises:
        DataError: it is not there or cannot be read, has no such column, or has more rows without a caption
            than `max_bad_share` allows.
        MissingExtraError: packages that are not installed.
    """
    require("train", "datasets")
    from vlm_vision.train.shards import Shards, find_shards

    shards = find_shards(config.path)
    return Shards(config, shards) if shards else Table(config)


def is_there(config: PairsConfig) -> bool:
    """Whether a source is on this machine, as far as it can be told without fetching anything."""
    return bool(find_files(config.path))


def find_files(path: str) -> list[str]:
    """Files and folders that a path with `*` or `{0..9}` stands for, in the order of their names."""
    found = []
    for name in expand_braces(path):
        if Path(name).exists():
            found.append(name)
        elif has_magic(name):
            found += sorted(glob(name, recursive=True))
    return found


class Table:
    """Rows of files, folders or hub data sets, memory-mapped. Rows that name the same picture share it."""

    lanes = 1

    def __init__(self, config: PairsConfig) -> None:
        """Read the table and check it; raises as `open_source`."""
        self.config = config
        self._table, malformed = _load_table(config)
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._check_columns()
        self._left_out = np.fromiter(malformed, dtype=np.int64)
        self._root = os.path.realpath(_image_folder(config))
        self._class_names = getattr(self._table.features[config.caption_column], "names", None)
        rows, places, missing = self._find_captions()
        self.bad_rows: Sequence[str] = [
            *(f"{config.path}, row {row + 1}: {reason}" for row, reason in malformed.items()),
            *(f"{config.path}, row {self._number(row)}: {reason}" for row, reason in missing),
        ]
        self.num_pairs = len(rows)
        self._check_captions()
        pictures = self._picture_of_row()[rows]
        order = np.argsort(pictures, kind="stable")
        self._rows, self._places = rows[order], places[order]
        changes = np.flatnonzero(np.diff(pictures[order])) + 1
        self._starts = np.concatenate([[0], changes, [len(rows)]])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def texts(self, index: int) -> tuple[list[str], list[str]]:
        captions, negatives, negative_column = [], [], self.config.negative_column
        for entry in range(self._starts[index], self._starts[index + 1]):
            row, place = int(self._rows[entry]), int(self._places[entry])
            captions.append(self._text(self.config.caption_column, row, place))
            if negative_column is not None:
                negatives.append(self._text(negative_column, row, place))
        return captions, negatives

    def content(self, index: int) -> bytes:
        value = self._picture(index)
        if isinstance(value, bytes):
            return value
        if not value:
            raise DataError(f"{self._row_name(index)}: column {self.config.image_column!r} is empty")
        try:
            return Path(self._path(str(value), index)).read_bytes()
        except FileNotFoundError:
            raise DataError(f"{self._row_name(index)}: picture {value!r} does not exist") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{self.place(index)}: cannot be read: {first_line(error)}") from error

    def name(self, index: int) -> str:
        value = self._picture(index)
        return value if isinstance(value, str) and value else f"row {self._number(self._first_row(index))}"

    def place(self, index: int) -> str:
        value = self._picture(index)
        return f"{self._row_name(index)}: {value}" if isinstance(value, str) else self._row_name(index)

    def replacements(self, index: int) -> Iterator[int]:
        return chain(range(index, len(self)), range(index))

    def shuffle(self, seed: int, source: int) -> Shuffle:
        return UniformShuffle(len(self), seed, source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": {}}  # the table is mapped again, its columns would be copied

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns:
            self._columns[name] = self._table.data.column(name)
        return self._columns[name]

    def _check_columns(self) -> None:
        known, config = self._table.column_names, self.config
        for column in (config.image_column, config.caption_column, config.negative_column):
            if column is not None and column not in known:
                raise DataError(
                    f"{config.path}: no column {column!r}{nearest(column, known)} "
                    f"(columns: {', '.join(known)})"
                )

    def _check_captions(self) -> None:
        config, bad = self.config, len(self.bad_rows)
        if not self.num_pairs:
            raise DataError(
                f"{config.path}: no row has a caption in column {config.caption_column!r}"
                + (f"; {self.bad_rows[0]}" if bad else "")
            )
        allowed = max_bad(config, self.num_pairs + bad)
        if bad > allowed:
            raise DataError(
                f"{bad:,} of {self.num_pairs + bad:,} rows cannot be used, max_bad_share allows {allowed:,}: "
                f"mend them, or raise it\n" + "\n".join(f"  {row}" for row in self.bad_rows[:10])
            )

    def _find_captions(self) -> tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[int, str]]]:
        """Row of each caption, its place in the row's list, and (row, reason) of those that are none."""
        config = self.config
        rows, places, good = self._entries(config.caption_column)
        reasons = dict.fromkeys(np.flatnonzero(~good).tolist(), config.caption_column)
        if config.negative_column is not None:
            negative_rows, negative_places, has_negative = self._entries(config.negative_column)
            if not (np.array_equal(rows, negative_rows) and np.array_equal(places, negative_places)):
                raise DataError(
                    f"{config.path}: columns {config.caption_column!r} and {config.negative_column!r} have "
                    "not as many texts in each row"
                )
            without = np.flatnonzero(good & ~has_negative).tolist()
            reasons.update(dict.fromkeys(without, config.negative_column))
            good &= has_negative
        missing = []
        for entry, column in sorted(reasons.items()):
            text = self._text(column, int(rows[entry]), int(places[entry]))
            missing.append((int(rows[entry]), f"{text!r} in column {column!r} is no caption"))
        return rows[good], places[good], missing

    def _entries(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Row and place of each text of a column, and whether it says anything; an empty list is one text."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._column(name)
        rows, places, good, first = [], [], [], 0
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        for chunk in column.chunks:
            row = np.arange(len(chunk), dtype=np.int64)
            place = np.zeros(len(chunk), dtype=np.int64)
            texts = chunk
            if is_list:
                lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
                texts = chunk.flatten()
                if (lengths == 0).any():
                    padded = chain.from_iterable(texts or [None] for texts in chunk.to_pylist())
                    texts = pa.array(list(padded), chunk.type.value_type)
                counts = np.maximum(lengths, 1).astype(np.int64)
                row = np.repeat(row, counts)
                place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
            rows.append(first + row)
            places.append(place)
            good.append(self._says_something(name, texts))
            first += len(chunk)
        if not rows:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.bool_)
        return np.concatenate(rows), np.concatenate(places), np.concatenate(good)

    def _says_something(self, name: str, texts: pa.Array) -> NDArray[np.bool_]:
        """`PairsConfig.is_caption` of a whole column."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._class_names is not None and name == self.config.caption_column:
            known: NDArray[np.bool_] = pc.fill_null(pc.greater_equal(texts, 0), False).to_numpy(False)
            return known
        try:
            words = pc.utf8_lower(pc.utf8_trim_whitespace(pc.cast(texts, pa.large_string())))
        except pa.ArrowException as error:
            raise DataError(
                f"{self.config.path}: captions must be text, not {texts.type} ({first_line(error)})"
            ) from error
        none = pa.array(["", *self.config.missing_captions], pa.large_string())
        says = pc.and_(words.is_valid(), pc.invert(pc.is_in(words, none)))
        found: NDArray[np.bool_] = says.to_numpy(zero_copy_only=False)
        return found

    def _picture_of_row(self) -> NDArray[np.int64]:
        """A number for each row, the same where rows name the same picture file."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._column(self.config.image_column)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return np.arange(len(column))
        codes = pc.fill_null(column, "").dictionary_encode()  # one dictionary for all its chunks
        return np.concatenate([chunk.indices.to_numpy() for chunk in codes.chunks]).astype(np.int64)

    def _text(self, column: str, row: int, place: int) -> str:
        value = self._column(column)[row].as_py()
        if isinstance(value, list):
            value = value[place] if value else None
        if value is None:
            return ""
        if self._class_names is not None and column == self.config.caption_column:
            return str(self._class_names[value]).replace("_", " ") if value >= 0 else str(value)
        return str(value).strip()

    def _picture(self, index: int) -> Any:
        """Bytes, or the path of a file."""
        value = self._column(self.config.image_column)[self._first_row(index)].as_py()
        if isinstance(value, dict):  # the layout of Hugging Face image columns
            return value.get("bytes") or value.get("path")
        return value

    def _path(self, name: str, index: int) -> str:
        path = os.path.join(self._root, name)
        # The paths of a hub data set are those of its files, wherever the library has put them.
        if not self.config.path.startswith(HUB) and not is_inside(path, self._root):
            raise DataError(
                f"{self._row_name(index)}: picture {name!r} lies outside the image folder {self._root}; "
                "set image_folder"
            )
        return path

    def _first_row(self, index: int) -> int:
        return int(self._rows[self._starts[index]])

    def _row_name(self, index: int) -> str:
        return f"{self.config.path}, row {self._number(self._first_row(index))}"

    def _number(self, row: int) -> int:
        """What a row counts as in the file, from 1, with the malformed ones that were left out."""
        before = np.searchsorted(self._left_out - np.arange(len(self._left_out)), row, side="right")
        return row + int(before) + 1


def max_bad(config: PairsConfig, count: int) -> int:
    """How many of so many samples may be bad."""
    return int(config.max_bad_share * count + 1e-9)


def _image_folder(config: PairsConfig) -> str:
    if config.image_folder is not None:
        return config.image_folder
    path = config.path.removeprefix(HUB).rpartition("@")[0] if config.path.startswith(HUB) else config.path
    found = find_files(path)
    return path if Path(path).is_dir() else os.path.dirname(found[0] if found else path)


def _load_table(config: PairsConfig) -> tuple[datasets.Dataset, Mapping[int, str]]:
    """The table, and the rows that could not be read at all, each with its reason."""
    import datasets

    datasets.disable_progress_bars()
    if config.path.startswith(HUB):
        return load_hub(config.path), {}
    path = Path(config.path)
    if path.is_dir():
        files = sorted(map(str, path.glob("*.parquet")))
        if not files:
            return _folder_table(path, config), {}
    else:
        files = find_files(config.path)
    if not files:
        siblings = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"data file {config.path!r} does not exist{nearest(config.path, siblings)}")
    kinds = {_READERS.get(Path(file).suffix.lower()) for file in files}
    if None in kinds:
        raise DataError(f"{config.path}: data must be a folder or one of {', '.join(_READERS)}, or tars")
    if len(files) > 1 and kinds != {"parquet"}:
        raise DataError(f"{config.path}: {len(files)} files, but only parquet files and tars can be several")
    (kind,) = kinds
    assert kind is not None
    try:
        return load_files(files, kind), {}
    except DataError:
        if kind == "parquet":
            raise
        count, malformed = _malformed_rows(files[0], kind)
        if not malformed:
            raise
    if len(malformed) > max_bad(config, count):
        more = f", and {len(malformed) - 1:,} more of {count:,} rows" if len(malformed) > 1 else ""
        raise DataError(
            f"{config.path}: cannot be read as {kind}: {next(iter(malformed.values()))}{more}: mend them, or "
            "raise max_bad_share to leave them out"
        )
    return load_files([_copy_without(files[0], kind, malformed)], kind), malformed


def load_files(files: Sequence[str], kind: str) -> datasets.Dataset:
    """Files of one kind as a table that is memory-mapped.

    Raises:
        DataError: one cannot be read as that.
    """
    import datasets

    options = _csv_options(Path(files[0])) if kind == "csv" else {}
    try:
        return datasets.load_dataset(
            kind, data_files=[str(Path(file).resolve()) for file in files], split="train", **options
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise DataError(f"{files[0]}: cannot be read as {kind}: {cause}") from error


def load_hub(path: str) -> datasets.Dataset:
    """`hub:owner/name`, `hub:owner/name:subset`, each with `@split`; a local folder is named the same way."""
    import datasets

    name, _, split = path.removeprefix(HUB).partition("@")
    name, _, subset = name.partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split=split or "train")
    except (
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetGenerationError,
        ValueError,
        OSError,
    ) as error:
        cause = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise DataError(f"{path}: cannot be loaded: {cause}") from error


def _folder_table(folder: Path, config: PairsConfig) -> datasets.Dataset:
    import datasets

    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise DataError(
            f"{folder}: no pictures in class folders (expected {folder}/CLASS/PICTURE.jpg), no parquet file, "
            "no tar"
        )
    return datasets.Dataset.from_dict(
        {
            config.image_column: [path.relative_to(folder).as_posix() for path in files],
            config.caption_column: [path.parent.name.replace("_", " ") for path in files],
        }
    )


def _csv_options(path: Path) -> dict[str, Any]:
    """How to read a CSV: every column as text, for else a picture `0001` becomes a number."""
    import datasets

    separator, columns = _csv_header(path)
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    return {"sep": separator, "keep_default_na": False, "features": features}


def _csv_header(path: Path) -> tuple[str, list[str]]:
    """Separator and columns of a CSV; open_clip takes the tab unless told, and most files have commas."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    try:
        separator = csv.Sniffer().sniff(header, delimiters=",\t;|").delimiter
    except csv.Error:  # a single column
        separator = ","
    return separator, next(csv.reader([header], delimiter=separator), [])


def _malformed_rows(path: str, kind: str) -> tuple[int, dict[int, str]]:
    """Rows of a CSV or JSONL that does not load as a whole, and those of them to blame, with reasons."""
    count, malformed = 0, {}
    for count, (line, row, reason) in enumerate(_rows(Path(path), kind), start=1):
        if row is None:
            malformed[count - 1] = f"line {line}: {reason}"
    return count, malformed


def _copy_without(path: str, kind: str, malformed: Mapping[int, str]) -> str:
    """A copy without rows that are malformed, to be read in the file's place."""

    def write(copy: Path) -> None:
        with copy.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=_csv_header(Path(path))[0])
            if kind == "csv":
                writer.writerow(_csv_header(Path(path))[1])
            for _, row, _ in _rows(Path(path), kind):
                if isinstance(row, str):
                    file.write(row)
                elif row is not None:
                    writer.writerow(row)

    facts = os.stat(path)
    name = file_key(os.path.realpath(path), facts.st_size, facts.st_mtime_ns) + Path(path).suffix
    return str(FileCache(float("inf")).path(name, write))


def _rows(path: Path, kind: str) -> Iterator[tuple[int, str | list[str] | None, str]]:
    """Line number of each row and the row, or in its place None and what is wrong with it."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if kind == "csv":
            separator, columns = _csv_header(path)
            reader = csv.reader(file, delimiter=separator)
            next(reader, None)
            for cells in reader:
                fits = len(cells) <= len(columns)
                reason = "" if fits else f"{len(cells)} fields, where the header has {len(columns)}"
                if cells:
                    yield reader.line_num, cells if fits else None, reason
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = line.rstrip("\r\n") + "\n" if isinstance(json.loads(line), dict) else None
                yield number, row, "is no JSON object"
            except ValueError as error:
                yield number, None, f"is not JSON: {error}"
