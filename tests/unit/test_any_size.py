"""Pictures of other sizes than the native one, call by call, for trunks of every kind."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pins import needs_new_torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from vlm_vision import VisionTower, load_tower
from vlm_vision.adapters.lora import add_lora, merge_lora
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.backbones import timm as ours
from vlm_vision.cli import main
from vlm_vision.device_map import place
from vlm_vision.errors import ConfigError
from vlm_vision.testing import check_tower

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "num_heads": 2, "embed_dim": 32}
SWIN: dict[str, Any] = {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}
STAGES: dict[str, Any] = {"img_size": 64, "embed_dim": (32,) * 4, "depths": (1,) * 4}
# A model of timm, made small, and the step of its sizes.
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": ("vit_tiny_patch16_224", VIT, 8),
    "ViT, a margin dropped": ("vit_tiny_patch16_224", {**VIT, "img_size": 34}, 8),
    "EVA02": ("eva02_tiny_patch14_224", VIT, 8),
    "PE": ("vit_pe_core_tiny_patch16_384", VIT, 8),
    "rotary": ("vit_small_patch16_rope_224", VIT, 8),
    "rotary, mixed": ("vit_small_patch16_rope_mixed_224", VIT, 8),
    "DINOv3": ("vit_small_patch16_dinov3", VIT, 8),
    "BEiT": ("beit_base_patch16_224", VIT, 8),
    "relative": ("vit_relpos_small_patch16_224", VIT, 8),
    "relative, shared": ("vit_srelpos_small_patch16_224", VIT, 8),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, 8),
    "Swin V2": ("swinv2_tiny_window8_256", {**SWIN, "img_size": 64}, 8),
    "Swin V2 CR": ("swinv2_cr_tiny_224", {**SWIN, "window_size": 7}, 8),
    "MaxViT": ("maxvit_tiny_tf_224", STAGES, 32),
    "CoAtNet": ("test_coatnet", {"img_size": 64}, 32),
    "ConvNeXt": ("test_convnext", {}, 32),
}
KINDS = {kind: parts for kind, parts in KINDS.items() if timm.is_model(parts[0])}


def name_of(kind: str) -> str:
    return "small_" + kind.lower().replace(",", "").replace(" ", "_")


def register(kind: str) -> None:
    """Make a small model one of timm's, by a name of its own."""
    base, made_small, _ = KINDS[kind]

    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        model: Any = timm.create_model(base, pretrained=False, **{**made_small, **arguments})
        side = made_small.get("img_size", 160)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
        return model

    build.__name__ = name_of(kind)
    timm.models.register_model(build)


for _kind in KINDS:
    register(_kind)


@cache
def loaded(kind: str) -> VisionTower:
    """The same weights every time, none of them zero as timm has biases of positions at first."""
    torch.manual_seed(0)
    tower = load_tower(f"timm:{name_of(kind)}@none", pooled_head=True)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def tower_of(kind: str, **changes: Any) -> VisionTower:
    """A tower of its own, with settings changed as if at load."""
    return like(loaded(kind), **changes)


def like(tower: VisionTower, **changes: Any) -> VisionTower:
    config = tower.config.model_copy(update=changes)
    return VisionTower(config, copy.deepcopy(tower.backbone)).eval()


def native(tower: VisionTower) -> tuple[int, int]:
    settings = tower.backbone.info.preprocess
    return settings.height, settings.width


