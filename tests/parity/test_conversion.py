"""Converted weights against both libraries: what they compute from the same numbers is the same.

Tolerances are absolute, fp32 on CPU; the worst difference measured stands beside each. Weights are drawn so
wide that features differ from token to token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlm_vision import load_dual_encoder, load_tower
from vlm_vision.architectures import open_clip_architecture, transformers_config
from vlm_vision.backbones.config import PUBLISHED
from vlm_vision.errors import WeightsError
from vlm_vision.layouts import LAYOUTS, Layout, convert

CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "quick_gelu": {**CLIP, "quick_gelu": True},
    "gelu": CLIP,
    "tanh, eps 1e-3, wide MLP": {
        **CLIP,
        "vision_cfg": {
            **CLIP["vision_cfg"],  # type: ignore[dict-item]
            "mlp_ratio": 5.5,
            "norm_kwargs": {"eps": 1e-3},
            "act_kwargs": {"approximate": "tanh"},
        },
        "text_cfg": {**CLIP["text_cfg"], "pool_type": "eos", "eos_id": 49407},  # type: ignore[dict-item]
    },
}
TEXTS = ["a photo of a cat.", "two red squares left of a blue circle", "x"]


def widened(model: nn.Module) -> Any:
    """Random weights that make features differ, and biases that are not zero."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif parameter.ndim == 0:
            nn.init.constant_(parameter, 1.3)
        else:
            nn.init.normal_(parameter, std=0.12)
    return model.eval()


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert float(expected.detach().std()) > 0.01
    return float((found - expected).detach().abs().max())


def inputs(side: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, side, side, generator=generator), open_clip.tokenize(TEXTS, context_length=16)


def hidden_states(visual: Any, pixels: Tensor) -> list[Tensor]:
    """Output of each of open_clip's layers, class token first."""
    output = visual.forward_intermediates(
        pixels, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )
    pairs = zip(output["image_intermediates_prefix"], output["image_intermediates"], strict=True)
    return [torch.cat(pair, dim=1) for pair in pairs]


def assert_clip_agrees(native: Any, theirs: CLIPModel) -> None:
    pixels, tokens = inputs()
    with torch.no_grad():
        image, text = native.encode_image(pixels), native.encode_text(tokens)
        similarities = native.logit_scale.exp() * normalize(image, dim=-1) @ normalize(text, dim=-1).T
        output = theirs(input_ids=tokens, pixel_values=pixels)
        vision = theirs.vision_model(pixels, output_hidden_states=True)
    for found, expected in zip(vision.hidden_states[1:], hidden_states(native.visual, pixels), strict=True):
        assert worst(found, expected) < 1e-5  # 0, largest 9.6
    assert worst(theirs.visual_projection(vision.pooler_output), image) < 1e-5  # 1.3e-6
    assert worst(output.image_embeds, normalize(image, dim=-1)) < 1e-6  # 2.7e-7
    assert worst(output.text_embeds, normalize(text, dim=-1)) < 1e-6  # 3e-8
    assert worst(output.logits_per_image, similarities) < 5e-6  # 3.6e-7


