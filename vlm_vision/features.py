"""Which layers and which tokens of a backbone a tower gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_vision.errors import ConfigError
from vlm_vision.tower_config import Select


def resolve_layers(layer: int | Sequence[int] | None, num_layers: int, default: int) -> tuple[int, ...]:
    """Layers as 1-based numbers, in the order asked for.

    Counted as transformers counts `hidden_states`: -1 is the last layer, -2 the one before it.

    Raises:
        ConfigError: a layer outside 1..num_layers; 0 (embeddings before any layer) is not offered.
    """
    asked = (default,) if layer is None else (layer,) if isinstance(layer, int) else tuple(layer)
    resolved = tuple(number if number > 0 else num_layers + 1 + number for number in asked)
    for number, given in zip(resolved, asked, strict=True):
        if given == 0 or not 1 <= number <= num_layers:
            raise ConfigError(
                f"layer {given} is out of range: this backbone has {num_layers} layers, "
                f"so give 1 to {num_layers}, or -{num_layers} to -1"
            )
    if len(set(resolved)) != len(resolved):
        raise ConfigError(f"layer {list(asked)} names one layer twice (of {num_layers})")
    return resolved


def select_tokens(
    tokens: Float[Tensor, "b tokens d"], select: Select, prefix_tokens: int
) -> Float[Tensor, "b n d"]:
    """Patch tokens, class token and patch tokens, or class token alone; registers are never given."""
    if select == "patch":
        return tokens[:, prefix_tokens:]
    if select == "cls":
        return tokens[:, :1]
    if prefix_tokens == 1:
        return tokens
    return torch.cat([tokens[:, :1], tokens[:, prefix_tokens:]], dim=1)
