"""Features of a whole data set, by every GPU that torchrun gives.

The list of pictures is cut into shards before anything runs, and a batch never crosses one, so the bytes of a
shard depend neither on how many processes there are nor on which of them makes it. Processes take whole
shards, one after another. A shard is complete or absent: the same command again makes those that are absent.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from vlm_vision.errors import ConfigError, DataError, require
from vlm_vision.feature_shards import (
    BAD_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    Bad,
    Manifest,
    ShardFormat,
    read_facts,
    write_shard,
)
from vlm_vision.feature_stream import Encoder, FilledShard, ShardBuffer, Work, stream_features
from vlm_vision.files import whole_file
from vlm_vision.picture_list import (
    ListedPicture,
    Opener,
    check_names,
    hash_of,
    list_pictures,
    open_pictures,
)
from vlm_vision.progress import progress_bar
from vlm_vision.tower import VisionTower
from vlm_vision.weights import fingerprint

LIST_FILE = ".pictures.json"  # for the other processes, while an extraction runs
SHARD_BYTES = 2**30  # that a shard has at most, unless its size is given
MAX_ROWS = 65_536  # of one file: a safetensors header, which holds the names, may have 100 MB
_CALLS = count()  # each call counts from zero in the store that the processes share


class Extraction(NamedTuple):
    """What is there after an extraction.

    Attributes:
        manifest: what the features were made of.
        pictures: that have features.
        bad: that were left out.
        new: pictures that this run went through; the rest was there before.
        seconds: from the first picture asked for to the last shard on the disk; without loading the tower.
    """

    manifest: Manifest
    pictures: int
    bad: int
    new: int
    seconds: float


@torch.inference_mode()
def extract_features(
    tower: VisionTower,
    sources: Sequence[str | Path] | Sequence[ListedPicture],
    folder: str | Path,
    *,
    tower_name: str = "",
    pooled: bool = False,
    batch_size: int = 32,
    workers: int | None = None,
    shard_size: int | None = None,
    format: ShardFormat | None = None,
    max_bad_share: float = 0.05,
    opener: Opener = open_pictures,
) -> Extraction | None:
    """Write the features of a data set as shards that `FeatureShards` reads, or those that are absent.

    Under torchrun every process calls this with the same arguments; the folder is one that all of them see.

    Args:
        sources: picture files, folders and tars, as `list_pictures` takes them, or pictures it listed.
        tower_name: noted in the folder.
        pooled: image embeddings [E] in place of the selected tokens [N,D].
        batch_size: pictures at once; another one changes features by rounding alone, so may come midway.
        workers: processes that decode; None takes the cores that are left to this process.
        shard_size: pictures of a shard; None is what the folder has, or as many as stay under 1 GiB.
        format: None is what the folder has, or safetensors.
        max_bad_share: pictures that cannot be read are left out, counted and listed up to this share.
        opener: opens listed pictures that are no files or members of tars.

    Returns:
        What is there, in the process of rank 0, once all is; None in the others, which may end before.

    Raises:
        ConfigError: the folder holds features of another tower, other options or other pictures.
        DataError: no pictures, two of one name, more that cannot be read than `max_bad_share`, features that
            are not finite, a damaged shard, or a disk that is too small.
        OSError: a tar cannot be read, or a shard not be written.
    """
    folder, ranks, encoder = Path(folder), _Ranks(), Encoder(tower, pooled)
    device = ranks.device()
    weights = fingerprint(tower, repr(tower.image_processor.config))
    if ranks.rank == 0:
        pictures = [source for source in sources if isinstance(source, ListedPicture)]
        pictures = pictures or list_pictures(sources)  # type: ignore[arg-type]  # one or the other
        check_names(pictures)
        found = Manifest.read(folder) if (folder / MANIFEST_FILE).exists() else None
        if found is not None:
            shard_size, format = shard_size or found.shard_size, format or found.format
        manifest = Manifest(
            tower=tower_name,
            weights=weights,
            layers=() if pooled else tower.layers,
            select="pooled" if pooled else tower.config.select,
            dtype=str(tower.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # pydantic checks it
            shape=encoder.shape,
            format=format or "safetensors",
            shard_size=shard_size or _default_shard_size(encoder.row_bytes, len(pictures)),
            pictures=len(pictures),
            names=hash_of(pictures),
        )
        _check(manifest, found, folder)
        if manifest.format == "parquet":
            require("train", "pyarrow")
        start = _take_over(folder, manifest, encoder.row_bytes)
        ranks.share(folder, pictures, start)
    else:
        pictures, start = ranks.shared(folder)
        manifest = start.manifest
        if manifest.weights != weights:
            raise ConfigError(
                f"process {ranks.rank} has other weights than process 0: all machines need the same files, "
                "and a tower of random weights (@none) has to be saved first"
            )
    began = time.perf_counter()
    saved: deque[Future[ShardBuffer]] = deque()
    # One is filled while another is written; a model that is faster than the disk waits for it.
    rows = min(manifest.shard_size, manifest.pictures)
    spare = [ShardBuffer(encoder, rows, device) for _ in start.absent[:2]]

    def free_buffer() -> ShardBuffer:
        return spare.pop() if spare else saved.popleft().result()

    with ExitStack() as stack:
        tally = stack.enter_context(_Tally(ranks, len(pictures), start.done, start.bad, max_bad_share))
        writer = stack.enter_context(ThreadPoolExecutor(1))
        works = _works(pictures, manifest, ranks.claim(start.absent), batch_size)
        for shard in stream_features(
            encoder, works, free_buffer, tally.add, workers=_workers(workers), device=device, opener=opener
        ):
            saved.append(writer.submit(_save, folder / manifest.file(shard.number), shard))
        while saved:
            saved.popleft().result()
        ranks.add("finished")
        if ranks.rank != 0:
            return None
        while ranks.add("finished", 0) < ranks.world:
            tally.show()
            time.sleep(0.2)
        tally.show()
    seconds = time.perf_counter() - began
    kept, left_out = _finish(folder, manifest)
    return Extraction(manifest, kept, left_out, len(pictures) - start.done, seconds)


@torch.inference_mode()
def extract_file(
    tower: VisionTower,
    sources: Sequence[str | Path],
    path: str | Path,
    *,
    tower_name: str = "",
    pooled: bool = False,
    batch_size: int = 32,
    workers: int | None = None,
) -> Float[Tensor, "n ..."]:
    """Write the features of a handful of pictures as one safetensors file: a tensor `features`, row by row.

    Raises:
        ConfigError: there are several processes, which cannot write one file.
        DataError: no pictures, too many for one file, or one that cannot be read.
    """
    path, ranks, encoder = Path(path), _Ranks(), Encoder(tower, pooled)
    if ranks.world > 1:
        raise ConfigError(f"{path}: {ranks.world} processes cannot write one file; give a folder")
    pictures, device = list_pictures(sources), ranks.device()
    if len(pictures) > MAX_ROWS:
        raise DataError(
            f"{path}: {len(pictures):,} pictures are more than one file takes ({MAX_ROWS:,}); give a folder"
        )
    buffer = ShardBuffer(encoder, len(pictures), device)
    works = _batches(0, pictures, batch_size)
    with _Tally(ranks, len(pictures), done=0, bad=0, max_bad_share=0) as tally:
        (shard,) = stream_features(
            encoder, works, lambda: buffer, tally.add, workers=_workers(workers), device=device
        )
    facts = {"pictures": json.dumps([picture.place for picture in pictures]), "tower": tower_name}
    with whole_file(path) as partial:
        save_file({"features": shard.features()}, partial, facts)
    return shard.features()


# What there is to do ----------------------------------------------------------------------------------------


class _Start(NamedTuple):
    """What rank 0 tells the others: the shards that are absent, and the pictures of those that are there."""

    manifest: Manifest
    absent: list[int]
    done: int
    bad: int


def _default_shard_size(row_bytes: int, pictures: int) -> int:
    """A power of two, under `SHARD_BYTES`, that leaves shards enough for several processes to share."""
    fitting = min(SHARD_BYTES // row_bytes, max(128, pictures // 64), 16_384)
    return int(2 ** (max(1, fitting).bit_length() - 1))


def _check(wanted: Manifest, found: Manifest | None, folder: Path) -> None:
    """A manifest that can be, and is that of the folder if it has one."""
    if wanted.shard_size > MAX_ROWS:
        raise ConfigError(f"a shard has at most {MAX_ROWS:,} pictures, not {wanted.shard_size:,}")
    if wanted.format == "parquet" and wanted.dtype == "bfloat16":
        raise ConfigError("parquet has no bfloat16: take dtype float16 or float32, or safetensors")
    if found is None:
        return
    old, new = found.model_dump(mode="json"), wanted.model_dump(mode="json")
    changed = [
        f"{name} {old[name]!r}, now {new[name]!r}"
        for name in ("select", "layers", "dtype", "format", "shard_size", "pictures")
        if old[name] != new[name]
    ]
    if not changed and found.names != wanted.names:
        changed = ["pictures of other names, or in another order"]
    if not changed and found.weights != wanted.weights:
        changed = ["a tower of other weights or preprocessing"]
    if changed:
        raise ConfigError(
            f"{folder} was begun with {'; '.join(changed)}. Go on as it was begun, or give another folder"
        )


def _take_over(folder: Path, manifest: Manifest, row_bytes: int) -> _Start:
    """Make the folder ready, and see what it lacks.

    Raises:
        ConfigError: the folder holds something else.
        DataError: a shard is damaged, or the disk is too small for the rest.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder, or a file that ends in .safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    if not (folder / MANIFEST_FILE).exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no features; give another folder")
    absent, done, bad = [], 0, 0
    for number in range(manifest.shards):
        shard, rows = folder / manifest.file(number), manifest.rows(number)
        if not shard.exists():
            absent.append(number)
            continue
        names, left_out = read_facts(shard)
        if len(names) + len(left_out) != rows.stop - rows.start:
            raise DataError(f"{shard} is of other pictures: delete it and run the command again")
        done, bad = done + rows.stop - rows.start, bad + len(left_out)
    needed, free = (manifest.pictures - done) * row_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: the features take {needed / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} GB free. "
            "Less do: dtype bfloat16, one layer, select cls or pooled"
        )
    if absent:
        (folder / INDEX_FILE).unlink(missing_ok=True)
    manifest.save(folder)
    return _Start(manifest, absent, done, bad)