def sizes_of(tower: VisionTower) -> list[tuple[int, int]]:
    """Wider, and smaller."""
    step = tower.backbone.info.size_step
    assert step is not None
    rows, columns = (side // step for side in native(tower))
    return [((rows + 1) * step, (columns + 3) * step), (step, columns * step)]


# Exactness -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_per_call_is_that_size_at_load_to_the_bit(kind: str) -> None:
    tower = tower_of(kind)
    assert tower.backbone.info.size_step == KINDS[kind][2]
    for size in sizes_of(tower):
        pixels, other = torch.randn(2, 3, *size), like(tower, image_size=size)
        assert torch.equal(tower(pixels, interpolate=True), other(pixels))
        assert torch.equal(tower.pooled(pixels, interpolate=True), other.pooled(pixels))
    # Per call what is resampled is in half precision already, at load not yet.
    half, exact = tower.bfloat16()(pixels, interpolate=True), other.bfloat16()(pixels)
    assert half.dtype is torch.bfloat16
    assert float((half - exact).abs().max() / exact.abs().max()) <= 0.05  # measured 9e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_per_call_is_what_timm_gives_at_it(kind: str) -> None:
    """timm's own model, set to the size by timm or, where it follows sizes, as it is."""
    tower = tower_of(kind, layer=-1)
    theirs: Any = timm.create_model(name_of(kind), num_classes=0).eval()
    theirs.load_state_dict(tower.backbone.model.state_dict())  # type: ignore[union-attr]
    size = sizes_of(tower)[0]
    if hasattr(theirs, "set_input_size"):
        theirs.set_input_size(img_size=size)
    pixels = torch.randn(1, 3, *size)
    expected = theirs.forward_intermediates(pixels, indices=1, intermediates_only=True)[0]
    assert torch.equal(tower(pixels, interpolate=True), expected.flatten(2).mT)
    assert torch.equal(tower.pooled(pixels, interpolate=True), theirs(pixels))


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in ("EVA02", "PE", "BEiT", "DINOv3") if kind in KINDS])
def test_a_size_per_call_is_what_timm_builds_and_loads_at_it(kind: str) -> None:
    """timm's own model, built at the size, with its converter of checkpoints."""
    tower = tower_of(kind, layer=-1)
    size = sizes_of(tower)[0]
    theirs: Any = timm.create_model(name_of(kind), num_classes=0, img_size=size).eval()
    convert = import_module(type(theirs).__module__).checkpoint_filter_fn
    theirs.load_state_dict(convert(tower.backbone.model.state_dict(), theirs))  # type: ignore[union-attr]
    pixels = torch.randn(1, 3, *size)
    worst = (tower.pooled(pixels, interpolate=True) - theirs(pixels)).abs().max()
    assert float(worst) <= 1e-6  # measured 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_native_size_runs_through_the_trunk_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tower_of(kind)
    pixels, other = torch.randn(2, 3, *native(tower)), torch.randn(1, 3, *sizes_of(tower)[0])
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    features = tower(pixels)
    tower(other, interpolate=True)
    assert torch.equal(tower(pixels), features)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in tower.named_buffers())
    monkeypatch.delattr(ours, "set_to_size")
    assert torch.equal(tower(pixels, interpolate=True), features)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViT", "PE", "Swin"])
def test_towers_that_hold_no_more_than_they_need_take_other_sizes(kind: str) -> None:
    tower = tower_of(kind, pooled_head=False, layer=1)
    first, second = sizes_of(tower)
    resized = tower_of(kind, pooled_head=False, layer=1, image_size=first)
    pixels = torch.randn(1, 3, *first)
    assert torch.equal(tower(pixels, interpolate=True), resized(pixels))
    # From a size that was not the weights' first to another.
    pixels = torch.randn(1, 3, *second)
    assert torch.equal(resized(pixels, interpolate=True), like(resized, image_size=second)(pixels))


@pytest.mark.parametrize("kind", ["ViT, a margin dropped", "EVA02", "relative, shared", "Swin", "CoAtNet"])
def test_every_kind_keeps_the_contract(kind: str) -> None:
    check_tower(tower_of(kind))


# What a tower goes through between calls -------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in ("PE", "BEiT", "relative", "Swin V2") if kind in KINDS])
def test_new_weights_are_what_other_sizes_run_with(kind: str) -> None:
    tower = tower_of(kind)
    size = sizes_of(tower)[0]
    pixels = torch.randn(1, 3, *size)
    first = tower(pixels, interpolate=True)
    tower.load_state_dict({name: value * 0.5 for name, value in tower.state_dict().items()})
    second = tower(pixels, interpolate=True)
    assert not torch.equal(second, first)
    assert torch.equal(second, like(tower, image_size=size)(pixels))
    for parameter in tower.parameters():
        parameter.data.mul_(0.9)  # as optimizers with a master copy do, which no version counter tells
    assert torch.equal(tower(pixels, interpolate=True), like(tower, image_size=size)(pixels))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["EVA02", "Swin"])
def test_hooks_take_part(kind: str) -> None:
    tower, seen = tower_of(kind), list[int]()
    pixels = torch.randn(1, 3, *sizes_of(tower)[0])
    handle = tower.backbone.layer_modules()[0].register_forward_hook(lambda *_: seen.append(1))
    tower(pixels, interpolate=True)
    handle.remove()
    tower(pixels, interpolate=True)
    assert seen == [1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["EVA02", "Swin"])
def test_adapters_take_part(kind: str) -> None:
    pytest.importorskip("peft", minversion="0.17")
    tower = tower_of(kind)
    pixels = torch.randn(1, 3, *sizes_of(tower)[0])
    plain = tower(pixels, interpolate=True)
    add_lora(tower, [name for name, _ in tower.named_parameters() if "mlp" in name], LoraConfig(rank=2))
    for name, parameter in tower.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)
    adapted = tower(pixels, interpolate=True)
    assert not torch.allclose(adapted, plain)
    merge_lora(tower)
    assert float((tower(pixels, interpolate=True) - adapted).abs().max()) <= 1e-4


