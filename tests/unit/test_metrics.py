"""Accuracy and recall against the same spelled out on the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_vision.errors import DataError
from vlm_vision.metrics import Classification, classification, classification_of_scores, retrieve


def unit(rows: int, width: int, seed: int) -> Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


# Classification -----------------------------------------------------------------------------------------


def test_confusion_accuracy_and_recall_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.2, 0.5], [0.3, 0.7, 0.6], [0.6, 0.4, 0.5]])
    found = classification_of_scores(scores, torch.tensor([1, 0, 0, 0]))
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found.ranks.tolist() == [0, 0, 2, 0]
    assert [found.accuracy(k) for k in (1, 2, 3)] == [0.75, 0.75, 1.0]
    assert found.mean_per_class_recall == pytest.approx((2 / 3 + 1) / 2)  # the class without pictures is out


def test_classification_equals_torch_and_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    images, classes = unit(3000, 16, 0), unit(40, 16, 1)  # three tiles
    targets = torch.randint(0, 37, (3000,), generator=torch.Generator().manual_seed(2))
    found = classification(images, classes, targets)
    scores = images @ classes.T
    for k in (1, 5, 40):
        hits = (scores.topk(k).indices == targets[:, None]).any(dim=1)
        assert found.accuracy(k) == pytest.approx(float(hits.double().mean()), abs=1e-12)
    predicted = scores.argmax(dim=1)
    expected = metrics.confusion_matrix(targets, predicted, labels=range(40))
    assert torch.equal(found.confusion, torch.from_numpy(expected))
    recall = metrics.recall_score(targets, predicted, average="macro", labels=range(37), zero_division=0)
    assert found.mean_per_class_recall == pytest.approx(recall, abs=1e-12)


def test_of_equal_classes_the_first_is_predicted() -> None:
    classes = unit(6, 8, 0)
    classes = torch.cat([classes, classes[:2]])  # 6 is 0 again, 7 is 1 again
    found = classification(classes.repeat(300, 1), classes, torch.arange(8).repeat(300))
    assert found.ranks.view(300, 8).unique(dim=0).tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]]
    assert found.confusion[6, 0] == found.confusion[7, 1] == 300


def test_accuracy_and_confusion_tell_the_same_of_ties() -> None:
    scores = torch.randint(0, 3, (500, 9), generator=torch.Generator().manual_seed(0)).float()
    targets = torch.arange(500) % 9
    found = classification_of_scores(scores, targets)
    assert found.accuracy() == pytest.approx(int(found.confusion.trace()) / 500)
    assert isinstance(found, Classification)


# Retrieval ----------------------------------------------------------------------------------------------


def recall_on_the_whole_matrix(
    queries: Tensor, query_groups: Tensor, gallery: Tensor, gallery_groups: Tensor, k: int
) -> float:
    """CLIP_benchmark's recall (metrics/zeroshot_retrieval.py): is any of the top k a true match?"""
    top = (queries @ gallery.T).topk(k, dim=1).indices
    return float((gallery_groups[top] == query_groups[:, None]).any(dim=1).double().mean())


@pytest.mark.parametrize("tile", [7, 64, 10_000])
def test_recall_in_tiles_equals_the_whole_matrix(tile: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, numbers = unit(200, 12, 0), torch.arange(200)
    owner = torch.cat([numbers, torch.randint(0, 200, (700,), generator=generator)])
    owner = owner[torch.randperm(900, generator=generator)]  # 1 to 9 captions a picture, in no order
    texts = normalize(images[owner] + 0.35 * torch.randn(900, 12, generator=generator), dim=-1)
    for one, other in (((images, numbers), (texts, owner)), ((texts, owner), (images, numbers))):
        found = retrieve(*one, *other, tile=tile)
        for k in (1, 5, 10):
            expected = recall_on_the_whole_matrix(*one, *other, k)
            assert 0.1 < expected < 1
            assert found.recall(k) == expected
        scores = (one[0].double() @ other[0].double().T).masked_fill(one[1][:, None] != other[1], -9)
        assert torch.allclose(found.own, scores.amax(dim=1), rtol=0, atol=1e-14)
        scores = (one[0].double() @ other[0].double().T).masked_fill(one[1][:, None] == other[1], -9)
        assert torch.allclose(found.wrong, scores.amax(dim=1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tile", [2, 100])
def test_ties_are_lost(tile: int) -> None:
    numbers = torch.arange(30)
    same = unit(1, 64, 0).expand(30, -1)
    assert retrieve(same, numbers, same, numbers, tile=tile).ranks.tolist() == [29] * 30  # of 30, last
    images = unit(30, 64, 1)
    texts = torch.cat([images, images[:10]])  # the last ten captions say what the first ten do
    owner = torch.cat([numbers, torch.arange(20, 30)])
    found = retrieve(images, numbers, texts, owner, tile=tile)
    assert found.ranks.tolist() == [1] * 10 + [0] * 20
    assert retrieve(texts, owner, images, numbers, tile=tile).ranks[:30].tolist() == [0] * 30
    two_of_one_picture = retrieve(images, numbers, torch.cat([images, images]), numbers.repeat(2), tile=tile)
    assert two_of_one_picture.ranks.tolist() == [0] * 30  # true items may be as near as each other


def test_what_does_not_compare_is_lost() -> None:
    images, numbers = unit(5, 4, 0), torch.arange(5)
    broken = images.clone()
    broken[2] = float("nan")
    assert retrieve(broken, numbers, images, numbers).ranks[2] == 4
    assert retrieve(images, numbers, broken, numbers).ranks.tolist() == [1, 1, 4, 1, 1]


def test_a_query_without_a_true_match_is_an_error() -> None:
    with pytest.raises(DataError, match="query 1 has no true match"):
        retrieve(unit(2, 4, 0), torch.tensor([0, 5]), unit(3, 4, 1), torch.arange(3))


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


def test_memory_is_of_a_tile_not_of_the_data() -> None:
    images, texts = unit(1000, 4, 0), unit(3000, 4, 1)
    with Largest() as largest:
        retrieve(images, torch.arange(1000), texts, torch.arange(3000) % 1000, tile=100)
    assert largest.numel <= 100 * 100  # and vectors of 3000; the whole matrix has 3,000,000
