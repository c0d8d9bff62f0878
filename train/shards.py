"""Tars as webdataset packs them: `dir/0001.jpg` and `dir/0001.txt` are one sample.

Python's `tarfile` reads the headers of a tar once, to learn where the bytes of each file lie; from there any
sample is read at any time. Nothing is extracted, nothing but pictures, texts and JSON is read, and nothing is
unpickled. A tar that lies elsewhere is copied to this machine as a whole when the first of its samples is
asked for.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import has_magic
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vlm_vision.errors import ConfigError, DataError, first_line, nearest
from vlm_vision.picture_list import expand_braces, members_of_tar
from vlm_vision.pictures import PICTURE_SUFFIXES
from vlm_vision.progress import progress_bar
from vlm_vision.train.file_cache import FileCache, file_key
from vlm_vision.train.order import ShardShuffle, Shuffle
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.sources import HUB, SourceError, find_files

COUNTS_FILE = "sizes.json"  # samples of each tar beside it, as open_clip reads them
TEXT, RECORD = ".txt", ".json"
CAPTION = "caption"  # what a caption is called in tars
SUFFIXES = (*sorted(PICTURE_SUFFIXES), TEXT, RECORD)
OPEN_TARS = 128
_FETCHERS = 8


def find_shards(path: str) -> list[str]:
    """The tars that a path, a pattern or a folder stands for, in the order of their names and numbers.

    Raises:
        DataError: there are none, one is not there, or they are no plain tars.
    """
    if path.startswith("pipe:"):
        raise DataError(
            f"{path!r}: commands are not run; copy the tars, or name them by s3://, gs:// or hf://"
        )
    if path.startswith(HUB):
        return []
    if path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise DataError(f"{path}: a compressed tar has to be read from its start; unpack it to a .tar first")
    path = path.removeprefix("file://")
    if Path(path).is_dir():
        return sorted(map(str, Path(path).glob("*.tar")), key=_by_number)
    if not path.lower().endswith(".tar"):
        if "://" in path:
            raise DataError(f"{path}: only tars are read from elsewhere (.../*.tar); copy a table here")
        return []
    if "://" not in path:
        missing = [name for name in expand_braces(path) if not has_magic(name) and not Path(name).exists()]
        found = sorted(find_files(path), key=_by_number)
        if missing or not found:
            folder = Path(path).parent
            siblings = [str(other) for other in folder.iterdir()] if folder.is_dir() else []
            wanted = missing[0] if missing else path
            raise DataError(f"data file {wanted!r} does not exist{nearest(wanted, siblings)}")
        return found
    shards = []
    for url in expand_braces(path):
        filesystem, place = _filesystem(url)
        names = filesystem.glob(place) if has_magic(place) else [place]
        shards += sorted((filesystem.unstrip_protocol(name) for name in names), key=_by_number)
    if not shards:
        raise DataError(f"{path}: no such tar")
    return shards


class Shards:
    """Samples of tars; their captions are read with their pictures, so a bad one shows only then."""

    bad_rows: Sequence[str] = ()

    def __init__(self, config: PairsConfig, shards: Sequence[str]) -> None:
        """Count the samples, by `sizes.json` beside the tars or by their headers.

        Raises:
            DataError: a tar that is damaged, tars without samples, counts that make no sense.
        """
        self.config, self.lanes = config, config.lanes
        self.shards = list(shards)
        self._cache = FileCache(config.cache_gb * 1e9)
        self._lock = threading.RLock()
        self._indices: OrderedDict[int, _Index] = OrderedDict()
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self.counts = self._count()
        self._ends = np.cumsum(self.counts)
        self.num_pairs = len(self)
        if not len(self):
            raise DataError(f"{config.path}: no sample in {len(self.shards):,} tar(s)")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def texts(self, index: int) -> tuple[list[str], list[str]]:
        config, record = self.config, None
        captions: Any = None
        if config.caption_column == CAPTION:
            captions = self._text(index)
        if captions is None:
            record = self._record(index)
            captions = self._in_record(record, config.caption_column, index)
        captions = captions if isinstance(captions, list) else [captions]
        captions = [str(text).strip() for text in captions]
        if config.negative_column is None:
            captions = [text for text in captions if config.is_caption(text)]
            if not captions:
                raise DataError(f"{self.place(index)}: has no caption")
            return captions, []
        negatives = self._in_record(record or self._record(index), config.negative_column, index)
        negatives = [
            str(text).strip() for text in (negatives if isinstance(negatives, list) else [negatives])
        ]
        if len(negatives) != len(captions):
            raise DataError(
                f"{self.place(index)}: has {len(captions)} captions, but {len(negatives)} negatives"
            )
        both = [pair for pair in zip(captions, negatives, strict=True) if all(map(config.is_caption, pair))]
        if not both:
            raise DataError(f"{self.place(index)}: has no caption with a negative")
        return [caption for caption, _ in both], [negative for _, negative in both]

    def content(self, index: int) -> bytes:
        for suffix in SUFFIXES[: -len((TEXT, RECORD))]:
            content = self._read(index, suffix)
            if content is not None:
                return content
        raise DataError(f"{self.place(index)}: has no picture ({', '.join(sorted(PICTURE_SUFFIXES))})")

    def name(self, index: int) -> str:
        shard, number = self._locate(index)
        return f"{Path(self.shards[shard]).name}/{self._index(shard).name(number)}"

    def place(self, index: int) -> str:
        shard, number = self._locate(index)
        return f"{self.shards[shard]}, sample {self._index(shard).name(number)}"

    def replacements(self, index: int) -> Iterator[int]:
        shard, _ = self._locate(index)  # another tar might have to be fetched
        start, stop = int(self._ends[shard] - self.counts[shard]), int(self._ends[shard])
        return chain(range(index, stop), range(start, index))

    def shuffle(self, seed: int, source: int) -> Shuffle:
        return ShardShuffle(self.counts, seed, source)

    def check_room(self, lanes: int) -> None:
        """Refuse to read more tars at once than may be copied: they would be fetched again and again.

        Args:
            lanes: that the processes of this machine read.

        Raises:
            ConfigError: names both sizes.
        """
        if "://" not in self.shards[0]:
            return
        filesystem, place = _filesystem(self.shards[0])
        size, tars = filesystem.size(place) or 0, min(lanes, len(self.shards))
        if size * tars > self._cache.limit:
            raise ConfigError(
                f"{self.config.path}: {tars} tars of {size / 1e9:.3g} GB are read at once, which cache_gb "
                f"{self.config.cache_gb:g} does not hold: raise it, or lower lanes"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_indices": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def _count(self) -> list[int]:
        known: dict[str, int] = {}
        for folder in dict.fromkeys(url.rpartition("/")[0] for url in self.shards):
            for name, count in _read_counts(f"{folder}/{COUNTS_FILE}" if folder else COUNTS_FILE).items():
                known[f"{folder}/{name}" if folder else name] = count
        unknown = [number for number, url in enumerate(self.shards) if url not in known]
        counts = [known.get(url, 0) for url in self.shards]
        if not unknown:
            return counts
        # More than a few tars take a while: sizes.json spares it.
        with (
            ThreadPoolExecutor(_FETCHERS) as threads,
            progress_bar(len(unknown), "counting samples", disable=len(unknown) < 32) as bar,
        ):
            for number, index in zip(unknown, threads.map(self._read_index, unknown), strict=True):
                if index.damage:
                    raise DataError(index.damage)
                counts[number] = len(index.keys)
                bar.update()
        return counts

    def _locate(self, index: int) -> tuple[int, int]:
        """Shard, and number of the sample in it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.counts[shard])

    def _text(self, index: int) -> list[str] | None:
        """Lines of the .txt file; None where there is none."""
        content = self._read(index, TEXT)
        if content is None:
            return None
        try:
            return content.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(index)}: its .txt is not UTF-8: {error}") from error

    def _record(self, index: int) -> dict[str, Any]:
        content = self._read(index, RECORD)
        if content is None:
            raise DataError(f"{self.place(index)}: has neither .txt nor .json with captions")
        try:
            record = json.loads(content)
        except ValueError as error:
            raise DataError(f"{self.place(index)}: its .json cannot be read: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{self.place(index)}: its .json is no object")
        return record

    def _in_record(self, record: dict[str, Any], key: str, index: int) -> Any:
        if record.get(key) is None:
            raise DataError(f"{self.place(index)}: its .json has no {key!r}{nearest(key, record)}")
        return record[key]

    def _read(self, index: int, suffix: str) -> bytes | None:
        """A file of a sample; None where it has none of this suffix.

        Raises:
            DataError: the tar was cut off before this sample.
            SourceError: the tar cannot be read.
        """
        shard, number = self._locate(index)
        known = self._index(shard)
        if number >= len(known.keys):
            raise DataError(f"{self.place(index)}, is missing: {known.damage}")
        column = SUFFIXES.index(suffix)
        size = int(known.sizes[number, column])
        if size < 0:
            return None
        try:
            with self._lock:  # of threads that score held-out pictures, one might close another's file
                content = os.pread(self._file(shard).fileno(), size, int(known.offsets[number, column]))
        except OSError as error:
            raise SourceError(f"{self.shards[shard]}: cannot be read: {error}") from error
        if len(content) < size:
            raise DataError(f"{self.place(index)}: the tar ends within its {suffix}")
        return content

    def _file(self, shard: int) -> IO[bytes]:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = self._open(shard)
            if len(self._files) > OPEN_TARS:
                self._files.popitem(last=False)[1].close()
        return self._files[shard]

    def _index(self, shard: int) -> _Index:
        with self._lock:
            return self._known_index(shard)

    def _known_index(self, shard: int) -> _Index:
        if shard in self._indices:
            self._indices.move_to_end(shard)
            return self._indices[shard]
        index = self._read_index(shard)
        count, url = self.counts[shard], self.shards[shard]
        if len(index.keys) != count and not index.damage:
            raise SourceError(
                f"{url}: has {len(index.keys):,} samples, but {COUNTS_FILE} beside it says {count:,}: "
                "delete or mend that file"
            )
        self._indices[shard] = index
        if len(self._indices) > max(OPEN_TARS, 2 * self.lanes):
            self._indices.popitem(last=False)
        return index

    def _read_index(self, shard: int) -> _Index:
        name = f"{self._identity(shard)}.index.npz"
        with self._cache.open(name, lambda path: self._write_index(shard, path)) as file:
            return _Index.load(file)

    def _write_index(self, shard: int, path: Path) -> None:
        with self._open(shard) as tar:
            _Index.of_tar(tar.name, self.shards[shard]).save(path)

    def _open(self, shard: int) -> IO[bytes]:
        url = self.shards[shard]
        try:
            if "://" not in url:
                return open(url, "rb")
            return self._cache.open(f"{self._identity(shard)}.tar", partial(_fetch, url))
        except OSError as error:
            raise SourceError(f"{url}: cannot be read: {first_line(error)}") from error

    def _identity(self, shard: int) -> str:
        """What tells a tar from any other and from itself at another time."""
        url = self.shards[shard]
        try:
            if "://" not in url:
                facts = os.stat(url)
                return file_key(os.path.realpath(url), facts.st_size, facts.st_mtime_ns)
            filesystem, place = _filesystem(url)
            return file_key(url, filesystem.ukey(place))
        except OSError as error:
            raise SourceError(f"{url}: cannot be read: {first_line(error)}") from error


