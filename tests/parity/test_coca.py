"""CoCa beside open_clip's own: embeddings, logits of captions, the loss of both, and the folder it reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from duals import COCA, TEXTS, dual, pixels, stirred
from open_clip.loss import CoCaLoss
from safetensors.torch import load_file, save_file
from tiny import tiny_dual_encoder
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm_vision import DualEncoder, load_dual_encoder
from vlm_vision.dual_encoder import caption_loss, describe_dual_encoder
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.export import export_open_clip, export_transformers

# Of the largest number: without a graph both libraries sum in an order of their own.
TOLERANCE = 1e-6  # 5.2e-7


def pair(folder: Path) -> tuple[Any, DualEncoder]:
    """open_clip's CoCa and ours with its weights."""
    torch.manual_seed(0)
    architecture = {key: value for key, value in COCA["architecture"].items() if key != "custom_text"}
    theirs = open_clip.CoCa(**architecture)
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.2)
    stirred(theirs).eval()
    folder.mkdir()
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    return theirs, load_dual_encoder({"backbone": {**COCA, "weights": str(folder)}})


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert float(expected.std(dim=0).max()) > 1e-2
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_embeddings_and_captions_are_open_clips(tmp_path: Path) -> None:
    theirs, model = pair(tmp_path / "weights")
    tokens = model.tokenizer(TEXTS[:3])
    expected = theirs(pixels(), tokens, output_labels=False)
    assert worst(model.encode_image(pixels()), expected["image_features"]) <= TOLERANCE
    assert worst(model.encode_text(tokens), expected["text_features"]) <= TOLERANCE
    logits = model.caption_logits(pixels(), tokens)
    assert logits.shape == (3, 16, 49408)
    assert worst(logits, expected["logits"]) <= TOLERANCE
    image, image_tokens = model.encode_image_with_tokens(pixels())
    text, states = model.encode_text_with_tokens(tokens)
    assert (image_tokens.shape, states.shape) == ((3, 5, 32), (3, 16, 32))
    assert torch.equal(image, model.encode_image(pixels()))
    assert torch.equal(text, model.encode_text(tokens))
    assert torch.equal(model.decode(image_tokens, states), logits)
    with torch.enable_grad():  # through the modules themselves
        assert worst(model.caption_logits(pixels(), tokens).detach(), expected["logits"]) <= TOLERANCE


def test_the_loss_is_open_clips_and_every_parameter_learns(tmp_path: Path) -> None:
    theirs, model = pair(tmp_path / "weights")
    tokens = model.tokenizer(TEXTS[:3])
    image, image_tokens = model.encode_image_with_tokens(pixels())
    text, states = model.encode_text_with_tokens(tokens)
    similarities = model.logit_scale.exp() * image @ text.T
    own = torch.arange(3)
    contrastive = (cross_entropy(similarities, own) + cross_entropy(similarities.T, own)) / 2
    captions = caption_loss(model.decode(image_tokens, states), tokens, model.tokenizer.pad_id)
    output = theirs(pixels(), tokens)
    expected = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)(**output)
    assert contrastive.item() == pytest.approx(expected[0].item(), rel=1e-6)  # 0
    assert 2 * captions.item() == pytest.approx(expected[1].item(), rel=1e-6)  # 0
    (contrastive + 2 * captions).backward()
    (expected[0] + expected[1]).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient = gradients[name.removeprefix("tower.backbone.")]
        assert parameter.grad is not None, name
        assert gradient is not None
        # Worst measured: 1.1e-6, beside elements of 1.6.
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5), name


@torch.no_grad()
def test_saved_loaded_and_exported_whole(tmp_path: Path) -> None:
    model = dual("open_clip, CoCa", tmp_path)
    tokens = model.tokenizer(TEXTS[:3])
    logits = model.caption_logits(pixels(), tokens)
    model.save_pretrained(tmp_path / "saved")
    again = load_dual_encoder(tmp_path / "saved")
    assert torch.equal(again.caption_logits(pixels(), tokens), logits)
    shapes = {
        name: tensor.shape for name, tensor in describe_dual_encoder(tmp_path / "saved").state_dict().items()
    }
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    export_open_clip(again, tmp_path / "export")
    name = f"local-dir:{tmp_path / 'export'}"
    theirs = open_clip.create_model(name).eval()
    assert isinstance(theirs, open_clip.CoCa)
    output = theirs(pixels(), open_clip.get_tokenizer(name)(TEXTS[:3]), output_labels=False)
    assert worst(logits, output["logits"]) <= TOLERANCE
    assert worst(model.encode_image(pixels()), output["image_features"]) <= TOLERANCE
    with pytest.raises(ConfigError, match=r"no counterpart in transformers: .*--to open_clip"):
        export_transformers(model, tmp_path / "clip")


@torch.no_grad()
def test_folders_and_weights_without_a_decoder(tmp_path: Path) -> None:
    """An older version kept none; a checkpoint must have its own."""
    _, model = pair(tmp_path / "weights")
    model.save_pretrained(tmp_path / "saved")
    for path in (
        tmp_path / "saved" / "model.safetensors",
        tmp_path / "weights" / "open_clip_model.safetensors",
    ):
        state = {
            name: value for name, value in load_file(path).items() if not name.startswith("text_decoder.")
        }
        save_file(state, path)
    old = load_dual_encoder(tmp_path / "saved")
    tokens = model.tokenizer(TEXTS[:3])
    assert torch.equal(old.encode_text(tokens), model.encode_text(tokens))
    with pytest.raises(ConfigError, match=r"has no decoder, which captions need: use a CoCa"):
        old.caption_logits(pixels(), tokens)
    with pytest.raises(ConfigError, match=r"a CoCa that an older version saved without its decoder"):
        export_open_clip(old, tmp_path / "export")
    with pytest.raises(WeightsError, match=r"\(text_decoder\): .*\n.*missing"):
        load_dual_encoder({"backbone": {**COCA, "weights": str(tmp_path / "weights")}})
    for call in (tiny_dual_encoder().caption_logits, tiny_dual_encoder().decode):
        with pytest.raises(ConfigError, match="has no decoder"):
            call(pixels(), tokens)


@torch.no_grad()
def test_random_weights_are_drawn_not_found() -> None:
    """open_clip leaves the decoder's projection as the memory was."""
    torch.manual_seed(0)
    first = load_dual_encoder({"backbone": COCA})
    torch.manual_seed(0)
    second = load_dual_encoder({"backbone": COCA})
    projections: list[Any] = [model.text_decoder.text_projection for model in (first, second)]  # type: ignore[union-attr]
    assert torch.equal(*projections)
    assert float(projections[0].std()) == pytest.approx(1 / math.sqrt(32), rel=0.01)
