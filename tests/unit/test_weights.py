"""Reading and loading weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import CLIP_VISION, TOWER
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm_vision import load_tower
from vlm_vision.backbones.open_clip import build_visual
from vlm_vision.weights import without_init


def through_data() -> nn.Module:
    """As models of older libraries are filled, and timm's."""
    linear = nn.Linear(4, 4)
    nn.init.trunc_normal_(linear.weight)  # draws until all fit
    linear.weight.data.normal_()
    linear.bias.data.uniform_(-1, 1)
    return linear


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(8, 8),
        lambda: CLIPVisionModel(CLIPVisionConfig(**CLIP_VISION)),
        lambda: build_visual(TOWER["backbone"]["architecture"]),
        through_data,
    ],
    ids=["torch", "transformers", "open_clip", "through .data"],
)
def test_without_init_fills_nothing_with_random_numbers(build: Callable[[], nn.Module]) -> None:
    """A 7B model takes minutes to fill with numbers that a file replaces."""
    with Fills() as fills, without_init():
        model = build()
    assert fills.names == []
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    with Fills() as fills:
        build()
    assert fills.names


@pytest.mark.parametrize(
    "name", ["open_clip:PE-Core-T-16-384", "open_clip:ViTamin-S", "timm:vit_small_patch16_rope_224"]
)
def test_models_that_compute_while_they_are_built_load_from_a_file(name: str, tmp_path: Path) -> None:
    """Rotary positions, and a trunk that runs to learn its shapes."""
    tower = load_tower(f"{name}@none", pooled_head=True)
    prefix = "backbone." if name.startswith("open_clip") else "backbone.model."
    state = {key.removeprefix(prefix): tensor for key, tensor in tower.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    again = load_tower(f"{name}@{tmp_path / 'model.safetensors'}", pooled_head=True)
    assert again.backbone.info == replace(tower.backbone.info, preprocess=again.backbone.info.preprocess)
    pixels = torch.randn(1, 3, again.image_processor.config.height, again.image_processor.config.width)
    with torch.no_grad():
        assert torch.equal(again(pixels), tower(pixels))
        again.save_pretrained(tmp_path / "tower")
        assert torch.equal(load_tower(tmp_path / "tower")(pixels), tower(pixels))


class Fills(TorchDispatchMode):
    """The names of all operations that fill memory with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith(("normal_", "uniform_")) and not args[0].is_meta:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
