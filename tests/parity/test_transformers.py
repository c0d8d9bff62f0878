"""The transformers backbones against the models they wrap, from folders as `save_pretrained` writes them.

Tolerances are absolute, fp32 on CPU; the worst difference measured stands beside each. Today's transformers
and ours run the same kernels; 4.37 has its own attention.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from einops import rearrange
from PIL import Image
from pins import needs_new_torch
from safetensors.torch import load_file, save_file
from tiny import CLIP_VISION as VISION
from torch import Tensor, nn
from torch.nn.functional import pad

from vlm_vision import VisionTower, load_tower
from vlm_vision.backbones import transformers_vit
from vlm_vision.backbones.config import PUBLISHED
from vlm_vision.compat import under_names
from vlm_vision.errors import ConfigError, DataError, WeightsError
from vlm_vision.testing import check_tower
from vlm_vision.tower import describe_tower
from vlm_vision.verify import run_transformers, verify

TEXT = {**VISION, "vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
DINO = {**VISION, "image_size": 70, "patch_size": 14}
MAE = {
    **VISION,
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 16,
}
# Class of the model, and its config.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIPVisionModel", VISION),
    "SigLIP": ("SiglipVisionModel", VISION),
    "SigLIP, a margin dropped": ("SiglipVisionModel", {**VISION, "image_size": 36}),
    "SigLIP2 NaFlex": ("Siglip2VisionModel", {**VISION, "num_patches": 16}),
    "DINOv2": ("Dinov2Model", DINO),
    "DINOv2 SwiGLU": ("Dinov2Model", {**DINO, "use_swiglu_ffn": True}),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", {**DINO, "num_register_tokens": 4}),
    "DINOv3": ("DINOv3ViTModel", {**VISION, "num_register_tokens": 4}),
    "DINOv3 gated": ("DINOv3ViTModel", {**VISION, "use_gated_mlp": True, "query_bias": False}),
    "DINOv3 ConvNeXt": (
        "DINOv3ConvNextModel",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 64},
    ),
    "AIMv2": ("Aimv2VisionModel", VISION),
    "AIMv2 native": ("Aimv2VisionModel", {**VISION, "is_native": True}),
    "ViT-MAE": ("ViTMAEModel", MAE),
}
HERE = [kind for kind, (name, _) in KINDS.items() if hasattr(transformers, name)]
# Those whose library resamples positions, or needs not.
OTHER_SIZES = [kind for kind in HERE if kind != "AIMv2"]
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def build(class_name: str, **config: Any) -> Any:
    """A model of transformers with numbers of its own in every parameter, those that start at 0 or 1 too."""
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def write(model: Any, folder: Path, processor: dict[str, Any] = PROCESSOR) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def saved(kind: str, folder: Path) -> tuple[Any, Path]:
    name, config = KINDS[kind]
    model = build(name, **config)
    return model, write(model, folder / "model")


def native(tower: VisionTower) -> tuple[int, int]:
    settings = tower.image_processor.config
    return settings.height, settings.width


library = torch.no_grad()(run_transformers)


def patches_of(state: Tensor, prefix_tokens: int) -> Tensor:
    if state.ndim == 4:
        return rearrange(state, "b d h w -> b (h w) d")
    return state[:, prefix_tokens:]


def worst(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


# Features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HERE)
def test_features_of_every_layer_equal_hidden_states(kind: str, tmp_path: Path) -> None:
    model, folder = saved(kind, tmp_path)
    whole = load_tower(f"transformers:{folder}", layer=-1)
    info = whole.backbone.info
    pixels = torch.randn(2, 3, *native(whole))
    output = library(model, pixels)
    assert len(output.hidden_states) == info.num_layers + 1
    for layer in range(1, info.num_layers + 1):
        tower = load_tower(f"transformers:{folder}", layer=layer)
        expected = patches_of(output.hidden_states[layer], info.prefix_tokens)
        assert len(tower.backbone.layer_modules()) == layer
        with torch.no_grad():
            assert worst(tower(pixels), expected) <= 1e-5  # measured 0 under 5.24, 2e-6 under 4.37
        learning = tower(pixels)
        assert learning.requires_grad
        assert worst(learning, expected) <= 1e-5  # measured 0 under 5.24 and 4.37
    if info.prefix_tokens:
        tower = load_tower(f"transformers:{folder}", layer=1, select="cls_patch")
        expected = output.hidden_states[1]
        expected = torch.cat([expected[:, :1], expected[:, info.prefix_tokens :]], dim=1)
        assert worst(tower(pixels), expected) <= 1e-5  # measured 0


@pytest.mark.parametrize("kind", HERE)
def test_the_pooled_head_equals_the_librarys(kind: str, tmp_path: Path) -> None:
    model, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}", pooled_head=True)
    pixels = torch.randn(2, 3, *native(tower))
    output = library(model, pixels)
    expected = getattr(output, "pooler_output", output.last_hidden_state[:, 0])  # ViT-MAE has none of its own
    assert tower.embed_dim == expected.shape[1]
    assert worst(tower.pooled(pixels), expected) <= 1e-5  # measured 3e-7
    selected = load_tower(f"transformers:{folder}", select="pooled")
    assert worst(selected(pixels), expected[:, None]) <= 1e-5  # measured 3e-7


@pytest.mark.parametrize("kind", HERE)
def test_verification_finds_every_family_equal(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path)
    (found,) = verify([f"transformers:{folder}"])
    assert found.verdict == "equal"
    assert found.patches is not None
    assert max(found.patches, found.pooled or 0.0) <= 1e-6  # measured 4e-7


@pytest.mark.parametrize("kind", HERE)
def test_every_family_keeps_the_contract(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path)
    check_tower(load_tower(f"transformers:{folder}"))
    check_tower(load_tower(f"transformers:{folder}", pooled_head=True, layer=-1))
    check_tower(
        load_tower(f"transformers:{folder}", dtype="bfloat16", layer=[-1, -2] if kind[:6] != "DINOv3" else -1)
    )


@pytest.mark.parametrize("kind", HERE)
def test_when_everything_learns_no_parameter_is_left_without_gradient(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}")
    tower.train_only("everything")
    torch.autograd.backward(tower(torch.randn(1, 3, *native(tower))).square().sum())
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_mae_gives_patches_in_their_order_and_hides_none(tmp_path: Path) -> None:
    model, folder = saved("ViT-MAE", tmp_path)
    assert model.config.mask_ratio == 0.75
    tower = load_tower(f"transformers:{folder}", layer=1)
    one = torch.randn(1, 3, 32, 32)
    other = one.clone()
    other[:, :, 8:16, 16:24] += 1.0  # row 1, column 2 of a grid of 4
    with torch.no_grad():
        change = (tower(one) - tower(other)).abs().sum(dim=-1)[0]
    assert tower.num_patches == 16
    assert int(change.argmax()) == 1 * 4 + 2


@pytest.mark.skipif("DINOv3" not in HERE, reason="this transformers has no DINOv3")
def test_dinov3s_angles_keep_their_precision_in_half_precision(tmp_path: Path) -> None:
    """A tower is cast after loading, which would cast the frequencies of rotations too."""
    _, folder = saved("DINOv3", tmp_path)
    theirs = transformers.DINOv3ViTModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    pixels = torch.randn(2, 3, 32, 32).bfloat16()
    output = library(theirs, pixels)
    tower = load_tower(f"transformers:{folder}", layer=-1, dtype="bfloat16")
    with torch.no_grad():
        assert torch.equal(tower(pixels), output.hidden_states[-1][:, 5:])
        cast = library(theirs.float().bfloat16(), pixels)
        assert not torch.equal(tower(pixels), cast.hidden_states[-1][:, 5:])
        tower.train()
        assert torch.equal(tower(pixels), output.hidden_states[-1][:, 5:])  # no random shifts


# Sizes ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHER_SIZES)
@pytest.mark.parametrize("steps", [(2, 2), (1, 2), (-1, 0)], ids=str)
def test_other_sizes_equal_the_librarys(kind: str, steps: tuple[int, int], tmp_path: Path) -> None:
    model, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}", layer=-1)
    step = tower.backbone.info.size_step
    assert step is not None
    size = tuple((side // step + number) * step for side, number in zip(native(tower), steps, strict=True))
    pixels = torch.randn(2, 3, *size)
    ours = tower(pixels, interpolate=True)
    if (
        kind in ("CLIP", "SigLIP", "SigLIP, a margin dropped", "ViT-MAE")
        and "interpolate_pos_encoding" not in inspect.signature(model.forward).parameters
    ):
        pytest.skip("this transformers takes one size of it")
    expected = patches_of(library(model, pixels).hidden_states[-1], tower.backbone.info.prefix_tokens)
    # Measured 1e-6, of NaFlex's positions, which 5.24 resamples by sums of its own. DINOv2 of 4.37 and 4.39
    # gives scales instead of sizes: 6e-2.
    old = "DINOv2" in kind and transformers.__version__.startswith(("4.37", "4.39"))
    assert worst(ours, expected) <= (1e-1 if old else 1e-5)
    loaded = load_tower(f"transformers:{folder}", layer=-1, image_size=list(size))
    assert loaded.grid == (size[0] // step, size[1] // step)[: len(loaded.grid)] or "ConvNeXt" in kind
    assert loaded.num_patches == ours.shape[1]
    assert worst(loaded(pixels), ours) <= 1e-6  # measured 0
    if tower.backbone.info.any_size:
        assert torch.equal(tower(pixels), ours)
    else:
        with pytest.raises(ConfigError, match="interpolate=True takes other sizes"):
            tower(pixels)


@torch.no_grad()
@pytest.mark.parametrize("kind", HERE)
def test_the_native_size_is_an_exact_no_op(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}", layer=-1)
    pixels = torch.randn(2, 3, *native(tower))
    features = tower(pixels)
    assert torch.equal(tower(pixels, interpolate=True), features)
    again = load_tower(f"transformers:{folder}", layer=-1, image_size=native(tower)[0])
    assert torch.equal(again(pixels), features)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tower.state_dict().items())


@pytest.mark.parametrize("kind", HERE)
def test_a_resized_tower_is_saved_and_learns(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path)
    step = load_tower(f"transformers:{folder}").backbone.info.size_step
    assert step is not None
    tower = load_tower(f"transformers:{folder}", image_size=[3 * step, 4 * step])
    tower.save_pretrained(tmp_path / "tower")
    again = VisionTower.from_pretrained(tmp_path / "tower")
    pixels = torch.randn(1, 3, 3 * step, 4 * step)
    with torch.no_grad():
        assert torch.equal(tower(pixels), again(pixels))
    tower.train_only("everything")
    torch.autograd.backward(tower(pixels).square().sum())
    assert all(parameter.grad is not None for parameter in tower.parameters())
    with pytest.raises(ConfigError, match=f"both sides must be multiples of {step} pixels"):
        load_tower(f"transformers:{folder}", image_size=3 * step + 1)


@pytest.mark.skipif("AIMv2" not in HERE, reason="this transformers has no AIMv2")
@torch.no_grad()
def test_aimv2_says_that_its_library_takes_one_size_and_resamples_as_siglip(tmp_path: Path) -> None:
    _, folder = saved("AIMv2", tmp_path)
    tower = load_tower(f"transformers:{folder}")
    assert "its library takes one size" in tower.backbone.info.assumptions[0]
    assert tower(torch.randn(1, 3, 40, 48), interpolate=True).shape == (1, 30, 32)


@pytest.mark.skipif("SigLIP2 NaFlex" not in HERE, reason="this transformers has no SigLIP2")
def test_naflex_runs_pictures_of_mixed_sizes_as_one_masked_batch(tmp_path: Path) -> None:
    model, folder = saved("SigLIP2 NaFlex", tmp_path)
    tower = load_tower(f"transformers:{folder}", layer=[-1, 1])
    sizes = [(32, 32), (16, 64), (40, 24), (8, 8)]
    pictures = [torch.randn(3, *size) for size in sizes]
    patches = [rearrange(picture, "c (h p) (w q) -> (h w) (p q c)", p=8, q=8) for picture in pictures]
    longest = max(len(rows) for rows in patches)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    tower.backbone.layer_modules()[0].register_forward_hook(count)
    with torch.no_grad():
        features = tower(pictures)
        output = model(
            torch.stack([pad(rows, (0, 0, 0, longest - len(rows))) for rows in patches]),
            pixel_attention_mask=torch.tensor(
                [[1] * len(rows) + [0] * (longest - len(rows)) for rows in patches]
            ),
            spatial_shapes=torch.tensor([[height // 8, width // 8] for height, width in sizes]),
            output_hidden_states=True,
        )
    assert runs == 1
    states = torch.cat([output.hidden_states[-1], output.hidden_states[1]], dim=-1)
    for picture, rows, found, state in zip(pictures, patches, features, states, strict=True):
        assert worst(found, state[: len(rows)]) <= 1e-5  # measured 2e-6
        alone = tower(picture[None])[0]
        assert worst(found, alone) <= 1e-5  # measured 1e-6
    torch.autograd.backward(sum(rows.square().sum() for rows in tower(pictures)))  # type: ignore[arg-type]
    assert all(parameter.grad is not None for parameter in tower.parameters())


@pytest.mark.skipif("SigLIP2 NaFlex" not in HERE, reason="this transformers has no SigLIP2")
@torch.no_grad()
def test_naflex_takes_pictures_as_they_are_shaped() -> None:
    tower = load_tower("transformers:google/siglip2-base-patch16-naflex@none", layer=1)
    config = tower.image_processor.config
    assert (config.resize, config.max_patches, config.patch_size) == ("flexible", 256, 16)
    sizes = [(160, 640), (300, 99)]
    pixels = tower.image_processor([Image.new("RGB", (width, height)) for height, width in sizes])
    library_module = import_module("transformers.models.siglip2.image_processing_siglip2")
    theirs = [library_module.get_image_size_for_max_num_patches(*size, 16, 256) for size in sizes]
    assert [tuple(picture.shape[1:]) for picture in pixels] == theirs == [(128, 512), (448, 144)]
    assert [tuple(features.shape) for features in tower(pixels)] == [(256, 768), (252, 768)]
    larger = load_tower("transformers:google/siglip2-base-patch16-naflex@none", layer=1, image_size=512)
    assert larger.num_patches == larger.image_processor.config.max_patches == 1024


# Names that versions of the library give -------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [kind for kind in ("DINOv2", "DINOv2 SwiGLU", "DINOv2 with registers", "ViT-MAE") if kind in HERE]
)
@torch.no_grad()
def test_a_saved_tower_loads_whichever_version_named_its_tensors(kind: str, tmp_path: Path) -> None:
    """Today's library still writes the names of version 4 into its own files."""
    _, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}", layer=-1)
    tower.save_pretrained(tmp_path / "tower")
    ours = load_file(tmp_path / "tower" / "model.safetensors")
    blocks = {
        re.sub(r"^(vit\.)?encoder\.layer\.", "backbone.blocks.", name): value
        for name, value in load_file(folder / "model.safetensors").items()
        if "encoder.layer." in name
    }
    older = {name: value for name, value in ours.items() if ".blocks." not in name} | blocks
    assert any("attention.attention.query" in name for name in older)
    save_file(older, tmp_path / "tower" / "model.safetensors", {"format": "pt"})
    again = VisionTower.from_pretrained(tmp_path / "tower")
    pixels = torch.randn(1, 3, *native(tower))
    assert torch.equal(again(pixels), tower(pixels))
    again.save_pretrained(tmp_path / "again")
    back = under_names(ours, older)
    assert back.keys() == older.keys()
    assert all(torch.equal(value, older[name]) for name, value in back.items())


