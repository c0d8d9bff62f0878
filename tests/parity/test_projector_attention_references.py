"""Projectors that attend against the code that they come from, and against recorded numbers of ours.

VLM_VISION_PROJECTOR_REFERENCES is a folder with checkouts LLaVA-NeXT, TinyLLaVA_Factory, TokenPacker and
cambrian; without it only the recorded numbers are compared. They were recorded from code that equalled all
four; `python tests/parity/test_projector_attention_references.py` records them anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm_vision.adapters import build_projector
from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.projector_keys import load_projector_weights

VARIABLE = "VLM_VISION_PROJECTOR_REFERENCES"
RECORDED = Path(__file__).parents[1] / "fixtures" / "projectors_attention.json"
PERCEIVER = {"name": "perceiver_resampler", "layers": 2, "num_latents": 6}
SVA = {"name": "sva", "width": 32, "layers": 2}
# Node, width of a patch and grid; 24 channels come out of all.
CASES: dict[str, tuple[dict[str, Any], int, Grid]] = {
    "LLaVA-NeXT perceiver": (PERCEIVER, 16, (3, 5)),
    "TinyLLaVA resampler": ({**PERCEIVER, "project": "before"}, 16, (3, 5)),
    "TokenPacker": ({"name": "token_packer"}, 4096, (4, 4)),
    "TokenPacker of 3": ({"name": "token_packer", "scale": 3}, 4096, (6, 6)),
    "SVA of one tower": (SVA, 20, (4, 4)),
    "SVA of two towers": ({**SVA, "widths": [8, 12], "regions": [2]}, 20, (4, 4)),
    "SVA of two groups": ({**SVA, "widths": [8, 12], "regions": [1, 2]}, 20, (4, 4)),
}
SMALL_TOKEN_PACKER = {"width": 16, "heads": 2}  # instead of the reference's only width, to be recorded


def case(name: str, **options: Any) -> tuple[Projector, Tensor]:
    """A projector and patches, with values from arithmetic alone: the same everywhere."""
    node, width, grid = CASES[name]
    width = width // 128 if options else width
    projector = build_projector({**node, **options}, width, 24, grid).eval()
    with torch.no_grad():
        for number, parameter in enumerate(projector.parameters()):
            scale = 0.5 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            parameter.copy_(waves(parameter.numel(), number).reshape(parameter.shape) * scale)
    return projector, waves(2 * grid[0] * grid[1] * width, 0.5).reshape(2, -1, width)


def waves(count: int, phase: float) -> Tensor:
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + phase).float()


def reference(path: str) -> ModuleType:
    """A module of a checkout by its file, with what it imports and does not need left empty."""
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} names no folder of checkouts")

    def many(tensors: Any, pattern: str, **sizes: int) -> tuple[Tensor, ...]:
        return tuple(rearrange(tensor, pattern, **sizes) for tensor in tensors)

    einops_exts, package, base = ModuleType("einops_exts"), ModuleType("reference"), ModuleType("base")
    einops_exts.rearrange_many = many  # type: ignore[attr-defined]
    package.register_connector = lambda _: lambda kind: kind  # type: ignore[attr-defined]
    package.__path__ = []
    base.Connector = nn.Module  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("reference.part", Path(os.environ[VARIABLE]) / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    stubs = {"einops_exts": einops_exts, "reference": package, "reference.base": base}
    with patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    return module


def next_perceiver(projector: Any, patches: Tensor) -> Tensor:
    arguments = SimpleNamespace(
        mm_perceiver_depth=2, mm_perceiver_latents=6, mm_perceiver_ff_mult=4, mm_perceiver_pretrained=None
    )
    module = reference("LLaVA-NeXT/llava/model/multimodal_resampler/perceiver.py")
    theirs = module.PerceiverResampler(arguments, SimpleNamespace(hidden_size=16))
    theirs.to(patches.dtype).perceiver.load_state_dict(projector.perceiver.state_dict())
    tokens: Tensor = projector.projection(theirs(patches))
    return tokens


def tinyllava(projector: Any, patches: Tensor) -> Tensor:
    settings = SimpleNamespace(hidden_size=24, vision_hidden_size=16, num_resampler_layers=2, num_queries=6)
    module = reference("TinyLLaVA_Factory/tinyllava/model/connector/resampler.py")
    theirs = module.PerceiverResampler(settings)
    state = {**projector.perceiver.state_dict(), "linear.weight": projector.projection.weight}
    theirs.to(patches.dtype).load_state_dict({**state, "linear.bias": projector.projection.bias})
    tokens: Tensor = theirs(patches)
    return tokens


def token_packer(projector: Any, patches: Tensor) -> Tensor:
    module = reference("TokenPacker/llava/model/multimodal_projector/builder.py")
    theirs = module.TokenPacker(
        raw_grid=projector.grid[0], hidden_size=24, scale_factor=projector.config.scale
    )
    theirs.to(patches.dtype).load_state_dict(projector.state_dict())
    tokens: Tensor = theirs((patches[..., -1024:], patches))
    return tokens


def sva(projector: Any, patches: Tensor) -> Tensor:
    """`VisionTokenSampler`, and what `prepare_inputs_labels_for_multimodal` does around it."""
    sampler = reference("cambrian/cambrian/model/vision_sampler.py").VisionTokenSampler
    config, batch, side = projector.config, len(patches), projector.grid[0]
    features = [
        projector.get_submodule(f"mm_projector_aux_{number}")(part)
        for number, part in enumerate(patches.split(list(config.towers(projector.in_features)), dim=-1))
    ]
    context = features[0].mean(1).view(batch, 1, 1, -1)
    groups = []
    for number, region in enumerate(config.regions):
        count, queries = side // region, (side // region) ** 2
        theirs = sampler(32, 32, [32] * len(features), [region] * len(features), 32, config.layers)
        theirs.to(patches.dtype).load_state_dict(
            projector.get_submodule(f"vision_sampler_{number}").state_dict()
        )
        seen = [
            feature.view(batch, count, region, count, region, -1)
            .permute(0, 1, 3, 2, 4, 5)
            .flatten(0, 2)
            .flatten(1, 2)
            for feature in features
        ]
        masks = [torch.ones(batch * queries, region**2, dtype=torch.bool) for _ in features]
        query = projector.vision_query[number].view(1, 1, 1, -1).expand(batch, queries, -1, -1).flatten(0, 1)
        told = context.expand(-1, queries, 1, -1).flatten(0, 1)
        found = theirs(query, told, *seen, *masks).view(batch, queries, -1)
        if number:
            plane = found.permute(0, 2, 1).reshape(batch, -1, count, count)
            plane = interpolate(
                plane.float(), size=(side // config.regions[0],) * 2, mode="bilinear", align_corners=False
            ).to(plane.dtype)
            found = plane.permute(0, 2, 3, 1).flatten(1, 2)
        groups.append(found)
    tokens: Tensor = projector.projection(torch.cat(groups, -1))
    return tokens


REFERENCES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "LLaVA-NeXT": next_perceiver,
    "TinyLLaVA": tinyllava,
    "TokenPacker": token_packer,
    "SVA": sva,
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    """In float64 it is the same sum; in float32 rounding is all that is left."""
    node, width, grid = CASES[name]
    torch.manual_seed(0)
    projector = build_projector(node, width, 24, grid).eval()
    patches = torch.randn(2, grid[0] * grid[1], width)
    run = REFERENCES[name.partition(" ")[0]]
    with torch.no_grad():
        for kind, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):  # worst: 2e-7, 6e-16
            inputs = patches.to(kind)
            ours = projector.to(kind)(inputs)
            theirs = run(projector, inputs)
            assert ours.shape == theirs.shape
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            assert error <= tolerance


def test_weights_start_as_in_the_reference() -> None:
    """From the same seed, every tensor is theirs to the bit."""
    builder = reference("TokenPacker/llava/model/multimodal_projector/builder.py")
    perceiver = reference("LLaVA-NeXT/llava/model/multimodal_resampler/perceiver.py")
    torch.manual_seed(0)
    theirs = builder.TokenPacker(hidden_size=24).state_dict()
    torch.manual_seed(0)
    ours = build_projector("token_packer", 4096, 24, (24, 24)).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    torch.manual_seed(0)
    theirs = perceiver.PerceiverResamplerModule(dim=16, depth=2, num_latents=6).state_dict()
    torch.manual_seed(0)
    ours = build_projector(PERCEIVER, 16, 24, (3, 5)).state_dict()
    assert all(torch.equal(ours[f"perceiver.{key}"], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["LLaVA-NeXT perceiver", "TinyLLaVA resampler", "TokenPacker"])
def test_weights_load_by_the_names_of_the_reference(name: str) -> None:
    """As in the file of a whole model, of which only the projector is taken."""
    projector, _ = case(name)
    state = {f"model.mm_projector.{key}": tensor for key, tensor in projector.state_dict().items()}
    if name.startswith("LLaVA-NeXT"):
        state = {
            key.replace("mm_projector.perceiver", "vision_resampler.perceiver").replace("projection.", ""): t
            for key, t in state.items()
        }
    elif name.startswith("TinyLLaVA"):
        state = {
            key.replace("model.mm_projector.perceiver.", "connector._connector.").replace(
                "model.mm_projector.projection.", "connector._connector.linear."
            ): tensor
            for key, tensor in state.items()
        }
    node, width, grid = CASES[name]
    loaded = build_projector(node, width, 24, grid)
    load_projector_weights(loaded, {**state, "lm_head.weight": torch.ones(1)})
    own = loaded.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in projector.state_dict().items())


def summary(name: str) -> list[float]:
    """A few numbers that every token and channel has a part in."""
    projector, patches = case(name, **(SMALL_TOKEN_PACKER if name.startswith("TokenPacker") else {}))
    with torch.no_grad():
        tokens = projector(patches).double()
    weights = waves(tokens.numel(), 0.1).double().reshape(tokens.shape)
    return [
        *(tokens * weights).mean(dim=2).flatten().tolist(),
        *(tokens * weights).mean(dim=(0, 1)).tolist(),
    ]


@pytest.mark.parametrize("name", CASES)
def test_equals_what_was_recorded(name: str) -> None:
    recorded = torch.tensor(json.loads(RECORDED.read_text(encoding="utf-8"))[name])
    found = torch.tensor(summary(name))
    assert (found - recorded).abs().max() <= 1e-5 * recorded.abs().max()


if __name__ == "__main__":
    numbers = {name: [float(f"{number:.8g}") for number in summary(name)] for name in CASES}
    RECORDED.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
