"""Running the blocks of a ViT: through their own modules, or without overhead when nothing learns.

A plain pre-norm block needs six matrix products and one attention; everything else is passes over memory.
Where no gradient is wanted, products add to the residual stream in place, queries, keys, values and the wide
MLP share one room that all blocks use again, and a large batch goes through each block in groups of pictures:
neither every layer's output nor a whole batch's MLP activations are ever in memory, and no pass is made that
a product can do. The arithmetic is the modules' own; sums are rounded in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlm_vision.compat import is_autocasting, is_compiling

# Tokens that go through a block together: enough to fill a device, few enough that their MLP activations,
# which are four times as wide, stay a small part of the memory. 14 pictures of CLIP ViT-L/14-336.
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Activation:
    """x -> function(scale x) / scale; the products before and after it scale, which costs nothing.

    Attributes:
        function: maps [tokens, width] to the same; may work in place.
    """

    function: Callable[[Tensor], Tensor]
    scale: float = 1.0


# x sigmoid(1.702 x) (arXiv:1606.08415), through the one kernel that torch has for x sigmoid(x).
QUICK_GELU = Activation(partial(functional.silu, inplace=True), scale=1.702)


@dataclass(frozen=True)
class PlainBlock:
    """The parts of a pre-norm block without anything beside them.

    Attributes:
        projections: q, k and v as (weight, bias), or the three fused as one.
        scales: factors per channel of what attention and MLP add (layer scale), where there are any.
    """

    norm_1: nn.LayerNorm
    projections: tuple[tuple[Tensor, Tensor | None], ...]
    out: nn.Linear
    norm_2: nn.LayerNorm
    up: nn.Linear
    activation: Activation
    down: nn.Linear
    heads: int
    scales: tuple[Tensor, Tensor] | None = None


def run_blocks(
    blocks: Sequence[nn.Module],
    tokens: Float[Tensor, "b ..."],
    layers: Sequence[int],
    *,
    run: Callable[[nn.Module, Tensor], Tensor],
    plain: Callable[[nn.Module], PlainBlock | None],
    checkpointing: bool = False,
) -> list[Float[Tensor, "b ..."]]:
    """Outputs of the given layers (ascending, from 1); none past the last is run.

    Args:
        tokens: [B,N,D], or maps [B,D,H,W] of stages, none of which is plain.
        run: a block's own forward, from tokens to tokens.
        plain: the parts of a block that is plain, else None.
        checkpointing: keep only what enters a block, and run it again in the backward pass.
    """
    learns = torch.is_grad_enabled() and (
        tokens.requires_grad or any(p.requires_grad for block in blocks for p in block.parameters())
    )
    lean = not (learns or is_autocasting(tokens.device.type) or is_compiling())
    outputs, owned = [], False  # whether `tokens` is no one else's, so may be changed in place
    room = Room()
    for number, block in enumerate(blocks[: layers[-1]], start=1):
        parts = plain(block) if lean and _is_bare(block) else None
        if parts is not None:
            # Contiguous, as groups of rows must be views: maps of a convolution may be channels first.
            tokens = tokens if owned else tokens.clone(memory_format=torch.contiguous_format)
            _run_plain(parts, tokens, room)
        elif checkpointing and learns:
            tokens = checkpoint(run, block, tokens, use_reentrant=False)
        else:
            tokens = run(block, tokens)
        owned = parts is not None
        if number in layers:
            outputs.append(tokens)
            owned = False
    return outputs


def resample_positions(
    positions: Float[Tensor, "tokens d"],
    prefix: int,
    old: Sequence[int],
    new: Sequence[int],
    settings: Mapping[str, Any],
) -> Float[Tensor, "new_tokens d"]:
    """Position embeddings for another grid, those of prefix tokens kept.

    Matches `interpolate_pos_encoding` of transformers' models and `resize_pos_embed` of open_clip's model.py;
    computed in float32, as half precision moves the embeddings. At the grid they have they are given back as
    they are.

    Args:
        settings: of `torch.nn.functional.interpolate`, in which the libraries differ.
    """
    if tuple(old) == tuple(new):
        return positions
    plane = rearrange(positions[prefix:], "(h w) d -> 1 d h w", h=old[0], w=old[1])
    resampled = functional.interpolate(plane.float(), size=tuple(new), **settings)
    rows = rearrange(resampled, "1 d h w -> (h w) d").to(positions.dtype)
    return torch.cat([positions[:prefix], rows]) if prefix else rows


def _is_bare(block: nn.Module) -> bool:
    """Whether nothing is hooked to a block: ZeRO-3, offloading and users' hooks live in modules' calls."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in block.modules()
    )


