"""Towers inside transformers: its LLaVAs with ours as `vision_config`, and the auto classes."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CLIP_VISION as CLIP
from tiny import RESNET, TOWER, tiny_tokenizer, tiny_tower
from torch import Tensor

from vlm_vision import VisionTower, load_tower
from vlm_vision.backbone import Backbone
from vlm_vision.errors import ConfigError, DataError, MissingExtraError, WeightsError

try:
    from vlm_vision.integrations.transformers import (
        VlmVisionBackbone,
        VlmVisionConfig,
        VlmVisionImageProcessor,
        VlmVisionModel,
        llava_fields,
    )
except MissingExtraError as error:
    pytest.skip(str(error), allow_module_level=True)

from parity.test_open_clip import to_transformers
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Backbone,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaProcessor,
)

IMAGE = 63
LLM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
DINOV2 = {**CLIP, "model_type": "dinov2", "mlp_ratio": 2}
DINOV2.pop("intermediate_size")
TRANSFORMERS = {
    "backbone": {
        "name": "transformers",
        "architecture": {**CLIP, "model_type": "clip_vision_model", "hidden_act": "quick_gelu"},
        "weights": "none",
    }
}
TIMM = {"backbone": "timm:test_vit4@none"}  # one register and no class token
PATCHES_ONLY = {"backbone": "timm:test_vit_relpos@none"}  # no class token, and buffers that are not saved
FUSED = {"backbone": {"name": "fused", "parts": [TOWER["backbone"], TRANSFORMERS["backbone"]]}}
KINDS = {
    "fused": FUSED,
    "open_clip ViT": TOWER,
    "transformers CLIP": TRANSFORMERS,
    "open_clip ResNet": RESNET,
    "timm ViT": TIMM,
    "timm ViT of patches": PATCHES_ONLY,
}


def make(source: dict[str, Any], **overrides: Any) -> VisionTower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_tower(source, **overrides)


def make_llava(tower: VisionTower, **fields: Any) -> Any:
    settings = {"image_token_index": IMAGE, **llava_fields(tower), **fields}
    torch.manual_seed(1)
    config = LlavaConfig(
        vision_config=VlmVisionConfig.from_tower(tower),
        text_config=LlamaConfig(**LLM),
        **settings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = VlmVisionModel.from_tower(tower)
    return model.eval()


def batch_of(tower: VisionTower, count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 60, (count, 4), generator=generator)
    pictures = torch.full((count, tower.num_tokens), IMAGE)
    side = tower.image_size
    return {
        "input_ids": torch.cat([ids[:, :1], pictures, ids[:, 1:]], dim=1),
        "pixel_values": torch.randn(count, 3, side, side, generator=generator),
    }


def worst(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(folder)
    return folder


def clip_tower(folder: Path, **overrides: Any) -> VisionTower:
    backbone = {"name": "transformers", "model": str(folder), "preprocess": {"image_size": 32}}
    return load_tower({"backbone": backbone}, **overrides)


@torch.no_grad()
def test_hidden_states_are_those_of_transformers_own_clip(clip_folder: Path) -> None:
    clip = CLIPVisionModel.from_pretrained(clip_folder)
    model = VlmVisionModel.from_tower(clip_tower(clip_folder, pooled_head=True))
    pixels = torch.randn(2, 3, 32, 32)
    theirs, ours = (one(pixels, output_hidden_states=True) for one in (clip, model))
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    assert ours.hidden_states[0] is None  # embeddings before any layer are not offered
    for one, other in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # measured 8.3e-7
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=0, atol=1e-5)
    chosen = model(pixels, output_hidden_states=[-2, 1]).hidden_states
    assert [state is not None for state in chosen] == [False, True, True, False]
    assert torch.equal(chosen[-2], ours.hidden_states[-2])


@torch.no_grad()
def test_pictures_of_other_sizes_are_taken_when_asked() -> None:
    tower = make(TOWER)
    pixels = torch.randn(2, 3, 48, 24)
    expected = tower(pixels, interpolate=True)
    model = VlmVisionModel.from_tower(tower)
    ours = model(pixels, output_hidden_states=-2, interpolate_pos_encoding=True).hidden_states[-2]
    assert torch.equal(ours[:, 1:], expected)
    maps = VlmVisionBackbone.from_tower(tower)(pixels, interpolate_pos_encoding=True).feature_maps[0]
    assert torch.equal(maps, rearrange(expected, "b (h w) c -> b c h w", h=6))


@torch.no_grad()
def test_a_tower_of_pictures_that_are_not_square(tmp_path: Path) -> None:
    tower = make(TOWER, image_size=(48, 24))
    model = VlmVisionModel.from_tower(tower)
    assert (model.config.image_size, model.config.patch_size) == ([48, 24], 8)
    model.save_pretrained(tmp_path)
    assert VlmVisionImageProcessor.from_tower(tower).crop_size == {"height": 48, "width": 24}
    pixels = torch.randn(1, 3, 48, 24)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).tower(pixels), tower(pixels))


@torch.no_grad()
def test_hidden_states_of_an_open_clip_tower_are_those_of_transformers_clip() -> None:
    tower = tiny_tower(pooled_head=True)
    clip = to_transformers(tower.backbone.visual, quick_gelu=False)
    pixels = torch.randn(2, 3, 32, 32)
    theirs = clip(pixels, output_hidden_states=True).hidden_states
    ours = VlmVisionModel.from_tower(tower)(pixels, output_hidden_states=True).hidden_states
    for layer in (1, 2, 3):
        assert worst(ours[layer], theirs[layer]) <= 1e-5  # measured 0


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, [-1, -3]])
@pytest.mark.parametrize("select", ["patch", "cls_patch"])
@pytest.mark.parametrize("source", ["transformers", "open_clip"])
def test_llava_gives_the_logits_that_it_gives_with_transformers_clip(
    source: str, layer: Any, select: str, clip_folder: Path
) -> None:
    if source == "transformers":
        tower = clip_tower(clip_folder, layer=layer, select=select)
        clip = CLIPVisionModel.from_pretrained(clip_folder)
    else:
        tower = tiny_tower(layer=layer, select=select, pooled_head=True)
        clip = to_transformers(tower.backbone.visual, quick_gelu=False)
    ours, fields = make_llava(tower), llava_fields(tower)
    assert fields["vision_feature_layer"] == layer
    config = LlavaConfig(
        vision_config=clip.config, text_config=LlamaConfig(**LLM), image_token_index=IMAGE, **fields
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    rest = {name: value for name, value in ours.state_dict().items() if "vision_tower" not in name}
    assert not theirs.load_state_dict(rest, strict=False).unexpected_keys
    theirs.model.vision_tower = clip
    batch = batch_of(tower)
    assert worst(ours(**batch).logits, theirs(**batch).logits) <= 1e-6  # measured 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_llava_reads_what_the_tower_gives(kind: str) -> None:
    tower = make(KINDS[kind])
    model = make_llava(tower)
    batch = batch_of(tower)
    read: list[Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(**batch)
    assert torch.equal(read[0], tower(batch["pixel_values"]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_llava_trains_saves_and_reloads_bit_equal(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    tower = make(KINDS[kind])
    model = make_llava(tower).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        assert model.model.vision_tower.is_gradient_checkpointing
    before = deepcopy(tower.state_dict())
    batch = batch_of(tower)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        dead = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not dead  # the layers that nobody reads were freed, so that DDP needs no search
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(parameter, before[name]) for name, parameter in tower.named_parameters())

    model.eval().save_pretrained(tmp_path / "llava")
    again, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "llava", output_loading_info=True
    )
    assert not any(report.values())
    batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        answers = [
            one.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
            for one in (again, model)
        ]
    assert torch.equal(*answers)
    assert answers[0].shape[1] == batch["input_ids"].shape[1] + 4
    own = again.model.vision_tower.tower
    assert torch.equal(own(batch["pixel_values"]), tower(batch["pixel_values"]))
    own.save_pretrained(tmp_path / "tower")
    assert torch.equal(
        load_tower(tmp_path / "tower")(batch["pixel_values"]), tower.eval()(batch["pixel_values"])
    )


@pytest.mark.parametrize("kind", [*KINDS, "whole"])
def test_checkpointing_recomputes_and_changes_no_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = make(KINDS.get(kind, TOWER)).train()
    if kind == "whole":  # a backbone that does not offer it runs again as a whole
        own = Backbone.checkpoint_activations
        monkeypatch.setattr(type(tower.backbone), "checkpoint_activations", own)
    model = VlmVisionModel.from_tower(tower)
    pixels = torch.randn(2, 3, tower.image_size, tower.image_size)
    runs: list[int] = []
    for module in tower.modules():
        if "norm" in type(module).__name__.lower():
            module.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients() -> tuple[int, list[Tensor]]:
        runs.clear()
        tower.zero_grad()
        torch.manual_seed(4)  # some backbones have dropout
        model(pixels).last_hidden_state.square().mean().backward()
        return len(runs), [parameter.grad.clone() for parameter in tower.parameters()]

    state = deepcopy(tower.state_dict())  # batch norms count every run
    once, plain = gradients()
    tower.load_state_dict(state)
    model.gradient_checkpointing_enable()
    twice, recomputed = gradients()
    assert twice > 1.5 * once > 0  # all but those before and after the blocks
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))
    model.gradient_checkpointing_disable()
    assert gradients()[0] == once


@pytest.mark.parametrize("kind", ["open_clip ViT", "open_clip ResNet"])
def test_llava_next_takes_the_same_tower(kind: str, tmp_path: Path) -> None:
    tower = make(KINDS[kind])
    if kind == "open_clip ResNet":  # its last stage is one patch
        tower = make(KINDS[kind], layer=3)
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        image_mean=list(tower.image_processor.config.mean),
        image_std=list(tower.image_processor.config.std),
    )
    config = LlavaNextConfig(
        vision_config=VlmVisionConfig.from_tower(tower),
        text_config=LlamaConfig(**LLM),
        image_token_index=IMAGE,
        image_grid_pinpoints=processor.image_grid_pinpoints,
        **llava_fields(tower),
    )
    torch.manual_seed(1)
    model = LlavaNextForConditionalGeneration(config)
    model.model.vision_tower = VlmVisionModel.from_tower(tower)
    inputs = dict(processor(Image.new("RGB", (60, 50), (200, 30, 60)), return_tensors="pt"))
    assert inputs["pixel_values"].shape[1] == 5  # the whole picture and four tiles
    side = tower.num_patches_per_side
    unpadded = side * 2 * 50 // 60  # rows of the four tiles that are picture
    rows = 2 * side - (2 * side - unpadded) // 2 * 2
    tokens = side**2 + rows * (2 * side + 1)  # each of these rows ends with a newline
    inputs["input_ids"] = torch.tensor([[7, *[IMAGE] * tokens, 8, 9]])
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.vision_tower.parameters())
    model.eval().save_pretrained(tmp_path)
    again, report = LlavaNextForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_dtype_follows_the_call_and_the_folder(tmp_path: Path) -> None:
    model = make_llava(make(TRANSFORMERS))
    batch = batch_of(model.model.vision_tower.tower)
    model.save_pretrained(tmp_path / "float32")
    half = LlavaForConditionalGeneration.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.vision_tower.tower.config.dtype == "bfloat16"
    half.save_pretrained(tmp_path / "bfloat16")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "bfloat16")
    assert again.model.vision_tower.tower.dtype == torch.bfloat16
    assert torch.equal(again(**batch).logits, half(**batch).logits)
    difference = worst(half(**batch).logits.float(), model(**batch).logits)
    assert 0 < difference < 0.05  # measured 4e-3
    random = AutoModel.from_config(VlmVisionConfig.from_tower(TRANSFORMERS), dtype=torch.float16)
    assert random.tower.dtype == torch.float16
    tower = make(TOWER, dtype="bfloat16")
    assert VlmVisionModel.from_tower(tower).config.dtype == torch.bfloat16
    assert tower.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_auto_model_gives_every_tensor_back(kind: str, tmp_path: Path) -> None:
    """Also those that no file holds, such as tables of positions: transformers empties them in loading."""
    tower = make(KINDS[kind])
    VlmVisionModel.from_tower(tower).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, VlmVisionModel)
    assert not any(report.values())
    assert not model.training
    theirs, ours = dict(model.tower.named_buffers()), dict(tower.named_buffers())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    pixels = torch.randn(1, 3, tower.image_size, tower.image_size)
    assert torch.equal(model.tower(pixels), tower(pixels))
    spread = AutoModel.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(spread.tower(pixels), tower(pixels))


@torch.no_grad()
def test_a_device_map_places_layers(tmp_path: Path) -> None:
    """As for a tower alone; transformers, whose map is for the model around it, keeps the tower whole."""
    tower, block = make(TOWER), "tower.backbone.visual.transformer.resblocks.0"
    batch, disk = batch_of(tower), tmp_path / "disk"
    VlmVisionModel.from_tower(tower).save_pretrained(tmp_path / "alone")
    device_map = {"tower": "cpu", block: "disk"}
    model = AutoModel.from_pretrained(tmp_path / "alone", device_map=device_map, offload_folder=disk)
    assert model.get_submodule(block).ln_1.weight.is_meta
    assert worst(model(batch["pixel_values"]).last_hidden_state[:, 1:], tower(batch["pixel_values"])) <= 1e-5
    llava = make_llava(tower)
    llava.save_pretrained(tmp_path / "llava")
    rest = {"model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    device_map = {"model.vision_tower": "cpu", "model.language_model": "disk", **rest}
    options = {"device_map": device_map, "offload_folder": disk}
    spread = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", **options)
    assert worst(spread(**batch).logits, llava(**batch).logits) <= 1e-5
    device_map["model.vision_tower"] = "disk"
    with pytest.raises(ConfigError, match="vision tower on the disk"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", **options)


def test_the_towers_with_unsaved_buffers_are_among_them() -> None:
    for kind in ("transformers CLIP", "timm ViT of patches"):
        tower = make(KINDS[kind])
        assert dict(tower.named_buffers()).keys() - tower.state_dict().keys()


def test_weights_are_kept_when_given_and_random_when_not() -> None:
    tower = make(TOWER)
    before = deepcopy(tower.state_dict())
    model = make_llava(tower)
    assert model.model.vision_tower.tower is tower
    model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    torch.manual_seed(5)
    random = AutoModel.from_config(VlmVisionConfig.from_tower(tower)).tower
    torch.manual_seed(5)
    again = load_tower(TOWER)  # the backbone's own way of drawing weights, not transformers'
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in random.state_dict().items())
    assert not torch.equal(random.backbone.visual.conv1.weight, tower.backbone.visual.conv1.weight)


def test_a_towers_own_folder_says_how_it_becomes_a_model(tmp_path: Path) -> None:
    load_tower(TOWER).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"take VlmVisionModel.from_tower\(load_tower\('"):
        VlmVisionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_are_missing_are_refused(whole: bool, tmp_path: Path) -> None:
    model: Any = make_llava(make(TOWER))
    if not whole:
        model = model.model.vision_tower
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if name.endswith("ln_pre.bias")]:
        del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing or misshapen: tower.backbone.visual.ln_pre.bias"):
        type(model).from_pretrained(tmp_path)


def test_a_config_is_complete_without_weights_or_a_network(tmp_path: Path) -> None:
    config = VlmVisionConfig.from_tower("open_clip:ViT-L-14-336-quickgelu@openai")
    facts = (config.hidden_size, config.image_size, config.patch_size, config.num_hidden_layers)
    assert facts == (1024, 336, 14, 24)
    assert config.num_held_layers == 23
    assert config.tower["backbone"]["weights"] is None  # they are the checkpoint's
    fused = VlmVisionConfig.from_tower(FUSED).tower["backbone"]["parts"]
    assert [part["backbone"]["weights"] for part in fused] == [None, None]
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, VlmVisionConfig)
    assert again.to_diff_dict() == config.to_diff_dict()
    short = AutoConfig.for_model("vlm_vision", tower=TOWER, dtype="float32")
    assert short.to_diff_dict() == VlmVisionConfig.from_tower(TOWER).to_diff_dict()
    nested = LlavaConfig(vision_config={"model_type": "vlm_vision", "tower": TOWER})
    assert nested.vision_config.hidden_size == 64


def test_a_place_that_the_tower_cannot_serve_is_refused() -> None:
    patches_only = make(RESNET)
    with pytest.raises(ConfigError, match="'default' drops token 0, which is a patch"):
        make_llava(patches_only, vision_feature_select_strategy="default")
    with pytest.raises(
        ConfigError, match=r"vision_feature_layer -2 has \[128\] channels, hidden_size is 256"
    ):
        make_llava(patches_only, vision_feature_layer=-2)
    tower = make(TOWER)
    with pytest.raises(
        ConfigError, match=r"layer -1 is not held: this tower was built up to layer 2 of 3 \(-2"
    ):
        make_llava(tower, vision_feature_layer=-1)
    with pytest.raises(ConfigError, match="layer 0 is out of range"):
        make_llava(tower, vision_feature_layer=0)
    model = make_llava(tower)
    with pytest.raises(ConfigError, match="vision_config is not this tower's"):
        model.model.vision_tower = VlmVisionModel.from_tower(make(TRANSFORMERS))
    with pytest.raises(ConfigError, match="a LLaVA of transformers reads patches"):
        llava_fields(make(TOWER, select="cls"))
    with pytest.raises(ConfigError, match="has no tower"):
        VlmVisionModel(VlmVisionConfig())
    with pytest.raises(ConfigError, match=r"does not fit its tower, which has \{'hidden_size': 64"):
        VlmVisionModel(VlmVisionConfig(**{**model.config.vision_config.to_dict(), "hidden_size": 65}))


def test_a_call_that_the_tower_cannot_serve_is_refused() -> None:
    model = VlmVisionModel.from_tower(make(TOWER))
    pixels = torch.randn(1, 3, 32, 32)
    for layer, message in ((-1, "not held"), ([1, 3], "not held"), (7, "out of range"), (0, "out of range")):
        with pytest.raises(ConfigError, match=message):
            model(pixels, output_hidden_states=layer)
    for wrong in (torch.randn(1, 3, 40, 40), pixels[0], pixels[:, :1]):
        with pytest.raises(ConfigError, match=r"this tower takes \[B, 3, 32, 32\]"):
            model(wrong)
    with pytest.raises(ConfigError, match="must be multiples of 8 pixels"):
        model(torch.randn(1, 3, 40, 44), interpolate_pos_encoding=True)


def test_outputs_are_those_of_a_model_of_transformers() -> None:
    model = VlmVisionModel.from_tower(make(TOWER))
    pixels = torch.randn(1, 3, 32, 32)
    plain = model(pixels)
    assert plain.hidden_states is None
    assert plain.pooler_output is None  # the head was freed
    assert torch.equal(model(pixels, return_dict=False)[0], plain.last_hidden_state)
    model.config.output_hidden_states = True
    states = model(pixels).hidden_states
    assert [state is None for state in states] == [True, False, False, True]


@torch.no_grad()
def test_backbone_gives_the_maps_of_transformers_dinov2_backbone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    stages = ["stage1", "stage3"]
    theirs = Dinov2Backbone(
        Dinov2Config(**DINOV2, out_features=stages, apply_layernorm=False, layerscale_value=0.5)
    ).eval()
    theirs.save_pretrained(tmp_path / "dinov2")
    tower = load_tower(
        {
            "backbone": {
                "name": "transformers",
                "model": str(tmp_path / "dinov2"),
                "preprocess": {"image_size": 32},
            }
        },
        layer=-1,
    )
    model = VlmVisionBackbone.from_tower(tower, out_features=stages)
    assert (model.out_features, model.out_indices, model.channels) == (stages, [1, 3], [32, 32])
    pixels = torch.randn(2, 3, 32, 32)
    expected = theirs(pixels).feature_maps
    maps = model(pixels).feature_maps
    assert maps[0].shape == (2, 32, 4, 4)
    assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))
    model.save_pretrained(tmp_path / "ours")
    other = VlmVisionBackbone.from_pretrained(tmp_path / "ours", out_indices=[2])
    assert other.out_features == ["stage2"]
    assert len(other(pixels).feature_maps) == 1


@torch.no_grad()
def test_backbone_gives_the_stages_of_a_resnet() -> None:
    tower = make(RESNET)
    model = AutoBackbone.from_config(
        VlmVisionConfig.from_tower(tower, out_features=["stage2", "stage5"])
    ).eval()
    model.load_state_dict(VlmVisionModel.from_tower(tower).state_dict())
    output = model(torch.randn(1, 3, 32, 32), output_hidden_states=True)
    assert [tuple(found.shape[1:]) for found in output.feature_maps] == [(32, 8, 8), (256, 1, 1)]
    assert model.channels == [32, 256]
    assert [None if state is None else state.shape[1] for state in output.hidden_states] == [
        None,
        64,
        64,
        16,
        4,
        1,
    ]
    assert VlmVisionBackbone.from_tower(make(TOWER)).out_features == ["stage2"]  # the deepest that is held
    for stage, message in (("stage3", "not held"), ("stem", "out of range")):
        with pytest.raises(ConfigError, match=message):
            VlmVisionBackbone.from_tower(make(TOWER), out_features=[stage])


def picture(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (37, 45, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def test_image_processor_makes_the_towers_own_pixels(tmp_path: Path) -> None:
    tower = make(TOWER)
    processor = VlmVisionImageProcessor.from_tower(tower)
    expected = tower.image_processor(picture())
    path = tmp_path / "picture.png"
    picture().save(path)
    values = np.asarray(picture())
    for image in (
        picture(),
        [picture()],
        [[picture()]],
        path,
        str(path),
        values,
        values.transpose(2, 0, 1),
        torch.from_numpy(values.copy()),
        values[None],
    ):
        output = processor(images=image, return_tensors="pt")
        assert torch.equal(output.pixel_values, expected)
    assert isinstance(processor.preprocess(picture()).pixel_values, list)
    clear = picture("RGBA")
    clear.putalpha(100)
    assert torch.equal(processor(clear, return_tensors="pt").pixel_values, tower.image_processor(clear))
    with pytest.raises(DataError, match="its scale is not known"):
        processor(values / 255)
    with pytest.raises(ConfigError, match="do_resize=False: a tower's pixels are made in one way"):
        processor(picture(), do_resize=False)
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(again, VlmVisionImageProcessor)
    assert again.to_dict() == processor.to_dict()
    assert torch.equal(again(picture(), return_tensors="pt").pixel_values, expected)
    with pytest.raises(ConfigError, match=r"image_mean=\[0.5, 0.5, 0.5\]"):
        AutoImageProcessor.from_pretrained(tmp_path, image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(ConfigError, match="no `vlm_vision` settings"):
        VlmVisionImageProcessor()
    tower.save_pretrained(tmp_path / "tower")
    own = VlmVisionImageProcessor.from_pretrained(tmp_path / "tower")
    assert torch.equal(own(picture(), return_tensors="pt").pixel_values, expected)


@torch.no_grad()
def test_llava_processor_takes_the_image_processor(tmp_path: Path) -> None:
    tower = make(TOWER)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    fields = llava_fields(tower)
    processor = LlavaProcessor(
        VlmVisionImageProcessor.from_tower(tower),
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=fields["vision_feature_select_strategy"],
        num_additional_image_tokens=1,
    )
    model = make_llava(tower, image_token_index=processor.image_token_id)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    for one in (processor, again):
        inputs = one(images=picture(), text="what is <image> ?", return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], tower.image_processor(picture()))
        assert (inputs["input_ids"] == processor.image_token_id).sum() == tower.num_patches
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_an_older_transformers_is_refused_by_name() -> None:
    code = (
        "import sys; sys.modules['transformers.backbone_utils'] = None\n"
        "import vlm_vision.integrations.transformers"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtraError: vlm_vision.integrations.transformers needs transformers >= 5" in result.stderr


def test_pictures_that_keep_their_shapes_are_not_for_a_llava() -> None:
    settings = {"model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 8, "hidden_size": 32}
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone = {"name": "transformers", "architecture": {**settings, **sizes}, "weights": "none"}
    tower = load_tower({"backbone": backbone})
    with pytest.raises(ConfigError, match=r"a LLaVA of transformers: pictures must be of one size"):
        llava_fields(tower)
    processor = VlmVisionImageProcessor.from_tower(tower)
    pictures = [Image.new("RGB", (64, 64)), Image.new("RGB", (128, 64))]
    assert [len(tower(pixels[None])[0]) for pixels in processor(pictures)["pixel_values"]] == [16, 15]
    with pytest.raises(ConfigError, match="return_tensors: pictures must be of one size"):
        processor(pictures, return_tensors="pt")
