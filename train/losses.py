"""Contrastive losses whose value and gradients are the full batch's, at every world size and tile size.

Both losses are sums over the matrix of similarities between all pictures and all texts. It is never held
whole: tiles of it are computed, reduced and computed again in the backward pass (Inf-CL, arXiv:2410.17243),
and texts of other ranks come round in a ring, together with what their own rank will need of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, softplus
from torch.utils.checkpoint import checkpoint

Duplicates = Literal["mask", "positive"]


def info_nce_loss(
    image: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    logit_scale: Float[Tensor, ""],
    *,
    tile_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    identities: Int[Tensor, "b k"] | None = None,
    duplicates: Duplicates = "mask",
    negatives: Float[Tensor, "n e"] | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020, figure 3): mean of both directions' cross-entropies.

    Negatives come from all ranks of the group, with gradients: averaged over ranks, as data-parallel training
    does, gradients are the full batch's. Equals `open_clip.loss.ClipLoss(local_loss=True,
    gather_with_grad=True)`.

    Args:
        image, text: unit-length embeddings of this rank's pairs, as many on every rank; row i of one belongs
            to row i of the other.
        logit_scale: the factor on similarities itself, not its logarithm.
        tile_size: pictures and texts of a tile; None takes this rank's whole block at once. Memory beyond the
            embeddings is a few tiles.
        group: ranks that share the batch; None is the default group, or this process alone.
        identities: pairs that agree in any of the k columns say the same thing (the same caption, the same
            picture), so they are no negatives of each other.
        duplicates: `mask` leaves such pairs out of each other's negatives; `positive` spreads the target
            evenly over them (as BLIP-2 does, arXiv:2301.12597, for captions of one picture).
        negatives: embeddings of texts that belong to no picture (hard negatives): columns for every picture
            of every rank, as many on every rank.
    """
    columns = text if negatives is None else torch.cat([text, negatives])
    loss: Tensor = _InfoNce.apply(
        image, columns, logit_scale, _Shape(len(text), tile_size, group, identities, duplicates)
    )
    return loss


def siglip_loss(
    image: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    *,
    tile_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    identities: Int[Tensor, "b k"] | None = None,
    duplicates: Duplicates = "mask",
    negatives: Float[Tensor, "n e"] | None = None,
) -> Float[Tensor, ""]:
    """Pairwise sigmoid loss (SigLIP, arXiv:2303.15343, section 3.2): summed over texts, mean over pictures.

    Arguments are as of `info_nce_loss`; `logit_bias` is added to the scaled similarities. Equals
    `open_clip.loss.SigLipLoss`. `duplicates="positive"` makes a pair of duplicates a positive one.
    """
    columns = text if negatives is None else torch.cat([text, negatives])
    loss: Tensor = _SigLip.apply(
        image, columns, logit_scale, logit_bias, _Shape(len(text), tile_size, group, identities, duplicates)
    )
    return loss


def distill_loss(
    image: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    logit_scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "b f"],
    teacher_text: Float[Tensor, "b f"],
    teacher_scale: Float[Tensor, ""],
    *,
    tile_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of a student's softmax over the batch with its teacher's; mean of both directions.

    Equals the distillation term of `open_clip.loss.DistillClipLoss`. Gradients averaged over ranks are the
    full batch's. `tile_size` rows meet all columns at once.
    """
    size = tile_size or len(image)
    total = image.new_zeros(())
    for rows, columns, their_rows, their_columns in (
        (image, text, teacher_image, teacher_text),
        (text, image, teacher_text, teacher_image),
    ):
        columns, their_columns = gather_rows(columns, group), gather_rows(their_columns, group)
        for first in range(0, len(rows), size):
            tile = slice(first, first + size)
            total = total + checkpoint(
                _distilled,
                *(rows[tile], columns, logit_scale, their_rows[tile], their_columns, teacher_scale),
                use_reentrant=False,
            )
    return total / (2 * len(image))


def _distilled(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    their_rows: Tensor,
    their_columns: Tensor,
    their_scale: Tensor,
) -> Tensor:
    targets = (their_scale * their_rows @ their_columns.T).softmax(dim=1)
    return cross_entropy(scale * rows @ columns.T, targets, reduction="sum")


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows of all ranks, as many from each; gradients come back summed over what all ranks say of a row."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, group)
    return gathered


class _Gather(torch.autograd.Function):
    """Backward sums what every rank's loss says of a row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.count = group, len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Autograd may hold on to what it passes.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.count
        return gradient[start : start + ctx.count], None