# Training and tracing ------------------------------------------------------------------------------------

TRACED = [
    kind for kind in ("CLIP", "SigLIP", "SigLIP2 NaFlex", "DINOv2", "DINOv3", "ViT-MAE") if kind in HERE
]


@needs_new_torch
@pytest.mark.parametrize("kind", TRACED)
def test_a_tower_compiles_whole_and_exports(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}").requires_grad_(False)
    pixels = torch.randn(2, 3, *native(tower))
    torch._dynamo.reset()
    with torch.no_grad():
        features = tower(pixels)
        compiled = torch.compile(tower, fullgraph=True, backend="eager")
        assert worst(compiled(pixels), features) <= 1e-5  # measured 0
        exported = torch.export.export(tower, (pixels,)).module()
        assert worst(exported(pixels), features) <= 1e-5  # measured 5e-7


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP", "DINOv2"])
def test_autocast_equals_the_librarys(kind: str, tmp_path: Path) -> None:
    model, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}", layer=-1)
    pixels = torch.randn(2, 3, *native(tower))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = library(model, pixels).hidden_states[-1]
        features = tower(pixels)
    prefix = tower.backbone.info.prefix_tokens
    assert features.dtype == expected.dtype
    assert worst(features.float(), expected[:, prefix:].float()) <= 0.05  # measured 0 under 5.24


