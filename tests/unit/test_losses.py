"""Contrastive losses on one process: by hand, against open_clip, in tiles, with duplicates and negatives.

Many ranks: tests/distributed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from vlm_vision.train import distill_loss, info_nce_loss, siglip_loss


def embeddings(pairs: int = 12, width: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, texts, the log of their scale and the bias, in double precision, with gradients."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, pairs, width, generator=generator, dtype=torch.float64)
    scale, bias = torch.tensor([2.3, -1.5], dtype=torch.float64)
    return image.requires_grad_(), text.requires_grad_(), scale.requires_grad_(), bias.requires_grad_()


def info_nce(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return info_nce_loss(normalize(image, dim=-1), normalize(text, dim=-1), scale.exp(), **options) + 0 * bias


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return siglip_loss(normalize(image, dim=-1), normalize(text, dim=-1), scale.exp(), bias, **options)


LOSSES = pytest.mark.parametrize("loss", [info_nce, siglip])


def worst_difference(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> float:
    """Of the values and of all gradients, relative to the largest element of each."""
    worst = 0.0
    (found, *found_grads), (expected, *expected_grads) = (
        (value := loss(*inputs), *torch.autograd.grad(value, inputs)) for loss in (ours, theirs)
    )
    for one, other in zip([found, *found_grads], [expected, *expected_grads], strict=True):
        difference = (one - other).abs().max() / other.abs().max().clamp(min=1e-12)
        worst = max(worst, float(difference.detach()))
    return worst


def test_two_pairs_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # Similarities times 2: [[2, 1.2], [0, 1.6]].
    rows = math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(0 - 1.6))
    columns = math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1.2 - 1.6))
    expected = (rows / 2 + columns / 2) / 2
    assert float(info_nce_loss(image, text, torch.tensor(2.0))) == pytest.approx(expected, rel=1e-6)
    pairs = sum(math.log(1 + math.exp(logit)) for logit in (-2 + 1, 1.2 - 1, 0 - 1, -1.6 + 1))
    found = siglip_loss(image, text, torch.tensor(2.0), torch.tensor(-1.0))
    assert float(found) == pytest.approx(pairs / 2, rel=1e-6)


def test_values_and_gradients_equal_open_clips() -> None:
    def theirs(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        loss: Tensor = ClipLoss()(normalize(image, dim=-1), normalize(text, dim=-1), scale.exp())
        return loss + 0 * bias

    def their_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        loss: Tensor = SigLipLoss()(normalize(image, dim=-1), normalize(text, dim=-1), scale.exp(), bias)
        return loss

    assert worst_difference(info_nce, theirs, embeddings()) < 1e-13  # worst measured: 5e-16
    assert worst_difference(siglip, their_siglip, embeddings()) < 1e-13  # worst measured: 5e-16


@LOSSES
@pytest.mark.parametrize("tile_size", [1, 5, 12, 100])
@pytest.mark.parametrize("duplicates", [None, "mask", "positive"])
def test_tiles_change_nothing(loss: Callable[..., Tensor], tile_size: int, duplicates: str | None) -> None:
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {
        "negatives": normalize(torch.randn(4, 16, generator=generator).double(), dim=-1)
    }
    if duplicates:
        options |= {
            "identities": torch.randint(0, 6, (12, 2), generator=generator),
            "duplicates": duplicates,
        }
    worst = worst_difference(
        lambda *inputs: loss(*inputs, tile_size=tile_size, **options),
        lambda *inputs: loss(*inputs, **options),
        embeddings(),
    )
    assert worst < 1e-12  # worst measured: 9e-16


@LOSSES
def test_gradients_are_the_derivatives(loss: Callable[..., Tensor]) -> None:
    negatives = normalize(torch.randn(2, 4, dtype=torch.float64), dim=-1).requires_grad_()

    def of(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, extra: Tensor) -> Tensor:
        return loss(image, text, scale, bias, tile_size=3, negatives=normalize(extra, dim=-1))

    assert torch.autograd.gradcheck(of, (*embeddings(pairs=5, width=4), negatives))


IDENTITIES = torch.tensor([[0, 9], [1, 8], [0, 7], [2, 8], [3, 5], [0, 4]])
SAME = torch.tensor(
    [
        [1, 0, 1, 0, 0, 1],
        [0, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 1],
        [0, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 1],
    ]
).bool()


def plain_info_nce(duplicates: str) -> Callable[..., Tensor]:
    """With the whole matrix and autograd."""

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale.exp() * normalize(image, dim=-1) @ normalize(text, dim=-1).T
        if duplicates == "mask":
            logits = logits.masked_fill(SAME & ~torch.eye(6, dtype=torch.bool), -torch.inf)
            targets = torch.eye(6, dtype=torch.float64)
            kept = logits.clamp(min=-1e4)  # cross_entropy of soft targets multiplies 0 by infinity
        else:
            targets, kept = SAME.double() / SAME.sum(1, keepdim=True), logits
        return (cross_entropy(kept, targets) + cross_entropy(kept.T, targets)) / 2 + 0 * bias

    return loss


def plain_siglip(duplicates: str) -> Callable[..., Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale.exp() * normalize(image, dim=-1) @ normalize(text, dim=-1).T + bias
        own = torch.eye(6, dtype=torch.bool)
        if duplicates == "mask":
            counted, positive = own | ~SAME, own
        else:
            counted, positive = torch.ones_like(own), SAME
        losses = logsigmoid(torch.where(positive, logits, -logits))
        return -(losses * counted).sum() / len(image)

    return loss


@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_duplicates_are_left_out_or_share_the_target(duplicates: str) -> None:
    options = {"identities": IDENTITIES, "duplicates": duplicates, "tile_size": 4}
    for loss, plain in ((info_nce, plain_info_nce), (siglip, plain_siglip)):
        worst = worst_difference(
            lambda *inputs, loss=loss: loss(*inputs, **options), plain(duplicates), embeddings(6)
        )
        assert worst < 1e-12  # worst measured: 3e-15


def test_extra_negatives_are_columns_of_every_picture_and_no_rows_of_their_own() -> None:
    image, text, scale, bias = embeddings()
    extra = normalize(torch.randn(3, 16, dtype=torch.float64), dim=-1)
    unit_image, unit_text = normalize(image, dim=-1), normalize(text, dim=-1)
    logits = scale.exp() * unit_image @ torch.cat([unit_text, extra]).T
    own = torch.arange(12)
    expected = (cross_entropy(logits, own) + cross_entropy(logits[:, :12].T, own)) / 2
    assert torch.allclose(info_nce(image, text, scale, bias, negatives=extra), expected, rtol=1e-13)
    sign = 2 * torch.eye(12, 15, dtype=torch.float64) - 1
    expected = -logsigmoid(sign * (logits + bias)).sum() / 12
    assert torch.allclose(siglip(image, text, scale, bias, negatives=extra), expected, rtol=1e-13)


def test_exchanging_the_two_sides_changes_nothing() -> None:
    image, text, scale, bias = embeddings()
    for loss in (info_nce, siglip):
        assert torch.allclose(loss(image, text, scale, bias), loss(text, image, scale, bias), rtol=1e-13)


def test_a_perfect_match_at_a_high_scale_costs_nothing_and_a_wrong_one_does() -> None:
    unit = torch.eye(4)
    assert float(info_nce_loss(unit, unit, torch.tensor(100.0))) == pytest.approx(0.0, abs=1e-6)
    assert float(info_nce_loss(unit, unit.roll(1, 0), torch.tensor(100.0))) == pytest.approx(100.0)


@LOSSES
def test_bfloat16_autocast_around_it_rounds_nothing(loss: Callable[..., Tensor]) -> None:
    inputs = tuple(tensor.detach().float().requires_grad_() for tensor in embeddings())

    def rounded(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*inputs)

    assert worst_difference(rounded, loss, inputs) == 0


@pytest.mark.parametrize("tile_size", [None, 5])
def test_distillation_equals_open_clips(tile_size: int | None) -> None:
    teacher = normalize(torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(2)).double(), dim=-1)
    teacher_scale = torch.tensor(30.0, dtype=torch.float64)

    def ours(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        sides = normalize(image, dim=-1), normalize(text, dim=-1)
        loss = distill_loss(*sides, scale.exp(), *teacher, teacher_scale, tile_size=tile_size)
        return loss + 0 * bias

    def theirs(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        sides = normalize(image, dim=-1), normalize(text, dim=-1)
        loss: Tensor = DistillClipLoss()(*sides, scale.exp(), *teacher, teacher_scale)[1]
        return loss + 0 * bias

    assert worst_difference(ours, theirs, embeddings()) < 1e-13  # worst measured: 5e-16
