"""Pictures with captions into tars as webdataset, open_clip and CLIP_benchmark read them."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.files import whole_folder
from vlm_vision.picture_list import NamedBytes
from vlm_vision.pictures import open_image
from vlm_vision.progress import progress_bar
from vlm_vision.train.order import EpochOrder
from vlm_vision.train.pairs import Pairs, write_bad_list
from vlm_vision.train.pairs_config import DataConfig
from vlm_vision.train.shards import COUNTS_FILE, RECORD, TEXT
from vlm_vision.train.sources import SourceError

SHARD_SIZE = 10_000  # as img2dataset's
CHUNK = 16
_KEPT = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png"}


class Packed(NamedTuple):
    """What was written: tars, samples, and samples left out because they cannot be read."""

    shards: int
    samples: int
    bad: int


def pack_data(
    config: DataConfig, folder: str | Path, *, shard_size: int = SHARD_SIZE, workers: int = 0, seed: int = 0
) -> Packed:
    """Write a folder of tars `0.tar`, `1.tar` and so on, complete or not at all.

    A sample is `000000042.jpg` (.png, .webp) and `000000042.txt`, a caption per line; hard negatives are in
    `000000042.json` under the name of their column. JPEG, PNG and WebP files stay as they are, byte by byte;
    pictures of other formats become PNG files. Samples are shuffled, so that any tar is a fair part of all.
    Beside the tars lie `sizes.json`, the samples of each (open_clip), and `nshards.txt`, their number
    (CLIP_benchmark). Each picture is written once, whatever the weight of its source, and without templates.

    Args:
        workers: processes that read and try pictures; 0 does so in this one.
        seed: of the shuffling.

    Raises:
        ConfigError: the folder is there already.
        DataError: more samples that cannot be read than `max_bad_share` allows.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} is there already: give another folder")
    pairs, bad, sizes = Pairs(config), list[str](), Counter[str]()
    with whole_folder(folder) as partial:
        numbered = enumerate(_readable(pairs, seed, workers, bad))
        for shard, samples in groupby(numbered, key=lambda sample: sample[0] // shard_size):
            with tarfile.open(partial / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for number, files in samples:
                    for suffix, content in files.items():
                        member = tarfile.TarInfo(f"{number:09d}{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    sizes[f"{shard}.tar"] += 1
        if not sizes:
            raise DataError(f"not one of {len(pairs):,} samples can be read; the first: {bad[0]}")
        (partial / COUNTS_FILE).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        (partial / "nshards.txt").write_text(f"{len(sizes)}\n", encoding="utf-8")
        if bad or pairs.bad_rows:
            write_bad_list(partial / "bad_samples.jsonl", [*pairs.bad_rows, *bad])
    return Packed(len(sizes), sizes.total(), len(bad) + pairs.dropped)


def _readable(pairs: Pairs, seed: int, workers: int, bad: list[str]) -> Iterator[dict[str, bytes]]:
    """The files of each sample by their suffix; what cannot be read goes to `bad`, up to the bound."""
    order = EpochOrder([source.shuffle(seed, number) for number, source in enumerate(pairs.sources)], seed)
    chunks = np.array_split(order.draws(0, np.arange(order.size)), -(-order.size // CHUNK))
    loader = DataLoader(
        _Reader(pairs),
        sampler=chunks,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=_as_is,
        num_workers=min(workers, len(chunks)),
    )
    with progress_bar(len(pairs), "packing") as bar:
        for found in loader:
            if isinstance(found, SourceError):
                raise found
            for sample in found:
                bar.update()
                if isinstance(sample, dict):
                    yield sample
                    continue
                bad.append(sample)
                if len(bad) > pairs.max_bad:
                    raise DataError(
                        f"{len(bad):,} of {len(pairs):,} samples cannot be read, max_bad_share allows "
                        f"{pairs.max_bad:,}; the last: {sample}"
                    )


class _Reader(Dataset[Any]):
    """Numbers of pictures to the files of their samples, in a worker; in place of a bad one, the reason."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __getitem__(self, chunk: Any) -> list[dict[str, bytes] | str] | SourceError:
        found: list[dict[str, bytes] | str] = []
        for index in chunk.tolist():
            try:
                found.append(self._files(index))
            except SourceError as error:
                return error
            except DataError as error:
                found.append(str(error))
        return found

    def _files(self, index: int) -> dict[str, bytes]:
        content, (captions, negatives) = self.pairs.content(index), self.pairs.texts(index)
        image = open_image(NamedBytes(content, self.pairs.place(index)))
        suffix = _suffix(content)
        if suffix is None:
            buffer = io.BytesIO()
            image.save(buffer, "png")
            suffix, content = ".png", buffer.getvalue()
        lines = "\n".join(" ".join(caption.split()) for caption in captions)
        files = {suffix: content, TEXT: lines.encode("utf-8", "replace")}
        if negatives:
            column = self.pairs.source_config(index).negative_column
            files[RECORD] = json.dumps({column: negatives}, ensure_ascii=False).encode("utf-8", "replace")
        return files


def _suffix(content: bytes) -> str | None:
    """Of a file that every reader of tars takes; by its first bytes, as names may be wrong or missing."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for start, suffix in _KEPT.items() if content.startswith(start)), None)


def _as_is(item: Any) -> Any:
    return item
