"""Weights on other devices, on the CPU and on the disk give the same features."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pins import OLD_TORCH, knows
from tiny import CLIP_VISION, RESNET, TOWER, tiny_tower
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm_vision import VisionTower, device_map, load_tower
from vlm_vision.backbone import Backbone
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.extract import extract_file
from vlm_vision.tower import describe_tower

pytest.importorskip("accelerate")

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def of_transformers(**architecture: Any) -> dict[str, Any]:
    return {"backbone": {"name": "transformers", "architecture": SMALL | architecture, "weights": "none"}}


KINDS: dict[str, dict[str, Any]] = {
    "native ViT": TOWER,
    "ModifiedResNet": RESNET,
    "timm ViT": {"backbone": "timm:test_vit@none"},
    "timm ConvNeXt": {"backbone": "timm:test_convnext@none"},
    "timm ResNet, whose first layer is of two modules": {"backbone": "timm:test_resnet@none"},
    "CLIP of transformers": of_transformers(model_type="clip_vision_model", **CLIP_VISION),
    "DINOv3": of_transformers(model_type="dinov3_vit", image_size=32, patch_size=8),
    "NaFlex": of_transformers(model_type="siglip2_vision_model", num_patches=16, patch_size=8),
    "any of transformers": of_transformers(model_type="vit", image_size=32, patch_size=8),
    "fused": {
        "backbone": {
            "name": "fused",
            "parts": [TOWER, {"backbone": "timm:test_convnext@none"}],
        }
    },
}
if not knows("dinov3_vit"):
    del KINDS["DINOv3"]
if not knows("siglip2_vision_model"):
    del KINDS["NaFlex"]
BLOCKS = "backbone.visual.transformer.resblocks"


def tower_of(kind: str, **options: Any) -> VisionTower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_tower(KINDS[kind], **options)


def layer_names(tower: VisionTower) -> list[str]:
    """Of the modules that are, or make, its layers."""
    waiting, found = [*tower.backbone.layer_modules()], set[nn.Module]()
    while waiting:
        layer = waiting.pop()
        if isinstance(layer, Backbone):
            waiting += layer.layer_modules()
        elif isinstance(layer, nn.ModuleList):
            waiting += layer
        else:
            found.add(layer)
    return [name for name, module in tower.named_modules() if module in found]


def pixels_for(tower: VisionTower) -> Tensor:
    settings = tower.image_processor.config
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, settings.height, settings.width, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_the_disk_give_the_same_features(kind: str, tmp_path: Path) -> None:
    options = {"pooled_head": kind != "fused"}
    tower = tower_of(kind, **options)
    names = layer_names(tower)
    device_map = {"": "cpu", names[0]: "disk", names[-1]: "disk"}
    spread = tower_of(kind, **options, device_map=device_map, offload_folder=tmp_path)
    assert spread.hf_device_map == device_map
    assert all(p.is_meta for p in spread.get_submodule(names[0]).parameters())
    pixels = pixels_for(tower)
    found = [(spread(pixels), tower(pixels))]
    if options["pooled_head"]:
        found.append((spread.pooled(pixels), tower.pooled(pixels)))
    step = tower.backbone.info.size_step
    if step is not None:
        mixed = [pixels[0], torch.nn.functional.pad(pixels[1], (0, step, 0, 2 * step))]
        found += zip(spread(mixed, interpolate=True), tower(mixed, interpolate=True), strict=True)
    for one, own in found:
        assert one.device == spread.device == tower.device
        assert float((one - own).abs().max()) <= 1e-5  # measured 1.1e-6, native ViT


def test_layers_that_share_weights_stay_where_the_rest_is() -> None:
    """CoaT's position encodings are one module in all blocks of a stage."""
    tower = describe_tower("timm:coat_tiny@none")
    shared, own = "backbone.model.serial_blocks1.0", "backbone.model.patch_embed2"
    assert shared in layer_names(tower)
    assert own in layer_names(tower)
    with pytest.raises(ConfigError, match="all that is no layer stays together"):
        device_map.place(tower, {"": "cpu", shared: "disk"}, offload_folder="none")
    with pytest.raises(ConfigError, match="name an offload_folder"):
        device_map.place(tower, {"": "cpu", own: "disk"})


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, {"backbone": "cpu"}, "auto"])
def test_one_device(device_map: Any) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto would take the GPU")
    tower = tiny_tower(device_map=device_map)
    assert not hasattr(tower, "hf_device_map")
    pixels = pixels_for(tower)
    assert torch.equal(tower(pixels), tiny_tower()(pixels))


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_strategies_fill_what_there_is_and_then_the_disk(strategy: str, tmp_path: Path) -> None:
    spread = tiny_tower(layer=3, device_map=strategy, max_memory={"cpu": "500KB"}, offload_folder=tmp_path)
    assert spread.hf_device_map == {"": "cpu", f"{BLOCKS}.1": "disk", f"{BLOCKS}.2": "disk"}
    pixels = pixels_for(spread)
    assert float((spread(pixels) - tiny_tower(layer=3)(pixels)).abs().max()) <= 1e-5  # measured 7e-7


@torch.no_grad()
def test_a_saved_tower_in_another_dtype_and_at_another_layer(tmp_path: Path) -> None:
    tiny_tower(layer=3).save_pretrained(tmp_path / "tower")
    options: dict[str, Any] = {"layer": [1, 2], "dtype": "bfloat16"}
    own = load_tower(tmp_path / "tower", **options)
    spread = VisionTower.from_pretrained(
        tmp_path / "tower",
        device_map={"": "cpu", f"{BLOCKS}.0": "disk"},
        offload_folder=tmp_path / "disk",
        **options,
    )
    pixels = pixels_for(own)
    assert spread(pixels).dtype == torch.bfloat16
    assert float((spread(pixels) - own(pixels)).abs().max()) <= 0.05  # measured 0.016, an ulp of bfloat16