@pytest.mark.parametrize(
    "kind", ["CLIP", "SigLIP", "DINOv2", *(["DINOv3 ConvNeXt"] if "DINOv3 ConvNeXt" in HERE else [])]
)
def test_activation_checkpointing_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}").train()
    pixels = torch.randn(2, 3, *native(tower))

    def gradients(enabled: bool) -> dict[str, Tensor]:
        tower.zero_grad()
        tower.backbone.checkpoint_activations(enabled)
        runs.clear()
        torch.autograd.backward(tower(pixels).square().sum())
        return {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}  # type: ignore[union-attr]

    runs: list[int] = []
    tower.backbone.layer_modules()[0].register_forward_pre_hook(lambda *_: runs.append(1))
    plain = gradients(False)
    assert len(runs) == 1
    checkpointed = gradients(True)
    assert len(runs) == 2
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in plain.items())


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP", "DINOv2"])
def test_the_last_layers_alone_learn(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}")
    tower.train_only(1)
    torch.autograd.backward(tower(torch.randn(1, 3, *native(tower))).square().sum())
    learnt = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert learnt == {name for name, _ in tower.named_parameters() if name.startswith("backbone.blocks.1.")}


@torch.no_grad()
def test_tokens_in_a_convolutions_layout_run_as_any_others() -> None:
    """SigLIP adds nothing to what its convolution gives but positions, so its tokens are not contiguous."""
    tower = load_tower(
        {
            "backbone": {
                "name": "transformers",
                "architecture": {**VISION, "model_type": "siglip_vision_model"},
                "weights": "none",
            }
        }
    )
    pixels = torch.randn(3, 3, 32, 32)
    assert not tower.backbone._embed(pixels).is_contiguous()  # type: ignore[operator]
    together, alone = tower(pixels), torch.cat([tower(picture[None]) for picture in pixels])
    assert worst(together, alone) <= 1e-5  # measured 5e-7


