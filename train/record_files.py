"""Records one by one out of JSON lists, JSONL, parquet files and hub data sets; none is held in memory."""

from __future__ import annotations

import codecs
import json
import os
from array import array
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlm_vision.errors import DataError, nearest, require
from vlm_vision.progress import progress_bar
from vlm_vision.train.sources import HUB, find_files, load_files, load_hub

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

WITHIN = "#"
"""Begins the name of a picture whose bytes lie in the table: `#row.place`."""

_CHUNK = 1 << 20  # bytes
_PATIENCE = 2.0  # seconds of reading without a bar
_ROWS = 1000  # of a table at once
_IMAGES = ("image", "images")
_TALKS = {"conversations", "messages"}


class RecordFile(Protocol):
    """Raw records by their number. Iterating reads all once, in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: int) -> Any: ...

    def picture(self, name: str) -> bytes:
        """The bytes behind a name that begins with WITHIN."""
        ...

    def digest(self) -> str:
        """A hash of all records; of pictures within them, only that they are there."""
        ...


def open_records(file: str | Path) -> RecordFile:
    """Whatever `ConversationConfig.file` names.

    Raises:
        DataError: no such file, or one of a kind that is not read.
        MissingExtraError: a table, without the packages that read it.
    """
    name = str(file)
    if name.startswith(HUB):
        return TableRecords(name)
    if Path(name).is_dir() or name.endswith(".parquet"):
        return TableRecords(name)
    path = Path(name)
    if not path.is_file():
        siblings = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"conversation file {name!r} does not exist{nearest(name, siblings)}")
    return JsonRecords(path)


def holds_conversations(file: str) -> bool:
    """Whether a data source is one of conversations, by its first record: captions come in tables as well.

    Raises:
        DataError: it is there, and cannot be read or holds no record.
    """
    if not file.startswith(HUB) and not file.endswith(".parquet"):
        path = Path(file)
        if path.suffix in (".json", ".jsonl") and path.is_file():
            first = next((raw for _, _, raw in _scan(path)), None)
            if first is None:
                raise DataError(f"{path} holds no record")
            return isinstance(first, dict) and bool(_TALKS & first.keys())
        if not (path.is_dir() and any(path.glob("*.parquet"))):
            return False
    elif not file.startswith(HUB) and not find_files(file):
        return False
    return bool(_TALKS & set(TableRecords(file).table.column_names))


class JsonRecords:
    """A JSON list or a JSONL file; memory holds where each record begins and ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self._sizes = array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Any]:
        """Raises DataError where the file is no JSON."""
        del self._starts[:], self._sizes[:]
        total, others = self.path.stat().st_size, os.environ.get("RANK", "0") != "0"
        with progress_bar(total, f"read {self.path.name}", disable=others, delay=_PATIENCE, unit="B") as bar:
            for start, size, raw in _scan(self.path):
                self._starts.append(start)
                self._sizes.append(size)
                yield raw
                bar.update(start + size - bar.n)
            bar.update(total - bar.n)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return json.loads(file.read(self._sizes[index]))

    def picture(self, name: str) -> bytes:
        raise DataError(f"{self.path}: picture {name!r} is of a table, and this is JSON")

    def digest(self) -> str:
        found = sha256()
        with self.path.open("rb") as file:
            while piece := file.read(_CHUNK):
                found.update(piece)
        return found.hexdigest()