@torch.no_grad()
def test_layers_may_wait_on_the_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    own, spread, windowed = tower_of("EVA02"), tower_of("EVA02"), tower_of("Swin")
    place(spread, {"": "cpu", "backbone.model.blocks.0": "disk"}, offload_folder=tmp_path)
    place(windowed, {"": "cpu", "backbone.model.layers.0": "disk"}, offload_folder=tmp_path)
    pixels = torch.randn(1, 3, *sizes_of(own)[0])
    assert torch.equal(spread(pixels, interpolate=True), own(pixels, interpolate=True))
    with pytest.raises(ConfigError, match="relative_position_bias_table waits on the CPU or the disk"):
        windowed(torch.randn(1, 3, *sizes_of(windowed)[0]), interpolate=True)


@torch.no_grad()
def test_threads_do_not_see_each_others_sizes() -> None:
    tower = tower_of("Swin")
    batches = [torch.randn(1, 3, *size) for size in (*sizes_of(tower), native(tower))] * 4
    expected = [tower(batch, interpolate=True) for batch in batches]

    def run(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return tower(batch, interpolate=True)

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, batches), expected))


@needs_new_torch
@torch.no_grad()
def test_a_compiled_tower_takes_other_sizes() -> None:
    tower = tower_of("EVA02")
    compiled = torch.compile(tower, backend="eager")
    for size in (*sizes_of(tower), native(tower)):
        pixels = torch.randn(1, 3, *size)
        assert torch.equal(compiled(pixels, interpolate=True), tower(pixels, interpolate=True))


# Learning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_other_sizes_reach_the_native_positions(kind: str) -> None:
    """Each against a difference quotient along a random direction; timm resamples in float32."""
    tower = tower_of(kind, layer=-1, pooled_head=False).double()
    pixels = torch.randn(1, 3, *sizes_of(tower)[0]).double()

    def loss() -> Tensor:
        features = tower(pixels, interpolate=True)
        return mse_loss(features, torch.ones_like(features))

    loss().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []
    for name, parameter in tower.named_parameters():
        if name.endswith(("pos_embed", "bias_table", "freqs")):
            assert parameter.grad is not None
            direction, step = torch.randn_like(parameter), 1e-3
            with torch.no_grad():
                parameter.add_(step * direction)
                above = loss()
                parameter.sub_(2 * step * direction)
                slope = (above - loss()) / (2 * step)
                parameter.add_(step * direction)
                found = (parameter.grad * direction).sum()
            assert float((slope - found).abs()) <= 1e-3 * float(found.abs()) + 1e-7, name  # measured 4e-5


@pytest.mark.parametrize("kind", [kind for kind in ("PE", "BEiT", "Swin") if kind in KINDS])
def test_activations_are_stored_or_not_with_the_same_gradients(kind: str) -> None:
    gradients = []
    for enabled in (False, True):
        tower = tower_of(kind, pooled_head=False).train()
        tower.checkpoint_activations(enabled)
        torch.manual_seed(1)
        features = tower(torch.randn(1, 3, *sizes_of(tower)[0]), interpolate=True)
        mse_loss(features, torch.ones_like(features)).backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


# What is refused, and what is said -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (f"timm:{name_of('Swin')}", "multiples of 8 pixels, per call or at load"),
        (f"timm:{name_of('ViT, a margin dropped')}", "multiples of 8 pixels, per call or at load"),
        ("timm:inception_v3", "at load only"),
        ("timm:mixer_s32_224", "none"),
    ],
)
def test_towers_show_says_which_sizes(source: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["towers", "show", source]) == 0
    assert f"other sizes    {said}\n" in capsys.readouterr().out


def test_sizes_that_cannot_be_taken_say_so() -> None:
    with pytest.raises(ConfigError, match="both sides must be multiples of 8 pixels"):
        tower_of("BEiT")(torch.zeros(1, 3, 36, 32), interpolate=True)
    with pytest.raises(ConfigError, match="interpolate=True takes other sizes"):
        tower_of("BEiT")(torch.zeros(1, 3, 40, 32))
    mixer = load_tower("timm:mixer_s32_224@none", layer=1)
    with pytest.raises(ConfigError, match="its backbone takes no other size"):
        mixer(torch.zeros(1, 3, 256, 256), interpolate=True)


def test_positions_that_would_learn_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tower, pixels = tower_of("BEiT"), torch.zeros(1, 3, 40, 32)
    monkeypatch.setattr(ours._WithGraph, "of", lambda *_: None)  # as if timm copied what it resampled
    with pytest.raises(ConfigError, match="bias_table learns, and timm resamples it without a gradient"):
        tower(pixels, interpolate=True)
    tower.train_only("nothing")
    assert tower(pixels, interpolate=True).isfinite().all()


def test_a_size_that_timm_refuses_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tower_of("Swin")

    def refuse(**size: Any) -> None:
        raise AssertionError("window does not fit")

    monkeypatch.setattr(type(tower.backbone.trunk), "set_input_size", lambda _, **size: refuse(**size))
    with pytest.raises(ConfigError, match="pixels of 64x80: timm:small_swin does not take them: window does"):
        tower(torch.zeros(1, 3, 64, 80), interpolate=True)
