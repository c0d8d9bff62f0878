"""What users do to a tower beside calling it: other sizes, lists of layers, compiling, training parts."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from PIL import Image
from pins import needs_new_torch
from tiny import CLIP_VISION, RESNET, TOWER, tiny_tower
from torch import Tensor, nn

from vlm_vision import VisionTower, load_tower
from vlm_vision.errors import ConfigError
from vlm_vision.features import resolve_layers
from vlm_vision.tower import describe_tower

FAMILIES: dict[str, dict[str, Any]] = {
    "native ViT": TOWER,
    "ModifiedResNet": RESNET,
    "timm ViT": {"backbone": "timm:test_vit@none"},
    "timm ConvNeXt": {"backbone": "timm:test_convnext@none"},
    "CLIP of transformers": {
        "backbone": {
            "name": "transformers",
            "architecture": {"model_type": "clip_vision_model", **CLIP_VISION},
            "weights": "none",
        }
    },
}


GENERIC: dict[str, Any] = {
    "backbone": {
        "name": "transformers",
        "architecture": {"model_type": "vit", **CLIP_VISION},
        "weights": "none",
    }
}


def tower_of(family: str, **overrides: Any) -> VisionTower:
    torch.manual_seed(0)
    return load_tower({**{**FAMILIES, "any of transformers": GENERIC}[family], **overrides})


def pixels_for(tower: VisionTower, count: int = 2) -> Tensor:
    settings = tower.image_processor.config
    return torch.randn(count, 3, settings.height, settings.width)


# Layers ----------------------------------------------------------------------------------------------------


def test_llava_nexts_lists_are_its_layers() -> None:
    """Of `hidden_states` of a 24-layer CLIP, in LLaVA-NeXT's clip_encoder.py with select layer -2."""
    assert resolve_layers("slicefour", 24, -2) == (4, 10, 16, 22)
    assert resolve_layers("slice_m25811_f6", 24, -2) == (23, 20, 17, 14, 6)
    with pytest.raises(ConfigError, match=r"layer -5 \(of 'slice_m25811_f6'\) is out of range"):
        resolve_layers("slice_m25811_f6", 4, -2)
    with pytest.raises(ConfigError, match="out of range"):
        resolve_layers("slicefour", 7, -2)  # its first would be the embeddings


@torch.no_grad()
def test_a_list_of_layers_is_their_features_side_by_side() -> None:
    pixels = torch.randn(1, 3, 32, 32)
    tower = tiny_tower(layer=[3, 1])
    assert tower.hidden_size == 128
    parts = [tiny_tower(layer=layer)(pixels) for layer in (3, 1)]
    assert torch.equal(tower(pixels), torch.cat(parts, dim=-1))


@torch.no_grad()
def test_the_pooled_head_as_one_token() -> None:
    tower = tiny_tower(select="pooled")
    pixels = torch.randn(2, 3, 32, 32)
    assert (tower.hidden_size, tower.num_tokens) == (32, 1)
    assert torch.equal(tower(pixels), tower.pooled(pixels)[:, None])
    assert torch.equal(tower(pixels), tiny_tower(pooled_head=True).pooled(pixels)[:, None])


@pytest.mark.parametrize(
    ("model", "prefix_tokens", "registers"),
    [
        ("test_vit", 1, 0),
        ("test_vit4", 1, 1),
        ("test_vit_relpos", 0, 0),
        ("test_convnext", 0, 0),
        ("vit_small_patch14_reg4_dinov2", 5, 4),
        ("deit_tiny_distilled_patch16_224", 2, 1),
        ("vit_small_patch16_dinov3", 5, 4),
        ("vit_mediumd_patch16_rope_reg1_gap_256", 1, 1),
    ],
)
def test_a_register_is_told_from_a_class_token(model: str, prefix_tokens: int, registers: int) -> None:
    tower = describe_tower(f"timm:{model}@none")
    info = tower.backbone.info
    assert (info.prefix_tokens, info.registers) == (prefix_tokens, registers)
    if info.has_class_token:
        assert describe_tower(f"timm:{model}@none", select="cls").num_tokens == 1
        return
    for select in ("cls", "cls_patch"):
        with pytest.raises(ConfigError, match="no class token; use select 'patch'"):
            describe_tower(f"timm:{model}@none", select=select)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_past_the_deepest_are_not_held(family: str) -> None:
    whole, first = tower_of(family, pooled_head=True), tower_of(family, layer=1)
    assert first.num_parameters < whole.num_parameters
    assert len(first.backbone.layer_modules()) <= 1


