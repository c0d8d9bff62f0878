"""Adapters as a folder in peft's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm_vision.adapters.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from vlm_vision.adapters.lora import ADAPTER, SplitAttention, slot_of
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError
from vlm_vision.export import library_name
from vlm_vision.files import whole_folder
from vlm_vision.layouts import counterpart
from vlm_vision.tower import VisionTower
from vlm_vision.weights import check_whole

PREFIX = "base_model.model."
_SUFFIXES = {
    f".lora_A.{ADAPTER}.weight": ".lora_A.weight",
    f".lora_B.{ADAPTER}.weight": ".lora_B.weight",
    f".lora_magnitude_vector.{ADAPTER}.weight": ".lora_magnitude_vector",
}


@dataclass(frozen=True)
class SavedLora:
    """What `save_lora` wrote.

    Attributes:
        layout: whose names of layers it has.
        adapted: those layers.
        only_here: of them, those that peft does not find in the library's model and passes over, since they
            are parts of torch's fused attention there; `load_adapter` reads them.
    """

    layout: str
    adapted: tuple[str, ...]
    only_here: tuple[str, ...]


def save_lora(model: VisionTower | DualEncoder, folder: str | Path, *, base: str | None = None) -> SavedLora:
    """Write the adapters that `add_lora` put onto a model, not merged, and all else that learns beside them.

    `load_adapter` reads the folder onto the same base. `peft.PeftModel.from_pretrained(model, folder)` reads
    it onto transformers' model: names are those of transformers wherever a layer has a counterpart there, for
    models of open_clip too, and then fit what `export_transformers` writes of the base. Where a layer of an
    open_clip model has none, all names are open_clip's, with q, k and v as layers of their own. open_clip's
    own model has them in one tensor, which peft adapts as one layer of three times the height with one common
    factor A: three factors do not fit into it, so that folder is for `load_adapter` alone.

    Args:
        base: what the adapters belong to, for `base_model_name_or_path`; None takes the model's source.

    Raises:
        ConfigError: the model has no adapters, or its library's names are not known here.
        WeightsError: as `check_whole`.
    """
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if config is None or not any(".lora_" in name for name, _ in model.named_parameters()):
        raise ConfigError("this model has no adapters: put them on with add_lora, and save before merging")
    learnt = {library_name(model, name): tensor for name, tensor in _learnt(model)}
    state, layout = _under_transformers_names(model, learnt), "transformers"
    if state is None:
        state, layout = {peft_name(name): tensor for name, tensor in learnt.items()}, "open_clip"
    adapted = tuple(sorted({name.partition(".lora_")[0] for name in state if ".lora_" in name}))
    within = {
        library_name(model, name)
        for name, module in model.named_modules()
        if isinstance(module, SplitAttention) and _source(model) == "transformers"
    }
    only_here = tuple(name for name in adapted if any(name.startswith(f"{owner}.") for owner in within))
    check_whole(state, f"{folder} is not written")
    settings = {
        **config.to_dict(),
        "base_model_name_or_path": base or _base(model),
        "inference_mode": True,
        "target_modules": list(adapted),
    }
    with whole_folder(folder) as partial:
        text = json.dumps(settings, indent=2, sort_keys=True, default=list)
        (partial / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        tensors = {f"{PREFIX}{name}": tensor.detach().contiguous() for name, tensor in state.items()}
        save_file(tensors, partial / ADAPTER_WEIGHTS[0], {"format": "pt"})
    return SavedLora(layout, adapted, only_here if layout == "transformers" else adapted)


def _learnt(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Adapters, what learns beside them, and buffers, which batch norms fill."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".lora_" in name:
            yield name, parameter
    buffers = dict(model.named_buffers())
    yield from ((name, buffers[name]) for name in model.state_dict() if name in buffers)


def peft_name(name: str) -> str:
    """A tensor's name as peft saves it: without the adapter's."""
    for ours, theirs in _SUFFIXES.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def _under_transformers_names(
    model: VisionTower | DualEncoder, learnt: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """Learnt tensors under transformers' names; None where one of them has no place there."""
    if _source(model) == "transformers":
        scalars = {"logit_scale", "logit_bias"} if getattr(model, "logit_bias", None) is not None else set()
        return {
            peft_name(name): tensor.reshape(1) if name in scalars else tensor
            for name, tensor in learnt.items()
        }
    names = [library_name(model, name) for name, _ in model.named_parameters()]
    adapted = {name.partition(".lora_")[0] for name in learnt if ".lora_" in name}
    state: dict[str, Tensor] = {}
    for name, tensor in learnt.items():
        layer, dot, factor = peft_name(name).partition(".lora_")
        plain = f"{layer}.weight" if dot else name.replace(".base_layer.", ".")
        slot = slot_of(plain)
        if dot or slot.parts > 1:  # one layer to one layer
            found = counterpart(slot.name, torch.empty(slot.parts, 1, device="meta"), names)
            if found is None or len(found) != slot.parts:
                return None
            theirs = list(found)[slot.number]
            found = {theirs.rpartition(".")[0] + dot + factor if dot else theirs: tensor}
        else:
            found = counterpart(plain, tensor, names)
            if found is None:
                return None
        # peft finds the bias of a layer that it has wrapped inside the wrapper.
        wrapped = not dot and plain.rpartition(".")[0] in adapted
        for theirs, value in found.items():
            layer, _, kind = theirs.rpartition(".")
            state[f"{layer}.base_layer.{kind}" if wrapped else theirs] = value
    return state


def _source(model: VisionTower | DualEncoder) -> str:
    tower = model.tower if isinstance(model, DualEncoder) else model
    return tower.backbone.portable_config().name


def _base(model: VisionTower | DualEncoder) -> str:
    """The model's source: as transformers names it, or as `load_tower` does."""
    tower = model.tower if isinstance(model, DualEncoder) else model
    node: Any = tower.config.backbone
    if node.name == "transformers" and node.model is not None:
        return str(node.weights if node.weights not in (None, "none") else node.model)
    return f"{node.name}:{node.model or 'architecture'}@{node.weights}"
