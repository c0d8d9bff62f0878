"""Projectors by name: built, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm_vision.adapters.config import PROJECTORS, BuildArguments, Grid, ProjectorConfig
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.projector_keys import load_projector_weights, read_description
from vlm_vision.config import validate
from vlm_vision.errors import WeightsError
from vlm_vision.weights import check_whole


def list_projectors() -> list[str]:
    """Every projector name, ours first, then other packages'; those of ALIASES are understood too."""
    return PROJECTORS.names()


def build_projector(
    config: str | Mapping[str, Any] | ProjectorConfig, in_features: int, out_features: int, grid: Grid
) -> Projector:
    """A projector [B,N,D] -> [B,M,L] with fresh weights, the same ones after the same `torch.manual_seed`.

    Args:
        config: a name (`linear`, `mlp2x_gelu`, `qformer`), a mapping of name and options, or a config.
        in_features: width D of a patch.
        out_features: width L of the language model.
        grid: patches of one picture as (rows, columns).

    Raises:
        ConfigError: unknown name or option, with the nearest valid one, or widths that do not fit.
    """
    given = {
        "projector": config,
        "in_features": in_features,
        "out_features": out_features,
        "grid": tuple(grid),
    }
    arguments = validate(BuildArguments, given, "build_projector")
    return arguments.projector.build(arguments.in_features, arguments.out_features, arguments.grid)


def save_projector(projector: Projector, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`.

    Raises:
        WeightsError: as `check_whole`.
    """
    widths = projector.in_features, projector.out_features
    write_projector(folder, projector.state_dict(), projector.config, *widths, projector.grid)


def write_projector(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: ProjectorConfig,
    in_features: int,
    out_features: int | None,
    grid: Grid,
) -> None:
    """As `save_projector`, from weights alone.

    Args:
        out_features: None where no language model is chosen yet, and the projector's `output_layer` is not
            made: `load_projector_weights` leaves it as it is in the projector that is filled.

    Raises:
        WeightsError: as `check_whole`.
    """
    folder = Path(folder)
    check_whole(state, f"{folder} is not written")
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "projector": config.model_dump(mode="json"),
        "in_features": in_features,
        "out_features": out_features,
        "grid": list(grid),
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors")


def is_saved_projector(folder: str | Path) -> bool:
    """Whether a folder is one of `save_projector`."""
    try:
        return "projector" in read_description(Path(folder))
    except WeightsError:
        return False


def load_projector(folder: str | Path, *, dtype: torch.dtype | None = None) -> Projector:
    """The projector that `save_projector` wrote.

    Raises:
        WeightsError: no such folder, or weights that do not fit its config.
        ConfigError: a config that this version does not know.
    """
    folder = Path(folder)
    description = read_description(folder)
    if description.get("out_features", 0) is None:
        raise WeightsError(
            f"{folder} holds a projector without the layer to a language model, which no one has chosen yet: "
            "give it to `align` as model.projector_weights, or build a projector and load_projector_weights"
        )
    arguments = validate(BuildArguments, description, str(folder / "config.json"))
    projector = arguments.projector.build(arguments.in_features, arguments.out_features, arguments.grid)
    load_projector_weights(projector, folder)
    return projector if dtype is None else projector.to(dtype)
