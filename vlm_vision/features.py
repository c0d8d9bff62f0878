"""Which layers and which tokens of a backbone a tower gives, and features on other grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from vlm_vision.errors import ConfigError
from vlm_vision.tower_config import LayerList, Select

SLICE_M25811_F6 = (-2, -5, -8, -11, 6)


def slice_four(num_layers: int, layer: int = -2) -> tuple[int, ...]:
    """LLaVA-NeXT's `slicefour`: every quarter's layer, counted as `hidden_states` (clip_encoder.py).

    Args:
        layer: its `mm_vision_select_layer`, from which the first is counted.
    """
    every = (num_layers + 1) // 4
    return tuple(range(every + layer, num_layers + 1, every)) if every else ()


def resolve_layers(
    layer: int | Sequence[int] | LayerList | None, num_layers: int, default: int
) -> tuple[int, ...]:
    """Layers as 1-based numbers, in the order asked for.

    Counted as transformers counts `hidden_states`: -1 is the last layer, -2 the one before it.

    Raises:
        ConfigError: a layer outside 1..num_layers; 0 (embeddings before any layer) is not offered.
    """
    if layer == "slicefour":
        asked = slice_four(num_layers)
    elif layer == "slice_m25811_f6":
        asked = SLICE_M25811_F6
    elif layer is None or isinstance(layer, int):
        asked = (default if layer is None else layer,)
    else:
        asked = tuple(int(number) for number in layer)
    resolved = tuple(number if number > 0 else num_layers + 1 + number for number in asked)
    for number, given in zip(resolved, asked, strict=True):
        if given == 0 or not 1 <= number <= num_layers:
            named = f" (of {layer!r})" if isinstance(layer, str) else ""
            raise ConfigError(
                f"layer {given}{named} is out of range: this backbone has {num_layers} layers, "
                f"so give 1 to {num_layers}, or -{num_layers} to -1"
            )
    if not resolved or len(set(resolved)) != len(resolved):
        raise ConfigError(
            f"layer {layer!r}: is {list(asked)} of {num_layers}; it must name layers, none twice"
        )
    return resolved


def select_tokens(
    tokens: Float[Tensor, "... tokens d"], select: Select, prefix_tokens: int
) -> Float[Tensor, "... n d"]:
    """Patch tokens, class token and patch tokens, or class token alone; registers are never given."""
    if select == "patch":
        return tokens[..., prefix_tokens:, :]
    if select == "cls":
        return tokens[..., :1, :]
    if prefix_tokens == 1:
        return tokens
    return torch.cat([tokens[..., :1, :], tokens[..., prefix_tokens:, :]], dim=-2)


def on_grid(
    tokens: Float[Tensor, "b n d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "b m d"]:
    """Features on another grid, as Cambrian's encoders put them (bilinear, corners not aligned)."""
    if old == new:
        return tokens
    plane = rearrange(tokens, "b (h w) d -> b d h w", h=old[0])
    moved = interpolate(plane.float(), size=new, mode="bilinear", align_corners=False).to(tokens.dtype)
    joined: Tensor = rearrange(moved, "b d h w -> b (h w) d")
    return joined
