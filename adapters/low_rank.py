"""What low-rank factors make of a weight: in fp32 whatever its precision, and rounded once, at the end."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor


def update(a: Tensor, b: Tensor) -> Tensor:
    """B A (LoRA, arXiv:2106.09685, section 4.1) in the shape of the weight that it is added to.

    Args:
        a: [rank, in], or [rank, in, h, w] of a convolution.
        b: [out, rank], or [out, rank, 1, 1].
    """
    if a.ndim == 4:
        change: Tensor = einsum(b[:, :, 0, 0].float(), a.float(), "out rank, rank into h w -> out into h w")
        return change
    return b.float() @ a.float()


def merged(weight: Tensor, change: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """weight + change in the weight's own precision.

    Args:
        change: `update` times the adapter's scale.
        magnitude: of DoRA (arXiv:2402.09353, section 4): the length that each row of the sum is given, one
            number for each output in any shape.
    """
    total = weight.float() + change.float()
    if magnitude is not None:
        rows = total.flatten(1)
        factors = magnitude.float().flatten() / torch.linalg.vector_norm(rows, dim=1)
        total = (rearrange(factors, "out -> out 1") * rows).view_as(total)
    return total.to(weight.dtype)