def _works(
    pictures: Sequence[ListedPicture], manifest: Manifest, shards: Iterable[int], batch_size: int
) -> Iterator[Work]:
    for shard in shards:
        yield from _batches(shard, pictures[manifest.rows(shard)], batch_size)


def _batches(shard: int, pictures: Sequence[ListedPicture], size: int) -> Iterator[Work]:
    for start in range(0, len(pictures), size):
        yield Work(shard, pictures[start : start + size], is_last=start + size >= len(pictures))


def _save(path: Path, shard: FilledShard) -> ShardBuffer:
    write_shard(path, shard.features(), shard.names, shard.bad)
    return shard.buffer


def _finish(folder: Path, manifest: Manifest) -> tuple[int, int]:
    """List what the shards hold; how many pictures have features, and how many have none."""
    kept = left_out = 0
    with ExitStack() as stack:
        index, listed = (
            stack.enter_context(stack.enter_context(whole_file(folder / name)).open("w", encoding="utf-8"))
            for name in (INDEX_FILE, BAD_FILE)
        )
        for number in range(manifest.shards):
            shard = manifest.file(number)
            names, bad = read_facts(folder / shard)
            for row, name in enumerate(names):
                index.write(json.dumps({"picture": name, "shard": shard, "row": row}) + "\n")
            for name, reason in bad:
                listed.write(json.dumps({"picture": name, "reason": reason, "shard": shard}) + "\n")
            kept, left_out = kept + len(names), left_out + len(bad)
    (folder / LIST_FILE).unlink(missing_ok=True)
    return kept, left_out


