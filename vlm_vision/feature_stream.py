"""Pictures to features at the speed of the model: others decode before it, and copy and write behind it.

Worker processes decode and prepare batches ahead. On a GPU, pixels go up and features come down on streams of
their own while it computes; they come down right into the memory that a shard is written from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.feature_shards import Bad
from vlm_vision.picture_list import ListedPicture, Opener, open_pictures
from vlm_vision.preprocess import ImageProcessor
from vlm_vision.tower import VisionTower

IN_FLIGHT = 2  # batches that a GPU is given ahead


class Encoder:
    """What features are taken: a tower's selected tokens [N,D], or its pooled embedding [E].

    Raises:
        ConfigError: the tower has no pooled head, is not on one device, or keeps the shapes of pictures.
    """

    def __init__(self, tower: VisionTower, pooled: bool) -> None:
        if hasattr(tower, "hf_device_map"):
            raise ConfigError(
                "every process has the whole tower on a GPU of its own: load the tower without device_map"
            )
        tower.image_processor.check_one_size("features of a data set")
        if pooled and tower.embed_dim is None:
            raise ConfigError("this tower has no pooled head: build it with pooled_head=True")
        self.tower, self.pooled = tower, pooled
        self.run: Callable[[Tensor], Tensor] = tower.pooled if pooled else tower

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture's features."""
        tower = self.tower
        if self.pooled and tower.embed_dim is not None:
            return (tower.embed_dim,)
        return (tower.num_tokens, tower.hidden_size)

    @property
    def row_bytes(self) -> int:
        return self.tower.dtype.itemsize * torch.Size(self.shape).numel()


class Work(NamedTuple):
    """Pictures of one batch; a batch is of one shard, and `is_last` of it or not."""

    shard: int
    pictures: Sequence[ListedPicture]
    is_last: bool


