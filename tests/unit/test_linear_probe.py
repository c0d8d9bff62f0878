"""The linear probe against scikit-learn called directly, and its search for C."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from vlm_vision.errors import DataError
from vlm_vision.train import linear_probe as module
from vlm_vision.train.linear_probe import linear_probe

CLASSES, WIDTH = 4, 12


def clouds(count: int, seed: int, spread: float = 1.6) -> tuple[Tensor, Tensor]:
    """Overlapping clouds of points, one for each class."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    return centres[targets] + spread * torch.randn(count, WIDTH, generator=generator), targets


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """(pictures, C) of every fit."""
    fits: list[tuple[int, float]] = []
    fit = module._fit

    def noted(known: np.ndarray, labels: np.ndarray, new: np.ndarray, classes: int, c: float) -> Tensor:
        fits.append((len(known), c))
        return fit(known, labels, new, classes, c)

    monkeypatch.setattr(module, "_fit", noted)
    return fits


def test_the_last_fit_is_scikit_learns_on_all_pictures(chosen: list[tuple[int, float]]) -> None:
    (known, targets), (new, truth) = clouds(120, 0), clouds(200, 1)
    found = linear_probe(known, targets, new, truth, CLASSES)
    count, c = chosen[-1]
    assert count == 120
    model = LogisticRegression(C=c, max_iter=1000, random_state=0).fit(known.numpy(), targets.numpy())
    assert found.accuracy() == pytest.approx(model.score(new.numpy(), truth.numpy()), abs=1e-12)
    assert 0.5 < found.accuracy() < 1
    assert {count for count, _ in chosen[:-1]} == {96}  # four fifths


def test_c_is_searched_as_clip_searched_it(chosen: list[tuple[int, float]]) -> None:
    known, targets = clouds(120, 0)
    linear_probe(known, targets, known, targets, CLASSES)
    powers = [round(float(np.log10(c)), 9) for _, c in chosen[:-1]]
    assert powers[:7] == [-6, -4, -2, 0, 2, 4, 6]
    gaps = {round(min(abs(one - other) for other in powers if other != one), 9) for one in powers}
    assert min(gaps) == 0.125
    assert len(powers) <= 7 + 2 * 4
    assert round(float(np.log10(chosen[-1][1])), 9) in powers


def test_two_classes_and_a_class_that_is_not_fitted() -> None:
    known, targets = clouds(80, 0, spread=0.5)
    for kept in ((0, 1), (0, 2, 3)):
        rows = torch.isin(targets, torch.tensor(kept))
        found = linear_probe(known[rows], targets[rows], known, targets, CLASSES)
        recall = found.confusion.diagonal() / found.confusion.sum(dim=1)
        assert [float(recall[number]) > 0.9 for number in range(CLASSES)] == [
            number in kept for number in range(CLASSES)
        ]


@pytest.mark.parametrize(
    ("targets", "message"),
    [([0, 0, 1, 1, 2], "class 2 has one"), ([1, 1, 1, 1, 1], "there is one class")],
)
def test_too_little_to_fit_on_is_an_error(targets: list[int], message: str) -> None:
    features, numbers = torch.randn(5, 3), torch.tensor(targets)
    with pytest.raises(DataError, match=message):
        linear_probe(features, numbers, features, numbers, 3)
