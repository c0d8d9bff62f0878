"""Scores of embeddings: accuracy by class and recall of retrieval, in tiles that never grow with the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from vlm_vision.errors import DataError

TILE = 1024
TIE = 1e-12  # similarities of unit embeddings, computed in double, that lie nearer are one similarity


@dataclass(frozen=True)
class Classification:
    """How well pictures were told apart.

    Attributes:
        confusion: pictures by true class (row) and predicted class (column).
        ranks: for each picture, how many classes came before its own.
    """

    confusion: Int[Tensor, "c c"]
    ranks: Int[Tensor, " n"]

    def accuracy(self, k: int = 1) -> float:
        """Share of pictures whose class is among the `k` nearest."""
        return float((self.ranks < k).double().mean())

    @property
    def mean_per_class_recall(self) -> float:
        """Mean over the classes that have pictures of the share of them told right."""
        of_class = self.confusion.sum(dim=1)
        recall = self.confusion.diagonal().double() / of_class.clamp(min=1)
        return float(recall[of_class > 0].mean())


def classification(
    images: Float[Tensor, "n e"], classes: Float[Tensor, "c e"], targets: Int[Tensor, " n"]
) -> Classification:
    """Nearest classes of pictures, by cosine similarity.

    Of classes that are equally near, as those of one name are, the first of the list comes first.

    Args:
        images, classes: of unit length.
        targets: true class of each picture.
    """
    # One column per embedding: two equal ones may come out of a matrix product a bit apart.
    distinct, column = classes.double().unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    confusion, ranks = torch.zeros(len(classes), len(classes), dtype=torch.long), []
    for rows in _tiles(len(images)):
        part = classification_of_scores((images[rows].double() @ distinct.T)[:, column], targets[rows])
        confusion += part.confusion
        ranks.append(part.ranks)
    return Classification(confusion, torch.cat(ranks))


def classification_of_scores(scores: Float[Tensor, "n c"], targets: Int[Tensor, " n"]) -> Classification:
    """As `classification`, from a score of each class; the highest is the nearest."""
    count = scores.shape[1]
    own, number = scores.gather(1, targets[:, None]), torch.arange(count)
    ranks = ((scores > own) | ((scores == own) & (number < targets[:, None]))).sum(dim=1)
    confusion = (targets * count + scores.argmax(dim=1)).bincount(minlength=count * count)
    return Classification(confusion.view(count, count), ranks)


@dataclass(frozen=True)
class Retrieved:
    """Where each query found what belongs to it.

    Attributes:
        ranks: how many wrong items are at least as near as the nearest true one; 0 is found first.
        own: similarity of the nearest true item.
        wrong: similarity of the nearest wrong item; -inf where there is none.
    """

    ranks: Int[Tensor, " q"]
    own: Float[Tensor, " q"]
    wrong: Float[Tensor, " q"]

    def recall(self, k: int) -> float:
        """Share of queries with at least one true item among the `k` nearest."""
        return float((self.ranks < k).double().mean())


def retrieve(
    queries: Float[Tensor, "q e"],
    query_groups: Int[Tensor, " q"],
    gallery: Float[Tensor, "g e"],
    gallery_groups: Int[Tensor, " g"],
    *,
    tile: int = TILE,
) -> Retrieved:
    """Rank a gallery for each query; what has the query's group is true, and any one of it counts.

    So a picture with five captions counts once, by the best of them, and a caption has one true picture: the
    convention of CLIP_benchmark. A tie of a true and a wrong item is lost, so that equal captions of
    different pictures, or a model that gives one embedding for everything, gain nothing; what does not
    compare (nan) is lost too. Similarities are computed in double, where the order of a sum does not decide,
    so the result does not depend on `tile`. Memory is O(tile^2) beside the embeddings.

    Args:
        queries, gallery: of unit length.
        query_groups, gallery_groups: numbers, such as which picture a caption belongs to.

    Raises:
        DataError: a query whose group is not in the gallery.
    """
    own = _nearest_true(queries, query_groups, gallery, gallery_groups, tile)
    ranks = torch.zeros(len(queries), dtype=torch.long)
    wrong = torch.full((len(queries),), -torch.inf, dtype=torch.double)
    for rows in _tiles(len(queries), tile):
        query, group, limit = queries[rows].double(), query_groups[rows, None], own[rows, None] - TIE
        for columns in _tiles(len(gallery), tile):
            scores = query @ gallery[columns].double().T
            is_true = group == gallery_groups[columns]
            ranks[rows] += (~(scores < limit) & ~is_true).sum(dim=1)
            wrong[rows] = wrong[rows].maximum(scores.masked_fill(is_true, -torch.inf).amax(dim=1))
    return Retrieved(ranks, own, wrong)


def _nearest_true(
    queries: Tensor, query_groups: Tensor, gallery: Tensor, gallery_groups: Tensor, tile: int
) -> Float[Tensor, " q"]:
    """Similarity of each query to the nearest item of its group, computed for those pairs alone."""
    sorted_groups, order = gallery_groups.sort(stable=True)
    first = torch.searchsorted(sorted_groups, query_groups)
    counts = torch.searchsorted(sorted_groups, query_groups, right=True) - first
    if not bool((counts > 0).all()):
        raise DataError(f"query {int(counts.argmin())} has no true match in the gallery")
    query = torch.arange(len(queries)).repeat_interleave(counts)
    within = torch.arange(len(query)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    item = order[first.repeat_interleave(counts) + within]
    own = torch.full((len(queries),), -torch.inf, dtype=torch.double)
    for pairs in _tiles(len(query), tile):
        scores = einsum(queries[query[pairs]].double(), gallery[item[pairs]].double(), "p e, p e -> p")
        own.scatter_reduce_(0, query[pairs], scores, "amax")
    return own


def _tiles(size: int, tile: int = TILE) -> Iterator[slice]:
    return (slice(start, start + tile) for start in range(0, size, tile))
