"""Contrastive losses whose gradients are the full batch's at every world size."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy


def info_nce_loss(
    image: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    logit_scale: Float[Tensor, ""],
    *,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020, figure 3): mean of both directions' cross-entropies.

    Negatives come from all ranks of the group, with gradients. Each rank scores its own rows against every
    column, so that gradients averaged over ranks, as data-parallel training does, are the full batch's.
    Equals `open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True)`.

    Args:
        image, text: unit-length embeddings of this rank's pairs; row i of one belongs to row i of the other.
        logit_scale: the factor on similarities itself, not its logarithm.
        group: ranks that share the batch; None is the default group, or this process alone.
    """
    offset, all_image, all_text = 0, image, text
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        offset = dist.get_rank(group) * len(image)
        all_image, all_text = _gather(image, group), _gather(text, group)
    targets = torch.arange(offset, offset + len(image), device=image.device)
    by_image = cross_entropy(logit_scale * image @ all_text.T, targets)
    by_text = cross_entropy(logit_scale * text @ all_image.T, targets)
    return (by_image + by_text) / 2


class _Gather(torch.autograd.Function):
    """Concatenate equal-sized rows of all ranks; backward sums what every rank's loss says of a row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.count = group, len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(
            memory_format=torch.contiguous_format
        )  # autograd may hold on to what it passes
        dist.all_reduce(gradient, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.count
        return gradient[start : start + ctx.count], None


def _gather(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    gathered: Tensor = _Gather.apply(rows, group)
    return gathered
