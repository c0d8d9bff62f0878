"""What a run's adapters on the language model learnt, apart from the weights that they learnt on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_vision.adapters.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from vlm_vision.adapters.save import PREFIX
from vlm_vision.errors import ConfigError, WeightsError, require
from vlm_vision.train.llm_adapters import ADAPTERS_FOLDER
from vlm_vision.train.model_card import finished_stages
from vlm_vision.train.vlm import VisionLanguageModel, load_llm

TOLERANCE = 1e-3
"""Of the largest weight: adapters of another run are off by more, and rounding to bfloat16 is not."""


@dataclass(frozen=True)
class LlmLora:
    """Adapters by the names of the language model.

    Attributes:
        settings: peft's `adapter_config.json`.
        tensors: `<layer>.lora_A.weight` and so on.
        base: weights of the whole language model beneath them, by name.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    base: dict[str, Tensor]

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have adapters."""
        return sorted({name.partition(".lora_")[0] for name in self.tensors})

    def save(self, folder: Path, base: str, renamed: Callable[[str], str] = str) -> None:
        """Write peft's two files into a folder that is there.

        Args:
            base: for `base_model_name_or_path`.
            renamed: a layer's name in the model that they are put onto.
        """
        settings = {
            **self.settings,
            "base_model_name_or_path": base,
            "target_modules": list(map(renamed, self.layers)),
        }
        text = json.dumps(settings, indent=2, sort_keys=True)
        (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        tensors = {f"{PREFIX}{renamed(name)}": tensor for name, tensor in self.tensors.items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS[0], {"format": "pt"})


def take_lora_apart(model: VisionLanguageModel, source: str | Path) -> LlmLora:
    """The adapters that are merged in a run's model, whose adapted layers then are what they were before.

    All else of the model stays as it learnt.

    Args:
        source: the folder that the model was loaded from, beside the stages of its run.

    Raises:
        ConfigError: no stage of the run kept adapters, or what they learnt on is not there any more.
        WeightsError: they are not those that are merged in this model.
    """
    require("train", "peft")
    from peft import PeftModel

    found = [stage / ADAPTERS_FOLDER for stage in finished_stages(Path(source))]
    folder = next((folder for folder in reversed(found) if folder.is_dir()), None)
    if folder is None:
        raise ConfigError(
            f"{source} lies beside no stage that kept adapters, and merged they cannot be told from the "
            "weights: train with `keep_adapters: true`, or export them merged"
        )
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    origin = settings["base_model_name_or_path"]
    try:
        below: Any = load_llm(origin, dtype=next(model.llm.parameters()).dtype)
    except ConfigError as error:
        raise ConfigError(f"{folder}: what its adapters learnt on is not there: {error}") from error
    base = {name: tensor.clone() for name, tensor in below.state_dict().items()}
    tensors = {
        name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS[0]).items()
    }
    lora = LlmLora(settings, tensors, base)
    merged = PeftModel.from_pretrained(below, str(folder)).merge_and_unload().state_dict()
    with torch.no_grad():
        for layer in lora.layers:
            weight = model.llm.get_submodule(layer).weight
            difference = (weight.float() - merged[f"{layer}.weight"].float()).abs().max()
            if not difference <= TOLERANCE * weight.abs().max():
                raise WeightsError(
                    f"{folder} does not hold the adapters that are merged in {source}: {layer} differs by "
                    f"{float(difference):.2g}. A later stage changed it, or {origin} is another model now; "
                    "export it merged"
                )
            weight.copy_(base[f"{layer}.weight"])
    return lora
