"""Pictures with captions, from one source or several, read in an order that depends only on (seed, epoch)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.picture_list import NamedBytes
from vlm_vision.preprocess import ImageProcessor, open_image
from vlm_vision.text import Tokenizer
from vlm_vision.train.augment import augment
from vlm_vision.train.fingerprints import caption_id, picture_id
from vlm_vision.train.order import EpochBatches, EpochOrder, SampleKey
from vlm_vision.train.pairs_config import AugmentConfig, DataConfig, PairsConfig, source_nodes
from vlm_vision.train.shards import Shards
from vlm_vision.train.sources import Source, SourceError, max_bad, open_source
from vlm_vision.train.termination import outlive_sigterm

__all__ = [
    "BAD_FILE",
    "BadSamples",
    "Batch",
    "EpochBatches",
    "Pairs",
    "TrainingPairs",
    "training_loader",
    "write_bad_list",
]


BAD_FILE = "bad_samples.jsonl"


class Pairs:
    """Pictures with their captions, those of several sources one after another. Never all in memory.

    Attributes:
        sources: where they come from.
        num_pairs: captions of all pictures; of tars, whose captions are not read beforehand, the samples.
        bad_rows: rows left out, each with its reason.
        dropped: how many those are.
        max_bad: pictures that may turn out unreadable, by the sources' `max_bad_share`.
        has_negatives: every caption has a hard negative.
    """

    def __init__(self, config: DataConfig) -> None:
        """Read the tables, count the tars, and check them.

        Raises:
            DataError: no such file or column, nothing left to read, too many rows without a caption.
            ConfigError: sources that do not go together.
        """
        nodes = source_nodes(config)
        self.config = config
        self.sources: list[Source] = [open_source(node) for node in nodes]
        self.has_negatives = nodes[0].negative_column is not None
        if any((node.negative_column is not None) != self.has_negatives for node in nodes):
            raise ConfigError("data: give negative_column for every source, or for none")
        self._ends = np.cumsum([len(source) for source in self.sources])
        self.num_pairs = sum(source.num_pairs for source in self.sources)
        self.bad_rows = [row for source in self.sources for row in source.bad_rows]
        self.dropped = len(self.bad_rows)
        self.max_bad = sum(max_bad(source.config, len(source)) for source in self.sources)

    def __len__(self) -> int:
        """Pictures, each counted once whatever its weight."""
        return int(self._ends[-1])

    @property
    def epoch_size(self) -> int:
        """Pictures that an epoch shows, by the sources' weights: what the length of a run counts by."""
        return self.order(seed=0).size

    def order(self, seed: int) -> EpochOrder:
        """Which pictures each epoch shows, and where.

        Raises:
            ConfigError: tars of several sources have different `lanes`.
        """
        lanes = {source.lanes for source in self.sources} - {1}
        if len(lanes) > 1:
            raise ConfigError(f"data: sources of tars have lanes {sorted(lanes)}; give all the same")
        return EpochOrder(
            [source.shuffle(seed, number) for number, source in enumerate(self.sources)],
            seed,
            weights=[source.config.weight for source in self.sources],
            lanes=lanes.pop() if lanes else 1,
        )

    def captions(self, index: int) -> list[str]:
        """Every caption of a picture, without templates.

        Raises:
            DataError: a sample of a tar has none.
        """
        return self.texts(index)[0]

    def texts(self, index: int) -> tuple[list[str], list[str]]:
        """Captions, and for each its hard negative; none of those where `has_negatives` is false."""
        source, number = self._locate(index)
        return source.texts(number)

    def source_config(self, index: int) -> PairsConfig:
        """The config of a picture's source."""
        return self._locate(index)[0].config

    def open(self, index: int) -> Image.Image:
        """Decode a picture.

        Raises:
            DataError: names the file, row or sample.
        """
        return open_image(NamedBytes(self.content(index), self.place(index)))

    def content(self, index: int) -> bytes:
        """The bytes of a picture's file; raises as `open`."""
        source, number = self._locate(index)
        return source.content(number)

    def name(self, index: int) -> str:
        """A picture's path, its row where the table holds the bytes, or its tar and key."""
        source, number = self._locate(index)
        return source.name(number)

    def place(self, index: int) -> str:
        """Where the picture is, for the eyes of whoever has to mend it."""
        source, number = self._locate(index)
        return source.place(number)

    def replacements(self, index: int) -> Iterator[int]:
        """A picture, and those to take where it cannot be read: the nearest of the same source, or tar."""
        source, number = self._locate(index)
        return (index - number + other for other in source.replacements(number))

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        source = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[source], index - int(self._ends[source]) + len(self.sources[source])


