from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from references import drawn
from tiny import RESNET, tiny_tower
from torch import Tensor
from torch.nn.functional import interpolate

from vlm_vision import load_tower
from vlm_vision.errors import ConfigError
from vlm_vision.multiscale import MultiscaleTower


def pixels(count: int = 2, side: int = 96) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_facts_are_those_of_the_features() -> None:
    tower = tiny_tower()
    multiscale = MultiscaleTower(tower)
    assert (multiscale.image_size, multiscale.hidden_size) == (96, 192)
    assert (multiscale.grid, multiscale.num_patches, multiscale.num_tokens) == ((4, 4), 16, 16)
    assert (multiscale.num_patches_per_side, multiscale.patch_size) == (4, 24)
    assert (multiscale.dtype, multiscale.device) == (torch.float32, torch.device("cpu"))
    assert multiscale.config == tower.config
    assert tower.image_size == tower.image_processor.config.image_size == 32  # the inner one is as it was
    picture = multiscale.image_processor(drawn(120, 100))
    assert multiscale(picture).shape == (1, multiscale.num_tokens, multiscale.hidden_size)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_each_scale_is_its_tiles_one_by_one(kind: str) -> None:
    tower = tiny_tower() if kind == "ViT" else load_tower(RESNET)
    multiscale, batch = MultiscaleTower(tower, (1, 3)), pixels()
    found = multiscale(batch)
    assert found.shape == (2, tower.num_patches, 2 * tower.hidden_size)
    small = interpolate(batch, size=32, mode="bicubic")
    torch.testing.assert_close(found[..., : tower.hidden_size], tower(small), rtol=0, atol=1e-5)
    rows, columns = tower.grid
    whole = torch.empty(2, 3 * rows, 3 * columns, tower.hidden_size)
    for row in range(3):
        for column in range(3):
            tile = batch[:, :, 32 * row : 32 * (row + 1), 32 * column : 32 * (column + 1)]
            features = tower(tile).unflatten(1, tower.grid)
            whole[:, rows * row : rows * (row + 1), columns * column : columns * (column + 1)] = features
    pooled = whole.unflatten(2, (columns, 3)).unflatten(1, (rows, 3)).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(found[..., tower.hidden_size :], pooled, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_tower_runs_once_a_scale_or_in_batches_of_the_size_asked_for() -> None:
    tower, sizes = tiny_tower(), []
    tower.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    whole = MultiscaleTower(tower)(pixels())
    assert sizes == [2, 8, 18]
    sizes.clear()
    parts = MultiscaleTower(tower, max_batch=8)(pixels())
    assert sizes == [2, 8, 8, 8, 2]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_class_token_is_the_mean_of_the_tiles() -> None:
    tower = tiny_tower(select="cls_patch")
    batch = pixels(side=64)
    found = MultiscaleTower(tower, (1, 2))(batch)
    assert found.shape == (2, 17, 128)
    quarters = [tower(part) for half in batch.chunk(2, dim=2) for part in half.chunk(2, dim=3)]
    mean = torch.stack([tokens[:, 0] for tokens in quarters]).mean(dim=0)
    torch.testing.assert_close(found[:, 0, 64:], mean, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_list_is_a_batch_and_the_dtype_is_the_tower_s() -> None:
    multiscale = MultiscaleTower(tiny_tower(dtype="bfloat16"))
    found = multiscale(list(pixels()))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, multiscale(pixels()))


def test_it_learns() -> None:
    tower = tiny_tower()
    multiscale = MultiscaleTower(tower)
    torch.autograd.backward(multiscale(pixels()).square().sum())
    assert [name for name, parameter in multiscale.named_parameters() if parameter.grad is None] == []
    multiscale.requires_grad_(False)
    assert not multiscale(pixels()).requires_grad
    tower.train_only(1)
    assert multiscale(pixels()).requires_grad


def test_llava_s_sizes_are_multiples_of_the_tower_s() -> None:
    assert MultiscaleTower.from_llava(tiny_tower(), "96,32,64").scales == (1, 2, 3)
    for sizes in ("64,96", "32,80", "336,672,1008"):
        with pytest.raises(
            ConfigError, match=f"s2_scales '{sizes}': the smallest must be the tower's size, 32"
        ):
            MultiscaleTower.from_llava(tiny_tower(), sizes)
    with pytest.raises(ConfigError, match="must be sides in pixels"):
        MultiscaleTower.from_llava(tiny_tower(), "32,big")


@pytest.mark.parametrize("scales", [(), (2, 3), (1, 1), (1, 3, 2), (1, 1.5)])
def test_scales_that_do_not_rise_from_one_are_refused(scales: Any) -> None:
    with pytest.raises(ConfigError, match="must be whole multiples of the tower's size that rise from 1"):
        MultiscaleTower(tiny_tower(), scales)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="max_batch 0"):
        MultiscaleTower(tiny_tower(), max_batch=0)
    with pytest.raises(ConfigError, match="select 'cls': scales are joined patch by patch"):
        MultiscaleTower(tiny_tower(select="cls"))
    multiscale = MultiscaleTower(tiny_tower())
    for wrong in (torch.zeros(1, 3, 32, 32), torch.zeros(3, 96, 96), torch.zeros(1, 1, 96, 96)):
        with pytest.raises(ConfigError, match=r"takes \[B, 3, 96, 96\], its largest scale"):
            multiscale(wrong)
    with pytest.raises(ConfigError, match="must hold pictures, all of one size"):
        multiscale([torch.zeros(3, 96, 96), torch.zeros(3, 48, 48)])
    with pytest.raises(ConfigError, match="no pixels were given"):
        multiscale([])
    with pytest.raises(ConfigError, match="not a list of Image; tower"):
        multiscale([Image.new("RGB", (8, 8))])