@pytest.mark.parametrize("variant", VARIANTS)
def test_open_clip_in_transformers(variant: str) -> None:
    architecture = VARIANTS[variant]
    native = widened(open_clip.CLIP(**architecture))
    theirs = CLIPModel(CLIPConfig(**transformers_config(architecture))).eval()
    theirs.load_state_dict(convert(native.state_dict(), "transformers"))
    assert_clip_agrees(native, theirs)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_transformers_in_open_clip(hidden_act: str, tmp_path: Path) -> None:
    """From a folder as `save_pretrained` writes it, into both classes of open_clip."""
    sides = {
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "hidden_act": hidden_act,
    }
    config = CLIPConfig(
        vision_config={**sides, "image_size": 32, "patch_size": 8},
        text_config={**sides, "max_position_embeddings": 16},
        projection_dim=24,
    )
    theirs = widened(CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    architecture = open_clip_architecture(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    state = load_file(tmp_path / "model.safetensors")
    flat, nested = open_clip.CLIP(**architecture), open_clip.CustomTextCLIP(**architecture)
    flat.load_state_dict(convert(state, "open_clip_flat"))
    nested.load_state_dict(convert(state, "open_clip"))
    assert_clip_agrees(flat.eval(), theirs)
    assert_clip_agrees(nested.eval(), theirs)


def test_vision_models_alone_load_from_folders_of_either_level(tmp_path: Path) -> None:
    architecture = VARIANTS["quick_gelu"]
    native = widened(open_clip.CLIP(**architecture))
    pixels, _ = inputs()
    config = CLIPVisionConfig(**transformers_config(architecture)["vision_config"])
    state = convert(native.visual.state_dict(prefix="visual."), "transformers")
    for model_class in (CLIPVisionModelWithProjection, CLIPVisionModel):
        folder = tmp_path / model_class.__name__
        folder.mkdir()
        config.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        model, report = model_class.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["mismatched_keys"]
        with torch.no_grad():
            output = model(pixels, output_hidden_states=True)
            expected = hidden_states(native.visual, pixels)[-2]
        assert worst(output.hidden_states[-2], expected) < 1e-5  # 3.2e-6, largest 6.9
        model.save_pretrained(folder / "again")
        state.pop("visual_projection.weight", None)
        again = convert(load_file(folder / "again" / "model.safetensors"), "transformers")
        assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert torch.equal(output.hidden_states[-2], model(pixels, output_hidden_states=True).hidden_states[-2])


SIGLIP = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "hidden_act": "gelu_pytorch_tanh",
}


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_siglip_in_both_libraries(activation: str) -> None:
    """timm's trunk under open_clip's names, and open_clip's text tower, against `SiglipModel`."""
    config = SiglipConfig(
        vision_config={**SIGLIP, "image_size": 32, "patch_size": 8, "hidden_act": activation},
        text_config={**SIGLIP, "vocab_size": 300, "max_position_embeddings": 16, "projection_size": 48},
    )
    theirs = widened(SiglipModel(config))
    state = convert(theirs.state_dict(), "open_clip")
    trunk = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        mlp_ratio=100 / 48,
        class_token=False,
        global_pool="map",
        num_classes=0,
        act_layer="gelu_tanh" if activation == "gelu_pytorch_tanh" else "gelu",
    ).eval()
    text = open_clip.model._build_text_tower(
        48,
        {
            "context_length": 16,
            "vocab_size": 300,
            "width": 48,
            "heads": 3,
            "layers": 2,
            "mlp_ratio": 100 / 48,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
    ).eval()
    for module, prefix in ((trunk, "visual.trunk."), (text, "text.")):
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        module.load_state_dict(own)
    pixels = inputs()[0]
    tokens = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        vision = theirs.vision_model(pixels, output_hidden_states=True)
        layers = trunk.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
        for found, expected in zip(vision.hidden_states[1:], layers, strict=True):
            assert worst(found, expected) < 1e-5  # 0, largest 8.2
        assert worst(vision.pooler_output, trunk(pixels)) < 1e-5  # 5.1e-7
        assert worst(theirs.text_model(tokens).pooler_output, text(tokens)) < 1e-5  # 0


@pytest.mark.parametrize(
    "name",
    ["ViT-L-14-336-quickgelu", "ViT-bigG-14", "ViT-B-16-SigLIP", "ViT-SO400M-16-SigLIP2-384"],
)
def test_full_sizes_have_each_tensor_of_the_other_library(name: str) -> None:
    """Without memory: names and shapes of the whole model, converted, are those of transformers' own."""
    architecture = open_clip.get_model_config(name)
    config = transformers_config(architecture)
    vision = {key: value for key, value in architecture.items() if key != "text_cfg"}
    whole_class, vision_class, configs = (
        (SiglipModel, SiglipVisionModel, (SiglipConfig, SiglipVisionConfig))
        if config["model_type"] == "siglip"
        else (CLIPModel, CLIPVisionModel, (CLIPConfig, CLIPVisionConfig))
    )
    built = {
        key: value for key, value in architecture.items() if key not in ("custom_text", "init_logit_bias")
    }
    with torch.device("meta"):
        native = (open_clip.CustomTextCLIP if architecture.get("custom_text") else open_clip.CLIP)(**built)
        whole = whole_class(configs[0](**config))
        alone = vision_class(configs[1](**transformers_config(vision)))
    state = native.state_dict()
    if "init_logit_bias" in architecture:
        state["logit_bias"] = torch.empty((), device="meta")
    shapes = {key: value.shape for key, value in convert(state, "transformers").items()}
    assert shapes == {key: value.shape for key, value in whole.state_dict().items()}
    bare = {key: value.shape for key, value in convert(alone.state_dict(), "transformers").items()}
    assert bare == {key: shape for key, shape in shapes.items() if key.startswith("vision_model.")}


def test_timms_siglip_trunks_are_as_their_table_says() -> None:
    """Sizes and activation of every SigLIP trunk that open_clip has."""
    for name in open_clip.list_models():
        architecture = open_clip.get_model_config(name)
        if "_siglip_" not in architecture["vision_cfg"].get("timm_model_name", "") or "nllb" in name:
            continue
        vision = {key: value for key, value in architecture.items() if key != "text_cfg"}
        config = transformers_config(vision)
        with torch.device("meta"):
            trunk = timm.create_model(architecture["vision_cfg"]["timm_model_name"], num_classes=0)
        block = trunk.blocks[0]
        assert config["hidden_size"] == trunk.embed_dim, name
        assert config["num_hidden_layers"] == len(trunk.blocks), name
        assert config["num_attention_heads"] == block.attn.num_heads, name
        assert config["intermediate_size"] == block.mlp.fc1.out_features, name
        assert config["layer_norm_eps"] == block.norm1.eps == trunk.norm.eps, name
        assert config["patch_size"] == trunk.patch_embed.patch_size[0], name
        assert config["image_size"] == trunk.patch_embed.img_size[0], name
        tanh = type(block.mlp.act).__name__ in ("GELUTanh", "PytorchGELUTanh")
        assert (config["hidden_act"] == "gelu_pytorch_tanh") == tanh, (name, type(block.mlp.act))


# Files of every layout behind both sources ------------------------------------------------------------------

PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


def native_clip(variant: str = "quick_gelu") -> Any:
    return widened(open_clip.CLIP(**VARIANTS[variant]))


def write(native: Any, layout: Layout, folder: Path, *, torch_file: bool = False) -> Path:
    """A file of a layout, with no word beside it of what it is."""
    folder.mkdir(parents=True)
    state = convert(native.state_dict(), layout, quick_gelu=True)
    if torch_file:
        torch.save(state, folder / "weights.pt")
        return folder / "weights.pt"
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def open_clip_node(weights: Path, variant: str = "quick_gelu") -> dict[str, Any]:
    return {"backbone": {"name": "open_clip", "architecture": VARIANTS[variant], "weights": str(weights)}}


def transformers_node(weights: Path, variant: str = "quick_gelu") -> dict[str, Any]:
    architecture = transformers_config(VARIANTS[variant])["vision_config"]
    preprocess = {"image_size": 32}
    return {
        "backbone": {
            "name": "transformers",
            "architecture": architecture,
            "weights": str(weights),
            "preprocess": preprocess,
        }
    }


@torch.no_grad()
@pytest.mark.parametrize("torch_file", [False, True], ids=["safetensors", "pt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_sources_take_files_and_folders_of_each_layout(
    layout: Layout, torch_file: bool, tmp_path: Path
) -> None:
    native = native_clip()
    path = write(native, layout, tmp_path / "weights", torch_file=torch_file)
    pixels, tokens = inputs()
    expected = hidden_states(native.visual, pixels)[-2][:, 1:]
    for weights in (path, path.parent):
        for node in (open_clip_node(weights), transformers_node(weights)):
            assert worst(load_tower(node)(pixels), expected) < 1e-5  # 3.2e-6
        model = load_dual_encoder(open_clip_node(weights))
        assert worst(model.tower.pooled(pixels), native.encode_image(pixels)) < 1e-5  # 8.3e-7
        assert worst(model.text(tokens), native.encode_text(tokens)) < 1e-5  # 0
        assert torch.equal(model.logit_scale, native.logit_scale)


def transformers_folder(native: Any, variant: str, folder: Path, **options: Any) -> Path:
    """As transformers' own `save_pretrained` writes a whole CLIP, with its image processor's settings."""
    theirs = CLIPModel(CLIPConfig(**transformers_config(VARIANTS[variant])))
    theirs.load_state_dict(convert(native.state_dict(), "transformers"))
    theirs.save_pretrained(folder, **options)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    return folder


@torch.no_grad()
def test_both_sources_take_a_folder_of_transformers_in_shards(tmp_path: Path) -> None:
    native = native_clip()
    folder = transformers_folder(native, "quick_gelu", tmp_path / "clip", max_shard_size="100KB")
    assert not (folder / "model.safetensors").exists()
    assert len(list(folder.glob("*.safetensors"))) > 2
    pixels, _ = inputs()
    expected = hidden_states(native.visual, pixels)[-2][:, 1:]
    for source in (open_clip_node(folder), f"transformers:{folder}"):
        tower = load_tower(source)
        assert worst(tower(pixels), expected) < 1e-5  # 3.2e-6
        settings = tower.image_processor.config
        assert (settings.resize_to, settings.interpolation, settings.mean) == (
            36,
            "bilinear",
            (0.5, 0.5, 0.5),
        )
    sorted(folder.glob("*.safetensors"))[0].unlink()
    for source in (open_clip_node(folder), f"transformers:{folder}"):
        with pytest.raises(WeightsError, match=r"model-00001-of-.*safetensors' does not exist"):
            load_tower(source)


def test_another_activation_is_refused_whatever_the_layout(tmp_path: Path) -> None:
    openai = write(native_clip(), "openai", tmp_path / "openai")
    quick = transformers_folder(native_clip(), "quick_gelu", tmp_path / "quick")
    exact = transformers_folder(native_clip("gelu"), "gelu", tmp_path / "exact")
    for weights in (openai, quick, quick / "model.safetensors"):
        with pytest.raises(
            WeightsError, match=r"trained with QuickGELU.*set architecture.quick_gelu to true"
        ):
            load_tower(open_clip_node(weights, "gelu"))
        with pytest.raises(
            WeightsError, match=r"trained with QuickGELU, .* computes 'gelu'.*is 'quick_gelu'"
        ):
            load_tower(transformers_node(weights, "gelu"))
    with pytest.raises(WeightsError, match=r"trained with GELU.*set architecture.quick_gelu to false"):
        load_tower(open_clip_node(exact))
    with pytest.raises(WeightsError, match=r"trained with GELU, .* computes 'quick_gelu'"):
        load_tower(transformers_node(exact))


def test_missing_and_extra_tensors_are_errors_in_every_layout(tmp_path: Path) -> None:
    native = native_clip()
    for layout in LAYOUTS:
        path = write(native, layout, tmp_path / layout)
        state = load_file(path)
        lost = "vision_model.pre_layrnorm.bias" if layout == "transformers" else "visual.ln_pre.bias"
        inner = "text." if layout == "open_clip" else ""
        strange = "vision_model.gain" if layout == "transformers" else f"{inner}transformer.resblocks.0.gain"
        save_file({name: tensor for name, tensor in state.items() if name != lost}, path)
        with pytest.raises(WeightsError, match=r"1 missing: ln_pre.bias"):
            load_tower(open_clip_node(path))
        with pytest.raises(WeightsError, match=r"1 missing: pre_layrnorm.bias"):
            load_tower(transformers_node(path))
        save_file({**state, strange: torch.ones(2)}, path)
        extra = r"1 (unexpected|tensor\(s\) belong to no part).*gain"
        with pytest.raises(WeightsError, match=extra):
            load_dual_encoder(open_clip_node(path))
        with pytest.raises(WeightsError, match=extra):
            load_tower(transformers_node(path))


@torch.no_grad()
def test_a_published_model_takes_a_file_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transformers:MODEL@FILE`: the shape and settings of a model that is known, the weights of a file."""
    vision = transformers_config(VARIANTS["quick_gelu"])["vision_config"]
    monkeypatch.setitem(PUBLISHED, "openai/tiny", vision)
    monkeypatch.setitem(PUBLISHED, "openai/other", {**vision, "patch_size": 16})
    native = native_clip()
    path = write(native, "openai", tmp_path / "weights")
    tower = load_tower(f"transformers:openai/tiny@{path}")
    pixels, _ = inputs()
    assert worst(tower(pixels), hidden_states(native.visual, pixels)[-2][:, 1:]) < 1e-5  # 3.2e-6
    assert tower.image_processor.config.mean == (0.48145466, 0.4578275, 0.40821073)
    with pytest.raises(WeightsError, match=r"2 of another shape: embeddings.patch_embedding.weight"):
        load_tower(f"transformers:openai/other@{path}")
