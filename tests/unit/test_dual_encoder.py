"""Dual encoders: SigLIP's bias where there is one, tokenizers of files, folders from before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TOWER, clip_tokenizer_files, tiny_dual_encoder

from vlm_vision import DualEncoder, load_dual_encoder
from vlm_vision.dual_encoder import describe_dual_encoder
from vlm_vision.errors import ConfigError, WeightsError

ARCHITECTURE: Any = TOWER["backbone"]["architecture"]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def node(architecture: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"backbone": {"name": "open_clip", "architecture": architecture, "weights": "none", **fields}}


def with_bias(**more: Any) -> DualEncoder:
    torch.manual_seed(0)
    return load_dual_encoder(node({**ARCHITECTURE, "init_logit_bias": -10, "custom_text": True, **more}))


def test_a_siglip_has_a_bias_and_a_clip_has_none(tmp_path: Path) -> None:
    siglip, clip = with_bias(), tiny_dual_encoder()
    assert siglip.logit_bias is not None
    assert (siglip.logit_bias.item(), siglip.logit_bias.shape) == (-10.0, ())
    assert siglip.logit_bias.requires_grad
    assert clip.logit_bias is None
    assert "logit_bias" in siglip.state_dict()
    assert "logit_bias" not in clip.state_dict()
    with torch.no_grad():
        siglip.logit_bias.fill_(-7.25)
    for model, name in ((siglip, "siglip"), (clip, "clip")):
        model.save_pretrained(tmp_path / name)
        again = load_dual_encoder(tmp_path / name)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert again.fingerprint() == model.fingerprint()
    described = describe_dual_encoder(tmp_path / "siglip")
    assert described.state_dict().keys() == siglip.state_dict().keys()


def test_a_clip_keeps_a_bias_that_it_was_given(tmp_path: Path) -> None:
    model = tiny_dual_encoder()
    model.logit_bias = torch.nn.Parameter(torch.tensor(-3.5))
    model.save_pretrained(tmp_path / "model")
    again = load_dual_encoder(tmp_path / "model")
    assert again.logit_bias is not None
    assert again.logit_bias.item() == -3.5


def test_a_folder_from_before_biases_were_kept_still_loads(tmp_path: Path) -> None:
    with_bias().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name != "logit_bias"}, path)
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    del config["tower"]["backbone"]["tokenizer"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_dual_encoder(tmp_path / "model").logit_bias is None


def test_the_bias_of_open_clips_weights_is_taken(tmp_path: Path) -> None:
    import open_clip

    settings = {**ARCHITECTURE, "init_logit_bias": -10}
    native = open_clip.CustomTextCLIP(**settings)
    with torch.no_grad():
        native.logit_bias.fill_(-12.5)
    save_file(native.state_dict(), tmp_path / "open_clip_model.safetensors")
    weights = str(tmp_path / "open_clip_model.safetensors")
    model = load_dual_encoder(node({**settings, "custom_text": True}, weights=weights))
    assert model.logit_bias is not None
    assert model.logit_bias.item() == -12.5
    state = {name: value for name, value in native.state_dict().items() if name != "logit_scale"}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match="have no logit_scale, so they are no dual encoder's"):
        load_dual_encoder(node({**settings, "custom_text": True}, weights=weights))


def test_a_tokenizer_of_files_is_saved_with_the_model(tmp_path: Path) -> None:
    """open_clip's SigLIPs name a tokenizer of the hub, and clean texts before it."""
    clip_tokenizer_files(tmp_path / "files")
    text = {
        **ARCHITECTURE["text_cfg"],
        "vocab_size": 520,
        "hf_tokenizer_name": "nobody/siglip",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    source = node({**ARCHITECTURE, "text_cfg": text}, tokenizer=str(tmp_path / "files"))
    model = load_dual_encoder(source)
    tokens = model.tokenizer(["A Red, Square!", "two cats " * 20])
    assert torch.equal(tokens[0], model.tokenizer("a red square")[0])
    assert [model.tokenizer.is_truncated(text) for text in ("cat", "two cats " * 20)] == [False, True]
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "files")
    again = load_dual_encoder(tmp_path / "model")
    assert torch.equal(again.tokenizer(["A Red, Square!", "two cats " * 20]), tokens)
    assert again.tokenizer.pad_id == 519
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["tower"]["backbone"]["tokenizer"] is None
    with pytest.raises(ConfigError, match=r"needs files of 'nobody/siglip' from the hub"):
        load_dual_encoder(node({**ARCHITECTURE, "text_cfg": text}))
    tiny_dual_encoder().save_pretrained(tmp_path / "clip")
    assert not (tmp_path / "clip" / "tokenizer").exists()


def test_sources_without_a_text_tower_say_so() -> None:
    with pytest.raises(ConfigError, match=r"backbone 'timm' has no text tower"):
        load_dual_encoder("timm:vit_tiny_patch16_224@none")
    vision = {key: value for key, value in ARCHITECTURE.items() if key != "text_cfg"}
    with pytest.raises(ConfigError, match=r"has no `text_cfg`, which a dual encoder needs"):
        load_dual_encoder(node(vision))