def test_what_lies_on_the_disk_goes_with_the_tower(tmp_path: Path) -> None:
    tower = tiny_tower(device_map={"": "cpu", f"{BLOCKS}.0": "disk"}, offload_folder=tmp_path)
    assert any(tmp_path.iterdir())
    backbone = tower.backbone
    del tower
    gc.collect()
    assert any(tmp_path.iterdir())
    del backbone
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_an_offloaded_tower_is_neither_saved_nor_given_a_data_set(tmp_path: Path) -> None:
    tower = tiny_tower(device_map={"": "cpu", f"{BLOCKS}.0": "disk"}, offload_folder=tmp_path)
    with pytest.raises(WeightsError, match=r"12 tensor.* not here .*resblocks.0.*device_map"):
        tower.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ConfigError, match="load the tower without device_map"):
        extract_file(tower, [tmp_path], tmp_path / "features.safetensors")


@pytest.mark.parametrize("move", ["to", "half", "cpu"])
def test_a_tower_whose_layers_wait_is_neither_moved_nor_cast(move: str, tmp_path: Path) -> None:
    tower = tiny_tower(device_map={"": "cpu", f"{BLOCKS}.0": "disk"}, offload_folder=tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be moved, nor cast where layers wait .*; load it anew"):
        getattr(nn.Sequential(tower), move)(*(["cpu"] if move == "to" else []))


@pytest.mark.parametrize(
    ("device_map", "options", "says"),
    [
        ("cdua:0", {}, "'cdua:0' cannot be used"),
        ("meta", {}, "describe_tower"),
        ("disk", {}, "only layers can be on the disk; name them, such as"),
        ({"": "disk"}, {}, "only layers can be on the disk"),
        ({"": "cpu", f"{BLOCKS}.0": "disk"}, {}, "name an offload_folder"),
        ({"": "cpu", f"{BLOCKS}.7": "cpu"}, {}, r"no module '.*resblocks.7'; did you mean"),
        ({"backbone.visual.conv1": "cpu"}, {}, r"names no device for 'backbone.visual.\w+'"),
        ({"": "cpu", f"{BLOCKS}.0.mlp": "disk"}, {"offload_folder": "x"}, r"layer '.*resblocks.0' stays"),
        ({"": "cpu", "backbone.visual.conv1": "disk"}, {"offload_folder": "x"}, "all that is no layer stays"),
        ("cpu", {"max_memory": {"cpu": 1}}, "max_memory is for device_map='auto'"),
        ("auto", {"max_memory": {"cpu": "1KB"}}, "nothing has room"),
        # accelerate 0.21 leaves out what it does not know
        ("auto", {"max_memory": {"tpu": "1KB"}}, "Device tpu is not recognized|nothing has room"),
    ],
)
def test_maps_that_cannot_be_done_say_why(device_map: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tiny_tower(device_map=device_map, **options)


def test_a_described_tower_says_that_it_has_no_weights() -> None:
    tower = describe_tower(KINDS["native ViT"])
    assert tower(torch.empty(1, 3, 32, 32, device="meta")).is_meta
    with pytest.raises(ConfigError, match="has no weights"):
        tower(torch.zeros(1, 3, 32, 32))


# Two GPUs --------------------------------------------------------------------------------------------------


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As torch's, which cannot exchange tensors without data."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter.detach()))
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


@pytest.mark.skipif(OLD_TORCH, reason="this torch asks for a GPU where no tensor has data")
@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_two_gpus_are_given_their_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data, which torch lets be on any device, and refuses to compute with across two."""
    whole = {"layer": [1, -1]} if "ViT" in kind else {}
    tower = tower_of(kind, pooled_head=kind != "fused", **whole)
    names, pixels, layers = layer_names(tower), pixels_for(tower), device_map._layers(tower)
    monkeypatch.setattr(nn.Module, "_apply", _apply)
    monkeypatch.setattr(device_map, "_layers", lambda _: layers)  # timm's are found by building a model
    with FakeTensorMode(allow_non_fake_inputs=True):
        _apply(tower, torch.empty_like)
        device_map.place(tower, {"": "cuda:0", **dict.fromkeys(names[1::2], "cuda:1")})
        features = tower(pixels)
        assert features.shape == (2, tower.num_tokens, tower.hidden_size)
        assert features.device == tower.device == torch.device("cuda:0")
        assert tower.get_submodule(names[1]).state_dict().popitem()[1].device == torch.device("cuda:1")
        if tower.config.keeps_head:
            assert tower.pooled(pixels).device == tower.device
        with pytest.raises(ConfigError, match="cannot be moved"):
            tower.to("cuda:0")
        assert {parameter.dtype for parameter in tower.half().parameters()} == {torch.float16}


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_a_tower_on_a_gpu_may_wait_elsewhere(kind: str, tmp_path: Path) -> None:
    own = tower_of(kind, device_map="cuda")
    names = layer_names(own)
    spread = tower_of(kind, device_map={"": 0, names[0]: "cpu", names[-1]: "disk"}, offload_folder=tmp_path)
    pixels = pixels_for(own)
    features = spread(pixels)
    assert features.device == spread.device == torch.device("cuda:0")
    assert float((features - own(pixels)).abs().max()) <= 1e-3
