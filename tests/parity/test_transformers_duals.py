"""Dual encoders of transformers beside the library: embeddings, temperature, tokenizer, and saved again.

Tolerances are absolute on embeddings of length 1 or, before normalising, of size 1 to 4, in fp32 on CPU; the
worst difference measured stands beside each.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from duals import HERE, TEXTS, library_model, pixels, saved
from safetensors.torch import load_file, save_file
from tiny import clip_tokenizer_files
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from vlm_vision import DualEncoder, VisionTower, load_dual_encoder, load_tower
from vlm_vision.dual_encoder import describe_dual_encoder
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.layouts import convert

TOLERANCE = 1e-5  # 1.9e-7


def features(output: Any) -> Tensor:
    """Of `get_..._features`: transformers 5 wraps them."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


@torch.no_grad()
def library_embeddings(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    inputs = {"pixel_values": pixels()}
    if "Siglip2" in type(model).__name__:
        patches = pixels().unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 3, 5, 1)
        inputs = {
            "pixel_values": patches.reshape(3, 16, -1),
            "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
            "spatial_shapes": torch.full((3, 2), 4),
        }
    return features(model.get_image_features(**inputs)), features(model.get_text_features(input_ids=tokens))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float(expected.std(dim=0).max()) > 1e-2  # they differ from one to the next
    assert float((found - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("kind", HERE)
@torch.no_grad()
def test_embeddings_are_the_librarys(kind: str, tmp_path: Path) -> None:
    theirs, folder = saved(kind, tmp_path / "model")
    model = load_dual_encoder(f"transformers:{folder}")
    tokens = model.tokenizer(TEXTS)
    image, text = library_embeddings(theirs, tokens)
    assert_close(model.encode_image(pixels()), normalize(image, dim=-1))
    assert_close(model.encode_text(tokens), normalize(text, dim=-1))
    assert_close(model.text(tokens), text)
    assert float(model.logit_scale) == pytest.approx(float(theirs.logit_scale))
    bias = getattr(theirs, "logit_bias", None)
    assert (model.logit_bias is None) == (bias is None)
    if bias is not None and model.logit_bias is not None:
        assert model.logit_bias.shape == ()
        assert float(model.logit_bias) == float(bias)
    assert not model.training


@pytest.mark.parametrize("kind", HERE)
@torch.no_grad()
def test_the_tokenizer_is_the_folders(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path / "model")
    tokenizer = load_dual_encoder(f"transformers:{folder}").tokenizer
    library = AutoTokenizer.from_pretrained(folder)
    expected = library(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    assert torch.equal(tokenizer(TEXTS), expected["input_ids"])
    assert tokenizer(TEXTS).shape == (4, tokenizer.context_length)
    assert torch.equal(tokenizer("two cats")[0], tokenizer(TEXTS)[1])
    assert [tokenizer.is_truncated(text) for text in TEXTS] == [False, False, True, False]
    assert tokenizer.pad_id == library.pad_token_id


@pytest.mark.parametrize("kind", HERE)
@torch.no_grad()
def test_saved_and_loaded_with_nothing_but_the_folder(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path / "model")
    model = load_dual_encoder(f"transformers:{folder}")
    tokens = model.tokenizer(TEXTS)
    image, text = model.encode_image(pixels()), model.encode_text(tokens)
    model.save_pretrained(tmp_path / "first")
    shutil.rmtree(folder)
    DualEncoder.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    again = load_dual_encoder(tmp_path / "second")
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again.tokenizer(TEXTS), tokens)
    assert torch.equal(again.encode_image(pixels()), image)
    assert torch.equal(again.encode_text(tokens), text)
    tower = VisionTower.from_pretrained(tmp_path / "second", pooled_head=False)
    assert torch.equal(tower(pixels()), model.tower(pixels()))
    described = describe_dual_encoder(tmp_path / "second")
    shapes = {name: tensor.shape for name, tensor in described.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert all(tensor.is_meta for tensor in described.parameters())


@pytest.mark.parametrize("kind", HERE)
def test_every_parameter_learns(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path / "model")
    model = load_dual_encoder(f"transformers:{folder}")
    image, text, scale = model(pixels(), model.tokenizer(TEXTS[:3]))
    (scale * image @ text.T).softmax(dim=1).diagonal().log().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == (["logit_bias"] if model.logit_bias is not None else [])


@torch.no_grad()
def test_weights_of_a_layout_of_open_clip_and_other_precision(tmp_path: Path) -> None:
    theirs, folder = saved("CLIP", tmp_path / "model")
    flat = convert(load_file(folder / "model.safetensors"), "open_clip_flat")
    save_file(flat, tmp_path / "flat.safetensors")
    source = {
        "backbone": {
            "name": "transformers",
            "model": str(folder),
            "weights": str(tmp_path / "flat.safetensors"),
        }
    }
    model = load_dual_encoder(source)
    assert_close(model.text(model.tokenizer(TEXTS)), library_embeddings(theirs, model.tokenizer(TEXTS))[1])
    half = load_dual_encoder(source, dtype="bfloat16")
    embeddings = half.encode_text(half.tokenizer(TEXTS))
    assert embeddings.dtype == torch.bfloat16
    assert half.encode_image(pixels()).dtype == torch.bfloat16
    assert half.logit_scale.dtype == torch.float32
    cosines = (embeddings.float() * model.encode_text(model.tokenizer(TEXTS))).sum(dim=-1)
    assert float(cosines.min()) > 0.99


def test_random_weights_from_the_whole_architecture(tmp_path: Path) -> None:
    clip_tokenizer_files(tmp_path)
    for kind in HERE:
        config = library_model(kind).config.to_dict()
        node = {"name": "transformers", "architecture": config, "weights": "none", "tokenizer": str(tmp_path)}
        model = load_dual_encoder({"backbone": node})
        image, text, _ = model(pixels(), model.tokenizer(TEXTS))
        assert image.shape[1] == text.shape[1]
        assert model.logit_scale.item() == pytest.approx(2.6592 if kind.startswith("CLIP") else 2.302585)
        assert (model.logit_bias is None) == kind.startswith("CLIP")
        without = {**node, "tokenizer": None}
        with pytest.raises(
            ConfigError, match=r"an `architecture` alone has no tokenizer.*backbone.tokenizer"
        ):
            load_dual_encoder({"backbone": without})


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    theirs, folder = saved("CLIP", tmp_path / "model")
    vision = tmp_path / "vision"
    shutil.copytree(folder, vision)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (vision / "config.json").write_text(
        json.dumps({**config["vision_config"], "model_type": "clip_vision_model"})
    )
    with pytest.raises(ConfigError, match=r"type 'clip_vision_model' is not known to have a text tower"):
        load_dual_encoder(f"transformers:{vision}")
    assert isinstance(load_tower(f"transformers:{vision}"), VisionTower)
    for file in folder.glob("*token*"):
        file.unlink()
    for file in (folder / "vocab.json", folder / "merges.txt"):
        file.unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"(has no vocabulary of a|no) tokenizer .*as `backbone.tokenizer`"):
        load_dual_encoder(f"transformers:{folder}")
    clip_tokenizer_files(folder)
    state = {name: value for name, value in theirs.state_dict().items() if "text_model.enc" not in name}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"32 missing: text_model.encoder"):
        load_dual_encoder(f"transformers:{folder}")
