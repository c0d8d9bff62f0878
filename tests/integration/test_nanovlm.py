"""Our towers in nanoVLM's own code; runs where `VLM_VISION_NANOVLM` names a checkout of it."""

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
from tiny import RESNET, tiny_tower

from vlm_vision import load_tower
from vlm_vision.errors import ConfigError

CHECKOUT = os.environ.get("VLM_VISION_NANOVLM")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="VLM_VISION_NANOVLM names no checkout of nanoVLM")
LLM = {
    "lm_hidden_dim": 32,
    "lm_inter_dim": 64,
    "lm_base_vocab_size": 64,
    "lm_vocab_size": 64,
    "lm_n_heads": 4,
    "lm_n_kv_heads": 2,
    "lm_n_blocks": 2,
}
IMAGE = 63


@pytest.fixture(autouse=True, scope="module")
def checkout() -> Iterator[None]:
    sys.path.insert(0, str(CHECKOUT))
    yield
    sys.path.remove(str(CHECKOUT))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_tower().save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def make_vlm(monkeypatch: pytest.MonkeyPatch, source: Path, **fields: Any) -> Any:
    from models import vision_language_model
    from models.config import VLMConfig

    from vlm_vision.integrations.nanovlm import vlm_fields

    class Tokenizer:
        image_token_id, eos_token_id = IMAGE, None

    monkeypatch.setattr(vision_language_model, "get_tokenizer", lambda *_: Tokenizer())
    torch.manual_seed(1)
    config = VLMConfig(**{**vlm_fields(source, pixel_shuffle=2), **LLM, **fields})
    return vision_language_model.VisionLanguageModel(config, load_backbone=False)


def test_their_model_trains_saves_reloads_and_generates(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    model = make_vlm(monkeypatch, source).train()
    assert model.MP.input_dim == 4 * 64
    ids = torch.randint(0, 60, (2, 12))
    ids[:, 1:5] = IMAGE  # 16 patches, four to a token
    pictures = torch.rand(2, 3, 32, 32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        _, loss = model(ids, pictures, targets=ids.masked_fill(ids == IMAGE, -100))
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.vision_encoder.parameters())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "vlm")
    again = type(model).from_pretrained(tmp_path / "vlm").eval()
    with torch.no_grad():
        assert torch.equal(again(ids, pictures)[0], model(ids, pictures)[0])
    answers = [one.generate(ids, pictures, max_new_tokens=3, greedy=True) for one in (again, model)]
    assert torch.equal(*answers)


@torch.no_grad()
def test_the_encoder_gives_the_towers_features_on_their_pictures(source: Path) -> None:
    from data.processors import get_image_processor
    from models.config import VLMConfig
    from models.vision_language_model import ViT

    from vlm_vision.integrations.nanovlm import vlm_fields

    encoder = ViT.from_pretrained(VLMConfig(**vlm_fields(source, pixel_shuffle=2)))
    tower = load_tower(source)
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    theirs, _ = get_image_processor(32, 32)(picture)
    assert torch.equal(encoder(theirs), tower(tower.image_processor(picture)))


def test_their_own_encoder_is_still_theirs() -> None:
    from models.config import VLMConfig
    from models.vision_language_model import ViT
    from models.vision_transformer import ViT as Theirs

    import vlm_vision.integrations.nanovlm as nanovlm

    nanovlm.install()
    config = VLMConfig(vit_hidden_dim=32, vit_inter_dim=64, vit_img_size=32, vit_n_heads=2, vit_n_blocks=1)
    assert type(ViT(config)) is Theirs


def test_fields_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    from vlm_vision.integrations.nanovlm import vlm_fields

    with pytest.raises(ConfigError, match=r"VLMConfig must have \{'mp_image_token_length': 4\}"):
        make_vlm(monkeypatch, source, mp_image_token_length=49)
    with pytest.raises(ConfigError, match="whose side 3 divides"):
        vlm_fields(source, pixel_shuffle=3)
    load_tower(RESNET).save_pretrained(tmp_path / "resnet")
    assert vlm_fields(tmp_path / "resnet")["mp_image_token_length"] == 1