# The processes ----------------------------------------------------------------------------------------------


class _Ranks:
    """The processes that share the work, as torchrun starts them; without it, one alone.

    They speak through torch's key-value store alone: who takes which shard, how many pictures are done.

    Raises:
        ConfigError: the environment tells of several processes, but not where they meet.
    """

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        store: Store = HashStore()
        if dist.is_initialized():  # they have met; not every launcher lets them meet again
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            store = dist.distributed_c10d._get_default_store()
        elif self.world > 1:
            try:
                store, *_ = next(iter(rendezvous("env://", self.rank, self.world)))
            except ValueError as error:
                raise ConfigError(f"WORLD_SIZE is {self.world}: start it with torchrun ({error})") from error
        self._store = PrefixStore(f"features {next(_CALLS)}", store)
        # Listing a large data set takes long, and torchrun ends all processes when one fails.
        self._store.set_timeout(timedelta(days=7))

    def device(self) -> torch.device:
        """The GPU of this process, if the machine has any.

        Raises:
            ConfigError: the machine has fewer GPUs than processes.
        """
        gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        if gpus == 0:
            return torch.device("cpu")
        if local_rank >= gpus:
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: there are {gpus} (--nproc-per-node {gpus})"
            )
        return torch.device("cuda", local_rank)

    def add(self, name: str, amount: int = 1) -> int:
        """Add to a number that all share; what it is then."""
        return int(self._store.add(name, amount))

    def claim(self, shards: Sequence[int]) -> Iterator[int]:
        """Shards that no other process takes, one at a time as they are asked for."""
        while (number := self.add("claimed") - 1) < len(shards):
            yield shards[number]

    def share(self, folder: Path, pictures: Sequence[ListedPicture], start: _Start) -> None:
        """Tell the others what rank 0 found; the list of pictures by way of the folder, for its size."""
        if self.world == 1:
            return
        with whole_file(folder / LIST_FILE) as partial:
            partial.write_text(json.dumps(pictures), encoding="utf-8")
        self._store.set("start", json.dumps([start.manifest.model_dump(), *start[1:]]))

    def shared(self, folder: Path) -> tuple[list[ListedPicture], _Start]:
        """What rank 0 told, once it has.

        Raises:
            DataError: the folder is another one than that of rank 0.
        """
        manifest, *rest = json.loads(self._store.get("start"))
        path = folder / LIST_FILE
        if not path.exists():
            raise DataError(
                f"process {self.rank} does not see {path}: all machines must share the folder of the output"
            )
        pictures = [ListedPicture(*entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
        return pictures, _Start(Manifest(**manifest), *rest)


class _Tally:
    """Counts pictures over all processes, shows them on rank 0, and stops when too many are bad."""

    def __init__(self, ranks: _Ranks, total: int, done: int, bad: int, max_bad_share: float) -> None:
        self._ranks, self._total, self._done, self._bad = ranks, total, done, bad
        self._max_bad_share = max_bad_share
        self._bar = progress_bar(total, "features", start=done, disable=ranks.rank != 0)

    def __enter__(self) -> _Tally:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, pictures: int, bad: Sequence[Bad]) -> None:
        """Count a batch.

        Raises:
            DataError: more pictures than `max_bad_share` cannot be read.
        """
        self.show(pictures)
        if not bad:
            return
        if self._max_bad_share == 0:
            raise DataError(bad[0].reason)
        all_bad = self._bad + self._ranks.add("bad", len(bad))
        if all_bad > self._max_bad_share * self._total:
            raise DataError(
                f"{all_bad:,} of {self._total:,} pictures cannot be read, more than max_bad_share "
                f"{self._max_bad_share}; the last: {bad[-1].reason}"
            )

    def show(self, pictures: int = 0) -> None:
        """Show what all processes have done, with some more of this one."""
        self._bar.update(self._done + self._ranks.add("pictures", pictures) - self._bar.n)


def _workers(asked: int | None) -> int:
    """Processes that decode: of the cores that this process has its share of, all but one."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