class _Index:
    """Where the files of a tar's samples lie.

    Attributes:
        keys: of the samples.
        offsets, sizes: [samples, len(SUFFIXES)], in bytes; a size of -1 where there is no such file.
        damage: why there are no more samples, if there should be.
    """

    def __init__(
        self, keys: Sequence[str], offsets: NDArray[np.int64], sizes: NDArray[np.int64], damage: str
    ) -> None:
        self.keys, self.offsets, self.sizes, self.damage = keys, offsets, sizes, damage

    def name(self, number: int) -> str:
        return repr(self.keys[number]) if number < len(self.keys) else f"number {number + 1}"

    @classmethod
    def of_tar(cls, path: str, url: str) -> _Index:
        """Read the headers of a file; what is damaged or not as it should be ends the samples."""
        numbers: dict[str, int] = {}
        places: list[list[tuple[int, int]]] = []
        damage = ""
        try:
            for member in members_of_tar(path, SUFFIXES):
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                key, suffix = folder + slash + stem, dot + suffix.lower()
                if suffix not in SUFFIXES or not stem:  # a mask `1.seg.png`; a hidden file
                    continue
                number = numbers.setdefault(key, len(numbers))
                if number == len(places):
                    places.append([(0, -1)] * len(SUFFIXES))
                assert member.offset is not None
                assert member.size is not None
                places[number][SUFFIXES.index(suffix)] = (member.offset, member.size)
        except DataError as error:
            damage = str(error).replace(path, url)
        table = np.array(places, dtype=np.int64).reshape(-1, len(SUFFIXES), 2)
        return cls(list(numbers), table[..., 0], table[..., 1], damage)

    def save(self, path: Path) -> None:
        texts = json.dumps({"keys": self.keys, "damage": self.damage}).encode()
        with path.open("wb") as file:
            np.savez(file, offsets=self.offsets, sizes=self.sizes, texts=np.frombuffer(texts, dtype=np.uint8))

    @classmethod
    def load(cls, file: IO[bytes]) -> _Index:
        with np.load(file, allow_pickle=False) as arrays:
            texts = json.loads(arrays["texts"].tobytes())
            return cls(texts["keys"], arrays["offsets"], arrays["sizes"], texts["damage"])


def _read_counts(path: str) -> dict[str, int]:
    """Samples by the name of their tar; nothing where there is no such file."""
    try:
        if "://" in path:
            filesystem, place = _filesystem(path)
            content = filesystem.cat_file(place)
        else:
            content = Path(path).read_bytes()
    except FileNotFoundError:
        return {}
    try:
        return {str(name): int(count) for name, count in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: must hold the samples of each tar, {{'0.tar': 1000}}: {error}") from error


def _fetch(url: str, path: Path) -> None:
    filesystem, place = _filesystem(url)
    filesystem.get_file(place, str(path))


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {first_line(error)}") from error


def _by_number(path: str) -> list[tuple[int, str]]:
    """`2.tar` before `10.tar`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]