@dataclass
class Batch:
    """B pairs, which have C distinct captions: class names in templates repeat, and embed alike.

    Attributes:
        squares: pictures as bytes.
        tokens: of the distinct captions.
        captions: for each picture, which of them is its own.
        bad: samples that were replaced, each with its error.
        truncated: pairs whose caption is longer than the text tower takes.
        indices: of the samples in `Pairs`.
        names: of the samples, with where they are.
        texts: the captions, templates filled in.
        picture_ids, caption_ids: of `fingerprints`: equal where pictures (before augmentation) or captions
            are the same or nearly so, on every rank and in every run.
        negatives: tokens of a hard negative for each picture; None without a `negative_column`.
        replay: other pictures, whose features are to stay as they were; None where there are none.
    """

    squares: UInt8[Tensor, "b h w 3"]
    tokens: Int[Tensor, "c t"]
    captions: Int[Tensor, " b"]
    bad: list[str]
    truncated: int
    indices: Int[Tensor, " b"]
    names: list[str]
    texts: list[str]
    picture_ids: Int64[Tensor, " b"]
    caption_ids: Int64[Tensor, " b"]
    negatives: Int[Tensor, "b t"] | None = None
    replay: UInt8[Tensor, "r h w 3"] | None = None

    @property
    def num_captions(self) -> int:
        """C, distinct captions."""
        return len(self.tokens)

    @property
    def identities(self) -> Int64[Tensor, "b 2"]:
        """What tells pairs that say the same: their caption's, and their picture's."""
        return torch.stack([self.caption_ids, self.picture_ids], dim=1)

    def part(self, rows: slice) -> Batch:
        """Some of the pairs, with their distinct captions."""
        kept, captions = torch.unique(self.captions[rows], return_inverse=True)
        return replace(
            self,
            squares=self.squares[rows],
            tokens=self.tokens[kept],
            captions=captions,
            indices=self.indices[rows],
            names=self.names[rows],
            texts=self.texts[rows],
            picture_ids=self.picture_ids[rows],
            caption_ids=self.caption_ids[rows],
            negatives=None if self.negatives is None else self.negatives[rows],
        )

    def pin_memory(self) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **pinned)


