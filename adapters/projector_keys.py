"""Weights of projectors as others name them, read from their files into ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm_vision.adapters.projector import Projector
from vlm_vision.errors import WeightsError
from vlm_vision.weights import find_weights_file, read_state_dict

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
    Layout("LLaVA-NeXT", "perceiver_resampler", (("vision_resampler.", ""), ("", "projection."))),
    Layout("TinyLLaVA", "perceiver_resampler", (("linear.", "projection."), ("", "perceiver."))),
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
    MobileVLM, VILA, Prismatic, nanoVLM, Honeybee, InternVL or TokenPacker, whichever fit.

    Args:
        source: a file (`mm_projector.bin`, safetensors), a folder, or tensors by name.

    A folder whose `config.json` says that no language model was chosen (`out_features` null) has no weights
    of the layer to it (`output_layer`), which stays as it is in the projector; see `write_projector`.

    Raises:
        WeightsError: lists every missing, unexpected and misshapen tensor; the projector is left as it was.
    """
    if isinstance(source, Mapping):
        fill(projector, projector_state(source), "what was given")
        return
    folder, lacks_output = Path(source), False
    if (folder / "config.json").is_file():
        lacks_output = read_description(folder).get("out_features", 0) is None
    fill(projector, projector_state(source), str(source), lacks_output=lacks_output)


def fill(
    projector: Projector, state: Mapping[str, Tensor], origin: str, *, lacks_output: bool = False
) -> None:
    """Load what `projector_state` gave.

    Args:
        lacks_output: the projector's `output_layer` is not there, and stays as it is.

    Raises:
        WeightsError: as `load_projector_weights`.
    """
    expected = projector.state_dict()
    layouts = [layout for layout in LAYOUTS if layout.projector == projector.config.name]
    named = [dict(state), *(layout.ours(state) for layout in layouts)]
    state = max(named, key=lambda state: len(state.keys() & expected.keys()))
    if lacks_output:
        own = {name: expected[name] for name in expected if name.startswith(f"{projector.output_layer}.")}
        expected = {name: tensor for name, tensor in expected.items() if name not in own}
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
    state = source if isinstance(source, Mapping) else read_state_dict(weights_file(source), of_a_projector)
    held = {name: HOLDER.search(name) for name in state}
    if not any(held.values()):
        return dict(state)
    return {name[found.end() :]: state[name] for name, found in held.items() if found}


def read_description(folder: Path) -> dict[str, Any]:
    """What `config.json` of a projector's folder says.

    Raises:
        WeightsError: there is none.
    """
    path = folder / "config.json"
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} holds no projector: {path.name} cannot be read ({error})") from error
    return description


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


def of_a_projector(name: str) -> bool:
    """Whether a whole model's tensor belongs to its projector."""
    return HOLDER.search(name) is not None


def _renamed(name: str, beginnings: tuple[tuple[str, str], ...]) -> str:
    for old, new in beginnings:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
