"""Parity of towers with the libraries they come from, on random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vlm_vision.errors import ConfigError, first_line
from vlm_vision.tower import VisionTower, load_tower
from vlm_vision.weights import without_init

# Largest difference allowed, as a share of the reference's largest value: float32 sums in another order.
TOLERANCE = 1e-4
# What a library computes with the weights of a tower: patches of a layer (from 1), and the pooled head.
Reference = Callable[[Tensor, int], tuple[Float[Tensor, "b n d"], Float[Tensor, "b e"] | None]]


@dataclass(frozen=True)
class Verification:
    """How far a tower is from its library's own model with the same weights.

    Attributes:
        patches: worst difference of the default layer's patch features, as a share of the largest.
        pooled: the same of the image embedding; None where there is none.
        parameters: of the whole backbone.
        failure: why it could not be compared, or empty.
    """

    name: str
    seconds: float
    patches: float | None = None
    pooled: float | None = None
    parameters: int = 0
    failure: str = ""

    @property
    def passed(self) -> bool:
        errors = [error for error in (self.patches, self.pooled) if error is not None]
        return not self.failure and max(errors) <= TOLERANCE


def verify(names: Iterable[str]) -> Iterator[Verification]:
    """Compare towers, `source:model` each, with their libraries; takes twice the memory of each model."""
    for name in names:
        start = time.monotonic()
        try:
            found = _compare(name)
            yield Verification(name, time.monotonic() - start, **found)
        except Exception as error:  # whatever a library raises is a finding about this one model
            yield Verification(name, time.monotonic() - start, failure=first_line(error))


@torch.no_grad()
def _compare(name: str) -> dict[str, Any]:
    source, _, model = name.partition(":")
    if source not in _REFERENCES:
        raise ConfigError(f"{source}: has no other library to compare with; check_tower tests its contract")
    tower, reference = _REFERENCES[source](model)
    settings = tower.image_processor.config
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, settings.height, settings.width, generator=generator)
    patches, pooled = reference(pixels, tower.layers[0])
    found: dict[str, Any] = {"parameters": tower.num_parameters, "pooled": None}
    if pooled is not None:
        found["pooled"] = _share(tower.pooled(pixels), pooled)
    # Asked for patches alone, the tower frees what lies behind: they must not change by it.
    bare = VisionTower(tower.config.model_copy(update={"pooled_head": False}), tower.backbone).eval()
    found["patches"] = _share(bare(pixels), patches)
    return found


def _share(own: Tensor, theirs: Tensor) -> float:
    if own.shape != theirs.shape:
        raise ConfigError(f"features are {list(own.shape)}, the library's {list(theirs.shape)}")
    if not (own.isfinite().all() and theirs.isfinite().all()):
        raise ConfigError("features are not finite")
    return float((own - theirs).abs().max() / theirs.abs().max())


def _random(source: str) -> VisionTower:
    """A whole tower with quickly made random weights."""
    with without_init():
        tower = load_tower(f"{source}@none", pooled_head=True)
    fill_with_noise(tower)
    return tower


def fill_with_noise(model: nn.Module) -> None:
    """Random weights at the speed of memory; libraries' own initialisation takes minutes for large models.

    Matrices keep the scale of what passes through them; gains are near one, all else is small.
    """
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for place, (name, tensor) in enumerate(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        flat, width = tensor.view(-1), tensor[0].numel() if tensor.ndim > 1 else 0
        for start in range(0, flat.numel(), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(noise.roll(place + start)[: len(part)])
        if tensor.ndim > 1:
            flat.mul_(max(width, 1) ** -0.5)
        else:
            flat.mul_(0.1)
            if name.endswith(("running_var", "weight", "gamma")):
                flat.abs_().add_(0.9)


def _open_clip(model: str) -> tuple[VisionTower, Reference]:
    from open_clip.modified_resnet import ModifiedResNet

    from vlm_vision.backbones.open_clip import build_visual

    tower = _random(f"open_clip:{model}")
    config = tower.backbone.portable_config()
    with without_init():
        theirs: Any = build_visual(config.architecture).eval()  # type: ignore[attr-defined]
    theirs.load_state_dict(tower.backbone.visual.state_dict(), assign=True)  # type: ignore[union-attr]

    def reference(pixels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        staged = isinstance(theirs, ModifiedResNet) or tower.backbone.info.default_layer == -1
        output_fmt = "NCHW" if staged else "NLC"
        found = theirs.forward_intermediates(pixels, indices=[layer - 1], output_fmt=output_fmt)
        patches = found["image_intermediates"][0]
        embedding = theirs(pixels)
        return (
            rearrange(patches, "b d h w -> b (h w) d") if staged else patches,
            embedding[0] if isinstance(embedding, tuple) else embedding,
        )

    return tower, reference


def _timm(model: str) -> tuple[VisionTower, Reference]:
    import timm

    tower = _random(f"timm:{model}")
    with without_init():
        theirs = timm.create_model(model, num_classes=0).eval()
    theirs.load_state_dict(tower.backbone.model.state_dict(), assign=True)  # type: ignore[union-attr]

    def reference(pixels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        _, maps = theirs.forward_intermediates(pixels, indices=[layer - 1], output_fmt="NCHW")
        return rearrange(maps[0], "b d h w -> b (h w) d"), theirs(pixels)

    return tower, reference


_REFERENCES: dict[str, Callable[[str], tuple[VisionTower, Reference]]] = {
    "open_clip": _open_clip,
    "timm": _timm,
}