# Any other model -----------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "ViTModel": (VISION, 1, "layers are the 3 modules"),
    "BeitModel": (VISION, 1, "layers are the 3 modules"),
    "DeiTModel": (VISION, 2, "of 18 tokens the first 2 come before the 4x4 patches"),
    "IJepaModel": (VISION, 0, "of 16 tokens the first 0 come before"),
    "ResNetModel": (
        {"hidden_sizes": [8, 16, 24, 32], "embedding_size": 8, "depths": [1, 1, 1, 1]},
        0,
        "hidden states are maps of stages",
    ),
    "SwinModel": (
        {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
        0,
        "hidden states are grids of stages",
    ),
    "ConvNextModel": (
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64},
        0,
        "layers are the 4 modules of 'encoder.stages'",
    ),
    "SegformerModel": (  # without what enters the first stage among its hidden states
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
        0,
        "held",
    ),
}


def settings(model: Any) -> dict[str, Any]:
    return {"image_size": getattr(model.config, "image_size", 64)}


@pytest.mark.parametrize("name", [name for name in OTHERS if hasattr(transformers, name)])
def test_any_model_with_hidden_states_gives_them_and_says_what_was_assumed(name: str, tmp_path: Path) -> None:
    config, prefix_tokens, assumed = OTHERS[name]
    model = build(name, **config)
    node = {
        "name": "transformers",
        "model": str(write(model, tmp_path / "model")),
        "preprocess": settings(model),
    }
    whole = load_tower({"backbone": node}, layer=-1)
    info = whole.backbone.info
    assert assumed in " ".join(info.assumptions)
    assert info.prefix_tokens == prefix_tokens
    pixels = torch.randn(2, 3, *native(whole))
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states[-info.num_layers :]
        held = whole.num_parameters
        for layer, state in reversed(list(enumerate(states, start=1))):
            tower = load_tower({"backbone": node}, layer=layer)
            if layer < len(states) or name == "ViTModel":  # others may give the last one after a norm
                assert worst(tower(pixels), patches_of(state, prefix_tokens)) <= 1e-5  # measured 0
            if assumed != "held":
                assert len(tower.backbone.layer_modules()) == layer
                assert tower.num_parameters < held or layer == len(states)
                held = tower.num_parameters
    check_tower(whole)
    tower = load_tower({"backbone": node})
    check_tower(tower)
    tower.train_only("everything")
    torch.autograd.backward(tower(pixels).square().sum())
    assert all(parameter.grad is not None for parameter in tower.parameters())


