"""Several backbones as one: their own features, side by side or one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import RESNET, TOWER

from vlm_vision import VisionTower, load_tower
from vlm_vision.errors import ConfigError
from vlm_vision.testing import check_tower

VIT = TOWER["backbone"]
OTHER_MEAN = {**VIT, "preprocess": {"image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}


def fused(*parts: Any, **settings: Any) -> VisionTower:
    torch.manual_seed(0)
    return load_tower({"backbone": {"name": "fused", "parts": list(parts), **settings}})


def alone(tower: VisionTower, part: int) -> VisionTower:
    """A part by itself, at the layer it was truncated to."""
    backbone, layer = tower.backbone.parts[part], tower.backbone._layers[part]  # type: ignore[union-attr,index]
    return VisionTower(tower.config.model_copy(update={"layer": layer}), backbone).eval()  # type: ignore[arg-type]


@torch.no_grad()
def test_channels_are_the_parts_own_features_side_by_side() -> None:
    tower = fused(VIT, {"backbone": VIT, "layer": 1})
    assert (tower.hidden_size, tower.grid) == (128, (4, 4))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(tower(pixels)[..., :64], alone(tower, 0)(pixels))
    assert torch.equal(tower(pixels)[..., 64:], alone(tower, 1)(pixels))


@torch.no_grad()
def test_each_part_sees_the_picture_in_its_own_normalisation() -> None:
    tower = fused(VIT, OTHER_MEAN)
    squares = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    second = alone(tower, 1)
    own = second(second.image_processor.normalise(squares))
    found = tower(tower.image_processor.normalise(squares))[..., 64:]
    assert float((found - own).abs().max()) <= 1e-5  # measured 1e-6


@torch.no_grad()
def test_grids_are_interpolated_to_agree() -> None:
    tower = fused(VIT, {"backbone": RESNET["backbone"], "layer": -2})  # 4x4 and 2x2 patches
    pixels = torch.randn(1, 3, 32, 32)
    coarse = alone(tower, 1)(pixels)
    wide = tower(pixels)[..., 64:].unflatten(1, (4, 4))
    corner = coarse.unflatten(1, (2, 2))[:, 0, 0]
    assert torch.allclose(wide[:, 0, 0], corner, atol=1e-6)
    assert fused(VIT, RESNET["backbone"], grid=[3, 5])(pixels).shape == (1, 15, 64 + 256)


@torch.no_grad()
def test_tokens_one_after_the_other() -> None:
    tower = fused(VIT, {"backbone": VIT, "layer": 1}, "timm:test_vit@none", join="tokens")
    assert tower.num_patches == 16 + 16 + 100
    assert tower.image_size == 160
    pixels = torch.randn(1, 3, 160, 160)
    assert torch.equal(tower(pixels)[:, 32:], alone(tower, 2)(pixels))
    with pytest.raises(ConfigError, match="has no one side"):
        _ = tower.num_patches_per_side


@pytest.mark.parametrize("join", ["channels", "tokens"])
def test_a_fused_tower_keeps_the_contract(join: str) -> None:
    check_tower(fused(VIT, OTHER_MEAN, "timm:test_vit@none", join=join))


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        ([VIT], {}, "name at least two `parts`"),
        ([VIT, RESNET["backbone"]], {"join": "tokens"}, r"widths \[64, 256\] differ.*join: channels"),
        ([VIT, VIT], {"join": "tokens", "grid": [2, 2]}, "`grid` is for `join: channels`"),
        ([VIT, {"backbone": VIT, "layer": 9}], {}, "layer 9 is out of range"),
        ([VIT, "open_clip:ViT-B-23@none"], {}, "did you mean 'ViT-B-32'"),
        ([VIT, VIT], {"model": "x"}, "are of the parts"),
    ],
)
def test_parts_that_do_not_fit_say_why(parts: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fused(*parts, **settings)


def test_a_fused_tower_has_no_pooled_head() -> None:
    with pytest.raises(ConfigError, match="no pooled head"):
        load_tower({"backbone": {"name": "fused", "parts": [VIT, VIT]}, "pooled_head": True})
