"""Projectors by name: built, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_vision.adapters.config import PROJECTORS, BuildArguments, Grid, ProjectorConfig
from vlm_vision.adapters.projector import Projector
from vlm_vision.config import validate
from vlm_vision.errors import WeightsError
from vlm_vision.weights import check_whole


def list_projectors() -> list[str]:
    """Every projector name, ours first, then other packages'; `mlp{depth}x_gelu` is understood too."""
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


def load_projector(folder: str | Path, *, dtype: torch.dtype | None = None) -> Projector:
    """The projector that `save_projector` wrote.

    Raises:
        WeightsError: no such folder, or weights that do not fit its config.
        ConfigError: a config that this version does not know.
    """
    folder = Path(folder)
    description = _description(folder)
    if description.get("out_features", 0) is None:
        raise WeightsError(
            f"{folder} holds a projector without the layer to a language model, which no one has chosen yet: "
            "give it to `align` as model.projector_weights, or build a projector and load_projector_weights"
        )
    arguments = validate(BuildArguments, description, str(folder / "config.json"))
    projector = arguments.projector.build(arguments.in_features, arguments.out_features, arguments.grid)
    load_projector_weights(projector, folder)
    return projector if dtype is None else projector.to(dtype)


def load_projector_weights(projector: Projector, source: str | Path) -> None:
    """Fill a projector from a folder, a safetensors file, or LLaVA's `mm_projector.bin`, every tensor once.

    A folder whose `config.json` says that no language model was chosen (`out_features` null) has no weights
    of the layer to it (`output_layer`), which stays as it is in the projector; see `write_projector`.

    Raises:
        WeightsError: lists every missing, unexpected and misshapen tensor; the projector is left as it was.
    """
    path, made_here = Path(source), None
    if path.is_dir():
        has_output = _description(path).get("out_features", 0) is not None
        path, made_here = path / "model.safetensors", None if has_output else projector.output_layer
    state = {name.split("mm_projector.")[-1]: tensor for name, tensor in _read(path).items()}
    expected = {
        name: tensor
        for name, tensor in projector.state_dict().items()
        if made_here is None or not name.startswith(f"{made_here}.")
    }
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        raise WeightsError(
            f"{path} does not fit the projector {projector.config.name!r} "
            f"({projector.in_features} -> {projector.out_features}): {'; '.join(sorted(problems))}"
        )
    projector.load_state_dict({**projector.state_dict(), **state})


def _description(folder: Path) -> dict[str, Any]:
    """What `config.json` of a projector's folder says."""
    path = folder / "config.json"
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} holds no projector: {path.name} cannot be read ({error})") from error
    return description


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # each reader has its own family of errors
        raise WeightsError(f"projector weights {str(path)!r} cannot be read: {error}") from error