@pytest.mark.parametrize("name", [name for name in OTHERS if hasattr(transformers, name)])
def test_verification_finds_any_model_equal(name: str, tmp_path: Path) -> None:
    folder = write(build(name, **OTHERS[name][0]), tmp_path / "model")
    (found,) = verify([f"transformers:{folder}"])
    assert found.verdict == "equal"
    assert found.patches is not None
    assert max(found.patches, found.pooled or 0.0) <= 1e-6  # measured 0


@torch.no_grad()
def test_any_model_takes_other_sizes_where_its_library_does(tmp_path: Path) -> None:
    model = build("ViTModel", **VISION)
    node = {"name": "transformers", "model": str(write(model, tmp_path / "model"))}
    tower = load_tower({"backbone": node})
    pixels = torch.randn(1, 3, 40, 48)
    states = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    assert worst(tower(pixels, interpolate=True), states[-2][:, 1:]) <= 1e-5  # measured 0
    loaded = load_tower({"backbone": node}, image_size=[40, 48])
    assert loaded.grid == (5, 6)
    assert worst(loaded(pixels), states[-2][:, 1:]) <= 1e-5  # measured 0
    loaded.save_pretrained(tmp_path / "tower")
    assert torch.equal(VisionTower.from_pretrained(tmp_path / "tower")(pixels), loaded(pixels))


