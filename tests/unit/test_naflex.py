"""Pictures that keep their shapes: taken where features may differ in number, else refused with a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny import TOWER, tiny_llm

from vlm_vision import VisionTower, load_tower
from vlm_vision.adapters import build_projector
from vlm_vision.errors import ConfigError
from vlm_vision.extract import extract_features, extract_file
from vlm_vision.integrations.clip_processor import ClipProcessor
from vlm_vision.multiscale import MultiscaleTower
from vlm_vision.tiling import tile_picture
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer, token_grid

if not hasattr(transformers, "Siglip2VisionModel"):
    pytest.skip("this transformers has no SigLIP2", allow_module_level=True)

NAFLEX: dict[str, Any] = {
    "backbone": {
        "name": "transformers",
        "architecture": {
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_patches": 16,
            "patch_size": 8,
        },
        "weights": "none",
    }
}
PICTURES = [Image.new("RGB", size, (200, 40, 90)) for size in ((64, 64), (128, 64), (50, 90))]


@pytest.fixture
def tower() -> VisionTower:
    torch.manual_seed(0)
    return load_tower(NAFLEX, pooled_head=True)


@torch.no_grad()
def test_features_differ_in_number_and_embeddings_do_not(tower: VisionTower) -> None:
    pixels = tower.image_processor(PICTURES)
    sizes = [(picture.shape[1] // 8) * (picture.shape[2] // 8) for picture in pixels]
    assert [tuple(features.shape) for features in tower(pixels)] == [(size, 32) for size in sizes]
    assert len(set(sizes)) > 1
    embeddings = tower.pooled(pixels)
    assert embeddings.shape == (3, 32)
    for picture, embedding in zip(pixels, embeddings, strict=True):
        assert torch.equal(tower.pooled(picture[None])[0], embedding)


def vlm(tower: VisionTower, folder: Path) -> None:
    llm = tiny_llm(folder / "llm")
    projector = build_projector("linear", tower.hidden_size, 32, token_grid(tower))
    VisionLanguageModel(tower, projector, load_llm(llm), load_tokenizer(llm))


NEED_ONE_SIZE: dict[str, Callable[[VisionTower, Path], object]] = {
    "a batch": lambda tower, _: tower.image_processor.normalise(
        [tower.image_processor.to_square(picture) for picture in PICTURES]
    ),
    "features of a data set": lambda tower, folder: extract_features(tower, [folder], folder / "out"),
    "features of a data set, in a file": lambda tower, folder: extract_file(
        tower, [folder], folder / "x.safetensors", pooled=True
    ),
    "a vision-language model": vlm,
    "several scales": lambda tower, _: MultiscaleTower(tower),
    "tiles": lambda tower, _: tile_picture(PICTURES[0], tower.image_processor, TilingConfig()),
    "code around CLIP": lambda tower, _: ClipProcessor(tower.image_processor),
}


@pytest.mark.parametrize("what", NEED_ONE_SIZE)
def test_what_needs_one_size_says_how_to_get_it(what: str, tower: VisionTower, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{what.partition(',')[0]}.*one size.*backbone.preprocess"):
        NEED_ONE_SIZE[what](tower, tmp_path)


@torch.no_grad()
def test_the_way_out_gives_one_size(tower: VisionTower, tmp_path: Path) -> None:
    """As the error says it, word for word."""
    asked = tower.image_processor.config.model_dump(mode="json") | {"resize": "squash"}
    asked = {name: value for name, value in asked.items() if name not in ("max_patches", "patch_size")}
    squashed = load_tower({"backbone": NAFLEX["backbone"] | {"preprocess": asked}})
    assert squashed.image_processor.config == tower.image_processor.config.squashed()
    for number, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{number}.png")
    features = extract_file(squashed, [tmp_path], tmp_path / "features.safetensors", workers=0)
    pixels = squashed.image_processor(PICTURES)
    assert pixels.shape == (3, 3, 32, 32)
    assert torch.equal(features, squashed(pixels))


@torch.no_grad()
def test_parts_of_a_fused_tower_see_one_square() -> None:
    for parts in ([NAFLEX, TOWER], [TOWER, NAFLEX]):
        fused = load_tower({"backbone": {"name": "fused", "parts": [part["backbone"] for part in parts]}})
        assert fused(fused.image_processor(PICTURES)).shape == (3, 16, 96)
