"""What training left beside a model, put onto it: PEFT's adapter folders and contrastive checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_vision.adapters.lora import Slot, slot_of
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.adapters.low_rank import merged as merged_weight
from vlm_vision.adapters.low_rank import update
from vlm_vision.backbones.config import PUBLISHED
from vlm_vision.config import read_yaml, validate
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.export import clip_vision_config, library_names, library_state
from vlm_vision.layouts import Layout, convert, detect_layout, with_vision_level
from vlm_vision.tower import VisionTower
from vlm_vision.weights import read_state_dict

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
LEARNT = "learnt.safetensors"

# What of an adapter_config.json says nothing about how the adapters are merged, or is read below.
_UNDERSTOOD = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "use_rslora",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# PiSSA, OLoRA, CorDA and LoftQ change the base weights too, so their factors do not fit the base as it was.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
_TEXT_SIDE = (
    "text",
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "logit_",
    "visual_projection.",  # of transformers' models, whose towers end before it
)
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB]|magnitude_vector)(\.default)?(\.weight)?"
)
_ADDED_TWICE_THROUGH = (0, 21)
_Scale = Callable[[str, int], float]  # what a module's factors of a rank are multiplied by


@dataclass(frozen=True)
class Merged:
    """What `load_adapter` changed.

    Attributes:
        adapted: tensors that low-rank factors were added to.
        replaced: tensors that came whole.
        left_out: of the text side, where the model is a tower alone.
    """

    adapted: tuple[str, ...]
    replaced: tuple[str, ...]
    left_out: tuple[str, ...]


def load_adapter(model: VisionTower | DualEncoder, folder: str | Path) -> Merged:
    """Merge into a model, in place, what was trained on top of its weights.

    Args:
        model: with the base weights. A tower has freed the layers after its own; what was trained there
            needs `load_tower(..., pooled_head=True)`.
        folder: of PEFT (`adapter_config.json`, `adapter_model.safetensors`), trained on open_clip's or
            transformers' CLIP; or a checkpoint of our contrastive runs (`runs/x/checkpoints/step_100`).

    Raises:
        ConfigError: neither of the two, or a kind of adapter that is not LoRA, rsLoRA or DoRA.
        WeightsError: tensors that nothing in the model takes, or of another base model; it is left as it was.
    """
    folder = Path(folder)
    if (folder / LEARNT).is_file():
        learnt = _stripped(
            read_state_dict(folder / LEARNT), "tower." if isinstance(model, VisionTower) else ""
        )
        merged, done = _merge(model.state_dict(), learnt, _scale_of_run(folder), model, str(folder))
        _write(model, merged)
        return done
    config = _adapter_config(folder)
    _check_base(model, config, folder)
    learnt = _stripped(_adapter_weights(folder), "base_model.model.")
    library = library_state(model)
    state, learnt = _under_its_names(library, learnt, folder)
    merged, done = _merge(state, learnt, _scale_of_peft(config), model, _origin(folder, config))
    changed = convert({**state, **merged}, detect_layout(library))
    own = {theirs: ours for ours, theirs in library_names(model).items()}
    _write(
        model,
        {own[name]: value for name, value in changed.items() if not torch.equal(value, library[name])},
    )
    return done


def _merge(
    state: Mapping[str, Tensor],
    learnt: Mapping[str, Tensor],
    scale: _Scale,
    model: VisionTower | DualEncoder,
    origin: str,
) -> tuple[dict[str, Tensor], Merged]:
    """The tensors of `state` that `learnt` changes, changed, and what was done."""
    factors: dict[tuple[str, bool], dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in learnt.items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            whole[_plain(name)] = tensor
        else:
            factors.setdefault((found["module"], bool(found["kind"])), {})[found["side"]] = tensor
    left_out: list[str] = []
    strange: list[str] = []
    misshapen: list[str] = []
    adapted: set[str] = set()
    replaced: set[str] = set()
    merged: dict[str, Tensor] = {}

    def place(name: str, value: Tensor, changed: set[str]) -> Tensor | None:
        """The part of the model that a learnt tensor belongs to; none, or another shape, is noted."""
        slot = _slot(state, name)
        if slot is None:
            is_text = isinstance(model, VisionTower) and name.startswith(_TEXT_SIDE)
            (left_out if is_text else strange).append(name)
            return None
        tensor = merged.setdefault(slot.name, state[slot.name].detach().clone())
        part = tensor if slot.parts == 1 else tensor.chunk(slot.parts)[slot.number]
        if part.shape != value.shape:
            misshapen.append(f"{name}: {tuple(value.shape)} onto {tuple(part.shape)}")
            return None
        changed.add(slot.name)
        return part

    for name, value in whole.items():
        part = place(name, value, replaced)
        if part is not None:
            part.copy_(value)
    for (module, is_embedding), sides in factors.items():
        change = _update(sides, is_embedding, module, scale, origin)
        part = place(f"{_plain(module)}.weight", change, adapted)
        if part is not None:
            part.copy_(merged_weight(part, change, sides.get("magnitude_vector")))
    _refuse(strange, misshapen, model, origin)
    if not merged:
        raise WeightsError(
            f"{origin}: nothing in it belongs to this model; it holds {', '.join(left_out[:3])}"
        )
    return merged, Merged(tuple(sorted(adapted)), tuple(sorted(replaced)), tuple(sorted(left_out)))


def _update(
    sides: Mapping[str, Tensor], is_embedding: bool, module: str, scale: _Scale, origin: str
) -> Tensor:
    """What low-rank factors add to a weight, in fp32."""
    if not {"A", "B"} <= sides.keys():
        raise WeightsError(f"{origin}: {module} has only one of its two factors, {', '.join(sides)}")
    a, b = sides["A"], sides["B"]
    rank = len(a)
    if b.shape[1] != rank:
        raise WeightsError(f"{module}: factors of rank {rank} and {b.shape[1]} do not belong together")
    if is_embedding and "magnitude_vector" in sides:
        raise ConfigError(
            f"{origin}: {module} is an embedding adapted by DoRA, which is not merged here. Merge it with "
            "peft (merge_and_unload), save that model, and load its folder"
        )
    change = update(a, b) * scale(module, rank)
    return change.T if is_embedding else change


def _plain(name: str) -> str:
    """A name as it was before peft wrapped its layer."""
    return name.replace(".base_layer.", ".")


def _slot(state: Mapping[str, Tensor], name: str) -> Slot | None:
    """Where a learnt tensor belongs, where q, k and v may be one tensor."""
    if name in state:
        return Slot(name)
    slot = slot_of(name)
    if slot.name in state:
        return slot
    module, _, kind = name.rpartition(".")
    fused = f"{module}.in_proj_{kind}"  # peft adapts torch's attention as a whole
    return Slot(fused) if fused in state else None


def _refuse(strange: list[str], misshapen: list[str], model: VisionTower | DualEncoder, origin: str) -> None:
    lines = [
        f"  {len(names)} {kind}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("not in this model", strange), ("of another shape", misshapen))
        if names
    ]
    if not lines:
        return
    tower = model.tower if isinstance(model, DualEncoder) else model
    if strange and tower.embed_dim is None:
        lines.append(
            f"  This tower has freed all that comes after layer {max(tower.layers)}: if these belong there, "
            "load the base with pooled_head=True"
        )
    raise WeightsError(f"{origin}: was not trained on this model\n" + "\n".join(lines))


def _under_its_names(
    library: Mapping[str, Tensor], learnt: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model in the layout whose names the adapter has, and the adapter."""
    best: tuple[int, dict[str, Tensor], dict[str, Tensor]] = (0, {}, {})
    layouts: tuple[Layout, ...] = ("open_clip", "open_clip_flat", "transformers")
    for layout in layouts:
        try:
            state = convert(library, layout)
        except ConfigError:
            continue  # a model that this layout cannot hold, so no adapter has its names
        named = {
            with_vision_level(name) if layout == "transformers" else name: tensor
            for name, tensor in learnt.items()
        }
        modules = {name.rpartition(".")[0] for name in state}
        hits = sum(re.split(r"\.lora_|\.base_layer|\.weight$|\.bias$", name)[0] in modules for name in named)
        best = max(best, (hits, state, named), key=lambda candidate: candidate[0])
    if not best[0]:
        raise WeightsError(
            f"{folder}: none of its tensors belongs to this model, under open_clip's or transformers' names; "
            f"they are {', '.join(sorted(learnt)[:3])}..."
        )
    return best[1:]


