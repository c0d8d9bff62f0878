"""InfoNCE on one process: by hand, against open_clip, and its symmetry. Many ranks: tests/distributed."""

from __future__ import annotations

import math

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from vlm_vision.train.losses import info_nce_loss


def embeddings(pairs: int = 12, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and the log of their scale, in double precision, with gradients."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, pairs, width, generator=generator, dtype=torch.float64)
    scale = torch.tensor(2.3, dtype=torch.float64)
    return image.requires_grad_(), text.requires_grad_(), scale.requires_grad_()


def test_two_pairs_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # Similarities times 2: [[2, 1.2], [0, 1.6]].
    rows = math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(0 - 1.6))
    columns = math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1.2 - 1.6))
    expected = (rows / 2 + columns / 2) / 2
    assert float(info_nce_loss(image, text, torch.tensor(2.0))) == pytest.approx(expected, rel=1e-6)


def test_value_and_gradients_equal_open_clip() -> None:
    results = []
    for loss in (info_nce_loss, ClipLoss()):
        image, text, scale = embeddings()
        value = loss(normalize(image, dim=-1), normalize(text, dim=-1), scale.exp())
        results.append((value, *torch.autograd.grad(value, (image, text, scale))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)  # worst measured: 0


def test_exchanging_the_two_sides_changes_nothing() -> None:
    image, text, scale = embeddings()
    assert info_nce_loss(image, text, scale) == info_nce_loss(text, image, scale)


def test_a_perfect_match_at_a_high_scale_costs_nothing_and_a_wrong_one_does() -> None:
    unit = torch.eye(4)
    assert float(info_nce_loss(unit, unit, torch.tensor(100.0))) == pytest.approx(0.0, abs=1e-6)
    assert float(info_nce_loss(unit, unit.roll(1, 0), torch.tensor(100.0))) == pytest.approx(100.0)