class TableRecords:
    """Rows of parquet files or of a hub data set, memory-mapped; pictures are read when asked for."""

    def __init__(self, name: str) -> None:
        require("train", "datasets")
        import datasets

        datasets.disable_progress_bars()
        self.name = name
        self.table: datasets.Dataset = load_hub(name) if name.startswith(HUB) else _load_parquet(name)
        self._arrow: pa.Table | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _ROWS):
            yield from self._records(first, min(first + _ROWS, len(self)))

    def __getitem__(self, index: int) -> Any:
        return self._records(index, index + 1)[0]

    def picture(self, name: str) -> bytes:
        row, place = map(int, name.removeprefix(WITHIN).split("."))
        table = self._rows(row, row + 1)
        (column,) = (column for column in _IMAGES if column in table.column_names)
        value = table.column(column)[0].as_py()
        value = value[place] if isinstance(value, list) else value
        content: bytes = value["bytes"] if isinstance(value, dict) else value
        return content

    def digest(self) -> str:
        found = sha256()
        for raw in self:
            found.update(f"{raw!r}\n".encode())
        return found.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrow": None}  # the data set is mapped again, this would be copied

    def _rows(self, first: int, stop: int) -> pa.Table:
        rows: pa.Table = self.table.with_format("arrow")[first:stop]
        return rows

    def _records(self, first: int, stop: int) -> list[dict[str, Any]]:
        table = self._rows(first, stop)
        columns = {}
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            if name in _IMAGES:
                columns[name] = [_named(value, row) for row, value in enumerate(_light(column), start=first)]
            else:
                columns[name] = column.to_pylist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _load_parquet(name: str) -> datasets.Dataset:
    files = sorted(map(str, Path(name).glob("*.parquet"))) if Path(name).is_dir() else find_files(name)
    if not files:
        raise DataError(f"{name!r}: there is no parquet file")
    return load_files(files, "parquet")


def _light(column: Any) -> list[Any]:
    """Of each picture its path, or WITHIN in place of bytes, which are not read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in _light(chunk)]
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        flat, at, lists = _light(column.flatten()), 0, []
        for length in pc.list_value_length(column).to_pylist():
            lists.append(None if length is None else flat[at : at + length])
            at += length or 0
        return lists
    if pa.types.is_struct(kind):
        known = {kind.field(number).name for number in range(kind.num_fields)}
        paths = pc.struct_field(column, "path").to_pylist() if "path" in known else [None] * len(column)
        if "bytes" not in known:
            return paths
        within = pc.struct_field(column, "bytes").is_valid().to_pylist()
        return [WITHIN if inside else path for inside, path in zip(within, paths, strict=True)]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [WITHIN if inside else None for inside in column.is_valid().to_pylist()]
    values: list[Any] = column.to_pylist()
    return values


def _named(value: Any, row: int) -> Any:
    """Pictures within a row, by their row and place."""
    if isinstance(value, list):
        return [f"{WITHIN}{row}.{place}" if one == WITHIN else one for place, one in enumerate(value)]
    return f"{WITHIN}{row}.0" if value == WITHIN else value


def _scan(path: Path) -> Iterator[tuple[int, int, Any]]:
    """(first byte, size in bytes, parsed value) of every record, reading the file once in pieces."""
    with path.open("rb") as file:
        head = file.read(_CHUNK)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: is UTF-16: save it as UTF-8")
    begin = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    if head[begin:].lstrip()[:1] == b"[":
        yield from _scan_list(path, head.index(b"[") + 1)
    else:
        yield from _scan_lines(path, begin)


def _scan_lines(path: Path, start: int) -> Iterator[tuple[int, int, Any]]:
    with path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield start, len(line), json.loads(line)
                except ValueError as error:
                    raise DataError(
                        f"{path}: line {number} is not JSON: {error}; give a list, or a record on each line"
                    ) from None
            start += len(line)


def _scan_list(path: Path, begin: int) -> Iterator[tuple[int, int, Any]]:
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, at, byte = "", 0, begin  # `text[at:]` is not parsed yet, and begins at `byte` of the file
    count = 0
    with path.open("rb") as file:
        file.seek(begin)
        while True:
            stop = at
            while stop < len(text) and text[stop] in " \t\r\n,":
                stop += 1
            byte, at = byte + stop - at, stop  # what was passed over is ASCII
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip() or any(
                    piece.strip() for piece in iter(partial(file.read, _CHUNK), b"")
                ):
                    raise DataError(f"{path}: more follows the end of the list, after {count} records")
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
