"""Projectors out of LLaVA's files, and into them: `mm_projector.bin`, or the folder of a whole model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_vision.adapters.build import build_projector
from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.downsample_config import SpatialPoolConfig
from vlm_vision.adapters.mlp_config import MlpConfig, MlpResConfig
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.projector_keys import (
    LAYOUTS,
    fill,
    projector_state,
    weights_file,
)
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.files import whole_file
from vlm_vision.weights import check_whole, read_state_dict

FILE, NEWLINE = "mm_projector.bin", "image_newline"
_RESAMPLER = "vision_resampler."
# A weight [L,D,...] that only this projector has, in LLaVA's file.
_FIRST_WEIGHTS = {
    "linear": "weight",
    "pooler": "conv_pool.weight",
    "ldp": "model.mlp.1.weight",
    "ldpv2": "mlp.mlp.0.weight",
}
_LAYER = re.compile(r"\d+\.weight")


def from_llava(source: str | Path, grid: Grid = (24, 24)) -> Projector:
    """The projector of a LLaVA model, in float32; its name, options and widths follow from names and shapes.

    Reads what LLaVA, LLaVA-NeXT, TinyLLaVA, Bunny and MobileVLM write of `linear`, `mlp{depth}x_gelu`,
    `mlp{depth}x_res{blocks}x_gelu`, `pooler`, the resampler `spatial_pool`, `ldpnet` and `ldpnetv2`. The file
    does not tell where LLaVA-NeXT pools between (`pool`), nor the target of `ldpnetv2`: 12x12, as there. A
    learnt end of rows that lies beside it is read by `read_image_newline`.

    Args:
        source: `mm_projector.bin`, a safetensors file, or a folder: of stage 1, of LoRA, or of a whole model,
            of which only what belongs to the projector is kept.
        grid: patches of one picture as (rows, columns), which the file does not tell; those of LLaVA-1.5's
            tower, CLIP ViT-L/14 at 336 pixels, unless given.

    Raises:
        WeightsError: no projector is there that LLaVA builds, or it is not whole.
        ConfigError: a grid that it cannot take.
    """
    state = projector_state(source)
    config, in_features, out_features = _described(state, str(source))
    projector = build_projector(config, in_features, out_features, grid)
    fill(projector, state, str(source))
    return projector


def read_image_newline(source: str | Path) -> Tensor | None:
    """The vector [L] by which LLaVA ends a row of a tiled picture, or None where the file has none.

    `mm_projector.bin` of stage 1 never has; a whole model's folder does. See `vlm_vision.tiling.merge_tiles`.

    Args:
        source: as for `from_llava`.

    Raises:
        WeightsError: it cannot be read.
    """
    state = read_state_dict(weights_file(source), lambda name: name.endswith(NEWLINE))
    found = [tensor for name, tensor in state.items() if name.rpartition(".")[2] == NEWLINE]
    return found[0] if found else None


def to_llava(projector: Projector, path: str | Path) -> dict[str, Any]:
    """Write a projector as LLaVA's `--pretrain_mm_mlp_adapter` reads it, and tell what its config must say.

    `mlp_res`, `pooler` and `spatial_pool` are LLaVA-NeXT's, which has the last one's code but does not call
    it.

    Args:
        path: the file, or a folder to hold `mm_projector.bin`.

    Returns:
        The fields of LLaVA's `config.json`: `mm_projector_type`, `mm_hidden_size`, and those of a resampler.

    Raises:
        ConfigError: LLaVA has no such projector.
        WeightsError: as `check_whole`.
    """
    fields = _llava_fields(projector)
    state = projector.state_dict()
    check_whole(state, f"{path} is not written")
    for layout in LAYOUTS:
        if layout.reference == "LLaVA-NeXT" and layout.projector == projector.config.name:
            state = layout.theirs(state)
    tensors = {
        f"model.{'' if name.startswith(_RESAMPLER) else 'mm_projector.'}{name}": tensor.detach().cpu().clone()
        for name, tensor in state.items()
    }
    file = Path(path) if Path(path).suffix else Path(path) / FILE
    with whole_file(file) as partial:
        torch.save(tensors, partial)
    return fields


def _described(state: Mapping[str, Tensor], origin: str) -> tuple[dict[str, Any], int, int]:
    """Name and options, and the widths D and L, from the names and shapes of LLaVA's tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, weight in _FIRST_WEIGHTS.items():
        if len(shapes.get(weight, ())) >= 2:
            return {"name": name}, shapes[weight][1], shapes[weight][0]
    numbers = sorted(int(name.removesuffix(".weight")) for name in shapes if _LAYER.fullmatch(name))
    if not numbers:
        raise WeightsError(
            f"{origin} holds no projector that LLaVA builds ({', '.join(list(shapes)[:3]) or 'no tensor'}); "
            "where you know which it is: load_projector_weights(build_projector(NAME, ...), FILE)"
        )
    in_features, out_features = shapes[f"{numbers[0]}.weight"][1], shapes[f"{numbers[-1]}.weight"][0]
    options = {"name": "mlp", "depth": len(numbers)}
    blocks = sum(name.endswith(".pre_norm.weight") for name in shapes)
    convolution = shapes.get(f"{_RESAMPLER}pool.weight")
    if blocks:
        options |= {"name": "mlp_res", "blocks": blocks}
    elif convolution is not None:
        width, in_features, stride, _ = convolution
        options |= {"name": "spatial_pool", "width": width, "stride": stride}
    return options, in_features, out_features


def _llava_fields(projector: Projector) -> dict[str, Any]:
    config = projector.config
    fields: dict[str, Any] = {"mm_hidden_size": projector.in_features}
    if config.name in ("identity", "linear", "pooler"):
        return {"mm_projector_type": config.name, **fields}
    if isinstance(config, MlpConfig) and config.activation == "gelu":
        return {"mm_projector_type": f"mlp{config.depth}x_gelu", **fields}
    if isinstance(config, MlpResConfig):
        return {"mm_projector_type": f"mlp{config.depth}x_res{config.blocks}x_gelu", **fields}
    if isinstance(config, SpatialPoolConfig):
        width = config.width or projector.in_features
        return {
            "mm_projector_type": f"mlp{config.depth}x_gelu",
            "mm_hidden_size": width,
            "mm_resampler_type": "spatial_pool",
            "mm_spatial_pool_mode": "conv",
            "mm_spatial_pool_stride": config.stride,
            "mm_spatial_pool_out_channels": width,
        }
    raise ConfigError(
        f"LLaVA has no projector {config.name!r} with these options: its file has a place for identity, "
        "linear, mlp with gelu, mlp_res, pooler and spatial_pool. `save_projector` keeps this one, and "
        "`load_projector` reads it"
    )
