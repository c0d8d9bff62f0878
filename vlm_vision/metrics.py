"""Scores of embeddings: accuracy and recall."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor


def top1_accuracy(scores: Float[Tensor, "n c"], targets: Int[Tensor, " n"]) -> float:
    """Share of rows whose highest score is at their target."""
    return float((scores.argmax(dim=1) == targets).float().mean())


def recall_at_k(scores: Float[Tensor, "q g"], positives: Sequence[Sequence[int]], k: int) -> float:
    """Share of queries with at least one of their positives among the k highest scores.

    The convention of CLIP_benchmark: a picture with five captions counts once, by any of them.
    """
    top = scores.topk(min(k, scores.shape[1]), dim=1).indices.tolist()
    hits = sum(not own.isdisjoint(found) for own, found in zip(map(set, positives), top, strict=True))
    return hits / len(positives)
