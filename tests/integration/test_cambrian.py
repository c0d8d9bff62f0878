"""Our towers in Cambrian's own code; runs where `VLM_VISION_CAMBRIAN` names a checkout of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import RESNET, tiny_tower
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from vlm_vision import load_tower
from vlm_vision.errors import ConfigError

CHECKOUT = os.environ.get("VLM_VISION_CAMBRIAN")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="VLM_VISION_CAMBRIAN names no checkout of Cambrian")


@pytest.fixture(autouse=True, scope="module")
def checkout() -> Iterator[None]:
    sys.path.insert(0, str(CHECKOUT))
    yield
    sys.path.remove(str(CHECKOUT))


def arguments(*names: str, lengths: tuple[int, ...], **fields: Any) -> SimpleNamespace:
    settings = {
        "vision_tower_aux_list": list(names),
        "vision_tower_aux_token_len_list": list(lengths),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "unfreeze_mm_vision_tower": False,
        "num_query_group": 1,
        "query_num_list": [16],
        "image_token_len": 16,
        "vision_hidden_size": 32,
        "connector_only": True,
        "connector_depth": 1,
        "pretrain_mm_mlp_adapter": None,
        "mm_projector_type": "sva",
    }
    return SimpleNamespace(**{**settings, **fields})


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "clip"
    )
    return tmp_path / "clip"


@pytest.mark.parametrize("length", [16, 9])
def test_features_and_pixels_are_those_of_their_clip(length: int, clip_folder: Path) -> None:
    from cambrian.model.multimodal_encoder import builder
    from cambrian.model.multimodal_encoder.clip_encoder import ClipVisionTower

    import vlm_vision.integrations.cambrian  # noqa: F401

    args = arguments(f"vlm_vision:transformers:{clip_folder}", lengths=(length,))
    (ours,) = builder.build_vision_tower_aux_list(args)
    theirs = ClipVisionTower(f"{clip_folder}-interp{length}", args)
    values = np.random.default_rng(0).integers(0, 256, (45, 37, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    pixels = [
        one.image_processor.preprocess(picture, return_tensors="pt")["pixel_values"] for one in (ours, theirs)
    ]
    assert torch.equal(*pixels)
    assert float((ours(pixels[1]) - theirs(pixels[1])).abs().max()) <= 1e-5  # measured 5e-7
    assert torch.equal(ours([pixels[1][0]])[0], ours(pixels[1]))
    facts = ("hidden_size", "image_size", "patch_size", "num_patches", "num_patches_per_side", "dtype")
    for fact in facts:
        assert getattr(ours, fact) == getattr(theirs, fact), fact
    assert torch.equal(ours.dummy_feature, theirs.dummy_feature)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    (waiting,) = builder.build_vision_tower_aux_list(args, delay_load=True)
    assert not waiting.is_loaded
    assert (waiting.hidden_size, waiting.num_patches) == (32, length)


@pytest.mark.parametrize("learns", [False, True])
def test_their_model_trains_with_two_of_ours(learns: bool, tmp_path: Path) -> None:
    from cambrian.model import CambrianConfig, CambrianLlamaForCausalLM

    import vlm_vision.integrations.cambrian  # noqa: F401

    tiny_tower().save_pretrained(tmp_path / "vit")
    load_tower(RESNET, layer=3).save_pretrained(tmp_path / "resnet")
    config = CambrianConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        tokenizer_padding_side="right",
    )
    config.pretraining_tp = 1
    torch.manual_seed(0)
    model = CambrianLlamaForCausalLM(config)
    args = arguments(
        f"vlm_vision:{tmp_path / 'vit'}",
        f"vlm_vision:{tmp_path / 'resnet'}",
        lengths=(16, 16),
        unfreeze_mm_vision_tower=learns,
        mm_vision_select_layer=2,
    )
    model.get_model().initialize_vision_modules(args)
    towers = model.get_vision_tower_aux_list()
    assert [tower.hidden_size for tower in towers] == [64, 32]
    ids = torch.tensor([[2, 9, -200, 10, 11, 12]])
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == -200, -100),
        "images": [torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)],
        "image_sizes": [(32, 32)],
    }
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        learnt = {parameter.grad is not None for tower in towers for parameter in tower.parameters()}
        assert learnt == {learns}
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_names_that_are_not_ours_go_to_their_builder() -> None:
    from cambrian.model import cambrian_arch

    import vlm_vision.integrations.cambrian as cambrian

    cambrian.install()
    args = arguments("vlm_vision:open_clip:ViT-S-32-alt@none", "nobody/knows", lengths=(49, 16))
    with pytest.raises(ValueError, match="Unknown vision tower: nobody/knows-interp16"):
        cambrian_arch.build_vision_tower_aux_list(args)
    with pytest.raises(ConfigError, match="'patch' cannot be resized to 15 tokens"):
        cambrian_arch.build_vision_tower_aux_list(arguments("vlm_vision:open_clip:RN50", lengths=(15,)))