@torch.no_grad()
def test_a_classifiers_checkpoint_gives_its_model_without_a_pooler(tmp_path: Path) -> None:
    model = build("ViTForImageClassification", **VISION)
    tower = load_tower(f"transformers:{write(model, tmp_path / 'model')}")
    pixels = torch.randn(1, 3, 32, 32)
    states = model(pixels, output_hidden_states=True).hidden_states
    assert worst(tower(pixels), states[-2][:, 1:]) <= 1e-5  # measured 0
    with pytest.raises(ConfigError, match="no pooled head"):
        load_tower(f"transformers:{tmp_path / 'model'}", pooled_head=True)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"model_type": "bert"}, "'bert' does not run on pixels"),
        ({"model_type": "no_such"}, "does not understand a config of type 'no_such'"),
        ({"hidden_size": 3}, "its config has no `model_type`"),
        (
            {"model_type": "yolos", **VISION, "image_size": [32, 32], "num_detection_tokens": 10},
            "27 tokens for a grid of 4x4: which 11 are none of it cannot be known",
        ),
        ({"model_type": "dinov2", **VISION, "hidden_size": "wide"}, "dinov2"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_known_is_refused(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tower({"backbone": {"name": "transformers", "architecture": architecture, "weights": "none"}})


def test_a_family_that_this_transformers_lacks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(transformers_vit.FAMILIES["dinov2"], model="Dinov9Model")
    monkeypatch.setitem(transformers_vit.FAMILIES, "dinov2", row)
    with pytest.raises(
        ConfigError, match="has no Dinov9Model, which 'dinov2' needs: pip install -U transformers"
    ):
        load_tower("transformers:facebook/dinov2-small@none")


# Loading -------------------------------------------------------------------------------------------------


def of_both(model: str) -> dict[str, Any]:
    config = getattr(transformers, model).config_class
    text = {**TEXT, "projection_size": 32, "hidden_size": 32}
    return {"text_config": text, "vision_config": dict(VISION), **({"projection_dim": 16} if config else {})}


# Class of the whole model, its config, and where its vision model is.
WHOLE: dict[str, tuple[Any, str]] = {
    "CLIPModel": (partial(of_both, "CLIPModel"), "vision_model"),
    "CLIPForImageClassification": (partial(of_both, "CLIPModel"), "vision_model"),
    "CLIPVisionModelWithProjection": (lambda: {**VISION, "projection_dim": 16}, "vision_model"),
    "SiglipModel": (partial(of_both, "SiglipModel"), "vision_model"),
    "SiglipForImageClassification": (partial(of_both, "SiglipModel"), "vision_model"),
    "Siglip2Model": (
        lambda: {**of_both("Siglip2Model"), "vision_config": {**VISION, "num_patches": 16}},
        "vision_model",
    ),
    "Aimv2Model": (partial(of_both, "Aimv2Model"), "vision_model"),
    "Dinov2ForImageClassification": (lambda: DINO, "dinov2"),
    "Dinov2WithRegistersForImageClassification": (lambda: DINO, "dinov2_with_registers"),
    "ViTMAEForPreTraining": (lambda: MAE, "vit"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in WHOLE if hasattr(transformers, name)])
def test_a_whole_model_gives_its_vision_part(name: str, tmp_path: Path) -> None:
    config, place = WHOLE[name]
    model = build(name, **config())
    folder = write(model, tmp_path / "model", {**PROCESSOR, "crop_size": {"height": 32, "width": 32}})
    tower = load_tower(f"transformers:{folder}")
    pixels = torch.randn(1, 3, *native(tower))
    states = library(getattr(model, place), pixels).hidden_states
    assert worst(tower(pixels), states[-2][:, tower.backbone.info.prefix_tokens :]) <= 1e-5  # measured 0
    state = load_file(folder / "model.safetensors")
    save_file({**state, "surprise.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 unexpected: .*surprise.weight"):
        load_tower(f"transformers:{folder}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_read_as_they_are_and_run_in_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build("SiglipVisionModel", **VISION).to(dtype)
    tower = load_tower(f"transformers:{write(model, tmp_path / 'model')}", pooled_head=True)
    assert tower.dtype == torch.float32
    ours = tower.state_dict()
    for name, value in getattr(model, "vision_model", model).state_dict().items():
        role = name.replace("encoder.layers", "blocks").replace("post_layernorm", "norm")
        assert torch.equal(ours[f"backbone.{role}"], value.float())


@torch.no_grad()
def test_a_folder_at_none_has_random_weights_and_the_folders_shape(tmp_path: Path) -> None:
    model, folder = saved("CLIP", tmp_path)
    (folder / "model.safetensors").unlink()
    tower = load_tower(f"transformers:{folder}@none")
    assert (tower.hidden_size, tower.grid, tower.image_size) == (32, (4, 4), 32)
    pixels = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(tower(pixels), library(model, pixels).hidden_states[-2][:, 1:])
    with pytest.raises(WeightsError, match="weights cannot be loaded"):
        load_tower(f"transformers:{folder}")


def test_weights_may_lie_in_another_folder(tmp_path: Path) -> None:
    model, folder = saved("CLIP", tmp_path)
    tower = load_tower(
        {"backbone": {"name": "transformers", "architecture": model.config.to_dict(), "weights": str(folder)}}
    )
    own = load_tower(f"transformers:{folder}")
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in tower.state_dict().items())
    with pytest.raises(WeightsError, match="has no weights; name a folder or hub id, or 'none'"):
        load_tower({"backbone": {"name": "transformers", "architecture": model.config.to_dict()}})


def test_dinov2_runs_at_its_native_size_with_its_margin_scaled(tmp_path: Path) -> None:
    _, folder = saved("DINOv2", tmp_path)
    tower = load_tower(f"transformers:{folder}")
    settings = tower.image_processor.config
    assert (settings.image_size, settings.resize_to) == (70, 80)  # 28 out of 32 as 70 out of 80
    assert tower.grid == (5, 5)
    assert settings.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("kind", HERE)
def test_a_saved_tower_needs_neither_the_hub_nor_the_folder_it_came_from(kind: str, tmp_path: Path) -> None:
    _, folder = saved(kind, tmp_path)
    tower = load_tower(f"transformers:{folder}")
    tower.save_pretrained(tmp_path / "tower")
    shutil.rmtree(folder)
    again = VisionTower.from_pretrained(tmp_path / "tower")
    pixels = torch.randn(1, 3, *native(tower))
    with torch.no_grad():
        assert torch.equal(tower(pixels), again(pixels))
    assert again.image_processor.config == tower.image_processor.config


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write(build("CLIPModel", **of_both("CLIPModel")), tmp_path / "model")
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
    _, folder = saved("CLIP", tmp_path)
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


def test_a_folder_without_preprocessing_says_so(tmp_path: Path) -> None:
    _, folder = saved("CLIP", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"has no preprocessor_config.json"):
        load_tower(f"transformers:{folder}")


# Published models ----------------------------------------------------------------------------------------


def twin(model: str) -> tuple[str, int] | None:
    """The same weights in timm, and how many parameters more the library's model has up to its last layer."""
    found = re.fullmatch(r"google/(siglip2?)-([\w-]+)-patch(\d+)-(\d+|naflex)", model)
    if found:
        family, size, patch, image = found.groups()
        tag = "v2_webli" if family == "siglip2" else "webli"
        size = size.replace("-", "")
        if image == "naflex":
            return f"naflexvit_{size}_patch16_siglip.{tag}", 0
        image = "378" if (family, patch, image) == ("siglip2", "14", "384") else image
        return f"vit_{size}_patch{patch}_siglip_{image}.{tag}", 0
    found = re.fullmatch(r"facebook/dinov2-(with-registers-)?(\w+)", model)
    if found:  # timm adds the class token's position to the class token
        position = PUBLISHED[model]["hidden_size"] if found[1] else 0
        return f"vit_{found[2]}_patch14_{'reg4_' if found[1] else ''}dinov2.lvd142m", position
    found = re.fullmatch(r"facebook/dinov3-vit(\w+?)16(plus)?-pretrain-lvd1689m", model)
    if found:  # timm leaves out biases of queries and values, which are zero
        size = {"s": "small", "b": "base", "l": "large", "h": "huge"}.get(found[1], found[1])
        row = PUBLISHED[model]
        biases = 2 * row["num_hidden_layers"] * row["hidden_size"] if row.get("query_bias", True) else 0
        return f"vit_{size}_{'plus_' if found[2] else ''}patch16_dinov3.lvd1689m", biases
    found = re.fullmatch(r"facebook/dinov3-convnext-(\w+)-pretrain-lvd1689m", model)
    if found:
        return f"convnext_{found[1]}.dinov3_lvd1689m", 0
    found = re.fullmatch(r"apple/aimv2-(\w+)-patch14-(\d+)", model)
    if found:  # without a head, the final norm is of no use here
        return f"aimv2_{found[1].lower()}_patch14_{found[2]}.apple_pt", -PUBLISHED[model]["hidden_size"]
    found = re.fullmatch(r"facebook/vit-mae-(\w+)", model)
    if found:
        return f"vit_{found[1]}_patch{PUBLISHED[model]['patch_size']}_224.mae", 0
    return None


def is_here(model: str) -> bool:
    family = transformers_vit.FAMILIES[PUBLISHED[model]["model_type"]]
    return hasattr(transformers, family.model)


@pytest.mark.parametrize("model", [model for model in PUBLISHED if is_here(model)])
def test_published_models_are_described_without_a_network_or_weights(model: str) -> None:
    """By the count of parameters of the same weights in timm, and by how they were shown pictures."""
    has_head = not model.startswith("apple/")
    tower = describe_tower(f"transformers:{model}", pooled_head=has_head, layer=-1)
    clips = {
        "openai/clip-vit-base-patch32": 87_456_000,
        "openai/clip-vit-base-patch16": 85_799_424,
        "openai/clip-vit-large-patch14": 303_179_776,
        "openai/clip-vit-large-patch14-336": 303_507_456,
    }
    same = twin(model)
    if same is None:
        assert tower.num_parameters == clips[model]
    else:
        with torch.device("meta"):
            theirs: nn.Module = timm.create_model(same[0], num_classes=0)
        assert tower.num_parameters - sum(p.numel() for p in theirs.parameters()) == same[1]
        settings, record = tower.image_processor.config, theirs.pretrained_cfg
        assert (settings.mean, settings.std) == (tuple(record["mean"]), tuple(record["std"]))  # type: ignore[index,arg-type]
    if tower.num_parameters < 1e8:
        pixels = torch.empty(1, 3, *native(tower), device="meta")
        assert tower(pixels).shape == (1, tower.num_patches, tower.hidden_size)


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