def training_loader(
    pairs: Pairs,
    processor: ImageProcessor,
    tokenizer: Tokenizer,
    augment_config: AugmentConfig,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> DataLoader[Any]:
    """This rank's share of the batches of global steps `start` to `stop`: each a `Batch`, or a `DataError`.

    What a step holds depends on the data's config, `seed` and `batch_size` alone: a run goes on from any step
    with another number of ranks or workers, bit for bit. Each rank gets `batch_size / world` pairs a step.

    Args:
        batch_size: pairs of a step over all ranks.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        DataError: fewer pictures than one batch, or a batch that does not divide among the ranks.
        ConfigError: lanes of tars that do not divide among the ranks, or more at once than `cache_gb` holds.
    """
    order = pairs.order(seed)
    batches = EpochBatches(order, batch_size, seed, start, stop, rank, world)
    here = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))  # ranks that share this machine's cache
    for source in pairs.sources:
        if isinstance(source, Shards):
            source.check_room(source.lanes * here // world)
    return DataLoader(
        TrainingPairs(pairs, processor, tokenizer, augment_config, seed),
        batch_sampler=batches,
        collate_fn=_as_is,
        num_workers=workers,
        worker_init_fn=outlive_sigterm,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # or each iterator would draw from the run's own
    )


class TrainingPairs(Dataset[Any]):
    """Augmented squares and tokens for a list of (epoch, draw) keys, each drawn from its own generator.

    A sample that cannot be read is replaced by the next one that can, if the config allows any; the batch
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
        negative_texts: list[str] = []
        indices: list[int] = []
        names: list[str] = []
        picture_ids: list[int] = []
        bad: list[str] = []
        for epoch, draw in keys:
            random = np.random.default_rng([self.seed, epoch, draw])
            used, image, captions, negatives = self._read(draw % len(self.pairs), bad)
            indices.append(used)
            names.append(self.pairs.place(used))
            picture_ids.append(picture_id(image))
            squares.append(np.asarray(augment(image, self.size, self.augment, random)))
            templates, which = self.pairs.source_config(used).templates, random.integers(len(captions))
            template = templates[random.integers(len(templates))]
            texts.append(template.replace("{}", captions[which]))
            if negatives:
                negative_texts.append(template.replace("{}", negatives[which]))
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        is_truncated = [self.tokenizer.is_truncated(text) for text in distinct]
        caption_ids = [caption_id(text) for text in distinct]
        which_caption = [distinct[text] for text in texts]
        return Batch(
            squares=torch.from_numpy(np.stack(squares)),
            tokens=self.tokenizer(list(distinct)),
            captions=torch.tensor(which_caption),
            bad=bad,
            truncated=sum(is_truncated[number] for number in which_caption),
            indices=torch.tensor(indices),
            names=names,
            texts=texts,
            picture_ids=torch.tensor(picture_ids),
            caption_ids=torch.tensor(caption_ids)[which_caption],
            negatives=self.tokenizer(negative_texts) if self.pairs.has_negatives else None,
        )

    def _read(self, index: int, bad: list[str]) -> tuple[int, Image.Image, list[str], list[str]]:
        """The picture and texts of a sample, or of the one that replaces it, and which that is."""
        for candidate in self.pairs.replacements(index):
            try:
                return candidate, self.pairs.open(candidate), *self.pairs.texts(candidate)
            except SourceError:
                raise
            except DataError as error:
                if self.pairs.max_bad == 0:
                    raise
                bad.append(str(error))
                if len(set(bad)) > self.pairs.max_bad:
                    raise DataError(
                        f"{len(set(bad)):,} samples of one batch cannot be read, max_bad_share allows "
                        f"{self.pairs.max_bad:,}; the last says: {error}"
                    ) from error
        raise DataError(f"{self.pairs.place(index)}: not one picture can be read; the last says: {bad[-1]}")


class BadSamples:
    """Rows that were left out and samples that were replaced, listed once each in a file, up to a bound.

    Args:
        path: `bad_samples.jsonl` of the run; what a resumed run finds there counts.
        is_main: whether to write: of several ranks one does.
    """

    def __init__(self, path: Path, pairs: Pairs, *, is_main: bool = True) -> None:
        self.path, self.allowed, self._is_main = path, pairs.max_bad, is_main
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._listed = {str(json.loads(line)["error"]) for line in lines}
        self._rows = set(pairs.bad_rows)  # they have been held against their own bound
        self._list(pairs.bad_rows)

    @property
    def replaced(self) -> int:
        """Samples that could not be read."""
        return len(self._listed - self._rows)

    def note(self, errors: Iterable[str]) -> None:
        """Add what a batch replaced; with several ranks, give each the errors of all.

        Raises:
            DataError: more than `max_bad_share` of all samples cannot be read.
        """
        self._list(errors)
        if self.replaced > self.allowed:
            raise DataError(
                f"{self.replaced:,} samples cannot be read, max_bad_share allows {self.allowed:,}; "
                f"they are listed in {self.path}"
            )

    def _list(self, errors: Iterable[str]) -> None:
        new = sorted(set(errors) - self._listed)
        if new and self._is_main:
            write_bad_list(self.path, new)
        self._listed.update(new)


def write_bad_list(path: Path, bad: Sequence[str]) -> None:
    """Append what could not be read, one JSON line each."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"error": error}) + "\n" for error in bad)


def _as_is(batch: Any) -> Any:
    return batch