class _Shape:
    """How the matrix of a rank's pictures and all texts is cut, and which of its entries are pairs.

    Columns of a rank are its `pairs` texts, then its extra negatives.
    """

    def __init__(
        self,
        pairs: int,
        tile_size: int | None,
        group: dist.ProcessGroup | None,
        identities: Tensor | None,
        duplicates: Duplicates,
    ) -> None:
        self.pairs, self.group, self.identities = pairs, group, identities
        self.spreads = duplicates == "positive"
        self.tile_size = tile_size or sys.maxsize
        is_split = dist.is_initialized() and dist.get_world_size(group) > 1
        self.rank, self.world = (dist.get_rank(group), dist.get_world_size(group)) if is_split else (0, 1)

    def tiles(self, columns: int) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the tiles of one rank's block."""
        for row in range(0, self.pairs, self.tile_size):
            for column in range(0, columns, self.tile_size):
                yield (
                    slice(row, min(row + self.tile_size, self.pairs)),
                    slice(column, min(column + self.tile_size, columns)),
                )

    def own(self, rows: slice, columns: slice, hop: int) -> slice | None:
        """Of a tile's pictures, those whose own text is in it; None where there is none."""
        first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
        return slice(first, last) if hop == 0 and first < last else None

    def duplicates(self, rows: slice, columns: slice, theirs: Tensor | None, hop: int) -> Tensor | None:
        """Where a tile's picture meets a text not its own that says the same; None stands for nowhere."""
        if self.identities is None or theirs is None or columns.start >= self.pairs:
            return None
        found = torch.zeros(
            rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool, device=theirs.device
        )
        texts = slice(columns.start, min(columns.stop, self.pairs))
        for mine, its in zip(self.identities[rows].T, theirs[texts].T, strict=True):
            found[:, : texts.stop - texts.start] |= mine[:, None] == its[None, :]
        if (own := self.own(rows, columns, hop)) is not None:
            _own_of(found, own, rows, columns).fill_(False)
        return found

    def rotate(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """Hand tensors to the next rank and take the previous one's, which are of the same shapes."""
        if self.world == 1:
            return list(tensors)
        group = self.group or dist.distributed_c10d._get_default_group()
        ahead, behind = (dist.get_global_rank(group, (self.rank + step) % self.world) for step in (1, -1))
        given = [tensor.contiguous() for tensor in tensors if tensor is not None]
        taken = [torch.empty_like(tensor) for tensor in given]
        sends = [dist.P2POp(dist.isend, tensor, ahead, self.group) for tensor in given]
        receives = [dist.P2POp(dist.irecv, tensor, behind, self.group) for tensor in taken]
        for work in dist.batch_isend_irecv([*sends, *receives]):
            work.wait()
        arrived = iter(taken)
        return [None if tensor is None else next(arrived) for tensor in tensors]


class _InfoNce(torch.autograd.Function):
    """Forward keeps the log-sum-exp of every row and column; backward makes probabilities of them again.

    A text's column is summed up by the ranks that it visits: its running log-sum-exp and its gradient travel
    with it, and are home after as many hops as there are ranks. So each similarity is computed once forward
    and once backward for both directions.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, columns: Tensor, scale: Tensor, shape: _Shape) -> Tensor:
        row_lse = image.new_full((len(image),), -torch.inf)
        column_lse = image.new_full((len(columns),), -torch.inf)
        # Sums of the logits of positives, and how many these are.
        row_own, row_count = torch.zeros_like(row_lse), torch.ones_like(row_lse)
        column_own, column_count = torch.zeros_like(column_lse), torch.ones_like(column_lse)
        texts, ids = columns, shape.identities
        with torch.autocast(image.device.type, enabled=False):
            for hop in range(shape.world):
                for r, c in shape.tiles(len(texts)):
                    logits = scale * (image[r] @ texts[c].T)
                    other = shape.duplicates(r, c, ids, hop)
                    if (own := shape.own(r, c, hop)) is not None:
                        row_own[own] += _own_of(logits, own, r, c)
                        column_own[own] += _own_of(logits, own, r, c)
                    if other is not None and shape.spreads:
                        shared = logits.masked_fill(~other, 0)
                        row_own[r], column_own[c] = row_own[r] + shared.sum(1), column_own[c] + shared.sum(0)
                        row_count[r] += other.sum(1)
                        column_count[c] += other.sum(0)
                    elif other is not None:
                        logits.masked_fill_(other, -torch.inf)
                    row_lse[r] = torch.logaddexp(row_lse[r], logits.logsumexp(1))
                    column_lse[c] = torch.logaddexp(column_lse[c], logits.logsumexp(0))
                texts, ids, column_lse, column_own, column_count = shape.rotate(
                    [texts, ids, column_lse, column_own, column_count]
                )
        ctx.save_for_backward(image, columns, scale, row_lse, column_lse, row_count, column_count)
        ctx.shape = shape
        by_image = row_lse - row_own / row_count
        by_text = (column_lse - column_own / column_count)[: shape.pairs]
        return (by_image.mean() + by_text.mean()) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, texts, scale, row_lse, column_lse, row_count, column_count = ctx.saved_tensors
        shape: _Shape = ctx.shape
        weight = gradient / (2 * shape.pairs)
        # Negatives that are no one's text have a column, but it is no cross-entropy.
        column_weight = weight * (torch.arange(len(texts), device=texts.device) < shape.pairs)
        row_share, column_share = weight / row_count, column_weight / column_count
        image_grad, texts_grad, ids = torch.zeros_like(image), torch.zeros_like(texts), shape.identities
        with torch.autocast(image.device.type, enabled=False):
            for hop in range(shape.world):
                for r, c in shape.tiles(len(texts)):
                    logits = scale * (image[r] @ texts[c].T)
                    other = shape.duplicates(r, c, ids, hop)
                    if other is not None and not shape.spreads:
                        logits.masked_fill_(other, -torch.inf)
                    slope = (logits - row_lse[r, None]).exp_().mul_(weight)
                    slope += logits.sub_(column_lse[c]).exp_().mul_(column_weight[c])
                    if (own := shape.own(r, c, hop)) is not None:
                        _own_of(slope, own, r, c).sub_(row_share[own] + column_share[own])
                    if other is not None and shape.spreads:
                        slope -= other * (row_share[r, None] + column_share[c])
                    image_grad[r] += slope @ texts[c]
                    texts_grad[c] += slope.T @ image[r]
                texts, ids, column_lse, column_weight, column_share, texts_grad = shape.rotate(
                    [texts, ids, column_lse, column_weight, column_share, texts_grad]
                )
        # The factor on all similarities: sum of slope times similarity, row by row.
        scale_grad = (image_grad * image).sum()
        return image_grad * scale, texts_grad * scale, scale_grad.to(scale.dtype), None


def _own_of(tile: Tensor, own: slice, rows: slice, columns: slice) -> Tensor:
    """The entries of a tile where pictures `own` meet their own texts, as a view."""
    return tile[
        own.start - rows.start : own.stop - rows.start, own.start - columns.start : own.stop - columns.start
    ].diagonal()


class _SigLip(torch.autograd.Function):
    """Each similarity counts once, in its picture's row; the gradient of a text travels with it."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, shape: _Shape
    ) -> Tensor:
        total = image.new_zeros(())
        texts, ids = columns, shape.identities
        with torch.autocast(image.device.type, enabled=False):
            for hop in range(shape.world):
                for r, c in shape.tiles(len(texts)):
                    logits = scale * (image[r] @ texts[c].T) + bias
                    sign, left_out = _signs(logits, r, c, ids, hop, shape)
                    losses = softplus(-sign * logits)
                    total += losses.sum() if left_out is None else losses.masked_fill_(left_out, 0).sum()
                if hop + 1 < shape.world:
                    texts, ids = shape.rotate([texts, ids])
        ctx.save_for_backward(image, columns, scale, bias)
        ctx.shape = shape
        return total / shape.pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        image, texts, scale, bias = ctx.saved_tensors
        shape: _Shape = ctx.shape
        weight, ids = gradient / shape.pairs, shape.identities
        image_grad, texts_grad = torch.zeros_like(image), torch.zeros_like(texts)
        bias_grad = image.new_zeros(())
        with torch.autocast(image.device.type, enabled=False):
            for hop in range(shape.world):
                for r, c in shape.tiles(len(texts)):
                    logits = scale * (image[r] @ texts[c].T) + bias
                    sign, left_out = _signs(logits, r, c, ids, hop, shape)
                    slope = -sign * torch.sigmoid(-sign * logits) * weight
                    if left_out is not None:
                        slope.masked_fill_(left_out, 0)
                    image_grad[r] += slope @ texts[c]
                    texts_grad[c] += slope.T @ image[r]
                    bias_grad += slope.sum()
                texts, ids, texts_grad = shape.rotate([texts, ids, texts_grad])
        scale_grad = (image_grad * image).sum().to(scale.dtype)
        return image_grad * scale, texts_grad * scale, scale_grad, bias_grad.to(bias.dtype), None


def _signs(
    logits: Tensor, rows: slice, columns: slice, theirs: Tensor | None, hop: int, shape: _Shape
) -> tuple[Tensor, Tensor | None]:
    """+1 where picture and text belong together, else -1; and what counts as neither."""
    sign, other = torch.full_like(logits, -1), shape.duplicates(rows, columns, theirs, hop)
    if (own := shape.own(rows, columns, hop)) is not None:
        _own_of(sign, own, rows, columns).fill_(1)
    if other is None or not shape.spreads:
        return sign, other
    return sign.masked_fill_(other, 1), None
