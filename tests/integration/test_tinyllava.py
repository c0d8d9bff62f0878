"""Our towers in TinyLLaVA Factory's own code; runs where `VLM_VISION_TINYLLAVA` names a checkout of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import TOWER, tiny_dual_encoder, tiny_llm, tiny_tower

from vlm_vision import VisionTower, load_tower
from vlm_vision.errors import ConfigError, WeightsError

CHECKOUT = os.environ.get("VLM_VISION_TINYLLAVA")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="VLM_VISION_TINYLLAVA names no checkout of TinyLLaVA")


@pytest.fixture(autouse=True, scope="module")
def checkout() -> Iterator[None]:
    sys.path.insert(0, str(CHECKOUT))
    yield
    sys.path.remove(str(CHECKOUT))


def make_vlm(folder: Path, llm: Path, **fields: Any) -> Any:
    """As TinyLLaVA's `train.py` builds it."""
    from tinyllava.model import TinyLlavaConfig, TinyLlavaForConditionalGeneration
    from tinyllava.utils import ModelArguments

    import vlm_vision.integrations.tinyllava  # noqa: F401

    arguments = ModelArguments(
        model_name_or_path=str(llm),
        tokenizer_name_or_path=str(llm),
        vision_tower=f"vlm_vision:{folder}",
        connector_type="mlp2x_gelu",
        **{"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", **fields},
    )
    config = TinyLlavaConfig()
    config.load_from_config(arguments)
    torch.manual_seed(0)
    model = TinyLlavaForConditionalGeneration(config)
    model.load_llm(model_name_or_path=str(llm))
    model.load_vision_tower(model_name_or_path=arguments.vision_tower.split(":")[-1])
    return model


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    return tiny_llm(tmp_path / "tinyllama")


@pytest.mark.parametrize("source", ["tower", "dual encoder"])
def test_their_model_trains_saves_and_reloads(source: str, llm: Path, tmp_path: Path) -> None:
    part = tiny_tower() if source == "tower" else tiny_dual_encoder()
    part.save_pretrained(tmp_path / "ours")
    tower = VisionTower.from_pretrained(tmp_path / "ours")
    model = make_vlm(tmp_path / "ours", llm).eval()
    pixels = model.vision_tower._image_processor(Image.new("RGB", (40, 30), "red"), return_tensors="pt")
    pixels = pixels["pixel_values"]
    assert torch.equal(pixels, tower.image_processor(Image.new("RGB", (40, 30), "red")))
    with torch.no_grad():
        assert torch.equal(model.vision_tower(pixels), tower(pixels))
    assert not any(parameter.requires_grad for parameter in model.vision_tower.parameters())

    model.requires_grad_(True).train()
    ids = torch.tensor([[2, 9, -200, 10, 11, 12]])
    labels = ids.masked_fill(ids == -200, -100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=labels, images=pixels).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.vision_tower.parameters())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.eval().save_pretrained(tmp_path / "vlm")
    for low_memory in (False, True):
        again = type(model).from_pretrained(tmp_path / "vlm", low_cpu_mem_usage=low_memory).eval()
        with torch.no_grad():
            assert torch.equal(again(ids, images=pixels).logits, model(ids, images=pixels).logits)

    stage = tmp_path / "stage" / "vision_tower"  # as TinyLLaVA's recipes save a trained tower
    stage.mkdir(parents=True)
    torch.save(dict(model.vision_tower._vision_tower.named_parameters()), stage / "pytorch_model.bin")
    following = make_vlm(tmp_path / "ours", llm).eval()
    following.load_vision_tower(model_name_or_path=str(tmp_path / "ours"), pretrained_vision_tower_path=stage)
    with torch.no_grad():
        assert torch.equal(following.vision_tower(pixels), model.vision_tower(pixels))


def test_another_layer_or_other_tokens_than_the_folders_are_refused(llm: Path, tmp_path: Path) -> None:
    load_tower(TOWER).save_pretrained(tmp_path / "ours")
    pixels = torch.randn(1, 3, 32, 32)
    for fields in ({"mm_vision_select_layer": -3}, {"mm_vision_select_feature": "cls_patch"}):
        model = make_vlm(tmp_path / "ours", llm, **fields)
        with pytest.raises(ConfigError, match="this tower's folder gives layer -2 and 'patch'"):
            model.encode_images(pixels)
    load_tower(TOWER, layer=-1).save_pretrained(tmp_path / "last")
    with pytest.raises(WeightsError, match="these weights are not for this model"):
        make_vlm(tmp_path / "ours", llm).vision_tower.load_model(str(tmp_path / "last"))
