"""What training did to the features that a VLM reads: by layer, and behind a projector that it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlm_vision.adapters.build import is_saved_projector, load_projector
from vlm_vision.adapters.llava_files import from_llava
from vlm_vision.adapters.projector import Projector
from vlm_vision.compat import attention_kernel
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.features import select_tokens
from vlm_vision.preprocess import Picture
from vlm_vision.progress import progress_bar
from vlm_vision.tower import VisionTower
from vlm_vision.train.validation import evaluating


@dataclass(frozen=True)
class Change:
    """How far vectors are from what they were.

    Attributes:
        cosine, cosine_min: mean and smallest cosine of a vector to itself before.
        relative: norm of all differences, by the norm of all vectors before.
    """

    cosine: float
    cosine_min: float
    relative: float


@dataclass(frozen=True)
class LayerDrift(Change):
    """Patch features of one layer.

    Attributes:
        layer: from 1.
        cka: linear centred kernel alignment of all patches (Kornblith et al., arXiv:1905.00414, eq. 4): 1
            where features differ by a rotation, a factor and a shift only; nan where none vary.
    """

    layer: int
    cka: float


@dataclass(frozen=True)
class Drift:
    """Two towers on the same pictures.

    Attributes:
        layers: every layer that both have, in order.
        read: those of which a VLM reads the features.
        projected: what comes out of a projector that was trained on the tower before.
    """

    pictures: int
    layers: tuple[LayerDrift, ...]
    read: tuple[int, ...]
    projected: Change | None


@torch.inference_mode()
def drift(
    before: VisionTower | DualEncoder,
    after: VisionTower | DualEncoder,
    pictures: Iterable[Picture],
    *,
    projector: Projector | None = None,
    batch_size: int = 8,
    total: int | None = None,
) -> Drift:
    """Compare the patch features of two towers of one architecture, layer by layer, in one pass.

    Sums are kept in double. Memory: the features of a batch, and 24 D^2 bytes a layer (ViT-L: 600 MB in all).

    Args:
        pictures: what `open_image` takes, one after another.
        projector: of a VLM that reads `before`; it gets the layers and tokens that `before` selects.
        total: of the pictures, where they do not tell their number; for the progress bar.

    Raises:
        ConfigError: towers of different architecture or preprocessing, or a projector for another.
        DataError: no picture, or one that cannot be read.
    """
    old, new = (model.tower if isinstance(model, DualEncoder) else model for model in (before, after))
    layers = _common_layers(old, new)
    if projector is not None and (projector.in_features != old.hidden_size or old.config.select == "pooled"):
        raise ConfigError(
            f"the projector takes {projector.in_features} channels, and the tower gives {old.hidden_size} "
            f"(layer {old.config.layer}, select {old.config.select}): load the tower as its VLM does"
        )
    sums = {layer: _Alignment() for layer in layers}
    changes, projected, count = {layer: _Sums() for layer in layers}, _Sums(), 0
    device = old.device
    with evaluating(old), evaluating(new), progress_bar(total or _length(pictures), "drift") as bar:
        for batch in _batches(pictures, batch_size):
            pixels = old.image_processor(batch)
            ours, theirs = _by_layer(old, pixels, layers), _by_layer(new, pixels, layers)
            for layer in layers:
                one, other = (
                    _rows(tokens[layer][:, old.backbone.info.prefix_tokens :], device)
                    for tokens in (ours, theirs)
                )
                changes[layer].add(one, other)
                sums[layer].add(one, other)
            if projector is not None:
                one, other = (
                    _rows(projector(projector.like_weights(_selected(old, tokens))), device)
                    for tokens in (ours, theirs)
                )
                projected.add(one, other)
            count += len(batch)
            bar.update(len(batch))
    if not count:
        raise DataError("no picture was given to compare two towers on")
    found = tuple(
        LayerDrift(**vars(changes[layer].change()), layer=layer, cka=sums[layer].cka()) for layer in layers
    )
    return Drift(count, found, old.layers, None if projector is None else projected.change())


def open_projector(source: str | Path, tower: VisionTower) -> Projector:
    """The projector of a VLM.

    Args:
        source: a folder of `save_projector`, a VLM's folder that holds one, or what `from_llava` takes.
        tower: whose features it takes.

    Raises:
        WeightsError: there is none, or of another kind.
        ConfigError: a config that this version does not know.
    """
    folder = Path(source) / "projector" if (Path(source) / "projector").is_dir() else Path(source)
    if is_saved_projector(folder):
        return load_projector(folder).eval()
    return from_llava(source, tower.grid).eval()


class _Sums:
    """Sums over rows from which `Change` follows."""

    def __init__(self) -> None:
        self.rows, self.cosine, self.cosine_min = 0, 0.0, 1.0
        self.difference, self.norm = 0.0, 0.0

    def add(self, before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> None:
        cosines = cosine_similarity(before, after, dim=1, eps=1e-300)
        self.rows += len(cosines)
        self.cosine += float(cosines.sum())
        self.cosine_min = min(self.cosine_min, float(cosines.min()))
        self.difference += float((after - before).square().sum())
        self.norm += float(before.square().sum())

    def change(self) -> Change:
        return Change(self.cosine / self.rows, self.cosine_min, (self.difference / self.norm) ** 0.5)


class _Alignment:
    """Sums over rows from which linear CKA follows, without the rows."""

    def __init__(self) -> None:
        self.rows = 0
        self.totals: list[Tensor] = []
        self.products: list[Tensor] = []

    def add(self, before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> None:
        self.rows += len(before)
        totals = [before.sum(dim=0), after.sum(dim=0)]
        pairs = ((before, after), (before, before), (after, after))
        products = [one.T @ other for one, other in pairs]
        if not self.totals:
            self.totals, self.products = totals, products
            return
        for kept, new in zip((*self.totals, *self.products), (*totals, *products), strict=True):
            kept += new

    def cka(self) -> float:
        before, after = self.totals
        pairs = ((before, after), (before, before), (after, after))
        cross, own, other = (
            float((product - einsum(one, two, "d, e -> d e") / self.rows).square().sum())
            for product, (one, two) in zip(self.products, pairs, strict=True)
        )
        norm = (own * other) ** 0.5
        return cross / norm if norm else float("nan")


def _common_layers(old: VisionTower, new: VisionTower) -> list[int]:
    """Layers that both towers have, where they are of one make."""
    if old.image_processor.config != new.image_processor.config:
        raise ConfigError("the two towers prepare pictures differently, so their patches do not correspond")
    last = [
        tower.backbone.info.num_layers if tower.config.keeps_head else max(tower.layers)
        for tower in (old, new)
    ]
    layers = list(range(1, min(last) + 1))
    for name in ("widths", "grids"):
        one, other = (getattr(tower.backbone.info, name)[: layers[-1]] for tower in (old, new))
        if one != other:
            raise ConfigError(f"the two towers have other {name} of layers: {one} and {other}")
    return layers


def _by_layer(tower: VisionTower, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    with attention_kernel(tower.config.attention):
        outputs = tower.backbone.forward_layers(tower.check_pixels(pixels, False), layers)
    return dict(zip(layers, outputs, strict=True))


def _selected(tower: VisionTower, by_layer: dict[int, Tensor]) -> Float[Tensor, "b n d"]:
    """What the tower would give."""
    prefix = tower.backbone.info.prefix_tokens
    return torch.cat(
        [select_tokens(by_layer[layer], tower.config.select, prefix) for layer in tower.layers], dim=-1
    )


def _rows(tokens: Float[Tensor, "b n d"], device: torch.device) -> Float[Tensor, "r d"]:
    """In double, where the device has it."""
    flat: Tensor = rearrange(tokens, "b n d -> (b n) d")
    return flat.to("cpu" if device.type == "mps" else device).double()


def _batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    waiting = iter(pictures)
    while batch := list(islice(waiting, size)):
        yield batch


def _length(pictures: Iterable[Picture]) -> int:
    return len(pictures) if isinstance(pictures, Sequence) else 0
