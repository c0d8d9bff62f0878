"""Our towers in Prismatic's own code; runs where `VLM_VISION_PRISMATIC` names a checkout of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import TOWER, tiny_tower
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_vision import VisionTower
from vlm_vision.errors import ConfigError

CHECKOUT = os.environ.get("VLM_VISION_PRISMATIC")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="VLM_VISION_PRISMATIC names no checkout of Prismatic")


@pytest.fixture(autouse=True, scope="module")
def checkout() -> Iterator[None]:
    sys.path.insert(0, str(CHECKOUT))
    yield
    sys.path.remove(str(CHECKOUT))


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["resize-crop", "resize-naive", "letterbox"])
def test_features_and_pixels_are_those_of_their_timm_backbone(
    strategy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import timm
    from prismatic.models.backbones.vision.base_vision import TimmViTBackbone
    from prismatic.models.materialize import get_vision_backbone_and_transform

    from vlm_vision.integrations.prismatic import register

    create = timm.create_model
    with monkeypatch.context() as patch:
        patch.setattr(
            timm, "create_model", lambda *names, **kw: create(*names, **{**kw, "pretrained": False})
        )
        torch.manual_seed(0)
        theirs = TimmViTBackbone("theirs", "test_vit", strategy, default_image_size=160).eval()
    save_file(theirs.featurizer.state_dict(), tmp_path / "vit.safetensors")
    register("ours", f"timm:test_vit@{tmp_path / 'vit.safetensors'}")
    ours, transform = get_vision_backbone_and_transform("ours", strategy)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (210, 300, 3), dtype=np.uint8))
    pixels = transform(picture)
    assert torch.equal(pixels, theirs.get_image_transform()(picture))
    expected = theirs(pixels[None])  # a list since timm 1.0, of which Prismatic unpacks tuples only
    assert torch.equal(ours(pixels[None]), expected[0] if isinstance(expected, list) else expected)
    for fact in ("embed_dim", "num_patches", "default_image_resolution", "half_precision_dtype"):
        assert getattr(ours, fact) == getattr(theirs, fact), fact
    policy = ours.get_fsdp_wrapping_policy()
    assert [
        isinstance(module, VisionTower)
        for module in ours.modules()
        if policy(module=module, recurse=False, nonwrapped_numel=0)
    ] == [True]


def make_llm() -> Any:
    from prismatic.models.backbones.llm.base_llm import HFCausalLLMBackbone, LLMBackbone

    class Tokenizer:
        def encode(self, text: str, **_: Any) -> list[int]:
            return [ord(text[0]) % 64]

    class Llm(HFCausalLLMBackbone):  # all but the download of weights
        prompt_builder_fn = transformer_layer_cls = half_precision_dtype = None

        def __init__(self) -> None:
            LLMBackbone.__init__(self, "tiny")
            self.llm = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=64,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                )
            )
            self.tokenizer = Tokenizer()

        @property
        def embed_dim(self) -> int:
            return 32

    return Llm()


def test_their_model_trains_with_the_tower_frozen_and_not(tmp_path: Path) -> None:
    from prismatic.models.materialize import get_vision_backbone_and_transform, get_vlm

    from vlm_vision.integrations.prismatic import register

    tiny_tower().save_pretrained(tmp_path / "tower")
    register("tiny", tmp_path / "tower")
    backbone, transform = get_vision_backbone_and_transform("tiny", "letterbox")
    torch.manual_seed(0)
    vlm = get_vlm("test", "gelu-mlp", backbone, make_llm())
    pixels = torch.stack([transform(Image.new("RGB", (40, 30), colour)) for colour in ("red", "blue")])
    batch = {
        "input_ids": torch.randint(1, 60, (2, 6)),
        "attention_mask": torch.ones(2, 6, dtype=torch.bool),
        "pixel_values": pixels,
    }
    for stage, trained in (("finetune", False), ("full-finetune", True)):
        vlm.freeze_backbones(stage)
        optimiser = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(3):
            output = vlm(**batch, labels=batch["input_ids"])
            output.loss.backward()
            learnt = {parameter.grad is not None for parameter in vlm.vision_backbone.parameters()}
            assert learnt == {trained}
            optimiser.step()
            optimiser.zero_grad()
            losses.append(output.loss.item())
        assert losses[-1] < losses[0]
    assert output.logits.shape[1] == 6 + backbone.num_patches
    assert isinstance(vlm.vision_backbone, nn.Module)


def test_names_and_strategies_that_are_not_ours_are_refused() -> None:
    from vlm_vision.integrations.prismatic import TowerBackbone, register

    with pytest.raises(ConfigError, match="'clip-vit-l' is a backbone of Prismatic's own"):
        register("clip-vit-l", TOWER)
    with pytest.raises(ConfigError, match="image_resize_strategy 'pad' is not known"):
        TowerBackbone("tiny", "pad", TOWER)
