"""Cached gradients: those of the whole batch, whatever is random in the model, for every loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny import TOWER, tiny_dual_encoder
from torch import Tensor, nn

from vlm_vision import load_dual_encoder
from vlm_vision.adapters.lora import add_lora
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.config import load_config
from vlm_vision.train.contrastive_config import LossConfig
from vlm_vision.train.gradient_cache import LOCAL, Outputs, cached_backward, join
from vlm_vision.train.learner import split_inputs
from vlm_vision.train.objective import Objective

PAIRS, CAPTIONS = 12, 5


def batch() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Twelve pictures with five distinct captions, and two texts of no picture."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(PAIRS, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 1000, (CAPTIONS + 2, 16), generator=generator)
    captions = torch.randint(0, CAPTIONS, (PAIRS,), generator=generator)
    identities = torch.stack([captions, torch.arange(PAIRS)], dim=1)
    facts = {"captions": captions, "num_captions": CAPTIONS, "identities": identities, "teacher": None}
    return {"pixels": pixels, "tokens": tokens}, facts


def objective(**loss: Any) -> Objective:
    """A model with dropout in its adapters and patches left out: random in both towers."""
    model = tiny_dual_encoder()
    names = [name for name, _ in model.named_parameters() if name.startswith(("tower.", "text."))]
    layers = add_lora(model, names, LoraConfig(rank=2, dropout=0.3))
    assert layers
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    model.requires_grad_(True)
    if loss.get("name") == "siglip":
        model.logit_bias = nn.Parameter(torch.tensor(-3.0))
    if "keep" not in loss:
        model.tower.backbone.drop_patches(0.5)
    whole = Objective(model, load_config(LossConfig, loss))
    whole.train()
    return whole


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the largest gradient of all: a bias before a softmax has gradients of rounding alone."""
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((found[name] - tensor).abs().max()) / largest for name, tensor in expected.items())


LOSSES: dict[str, dict[str, Any]] = {
    "info_nce": {},
    "in tiles, with both directions summed": {"tile_size": 5, "directions": "sum"},
    "siglip": {"name": "siglip"},
    "positive duplicates": {"duplicates": "positive"},
    "patches": {"patch_weight": 0.7},
    "kept features": {"keep": {"weight": 2.0}},
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunks", [2, 5, 12])
def test_chunks_give_the_gradients_of_the_whole_batch(name: str, chunks: int) -> None:
    whole, (inputs, facts) = objective(**LOSSES[name]), batch()
    if whole._reference:  # features have gone somewhere since
        with torch.no_grad():
            for parameter in whole.model.tower.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))

    torch.manual_seed(7)
    found_loss, outputs = cached_backward(
        lambda **chunk: whole(**chunk),
        split_inputs(inputs, chunks, pad_id=0),
        lambda found: whole.loss(found, facts),
        sync=lambda is_last: nullcontext(),
    )
    found = gradients(whole)

    whole.zero_grad()
    torch.manual_seed(7)
    parts: list[Outputs] = [
        whole(**chunk) for chunk in split_inputs(inputs, chunks, pad_id=0)
    ]  # all activations held
    local = sum(part[LOCAL] for part in parts if LOCAL in part)
    expected_loss = whole.loss(join(parts), facts) + local
    expected_loss.backward()
    assert outputs["image"].shape == (PAIRS, 32)
    assert float(found_loss) == pytest.approx(float(expected_loss.detach()), rel=1e-6)
    assert worst_difference(found, gradients(whole)) < 1e-5  # worst measured: 1e-6
    assert {"model.logit_scale"} <= found.keys()
    if whole.patch_head is not None:
        assert any(name.startswith("patch_head.") for name in found)


def test_without_randomness_chunks_equal_one_forward() -> None:
    torch.manual_seed(0)
    whole, (inputs, facts) = Objective(load_dual_encoder(TOWER), LossConfig()), batch()
    loss = whole.loss(whole(**inputs), facts)
    loss.backward()
    expected = gradients(whole)
    whole.zero_grad()
    found, _ = cached_backward(
        lambda **chunk: whole(**chunk),
        split_inputs(inputs, 4, pad_id=0),
        lambda outputs: whole.loss(outputs, facts),
        sync=lambda is_last: nullcontext(),
    )
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert worst_difference(gradients(whole), expected) < 1e-5  # worst measured: 1e-6


def test_a_loss_scale_multiplies_every_gradient() -> None:
    whole, (inputs, facts) = objective(keep={"weight": 1.0}), batch()
    found = []
    for scale in (1.0, 8.0):
        whole.zero_grad()
        torch.manual_seed(7)
        cached_backward(
            lambda **chunk: whole(**chunk),
            split_inputs(inputs, 3, pad_id=0),
            lambda outputs: whole.loss(outputs, facts),
            sync=lambda is_last: nullcontext(),
            scale=scale,
        )
        found.append(gradients(whole))
    eightfold = {name: 8 * tensor for name, tensor in found[0].items()}
    assert worst_difference(found[1], eightfold) < 1e-6


def test_gradients_are_exchanged_with_the_last_chunk_only() -> None:
    whole, (inputs, facts) = objective(), batch()
    told: list[bool] = []

    def sync(is_last: bool) -> Any:
        told.append(is_last)
        return nullcontext()

    cached_backward(
        lambda **chunk: whole(**chunk),
        split_inputs(inputs, 4, pad_id=0),
        lambda outputs: whole.loss(outputs, facts),
        sync=sync,
    )
    assert told == [False, False, False, True]


def test_every_chunk_has_something_and_the_last_has_some_of_all() -> None:
    chunks = split_inputs({"pixels": torch.zeros(7, 1), "tokens": torch.ones(2, 3)}, 4, pad_id=0)
    assert [len(chunk["pixels"]) for chunk in chunks] == [2, 2, 2, 1]
    assert ["tokens" in chunk for chunk in chunks] == [False, False, True, True]
    assert sum(chunk["shares"]["pixels"] for chunk in chunks) == pytest.approx(1)
