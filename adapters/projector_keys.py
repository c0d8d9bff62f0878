"""Weights of projectors as others name them, read from their files into ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vlm_vision.adapters.projector import Projector
from vlm_vision.errors import WeightsError
from vlm_vision.weights import SHARDS_SUFFIX, find_weights_file, read_state_dict

# Where a whole model holds its projector; what lies elsewhere in a file that has it belongs to other parts.
HOLDER = re.compile(
    r"(?:^|\.)(?:mm_projector\.|_connector\.|MP\.|abstractor\.|(?=vision_resampler\.))|^mlp1\."
)


@dataclass(frozen=True)
class Layout:
    """How a reference names the weights of one of our projectors.

    Attributes:
        reference: the project.
        projector: our name.
        names: beginnings of its names, behind the holder, and of ours; all others are the same.
    """

    reference: str
    projector: str
    names: tuple[tuple[str, str], ...]

    def ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its tensors under our names."""
        return {_renamed(name, self.names): tensor for name, tensor in state.items()}

    def theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under its names, without the holder."""
        back = tuple((our, their) for their, our in self.names)
        return {_renamed(name, back): tensor for name, tensor in state.items()}


# Projectors that are not listed for a reference have the names there that they have here.
LAYOUTS = (
    Layout("LLaVA-NeXT", "pool", (("", "mlp."),)),
    Layout("LLaVA-NeXT", "spatial_pool", (("vision_resampler.pool.", "pool."), ("", "mlp."))),
    Layout("Prismatic", "linear", (("projector.", ""),)),
    Layout("Prismatic", "mlp", (("projector.", ""),)),
    Layout("Prismatic", "fused_gelu_mlp", (("projector.", ""),)),
    Layout("VILA", "linear", (("layers.", ""),)),
    Layout("VILA", "mlp", (("layers.", ""),)),
    Layout("InternVL", "mlp_downsample", (("0.", "layers.1."), ("1.", "layers.2."), ("3.", "layers.4."))),
    Layout(
        "MobileVLM",
        "ldp",
        (
            ("model.mlp.1.", "mlp.0."),
            ("model.mlp.3.", "mlp.2."),
            ("model.mb_block.1.", "blocks.0."),
            ("model.mb_block.2.", "blocks.1."),
        ),
    ),
    Layout("MobileVLM", "ldpv2", (("mlp.mlp.", "mlp."), ("peg.peg.0.", "peg."))),
)


def load_projector_weights(projector: Projector, source: str | Path | Mapping[str, Tensor]) -> None:
    """Fill a projector with weights saved here, or by the project that it comes from; every tensor once.

    Of a whole model's weights the projector's are taken. Names are those of LLaVA, LLaVA-NeXT, TinyLLaVA,
    MobileVLM, VILA, Prismatic, nanoVLM, Honeybee or InternVL, whichever fit.

    A folder of ours whose `config.json` says that no language model was chosen (`out_features` null) has no
    weights of the layer to it (`output_layer`), which stays as it is in the projector; see `write_projector`.

    Args:
        source: a file (`mm_projector.bin`, safetensors), a folder, or tensors by name.

    Raises:
        WeightsError: lists every missing, unexpected and misshapen tensor; the projector is left as it was.
    """
    origin = "what was given" if isinstance(source, Mapping) else str(source)
    fill(projector, projector_state(source), origin, without_output=_is_without_output(source))


def fill(
    projector: Projector, state: Mapping[str, Tensor], origin: str, *, without_output: bool = False
) -> None:
    """Load what `projector_state` gave.

    Args:
        without_output: all but the projector's `output_layer`, which stays as it is.

    Raises:
        WeightsError: as `load_projector_weights`.
    """
    stays = f"{projector.output_layer}." if without_output else None
    expected = {
        name: tensor
        for name, tensor in projector.state_dict().items()
        if stays is None or not name.startswith(stays)
    }
    layouts = [layout for layout in LAYOUTS if layout.projector == projector.config.name]
    named = [dict(state), *(layout.ours(state) for layout in layouts)]
    state = max(named, key=lambda state: len(state.keys() & expected.keys()))
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        raise WeightsError(
            f"{origin} does not fit the projector {projector.config.name!r} "
            f"({projector.in_features} -> {projector.out_features}): {'; '.join(sorted(problems))}"
        )
    projector.load_state_dict({**projector.state_dict(), **state})


def projector_state(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a projector out of those of a file or folder, named from their holder on.

    A folder is one of LLaVA's stage 1 or LoRA (`mm_projector.bin`, `non_lora_trainables.bin`), or holds
    weights as usual; of shards only those that hold something of a projector are opened.

    Raises:
        WeightsError: nothing is there, or it cannot be read.
    """
    if isinstance(source, Mapping):
        state = source
    else:
        path = weights_file(source)
        state = read_state_dict(path, of_a_projector if path.name.endswith(SHARDS_SUFFIX) else None)
    held = {name: HOLDER.search(name) for name in state}
    if not any(held.values()):
        return dict(state)
    return {name[found.end() :]: state[name] for name, found in held.items() if found}


def weights_file(source: str | Path) -> Path:
    """The file that holds a projector: the one given, or that of a folder.

    Raises:
        WeightsError: a folder without one.
    """
    path = Path(source)
    if not path.is_dir():
        return path
    for name in ("mm_projector.bin", "non_lora_trainables.bin"):
        if (path / name).is_file():
            return path / name
    return find_weights_file(path)


def _is_without_output(source: str | Path | Mapping[str, Tensor]) -> bool:
    """Whether a folder says that its projector has no layer to a language model yet."""
    if isinstance(source, Mapping) or not (path := Path(source) / "config.json").is_file():
        return False
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    return "out_features" in description and description["out_features"] is None


def of_a_projector(name: str) -> bool:
    """Whether a whole model's tensor belongs to its projector."""
    return HOLDER.search(name) is not None


def _renamed(name: str, beginnings: tuple[tuple[str, str], ...]) -> str:
    for old, new in beginnings:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
