"""The drift of features against formulas on all rows at once, in double."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import RESNET, TOWER, tiny_dual_encoder, tiny_tower
from torch import Tensor

from vlm_vision import VisionTower, load_tower
from vlm_vision.adapters import build_projector
from vlm_vision.adapters.build import save_projector
from vlm_vision.errors import ConfigError, DataError, WeightsError
from vlm_vision.train.drift import drift, open_projector


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)) for _ in range(7)]


def changed(amount: float = 0.02, **overrides: object) -> VisionTower:
    tower = tiny_tower(**overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tower.parameters():
            weight += amount * torch.randn(weight.shape, generator=generator)
    return tower


@torch.no_grad()
def rows(tower: VisionTower, pictures: list[Image.Image], layer: int) -> Tensor:
    again = VisionTower(tower.config.model_copy(update={"layer": layer}), tower.backbone)
    return again(tower.image_processor(pictures)).flatten(0, 1).double()


def centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def test_every_layer_equals_the_formulas(pictures: list[Image.Image]) -> None:
    old, new = tiny_tower(pooled_head=True), changed(pooled_head=True)
    found = drift(old, new, pictures, batch_size=3)
    assert [layer.layer for layer in found.layers] == [1, 2, 3]
    assert (found.pictures, found.read, found.projected) == (7, (2,), None)
    for layer in found.layers:
        x, y = (rows(tower, pictures, layer.layer) for tower in (old, new))
        cosines = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
        assert layer.cosine == pytest.approx(float(cosines.mean()), abs=1e-12)  # measured 2e-16
        assert layer.cosine_min == pytest.approx(float(cosines.min()), abs=1e-12)  # measured 0
        relative = float((y - x).norm() / x.norm())
        assert 0.01 < relative < 1
        assert layer.relative == pytest.approx(relative, rel=1e-12)  # measured 2e-15
        # Kornblith et al., eq. 3 and 4: on the Gram matrices of all patches, where ours has sums by channel
        k, m = centred(x @ x.T), centred(y @ y.T)
        cka = float((k * m).sum() / (k.norm() * m.norm()))
        assert 0.3 < cka < 0.9999
        assert layer.cka == pytest.approx(cka, abs=1e-12)  # measured 1e-15


def test_nothing_changed_says_nothing_changed(pictures: list[Image.Image]) -> None:
    found = drift(tiny_dual_encoder(), tiny_dual_encoder().train(), iter(pictures))
    for layer in found.layers:
        assert layer.relative == 0
        assert (layer.cosine, layer.cosine_min, layer.cka) == pytest.approx((1, 1, 1), abs=1e-12)


def test_cka_forgives_rotations_and_cosine_does_not(pictures: list[Image.Image]) -> None:
    from vlm_vision.train.drift import _Alignment, _Sums

    x = torch.randn(200, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    alignment, sums = _Alignment(), _Sums()
    for part in x.split(64):
        alignment.add(part, 3 * part @ turn + 5)
        sums.add(part, 3 * part @ turn + 5)
    assert alignment.cka() == pytest.approx(1, abs=1e-12)
    assert sums.change().cosine < 0.5
    constant = _Alignment()
    constant.add(torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64))
    assert np.isnan(constant.cka())


def test_towers_that_freed_layers_and_convolutional_ones(pictures: list[Image.Image]) -> None:
    found = drift(tiny_tower(), changed(pooled_head=True), pictures)
    assert [layer.layer for layer in found.layers] == [1, 2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, other = load_tower(RESNET), load_tower(RESNET)
    assert all(layer.relative > 0 for layer in drift(one, other, pictures).layers)


@torch.no_grad()
def test_what_a_projector_makes_of_it(pictures: list[Image.Image], tmp_path: Path) -> None:
    old, new = tiny_tower(layer=[-2, 1]), changed(layer=[-2, 1])
    projector = build_projector("mlp2x_gelu", old.hidden_size, 24, old.grid)
    save_projector(projector, tmp_path / "vlm" / "projector")
    state = {f"model.mm_projector.{name}": value for name, value in projector.state_dict().items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    pixels = old.image_processor(pictures)
    x, y = (projector(tower(pixels)).flatten(0, 1).double() for tower in (old, new))
    for source in (tmp_path / "vlm", tmp_path / "vlm" / "projector", tmp_path / "mm_projector.bin"):
        found = drift(old, new, pictures, projector=open_projector(source, old), batch_size=4).projected
        assert found is not None
        assert found.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-5)  # measured 8e-8
        cosines = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
        assert found.cosine == pytest.approx(float(cosines.mean()), abs=1e-6)
        assert found.cosine_min == pytest.approx(float(cosines.min()), abs=1e-6)
    linear = build_projector("linear", old.hidden_size, 24, old.grid)
    torch.save(linear.state_dict(), tmp_path / "linear.bin")
    opened = open_projector(tmp_path / "linear.bin", old)
    assert torch.equal(opened.weight, linear.weight)  # type: ignore[arg-type]


def test_what_does_not_compare_is_refused(pictures: list[Image.Image], tmp_path: Path) -> None:
    tower = tiny_tower()
    with pytest.raises(ConfigError, match=r"takes 32 channels, and the tower gives 64 \(layer"):
        drift(tower, tower, pictures, projector=build_projector("linear", 32, 8, tower.grid))
    with pytest.raises(ConfigError, match="prepare pictures differently"):
        drift(tower, tiny_tower(image_size=64), pictures)
    wider = {"backbone": {**TOWER["backbone"], "architecture": {**TOWER["backbone"]["architecture"]}}}  # type: ignore[dict-item]
    vision = {**wider["backbone"]["architecture"]["vision_cfg"], "width": 96}  # type: ignore[index]
    wider["backbone"]["architecture"]["vision_cfg"] = vision  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"other widths of layers: \(64, 64\) and \(96, 96\)"):
        drift(tower, load_tower(wider), pictures)
    with pytest.raises(DataError, match="no picture"):
        drift(tower, tower, [])
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match="holds no projector that LLaVA builds"):
        open_projector(tmp_path / "x.bin", tower)