def _stripped(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _scale_of_run(folder: Path) -> _Scale:
    config = folder.parent.parent / "config.yaml"
    lora = validate(LoraConfig, read_yaml(config).get("lora") or {}, str(config))

    def scale(module: str, rank: int) -> float:
        if rank != lora.rank:
            raise WeightsError(f"{folder}: {module} has rank {rank}, and {config} says {lora.rank}")
        return lora.scale

    return scale


def _scale_of_peft(config: Mapping[str, Any]) -> _Scale:
    def of(pattern: str, module: str, default: Any) -> Any:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default

    def scale(module: str, rank: int) -> float:
        # Inside torch's attention, the output projection has the settings of the attention.
        module, fused, _ = module.partition(".base_layer.out_proj")
        said = of("rank_pattern", module, config["r"])
        if rank != said:
            raise WeightsError(f"{module} has rank {rank}, and {ADAPTER_CONFIG} says {said}")
        alpha = float(of("alpha_pattern", module, config["lora_alpha"]))
        once = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return once * _times_added(config) if fused else once

    return scale


def _times_added(config: Mapping[str, Any]) -> int:
    """How often peft adds the update of the output projection inside torch's attention.

    Twice, in its forward and so in training too, and when it merges (`MultiheadAttention.merge` through 0.21;
    github.com/huggingface/peft/pull/3774): what was trained is the doubled update.

    Raises:
        ConfigError: a later version wrote the adapter, of which this is not known.
    """
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.0"))
    if version is not None and (int(version[1]), int(version[2])) > _ADDED_TWICE_THROUGH:
        raise ConfigError(
            f"trained with peft {config['peft_version']} on torch's fused attention, whose output projection "
            f"peft adds twice through {'.'.join(map(str, _ADDED_TWICE_THROUGH))}; whether it still does is "
            "not known here. Merge it with that peft (merge_and_unload), save, and load the folder"
        )
    return 2


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds neither {ADAPTER_CONFIG}, as PEFT writes it, nor {LEARNT}, as a checkpoint of "
            "contrastive training does"
        ) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not JSON of keys and values: {error}") from error
    strange = [key for key, value in config.items() if value and key not in _UNDERSTOOD]
    if config.get("init_lora_weights", True) in _PLAIN_INITS:
        strange = [key for key in strange if key not in ("init_lora_weights", "eva_config")]
    if config.get("peft_type") != "LORA":
        strange = ["peft_type", *strange]
    if strange:
        raise ConfigError(
            f"{path}: {strange[0]} is {config.get(strange[0])!r}, and only LoRA, rsLoRA and DoRA are merged "
            "here. Merge it with peft (merge_and_unload), save that model, and load its folder"
        )
    return {"r": 8, "lora_alpha": 8, **config}


def _adapter_weights(folder: Path) -> dict[str, Tensor]:
    found = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if not found:
        raise WeightsError(f"{folder}: no {' or '.join(ADAPTER_WEIGHTS)} beside its {ADAPTER_CONFIG}")
    return read_state_dict(found[0])


def _origin(folder: Path, config: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    return f"{folder} (its base: {base})" if base else str(folder)


def _check_base(model: VisionTower | DualEncoder, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a base that is known to differ where no shape tells, such as another image size.

    Raises:
        WeightsError: names what differs.
    """
    known = PUBLISHED.get(str(config.get("base_model_name_or_path")))
    if known is None:
        return
    ours = clip_vision_config(model.tower if isinstance(model, DualEncoder) else model)
    compared = ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "hidden_act")
    differing = [
        f"{key} {known[key]}, here {ours.get(key)}"
        for key in compared
        if key in known and known[key] != ours.get(key)
    ]
    if differing:
        raise WeightsError(
            f"{_origin(folder, config)}: was trained on another model ({'; '.join(differing)}); load its base"
        )


def _write(model: VisionTower | DualEncoder, changed: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in changed.items():
            own[name].copy_(tensor.view_as(own[name]))  # SigLIP's scalars are vectors of one in its library