class ShardBuffer:
    """Where the features of a shard are gathered, on the CPU; pinned, if a GPU is to copy to it.

    Attributes:
        features: [S,...], of the tower's dtype.
        finite: [S], whether all of a picture's features are.
    """

    def __init__(self, encoder: Encoder, rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.features = torch.empty((rows, *encoder.shape), dtype=encoder.tower.dtype, pin_memory=pinned)
        self.finite = torch.empty(rows, dtype=torch.bool, pin_memory=pinned)


class FilledShard:
    """A shard whose rows are all there, or on their way from a GPU.

    Attributes:
        names: of the rows.
        bad: pictures that have no row.
    """

    def __init__(self, number: int, buffer: ShardBuffer) -> None:
        self.number, self.buffer = number, buffer
        self.names: list[str] = []
        self.bad: list[Bad] = []
        self.wait: Callable[[], object] = _nothing

    def features(self) -> Float[Tensor, "n ..."]:
        """The rows, once they are there.

        Raises:
            DataError: they are not finite.
        """
        self.wait()
        rows = len(self.names)
        if not self.buffer.finite[:rows].all():
            name = self.names[self.buffer.finite[:rows].tolist().index(False)]
            dtype = str(self.buffer.features.dtype).removeprefix("torch.")
            raise DataError(
                f"{name}: its features are not finite in {dtype}; bfloat16 and float32 have a wider range"
            )
        return self.buffer.features[:rows]


def stream_features(
    encoder: Encoder,
    works: Iterator[Work],
    free_buffer: Callable[[], ShardBuffer],
    count: Callable[[int, list[Bad]], None],
    *,
    workers: int,
    device: torch.device,
    opener: Opener = open_pictures,
) -> Iterator[FilledShard]:
    """Decode pictures and run the model on them; each shard as soon as its last batch is on the way.

    Args:
        works: asked for some batches ahead of the model.
        free_buffer: gives the memory of the next shard; may wait for it.
        count: told of each batch: its pictures, and those of them that could not be read.
        opener: opens the pictures of a batch, in a worker.

    Raises:
        OSError: a tar cannot be read.
    """
    loader = DataLoader(
        _Decoder(encoder.tower.image_processor, encoder.tower.dtype, opener),
        sampler=works,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    encoder.tower.to(device)
    fill = _GpuFill(encoder, device) if device.type == "cuda" else _CpuFill(encoder)
    shard: FilledShard | None = None
    for batch in loader:
        if isinstance(batch, OSError):
            raise batch
        if shard is None:
            shard = FilledShard(batch.shard, free_buffer())
        if batch.names:
            rows = slice(len(shard.names), len(shard.names) + len(batch.names))
            shard.wait = fill(shard.buffer.features[rows], shard.buffer.finite[rows], batch.pixels)
        shard.names += batch.names
        shard.bad += batch.bad
        count(len(batch.names) + len(batch.bad), batch.bad)
        if batch.is_last:
            yield shard
            shard = None


class _Batch(NamedTuple):
    """Pixels of the pictures that could be read, and which those are."""

    shard: int
    pixels: Float[Tensor, "b 3 h w"]
    names: list[str]
    bad: list[Bad]
    is_last: bool


class _Decoder(Dataset[Any]):
    """Work to a batch, in a worker. An error comes back in its place: one raised turns into a traceback."""

    def __init__(self, processor: ImageProcessor, dtype: torch.dtype, opener: Opener) -> None:
        self.processor, self.dtype, self.opener = processor, dtype, opener

    def __getitem__(self, work: Work) -> _Batch | OSError:
        squares, names, bad = [], [], []
        try:
            for picture, opened in zip(work.pictures, self.opener(work.pictures), strict=True):
                if isinstance(opened, DataError):
                    bad.append(Bad(picture.name, str(opened)))
                else:
                    squares.append(self.processor.to_square(opened))
                    names.append(picture.name)
        except OSError as error:
            return error
        size = (self.processor.config.height, self.processor.config.width)
        pixels = self.processor.normalise(squares) if squares else torch.empty(0, 3, *size)
        return _Batch(work.shard, pixels.to(self.dtype), names, bad, work.is_last)


class _CpuFill:
    """The model on a CPU."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(
        self, features: Float[Tensor, "b ..."], finite: Bool[Tensor, " b"], pixels: Float[Tensor, "b 3 h w"]
    ) -> Callable[[], object]:
        """Fill `features` and `finite` from pixels; what is returned waits until they are filled."""
        found = self.encoder.run(pixels)
        features.copy_(found)
        finite.copy_(found.isfinite().flatten(1).all(1))
        return _nothing


class _GpuFill(_CpuFill):
    """The model on a GPU, with the copies to it and from it beside the computing."""

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        super().__init__(encoder)
        torch.cuda.set_device(device)
        self.device = device
        self.up: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.down: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.in_flight: deque[Any] = deque()

    def __call__(
        self, features: Float[Tensor, "b ..."], finite: Bool[Tensor, " b"], pixels: Float[Tensor, "b 3 h w"]
    ) -> Callable[[], object]:
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.up):
            pixels = pixels.to(self.device, non_blocking=True)
        compute.wait_stream(self.up)
        pixels.record_stream(compute)
        found = self.encoder.run(pixels)
        all_finite = found.isfinite().flatten(1).all(1)
        self.down.wait_stream(compute)
        with torch.cuda.stream(self.down):
            for target, source in ((features, found), (finite, all_finite)):
                target.copy_(source, non_blocking=True)
                source.record_stream(self.down)
        done = self.down.record_event()
        self.in_flight.append(done)
        if len(self.in_flight) > IN_FLIGHT:  # or memory, and what is counted, would run ahead of the model
            self.in_flight.popleft().synchronize()
        wait: Callable[[], object] = done.synchronize
        return wait


def _as_is(batch: Any) -> Any:
    return batch


def _nothing() -> None:
    pass