# Sizes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [48, (32, 64), (24, 16)])
def test_positions_are_resampled_as_open_clip_does_at_load(size: int | tuple[int, int]) -> None:
    tower = tiny_tower()
    architecture = copy.deepcopy(TOWER["backbone"]["architecture"])  # type: ignore[index]
    architecture["vision_cfg"]["image_size"] = size
    theirs = open_clip.model.CLIP(**{**architecture, "text_cfg": architecture["text_cfg"]}).eval()
    state = {f"visual.{name}": value for name, value in tower.backbone.visual.state_dict().items()}  # type: ignore[union-attr,operator]
    resize_pos_embed(state, theirs)
    theirs.load_state_dict(state, strict=False)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(2, 3, height, width)
    last = len(tower.layers) and tower.layers[0] - 1
    own = theirs.visual.forward_intermediates(pixels, indices=[last], output_fmt="NLC")
    for found in (tower(pixels, interpolate=True), tiny_tower(image_size=size)(pixels)):
        assert float((found - own["image_intermediates"][0]).abs().max()) <= 1e-5  # measured 7e-7


@torch.no_grad()
@pytest.mark.parametrize("family", ["native ViT", "timm ViT", "timm ConvNeXt", "ModifiedResNet"])
def test_a_size_at_load_is_the_same_size_per_call(family: str) -> None:
    tower = tower_of(family, pooled_head=True)
    settings, step = tower.image_processor.config, tower.backbone.info.size_step
    assert step is not None
    size = (settings.height + step, settings.width + 2 * step)
    other = tower_of(family, pooled_head=True, image_size=size)
    assert other.image_size == size
    assert other.grid == (tower.grid[0] + 1, tower.grid[1] + 2)
    pixels = pixels_for(other)
    assert torch.equal(other(pixels), tower(pixels, interpolate=True))
    assert torch.equal(other.pooled(pixels), tower.pooled(pixels, interpolate=True))
    picture = Image.new("RGB", (50, 40), (10, 200, 30))
    assert other.image_processor(picture).shape == (1, 3, *size)


@torch.no_grad()
def test_a_resized_tower_is_saved_and_loaded_at_its_size(tmp_path: Any) -> None:
    for number, family in enumerate(("native ViT", "timm ViT")):
        tower = tower_of(family, image_size=64)
        tower.save_pretrained(tmp_path / str(number))
        again = VisionTower.from_pretrained(tmp_path / str(number))
        assert again.image_size == 64
        pixels = pixels_for(again)
        assert torch.equal(again(pixels), tower(pixels))
        larger = VisionTower.from_pretrained(tmp_path / str(number), image_size=96)
        assert larger.grid[0] * 2 == again.grid[0] * 3


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (Image.new("RGB", (32, 32)), "Image"),
        ([Image.new("RGB", (32, 32))], "list of Image"),
        ("photo.jpg", "str"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32)}, "dict"),
        (None, "NoneType"),
    ],
)
def test_pictures_in_the_place_of_pixels_say_so(pixels: Any, kind: str) -> None:
    tower = tiny_tower(pooled_head=True)
    for run in (tower, tower.pooled):
        with pytest.raises(ConfigError, match=rf"not a {kind}; tower.image_processor\(pictures\) makes"):
            run(pixels)


def test_no_pixels_at_all_say_so() -> None:
    tower = tiny_tower(pooled_head=True)
    for run in (tower, tower.pooled):
        with pytest.raises(ConfigError, match="no pixels were given"):
            run([])