class Room:
    """Memory that one block after the other uses: what is taken anew is slow until its pages are there."""

    def __init__(self) -> None:
        self._values: Tensor | None = None

    def take(self, *shape: int, like: Tensor) -> Tensor:
        """A tensor of any content, which is valid until the next is taken."""
        count = math.prod(shape)
        if self._values is None or len(self._values) < count:
            self._values = like.new_empty(count)
        return self._values[:count].view(shape)


def _run_plain(block: PlainBlock, tokens: Float[Tensor, "b n d"], room: Room) -> None:
    """Run a block in place."""
    groups = math.ceil(tokens.shape[0] * tokens.shape[1] / TOKENS_AT_ONCE)
    for group in tokens.chunk(groups):
        rows = group.flatten(0, 1)  # a view
        _add_attention(block, rows, len(group), room)
        _add_mlp(block, rows, room)


def _add_attention(block: PlainBlock, rows: Float[Tensor, "tokens d"], pictures: int, room: Room) -> None:
    projected = _project(block, rows, room)
    q, k, v = (
        rearrange(part, "(b n) (heads d) -> b heads n d", b=pictures, heads=block.heads) for part in projected
    )
    attended = functional.scaled_dot_product_attention(q, k, v)
    attended = rearrange(attended, "b heads n d -> (b n) (heads d)")
    _add_linear(rows, attended, block.out, None if block.scales is None else block.scales[0])


def _project(block: PlainBlock, rows: Float[Tensor, "tokens d"], room: Room) -> Sequence[Tensor]:
    """Queries, keys and values."""
    normed = block.norm_1(rows)
    sizes = [len(rows) * len(weight) for weight, _ in block.projections]
    places = torch.split(room.take(sum(sizes), like=rows), sizes)
    projected = [
        _linear(normed, weight, bias, out=place.view(len(rows), -1))
        for (weight, bias), place in zip(block.projections, places, strict=True)
    ]
    return projected if len(projected) == 3 else projected[0].chunk(3, dim=-1)


def _add_mlp(block: PlainBlock, rows: Float[Tensor, "tokens d"], room: Room) -> None:
    up, scale = block.up, block.activation.scale
    wide = room.take(len(rows), up.out_features, like=rows)
    wide = _linear(block.norm_2(rows), up.weight, up.bias, out=wide, scale=scale)
    wide = block.activation.function(wide)
    _add_linear(rows, wide, block.down, None if block.scales is None else block.scales[1], scale=1 / scale)


def _linear(
    values: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "e d"],
    bias: Float[Tensor, " e"] | None,
    *,
    out: Float[Tensor, "tokens e"],
    scale: float = 1.0,
) -> Float[Tensor, "tokens e"]:
    """scale (values weight^T + bias), into memory that is there."""
    if bias is None:
        return torch.addmm(out, values, weight.t(), beta=0, alpha=scale, out=out)
    return torch.addmm(bias if scale == 1 else bias * scale, values, weight.t(), alpha=scale, out=out)


def _add_linear(
    rows: Float[Tensor, "tokens d"],
    values: Float[Tensor, "tokens e"],
    layer: nn.Linear,
    factor: Float[Tensor, " d"] | None,
    *,
    scale: float = 1.0,
) -> None:
    """rows += factor (scale values weight^T + bias)."""
    if factor is None:
        rows.addmm_(values, layer.weight.t(), alpha=scale)
        if layer.bias is not None:
            rows.add_(layer.bias)
    else:
        product = torch.mm(values, layer.weight.t())
        if layer.bias is not None:
            product.add_(layer.bias, alpha=1 / scale)
        rows.addcmul_(product, factor, value=scale)
