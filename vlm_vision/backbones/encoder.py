"""Running the blocks of a ViT: through their own modules, or without overhead when nothing learns.

A plain pre-norm block needs six matrix products and one attention; everything else is passes over memory.
Where no gradient is wanted, residuals are added in place and the wide MLP runs in slices of tokens that stay
in the processor's cache, so that neither every layer's output nor a whole batch's MLP activations are ever
in memory. The arithmetic is the modules' own, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlm_vision.compat import is_autocasting, is_compiling

# Tokens in a slice of the MLP. On a CPU, one picture of CLIP ViT-L/14-336, whose 577 x 4096 floats fit in
# cache; elsewhere enough to fill the device.
MLP_SLICE_CPU, MLP_SLICE_DEVICE = 577, 8192


@dataclass(frozen=True)
class PlainBlock:
    """The parts of a pre-norm block without anything beside them.

    Attributes:
        projections: q, k and v as (weight, bias), or the three fused as one.
        activation: maps [tokens, width] to the same; may work in place.
        scales: factors per channel of what attention and MLP add (layer scale), where there are any.
    """

    norm_1: nn.LayerNorm
    projections: tuple[tuple[Tensor, Tensor | None], ...]
    out: nn.Linear
    norm_2: nn.LayerNorm
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
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
    for number, block in enumerate(blocks[: layers[-1]], start=1):
        parts = plain(block) if lean and _is_bare(block) else None
        if parts is not None:
            # Contiguous, as the MLP's slices must be views: maps of a convolution may be channels first.
            tokens = tokens if owned else tokens.clone(memory_format=torch.contiguous_format)
            _run_plain(parts, tokens)
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


def quick_gelu_(values: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), in place."""
    return values.mul_(torch.sigmoid(1.702 * values))


def _is_bare(block: nn.Module) -> bool:
    """Whether nothing is hooked to a block: ZeRO-3, offloading and users' hooks live in modules' calls."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in block.modules()
    )


def _run_plain(block: PlainBlock, tokens: Float[Tensor, "b n d"]) -> None:
    """Run a block in place."""
    normed = block.norm_1(tokens)
    projected = [functional.linear(normed, weight, bias) for weight, bias in block.projections]
    if len(projected) == 1:
        projected = list(projected[0].chunk(3, dim=-1))
    q, k, v = (rearrange(part, "b n (heads d) -> b heads n d", heads=block.heads) for part in projected)
    attended = functional.scaled_dot_product_attention(q, k, v)
    update = block.out(rearrange(attended, "b heads n d -> b n (heads d)"))
    tokens.add_(update if block.scales is None else update.mul_(block.scales[0]))
    size = MLP_SLICE_CPU if tokens.device.type == "cpu" else MLP_SLICE_DEVICE
    for part in torch.split(tokens.flatten(0, 1), size):
        update = block.down(block.activation(block.up(block.norm_2(part))))
        part.add_(update if block.scales is None else update.mul_(block.scales[1]))
