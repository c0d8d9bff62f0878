"""The transformers backbones against the models they wrap, from folders as `save_pretrained` writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
)

from vlm_vision import VisionTower, load_tower
from vlm_vision.backbones.config import PUBLISHED
from vlm_vision.errors import ConfigError, DataError, WeightsError
from vlm_vision.tower import describe_tower

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
TEXT = {**VISION, "vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
DINOV2 = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 70,
    "patch_size": 14,
}
DINOV2_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write(model: Any, processor: dict[str, Any], folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def build(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model to save, its vision part, and its image processor's settings."""
    torch.manual_seed(0)
    if kind == "whole CLIP":
        whole = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()
        return whole, whole.vision_model, CLIP_PROCESSOR
    if kind == "CLIP vision":
        vision = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
        return vision, vision, CLIP_PROCESSOR
    dinov2 = Dinov2Model(Dinov2Config(**DINOV2, use_swiglu_ffn=kind == "DINOv2 SwiGLU")).eval()
    return dinov2, dinov2, DINOV2_PROCESSOR


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


TOLERANCE = 1e-6  # measured 0; 1.9e-7 beside transformers 4.37, whose attention is made of matrix products
KINDS = ["whole CLIP", "CLIP vision", "DINOv2", "DINOv2 SwiGLU"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_hidden_states(kind: str, tmp_path: Path) -> None:
    model, vision, processor = build(kind)
    folder = write(model, processor, tmp_path / "model")
    side = vision.config.image_size
    pixels = torch.randn(2, 3, side, side)
    output = vision(pixels, output_hidden_states=True)
    for layer in (-1, -2, 1):
        tower = load_tower(f"transformers:{folder}", layer=layer)
        assert worst(tower(pixels), output.hidden_states[layer][:, 1:]) <= TOLERANCE
        assert len(tower.backbone.blocks) == (layer % 4)  # type: ignore[arg-type]
    whole = load_tower(f"transformers:{folder}", pooled_head=True)
    assert worst(whole.pooled(pixels), output.pooler_output) <= TOLERANCE
    assert worst(whole(pixels), output.hidden_states[-2][:, 1:]) <= TOLERANCE


@torch.no_grad()
def test_a_folder_at_none_has_random_weights_and_the_folders_shape(tmp_path: Path) -> None:
    model, vision, processor = build("CLIP vision")
    folder = write(model, processor, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    tower = load_tower(f"transformers:{folder}@none")
    assert (tower.hidden_size, tower.grid, tower.image_size) == (32, (4, 4), 32)
    pixels = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(
        tower(pixels), vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    )
    with pytest.raises(WeightsError, match="weights cannot be loaded"):
        load_tower(f"transformers:{folder}")


def test_weights_may_lie_in_another_folder(tmp_path: Path) -> None:
    model, _, processor = build("CLIP vision")
    folder = write(model, processor, tmp_path / "model")
    tower = load_tower(
        {"backbone": {"name": "transformers", "architecture": model.config.to_dict(), "weights": str(folder)}}
    )
    own = load_tower(f"transformers:{folder}")
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in tower.state_dict().items())
    with pytest.raises(WeightsError, match="has no weights; name a folder or hub id, or 'none'"):
        load_tower({"backbone": {"name": "transformers", "architecture": model.config.to_dict()}})


def test_dinov2_runs_at_its_native_size_with_its_margin_scaled(tmp_path: Path) -> None:
    model, _, processor = build("DINOv2")
    tower = load_tower(f"transformers:{write(model, processor, tmp_path / 'model')}")
    settings = tower.image_processor.config
    assert (settings.image_size, settings.resize_to) == (70, 80)  # 28 out of 32 as 70 out of 80
    assert tower.grid == (5, 5)
    assert settings.mean == (0.485, 0.456, 0.406)


def test_a_saved_tower_needs_neither_the_hub_nor_the_folder_it_came_from(tmp_path: Path) -> None:
    for kind in KINDS:
        model, _, processor = build(kind)
        folder = write(model, processor, tmp_path / "model")
        tower = load_tower(f"transformers:{folder}")
        tower.save_pretrained(tmp_path / "tower")
        shutil.rmtree(folder)
        again = VisionTower.from_pretrained(tmp_path / "tower")
        pixels = torch.randn(1, 3, tower.image_size, tower.image_size)
        assert torch.equal(tower(pixels), again(pixels)), kind
        assert again.image_processor.config == tower.image_processor.config


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, _, processor = build("whole CLIP")
    folder = write(model, processor, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    lost = next(name for name in state if name.startswith("vision_model") and "pre_layrnorm.bias" in name)

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsError, match=message):
            load_tower(f"transformers:{folder}")

    refused(
        {name: tensor for name, tensor in state.items() if name != lost}, "1 missing: .*pre_layrnorm.bias"
    )
    refused({**state, lost.replace("bias", "gain"): state[lost].clone()}, "1 unexpected: .*pre_layrnorm.gain")
    refused(
        {**state, lost: torch.zeros(5)},
        r"1 of another shape: .*pre_layrnorm.bias: file has \(5,\), model needs \(32,\)",
    )


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    model, _, processor = build("CLIP vision")
    folder = write(model, processor, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    proof = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.mkdir, (proof,))

    torch.save({"embeddings.class_embedding": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="weights cannot be loaded"):
        load_tower(f"transformers:{folder}")
    assert not proof.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert proof.exists()


def test_a_folder_without_preprocessing_or_of_another_family_says_so(tmp_path: Path) -> None:
    model, _, processor = build("CLIP vision")
    folder = write(model, processor, tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"has no preprocessor_config.json"):
        load_tower(f"transformers:{folder}")
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match="is a 'vit'; this source reads CLIP and DINOv2"):
        load_tower(f"transformers:{tmp_path / 'vit'}@none")
    with pytest.raises(ConfigError, match="model_type` must be one of clip_vision_model, dinov2"):
        load_tower(
            {"backbone": {"name": "transformers", "architecture": {"hidden_size": 3}, "weights": "none"}}
        )


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_are_described_without_a_network_or_weights(model: str) -> None:
    width, patches, millions = {
        "openai/clip-vit-base-patch32": (768, 49, 87.456),
        "openai/clip-vit-base-patch16": (768, 196, 85.799),
        "openai/clip-vit-large-patch14": (1024, 256, 303.180),
        "openai/clip-vit-large-patch14-336": (1024, 576, 303.507),
        "facebook/dinov2-small": (384, 1369, 22.057),
        "facebook/dinov2-base": (768, 1369, 86.580),
        "facebook/dinov2-large": (1024, 1369, 304.369),
        "facebook/dinov2-giant": (1536, 1369, 1136.481),
    }[model]
    tower = describe_tower(f"transformers:{model}", pooled_head=True)
    assert (tower.hidden_size, tower.num_patches) == (width, patches)
    assert tower.num_parameters / 1e6 == pytest.approx(millions, abs=0.001)
    pixels = torch.empty(1, 3, tower.image_size, tower.image_size, device="meta")
    assert tower(pixels).shape == (1, patches, width)


@pytest.mark.parametrize("size", ["B-32", "B-16", "L-14", "L-14-336"])
def test_published_clips_have_the_size_of_open_clips(size: str) -> None:
    """The same weights, but for the projection of the pooled head, which only open_clip's head has."""
    hub = {
        "B-32": "base-patch32",
        "B-16": "base-patch16",
        "L-14": "large-patch14",
        "L-14-336": "large-patch14-336",
    }
    theirs = describe_tower(f"open_clip:ViT-{size}-quickgelu", pooled_head=True)
    ours = describe_tower(f"transformers:openai/clip-vit-{hub[size]}", pooled_head=True)
    assert theirs.num_parameters - ours.num_parameters == theirs.backbone.visual.proj.numel()  # type: ignore[union-attr,operator]
    assert (ours.grid, ours.layers) == (theirs.grid, theirs.layers)


def test_a_published_model_at_none_needs_no_network() -> None:
    assert load_tower("transformers:facebook/dinov2-small@none", layer=1).hidden_size == 384
