"""Held-out pictures with captions or classes, and their features, which ranks compute in shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from einops import reduce
from jaxtyping import Float, Int, Num
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.progress import progress_bar
from vlm_vision.prompts import class_numbers, read_classes, read_templates
from vlm_vision.tower import VisionTower
from vlm_vision.train.benchmark_folder import BenchmarkFolder, is_benchmark_folder
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.validation_config import ZeroShotConfig

T = TypeVar("T")

BARE_NAME = ("{}",)


class Pictures(Protocol):
    """What `Pairs` and `BenchmarkFolder` have in common."""

    def __len__(self) -> int: ...

    def captions(self, index: int) -> list[str]: ...

    def open(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures of which each has one class.

    Attributes:
        classes: names, by number.
        templates: texts around a name.
        targets: number of each picture's class.
    """

    pictures: Pictures
    classes: list[str]
    templates: list[str]
    targets: Int[Tensor, " n"]


def open_captioned(config: PairsConfig) -> Pictures:
    """Pictures with captions, from any source of pairs or a folder in CLIP_benchmark's layout.

    Raises:
        DataError: they cannot be read, or have classes instead.
    """
    if not is_benchmark_folder(config.path):
        return _strict(config)
    folder = BenchmarkFolder(config.path)
    if not folder.is_retrieval:
        raise DataError(f"{config.path}: pictures have classes there, and no captions")
    return folder


def open_labelled(config: ZeroShotConfig, classes: Sequence[str] | None = None) -> LabelledPictures:
    """Pictures with classes, from any source of pairs or a folder in CLIP_benchmark's layout.

    Args:
        classes: instead of the config's, where it names none.

    Raises:
        DataError: they cannot be read, have captions instead, or a label is no class.
        ConfigError: classes or templates that are not known.
    """
    if config.classes is not None:
        classes = read_classes(config.classes)
    pictures: Pictures
    if is_benchmark_folder(config.path):
        folder = BenchmarkFolder(config.path)
        if folder.is_retrieval:
            raise DataError(f"{config.path}: pictures have captions there, and no classes")
        if classes is None:
            classes = folder.classes or [str(number) for number in range(max(folder.labels) + 1)]
        if max(folder.labels) >= len(classes):
            raise DataError(f"{config.path}: class {max(folder.labels)}, but {len(classes)} are named")
        pictures, targets, templates = folder, folder.labels, config.templates or folder.templates
    else:
        pairs = _strict(config)
        labels = [pairs.captions(index)[0] for index in range(len(pairs))]
        classes = sorted(set(labels)) if classes is None else classes
        pictures, templates = pairs, config.templates
        targets = class_numbers(labels, classes, config.path)
    return LabelledPictures(
        pictures, list(classes), read_templates(templates or BARE_NAME), torch.tensor(targets)
    )


def _strict(config: PairsConfig) -> Pairs:
    """All rows, or an error: scores over fewer pictures would not compare. A bound that is given holds."""
    if "max_bad_share" in config.model_fields_set:
        return Pairs(config)
    return Pairs(config.model_copy(update={"max_bad_share": 0.0}))


def embed_pictures(model: DualEncoder, pictures: Pictures) -> Float[Tensor, "n e"]:
    """Unit image embeddings of every picture, in order, fp32, on the CPU."""
    return normalize(picture_features(model.tower, pictures, model.tower.pooled), dim=-1)


def mean_patches(tower: VisionTower) -> Callable[[Tensor], Float[Tensor, "b d"]]:
    """The mean over the patches that a VLM reads."""
    return lambda pixels: reduce(tower(pixels).float(), "b n d -> b d", "mean")


@torch.inference_mode()
def picture_features(
    tower: VisionTower,
    pictures: Pictures,
    features: Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b d"]],
    *,
    batch_size: int = 128,
    workers: int = 4,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "n d"]:
    """Features of every picture, in order, fp32, on the CPU; threads decode the next batch meanwhile.

    Args:
        group: ranks that share the pictures. Each must call this with the same ones; each runs the model as
            often as the others, and gets all features.

    Raises:
        DataError: a picture cannot be read; on every rank, whichever has it.
        ConfigError: features that are not finite, of which no score would mean anything.
    """
    share = _share(len(pictures), group)
    parts, error = [], None
    try:
        with progress_bar(len(share), "embed pictures", disable=_rank(group) != 0) as bar:
            for squares in _decoded(tower, pictures, share, batch_size, workers):
                parts.append(features(tower.image_processor.normalise(squares)).float())
                bar.update(len(squares))
        found = torch.cat(parts)
    except DataError as caught:
        error = caught
    _raise_together(error, group)
    found = _gathered(found, len(pictures), group).cpu()
    if not bool(found.isfinite().all()):
        raise ConfigError(
            f"features of {int((~found.isfinite()).any(dim=1).sum())} of {len(pictures)} pictures are not "
            "finite: the weights are not, or overflow in their dtype (float16 does; try bfloat16 or float32)"
        )
    return found


def in_shares(
    items: Sequence[T],
    compute: Callable[[list[T]], Float[Tensor, "s e"]],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> Float[Tensor, "n e"]:
    """A row for each item, in order, on the CPU, of which each rank of a group computes its share.

    Args:
        device: where the ranks exchange them.
    """
    some = [items[index] for index in _share(len(items), group)]
    return _gathered(compute(some).to(device), len(items), group).cpu()


def _decoded(
    tower: VisionTower, pictures: Pictures, indices: Sequence[int], batch_size: int, workers: int
) -> Iterator[list[Num[Tensor, "h w 3"]]]:
    """Batches of squares; while one is used, the next is decoded."""

    def square(index: int) -> Num[Tensor, "h w 3"]:
        return tower.image_processor.to_square(pictures.open(index))

    with ThreadPoolExecutor(workers) as pool:
        batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        ahead: list[Future[Any]] = []
        try:
            for batch in [*batches, []]:
                now, ahead = ahead, [pool.submit(square, index) for index in batch]
                if now:
                    yield [future.result() for future in now]
        finally:
            for future in ahead:  # after an error, or where the caller stops
                future.cancel()


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _share(count: int, group: dist.ProcessGroup | None) -> list[int]:
    """This rank's indices, as many as every other's: the last ones repeat where they do not divide."""
    if group is None:
        return list(range(count))
    size = -(-count // dist.get_world_size(group))
    first = dist.get_rank(group) * size
    return [min(index, count - 1) for index in range(first, first + size)]


def _gathered(
    shares: Float[Tensor, "s d"], count: int, group: dist.ProcessGroup | None
) -> Float[Tensor, "n d"]:
    """All ranks' shares, as `_share` deals them, in order."""
    if group is None:
        return shares
    every = [torch.empty_like(shares) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, shares.contiguous(), group=group)
    return torch.cat(every)[:count]


def _raise_together(error: DataError | None, group: dist.ProcessGroup | None) -> None:
    """Raise a rank's error on all of them, which would else wait for it."""
    if group is None:
        if error is not None:
            raise error
        return
    told: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, None if error is None else str(error), group=group)
    for message in told:
        if message is not None:
            raise DataError(message)