def test_sizes_that_cannot_be_taken_say_so() -> None:
    with pytest.raises(ConfigError, match="both sides must be multiples of 8"):
        tiny_tower(image_size=33)
    with pytest.raises(ConfigError, match="both sides must be multiples of 8"):
        tiny_tower()(torch.zeros(1, 3, 36, 32), interpolate=True)
    with pytest.raises(ConfigError, match="interpolate=True takes other sizes"):
        tiny_tower()(torch.zeros(1, 3, 40, 32))


# Ways to run -----------------------------------------------------------------------------------------------


@needs_new_torch
@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "any of transformers"])
def test_compiles_as_one_graph(family: str) -> None:
    tower = tower_of(family)
    pixels = pixels_for(tower)
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    assert float((compiled(pixels) - tower(pixels)).abs().max()) <= 1e-4  # measured 1e-5, ConvNeXt


@needs_new_torch
@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "any of transformers"])
def test_exports(family: str) -> None:
    """For batches of any size; and the tower runs on as it was."""
    tower = tower_of(family)
    pixels = pixels_for(tower)
    before = tower(pixels)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(tower, (pixels,), dynamic_shapes={"pixels": batch}).module()
    assert torch.equal(tower(pixels), before)
    more = pixels_for(tower, count=5)
    assert float((program(more) - tower(more)).abs().max()) <= 1e-4  # measured 1e-5, ConvNeXt


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_under_autocast(family: str) -> None:
    tower = tower_of(family)
    pixels = pixels_for(tower)
    with torch.autocast("cpu", torch.bfloat16):
        features = tower(pixels)
        features.float().square().mean().backward()
    assert features.isfinite().all()
    exact = tower(pixels)
    assert float((features - exact).detach().abs().max() / exact.abs().max()) <= 0.1  # measured 0.03
    assert all(parameter.grad is not None for parameter in tower.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["flash", "efficient", "math"])
def test_attention_kernels_agree(kernel: str) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    if kernel == "efficient":
        with pytest.raises(ConfigError, match="attention 'efficient'"):
            tiny_tower(attention=kernel)(pixels)
        return
    found, own = tiny_tower(attention=kernel)(pixels), tiny_tower()(pixels)
    assert float((found - own).abs().max()) <= 1e-5  # measured 5e-7


@pytest.mark.parametrize("family", ["native ViT", "CLIP of transformers"])
def test_inference_without_overhead_is_the_modules_own_arithmetic(family: str) -> None:
    tower = tower_of(family, layer=[1, 2])
    pixels = pixels_for(tower)
    with torch.no_grad():
        lean = tower(pixels)
    through_modules = tower(pixels)
    assert through_modules.requires_grad
    assert float((lean - through_modules).abs().max()) <= 1e-5  # measured 4e-7


def test_hooks_on_blocks_are_run() -> None:
    tower, seen = tiny_tower(), []
    tower.backbone.layer_modules()[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        tower(torch.randn(1, 3, 32, 32))
    assert seen == [1]


# Learning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_activations_give_the_same_gradients(family: str) -> None:
    gradients = []
    for enabled in (False, True):
        tower = tower_of(family).train()
        for module in tower.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        tower.checkpoint_activations(enabled)
        torch.manual_seed(1)
        tower(pixels_for(tower)).square().mean().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_parts_of_a_tower_learn() -> None:
    tower = tiny_tower(layer=-1)
    tower.train_only(1)
    learning = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(".resblocks.2." in name for name in learning)
    tower(torch.randn(1, 3, 32, 32)).square().mean().backward()
    assert all(tower.get_parameter(name).grad is not None for name in learning)
    tower.train_only("everything")
    assert all(parameter.requires_grad for parameter in tower.parameters())
    tower.train_only("nothing")
    assert not tower(torch.randn(1, 3, 32, 32)).requires_grad
    with pytest.raises(ConfigError, match="last 4 layers: this tower has 3"):
        tower.train_only(4)
    for part in ("all", None, True, 0):
        with pytest.raises(
            ConfigError, match=r"train_only takes 'nothing', 'everything' or a number of layers"
        ):
            tower.train_only(part)  # type: ignore[arg-type]
