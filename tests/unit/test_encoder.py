"""The lean way through plain blocks against the blocks' own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pins import OLD_TRANSFORMERS
from tiny import CLIP_VISION, tiny_tower

from vlm_vision import VisionTower, load_tower
from vlm_vision.backbones import encoder

DINO = {**{key: CLIP_VISION[key] for key in CLIP_VISION if key != "intermediate_size"}, "mlp_ratio": 2}
TOWERS: dict[str, Any] = {
    "open_clip": tiny_tower,
    "CLIP": lambda: library("clip_vision_model", {**CLIP_VISION, "hidden_act": "quick_gelu"}),
    "CLIP with GELU": lambda: library("clip_vision_model", {**CLIP_VISION, "hidden_act": "gelu"}),
    "SigLIP": lambda: library("siglip_vision_model", CLIP_VISION),
    "DINOv2, scaled layers": lambda: library("dinov2", DINO),
    "without biases of q, k, v": lambda: library("dinov2", {**DINO, "qkv_bias": False}),
}


def library(model_type: str, config: dict[str, Any]) -> VisionTower:
    architecture = {"model_type": model_type, **config}
    preprocess = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    node = {"name": "transformers", "architecture": architecture, "weights": "none", "preprocess": preprocess}
    return load_tower({"backbone": node})


def with_numbers_everywhere(tower: VisionTower) -> VisionTower:
    """Biases and factors start at 0 and 1, which would hide that they are left out."""
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return tower.double()


def pixels_of(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)


def through_modules(tower: VisionTower, pixels: torch.Tensor) -> torch.Tensor:
    """A hook makes a block run as it is."""
    handles = [block.register_forward_hook(lambda *_: None) for block in tower.backbone.layer_modules()]
    features: torch.Tensor = tower(pixels)
    for handle in handles:
        handle.remove()
    return features


@pytest.mark.parametrize("at_once", [8192, 40, 1], ids=["all together", "in groups", "one by one"])
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_lean_blocks_equal_their_modules(kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer: what one gave must not change when the next runs in place."""
    monkeypatch.setattr(encoder, "TOKENS_AT_ONCE", at_once)
    plain_blocks = count_plain_blocks(monkeypatch)
    tower = with_numbers_everywhere(TOWERS[kind]())
    tower = VisionTower(tower.config.model_copy(update={"layer": (1, 2), "dtype": "float64"}), tower.backbone)
    pixels = pixels_of(5)
    features, own = tower(pixels), through_modules(tower, pixels)
    assert sum(plain_blocks) == 2
    error = (features - own).abs().max() / own.abs().max()
    in_float32 = kind == "SigLIP" and OLD_TRANSFORMERS  # softmax, whatever the dtype
    assert float(error) <= (1e-6 if in_float32 else 1e-13)  # measured 7.8e-8 and 1.5e-15


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_half_precision_is_as_near_as_the_modules_own(kind: str) -> None:
    tower = with_numbers_everywhere(TOWERS[kind]())
    pixels = pixels_of(32)
    exact = tower(pixels)
    tower.bfloat16()
    lean, own = (
        float((way - exact).square().mean()) for way in (tower(pixels), through_modules(tower, pixels))
    )
    assert lean <= 1.25 * own  # measured 0.88 to 1.12


def count_plain_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    run, counted = encoder._run_plain, []

    def counting(*arguments: Any) -> None:
        counted.append(1)
        run(*arguments)

    monkeypatch.setattr(encoder, "_run_plain", counting)
    return counted
