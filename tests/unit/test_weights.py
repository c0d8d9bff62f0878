"""Reading and loading weights."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import CLIP_VISION, TOWER
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm_vision import load_dual_encoder, load_tower
from vlm_vision.backbones.open_clip import build_visual
from vlm_vision.errors import WeightsError
from vlm_vision.layouts import convert
from vlm_vision.weights import read_state_dict, without_init


def through_data() -> nn.Module:
    """As models of older libraries are filled, and timm's."""
    linear = nn.Linear(4, 4)
    nn.init.trunc_normal_(linear.weight)  # draws until all fit
    linear.weight.data.normal_()
    linear.bias.data.uniform_(-1, 1)
    return linear


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(8, 8),
        lambda: CLIPVisionModel(CLIPVisionConfig(**CLIP_VISION)),
        lambda: build_visual(TOWER["backbone"]["architecture"]),
        through_data,
    ],
    ids=["torch", "transformers", "open_clip", "through .data"],
)
def test_without_init_fills_nothing_with_random_numbers(build: Callable[[], nn.Module]) -> None:
    """A 7B model takes minutes to fill with numbers that a file replaces."""
    with Fills() as fills, without_init():
        model = build()
    assert fills.names == []
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    with Fills() as fills:
        build()
    assert fills.names


@pytest.mark.parametrize(
    "name", ["open_clip:PE-Core-T-16-384", "open_clip:ViTamin-S", "timm:vit_small_patch16_rope_224"]
)
def test_models_that_compute_while_they_are_built_load_from_a_file(name: str, tmp_path: Path) -> None:
    """Rotary positions, and a trunk that runs to learn its shapes."""
    tower = load_tower(f"{name}@none", pooled_head=True)
    prefix = "backbone." if name.startswith("open_clip") else "backbone.model."
    state = {key.removeprefix(prefix): tensor for key, tensor in tower.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    again = load_tower(f"{name}@{tmp_path / 'model.safetensors'}", pooled_head=True)
    assert again.backbone.info == replace(tower.backbone.info, preprocess=again.backbone.info.preprocess)
    pixels = torch.randn(1, 3, again.image_processor.config.height, again.image_processor.config.width)
    with torch.no_grad():
        assert torch.equal(again(pixels), tower(pixels))
        again.save_pretrained(tmp_path / "tower")
        assert torch.equal(load_tower(tmp_path / "tower")(pixels), tower(pixels))


class Scripted(nn.Module):
    """Modules that hold given tensors under their names, for `torch.jit.script`."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            first, _, rest = name.partition(".")
            if rest:
                children.setdefault(first, {})[rest] = tensor
            elif tensor.is_floating_point():
                setattr(self, first, nn.Parameter(tensor))
            else:
                self.register_buffer(first, tensor)
        for first, below in children.items():
            self.add_module(first, Scripted(below))
        self.scratch = torch.zeros(2)  # neither a parameter nor a buffer: no part of the weights

    def forward(self, value: Tensor) -> Tensor:
        return value


def openai_archive(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A tiny CLIP in OpenAI's layout, scripted as OpenAI publishes its own."""
    torch.manual_seed(0)
    model = load_dual_encoder(TOWER)
    state = {
        name.replace("tower.backbone.", ""): tensor.to(dtype) for name, tensor in model.state_dict().items()
    }
    state = convert(state, "openai", quick_gelu=True)
    torch.jit.save(torch.jit.script(Scripted(state)), path)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_openais_own_archives_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    state = openai_archive(tmp_path / "clip.pt", dtype)
    found = read_state_dict(tmp_path / "clip.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    backbone = {**TOWER["backbone"], "weights": str(tmp_path / "clip.pt")}
    with pytest.raises(WeightsError, match="were trained with QuickGELU"):
        load_tower({"backbone": backbone})
    architecture = {**TOWER["backbone"]["architecture"], "quick_gelu": True}
    tower = load_tower({"backbone": {**backbone, "architecture": architecture}})
    assert torch.equal(tower.backbone.visual.conv1.weight, state["visual.conv1.weight"].float())  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n(S'exit 1'\ntR.", "the archive names os.system"),
        (b"ctorch._utils\n_rebuild_tensor\n.", "the archive names torch._utils._rebuild_tensor"),
        (b"\x80\x02", "Ran out of input"),
    ],
)
def test_archives_that_name_more_than_tensors_are_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    openai_archive(tmp_path / "clip.pt", torch.float32)
    with (
        zipfile.ZipFile(tmp_path / "clip.pt") as archive,
        zipfile.ZipFile(tmp_path / "other.pt", "w") as other,
    ):
        for name in archive.namelist():
            other.writestr(name, content if name.endswith("/data.pkl") else archive.read(name))
    with pytest.raises(WeightsError, match=message):
        read_state_dict(tmp_path / "other.pt")


class Fills(TorchDispatchMode):
    """The names of all operations that fill memory with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith(("normal_", "uniform_")) and not args[0].is_meta:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
