"""Towers and dual encoders as folders that other libraries load as their own models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm_vision.architectures import open_clip_architecture, transformers_config
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError
from vlm_vision.files import whole_folder
from vlm_vision.layouts import convert
from vlm_vision.tokenizer_files import is_clip_tokenizer, write_tokenizer
from vlm_vision.tower import CONFIG_FILE, WEIGHTS_FILE, VisionTower, load_tower, saved_folder
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import check_whole

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# Our names of a backbone's parts, and the names that its library's own model gives them.
LIBRARY_NAMES = {
    "open_clip": {"backbone.visual.": "visual."},
    "transformers": {
        "backbone.embeddings.": "vision_model.embeddings.",
        "backbone.pre_norm.": "vision_model.pre_layrnorm.",
        "backbone.blocks.": "vision_model.encoder.layers.",
        "backbone.norm.": "vision_model.post_layernorm.",
        "backbone.head.": "vision_model.head.",
        "text.": "",  # its text tower has its library's names within
        "image_projection.": "visual_projection.",
    },
}
# Whole models of transformers by their `model_type`.
DUAL_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
_BLOCK = "vision_model.encoder.layers."


@dataclass(frozen=True)
class ClipExport:
    """What `export_clip` wrote.

    Attributes:
        layers: of the model in the folder.
        placeholders: layers of zeros, which pass their input on unchanged, in place of layers that the tower
            no longer had.
        has_pooled: whether its pooled output is the model's; otherwise it is all zeros.
        select_layers: of `hidden_states`, those that are the tower's features, counted from the end.
    """

    layers: int
    placeholders: tuple[int, ...]
    has_pooled: bool
    select_layers: tuple[int, ...]


def load_whole_tower(source: str | Path | Mapping[str, Any]) -> VisionTower:
    """A tower with every layer that its source has; a folder of a vision-language model gives its tower.

    Raises:
        ConfigError, WeightsError: as `load_tower`.
    """
    if isinstance(source, (str, Path)) and (Path(source) / "tower" / CONFIG_FILE).is_file():
        source = Path(source) / "tower"
    return load_tower(source) if saved_folder(source) is not None else load_tower(source, pooled_head=True)


def export_clip(tower: VisionTower, folder: str | Path) -> ClipExport:
    """Write a `CLIPVisionModel` folder of transformers: LLaVA and LLaVA-NeXT take its path as vision tower.

    Every version of transformers reads it: names carry the `vision_model.` level, and sizes of the image
    processor are mappings. A tower gives features of one layer and has freed those after it, but readers
    count layers from the end (`hidden_states[-2]`). So freed layers are written as zeros: a pre-norm block of
    zeros adds nothing to its input, all counts stay right, and the tower's features are what LLaVA reads at
    any layer from the tower's own on. The final norm, where it is gone too, is zeros as well, so that no one
    takes a pooled output for an image embedding.

    Raises:
        ConfigError: the tower is no CLIP ViT, or its preprocessing is not one of a `CLIPImageProcessor`.
    """
    clip_vision_config(tower)
    _check_processor(tower.image_processor.config)
    config, state, written = vision_part(tower)
    dtype = str(tower.dtype).removeprefix("torch.")
    content = {
        "architectures": ["CLIPVisionModel"],
        **config,
        "torch_dtype": dtype,
        "vlm_vision": {
            "select_layers": list(written.select_layers),
            "select_feature": tower.config.select,
            "placeholder_layers": list(written.placeholders),
            "has_pooled_output": written.has_pooled,
        },
    }
    with whole_folder(folder) as partial:
        _write(partial, {CONFIG_FILE: content}, state, WEIGHTS_FILE)
        tower.image_processor.save_pretrained(partial)
    return written


def vision_part(tower: VisionTower) -> tuple[dict[str, Any], dict[str, Tensor], ClipExport]:
    """Config, tensors and what was filled in of the `CLIPVisionModel` or `SiglipVisionModel` that a tower is.

    Names have the `vision_model.` level. Layers that the tower has freed, and a norm after them, are zeros,
    see `export_clip`; a head that is gone is none, as the config says.

    Raises:
        ConfigError: it is neither.
    """
    config = vision_config(tower)
    state = convert(library_state(tower), "transformers")
    state.pop("visual_projection.weight", None)  # no part of a vision model alone
    total: int = config["num_hidden_layers"]
    kept = 1 + max(int(name.removeprefix(_BLOCK).split(".")[0]) for name in state if name.startswith(_BLOCK))
    first = {name: tensor for name, tensor in state.items() if name.startswith(f"{_BLOCK}0.")}
    for layer in range(kept, total):
        for name, tensor in first.items():
            state[name.replace(f"{_BLOCK}0.", f"{_BLOCK}{layer}.")] = torch.zeros_like(tensor)
    has_pooled = "vision_model.post_layernorm.weight" in state
    for name in () if has_pooled else ("weight", "bias"):
        state[f"vision_model.post_layernorm.{name}"] = torch.zeros_like(
            state[f"{_BLOCK}0.layer_norm1.weight"]
        )
    if config["model_type"] == "siglip_vision_model":
        config["vision_use_head"] = any(name.startswith("vision_model.head.") for name in state)
    written = ClipExport(
        layers=total,
        placeholders=tuple(range(kept + 1, total + 1)),
        has_pooled=has_pooled,
        select_layers=tuple(layer - total - 1 for layer in tower.layers),
    )
    return config, state, written


def export_open_clip(model: DualEncoder, folder: str | Path) -> None:
    """Write a folder that open_clip loads: `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

    `open_clip.get_tokenizer` of the same name gives its tokenizer: open_clip's own, or that of the files in
    the folder, before which open_clip cleans texts (`ftfy`, white space).

    Raises:
        ConfigError: open_clip has no such model, or its preprocessing is not one of open_clip's.
    """
    architecture = open_clip_dual_architecture(model)
    if model.config.image_size is not None and architecture["vision_cfg"].get("timm_model_name"):
        raise ConfigError(
            f"this tower was resized to {model.config.image_size}, and open_clip builds its trunk from timm "
            "at the trunk's own size: export it without image_size"
        )
    if "multimodal_cfg" in architecture and model.text_decoder is None:
        raise ConfigError(
            "this is a CoCa that an older version saved without its decoder, so open_clip could not load it: "
            "load it from its source again"
        )
    architecture.pop("init_logit_bias", None)
    if model.logit_bias is not None:
        architecture["init_logit_bias"] = model.logit_bias.item()
    settings = model.image_processor.config
    if settings.resize_to not in (None, settings.image_size):
        raise ConfigError(
            f"preprocess.resize_to is {settings.resize_to}, and open_clip resizes to its image size, "
            f"{settings.image_size}: set it to that, and check what it does to your scores"
        )
    flat = not architecture.get("custom_text") and not architecture["text_cfg"].get("hf_model_name")
    state = convert(library_state(model), "open_clip_flat" if flat else "open_clip")
    content = {
        "model_cfg": architecture,
        "preprocess_cfg": {
            "mean": list(settings.mean),
            "std": list(settings.std),
            "interpolation": settings.interpolation,
            "resize_mode": settings.resize,
            "fill_color": settings.fill,
        },
    }
    with whole_folder(folder) as partial:
        _write(partial, {OPEN_CLIP_CONFIG: content}, state, OPEN_CLIP_WEIGHTS)
        if architecture["text_cfg"].get("hf_tokenizer_name"):
            model.tokenizer.save_pretrained(partial)


def export_transformers(model: DualEncoder, folder: str | Path) -> str:
    """Write a whole `CLIPModel`, `SiglipModel` or `Siglip2Model` folder of transformers, with its processor.

    `CLIPProcessor.from_pretrained` (`SiglipProcessor`, `AutoProcessor`) gives the image processor and the
    tokenizer. `CLIPVisionModel.from_pretrained` takes the vision tower alone from it, and so does LLaVA.

    Returns:
        The name of the class.

    Raises:
        ConfigError: transformers has no model that computes this, or no image processor or tokenizer.
    """
    config = transformers_dual_config(model)
    _check_processor(model.image_processor.config)
    takes_bias = config["model_type"] != "clip"
    if takes_bias and model.logit_bias is None:
        raise ConfigError(
            "an older version saved this SigLIP without its logit_bias, and transformers' models have one: "
            "load it from its source again, or set model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))"
        )
    if not takes_bias and model.logit_bias is not None:
        raise ConfigError(
            "this CLIP has a logit_bias, and transformers' CLIPModel has none: set model.logit_bias = None, "
            "which leaves the embeddings as they are, and add the bias to the logits yourself"
        )
    state = convert(library_state(model), "transformers")
    dtype = str(model.tower.dtype).removeprefix("torch.")
    with whole_folder(folder) as partial:
        _write(partial, {CONFIG_FILE: {**config, "torch_dtype": dtype}}, state, WEIGHTS_FILE)
        model.image_processor.save_pretrained(partial)
        write_tokenizer(model.tokenizer, partial)
    return str(config["architectures"][0])


def transformers_dual_config(model: DualEncoder) -> dict[str, Any]:
    """The `config.json` of the model of transformers that a dual encoder is.

    Raises:
        ConfigError: it is none, with the reason.
    """
    backbone, architecture = model.portable_config(), _architecture(model.tower)
    if backbone.name == "transformers":
        whole: dict[str, Any] = deepcopy(getattr(backbone, "text_architecture", None) or {})
        names = [DUAL_CLASSES[whole["model_type"]]]
        return {**whole, "vision_config": architecture, "architectures": names}
    if backbone.name == "open_clip":
        try:
            return transformers_config(architecture)
        except ConfigError as error:
            raise ConfigError(
                f"this dual encoder has no counterpart in transformers: {error}. open_clip loads it: "
                "--to open_clip"
            ) from error
    raise ConfigError(
        f"this dual encoder's backbone is from {backbone.name}: only those of open_clip and transformers are "
        "known there"
    )


def open_clip_dual_architecture(model: DualEncoder) -> dict[str, Any]:
    """open_clip's `model_cfg` of a dual encoder.

    Raises:
        ConfigError: open_clip has no such model, with the reason.
    """
    backbone = model.portable_config()
    if backbone.name == "open_clip":
        return _architecture(model.tower)
    if backbone.name != "transformers":
        raise ConfigError(
            f"this dual encoder's backbone is from {backbone.name}, so it is no open_clip model"
        )
    try:
        architecture = open_clip_architecture(transformers_dual_config(model))
    except ConfigError as error:
        raise ConfigError(
            f"this dual encoder has no counterpart in open_clip: {error}. transformers loads it: "
            "--to transformers"
        ) from error
    if not is_clip_tokenizer(model.tokenizer):
        # open_clip takes it from the folder itself; the name only says that there is one.
        architecture["text_cfg"].setdefault("hf_tokenizer_name", "tokenizer")
    return architecture


def clip_vision_config(tower: VisionTower) -> dict[str, Any]:
    """The `config.json` of the `CLIPVisionModel` that a tower's backbone is; with all its layers.

    Raises:
        ConfigError: it is no CLIP ViT.
    """
    config = vision_config(tower, wanted="CLIPVisionModel")
    if config["model_type"] == "clip_vision_model":
        return config
    raise _no_vision_model(tower, "CLIPVisionModel", f" ({config['model_type']})")


def vision_config(tower: VisionTower, wanted: str = "CLIP or SigLIP of transformers") -> dict[str, Any]:
    """The `config.json` of the CLIP or SigLIP of pictures that a tower's backbone is, with all its layers.

    Args:
        wanted: what the refusal calls it.

    Raises:
        ConfigError: it is neither.
    """
    backbone = tower.backbone.portable_config()
    architecture = _architecture(tower)
    if backbone.name == "open_clip":
        architecture.pop("text_cfg", None)  # what the text tower is does not matter here
        try:
            architecture = transformers_config(architecture)
        except ConfigError as error:
            raise ConfigError(f"this tower is no {wanted}: {error}") from error
    model_type = architecture.get("model_type", "")
    if model_type in ("clip_vision_model", "siglip_vision_model"):
        return architecture
    raise _no_vision_model(tower, wanted, f" ({model_type})" if model_type else "")


def _no_vision_model(tower: VisionTower, wanted: str, kind: str) -> ConfigError:
    backbone = tower.backbone.portable_config()
    return ConfigError(
        f"this tower is no {wanted}: its backbone is {backbone.name}:{backbone.model or ''}{kind}; CLIP ViTs "
        "of open_clip and transformers are"
    )


def _architecture(tower: VisionTower) -> dict[str, Any]:
    """A backbone's architecture in its library's terms, at the tower's image size; empty if it has none."""
    found = deepcopy(getattr(tower.backbone.portable_config(), "architecture", None) or {})
    vision: dict[str, Any] = found.get("vision_cfg", found)
    if tower.config.image_size is not None and found:
        vision["image_size"] = tower.config.image_size
    return dict(found)


def library_names(model: VisionTower | DualEncoder) -> dict[str, str]:
    """Our name of each tensor to the name that its library's own model has for it.

    Raises:
        ConfigError: a backbone whose library's names are not known here.
    """
    return {name: library_name(model, name) for name in model.state_dict()}


def library_name(model: VisionTower | DualEncoder, name: str) -> str:
    """The name that the library's own model has for a tensor or a layer of ours.

    Raises:
        ConfigError: as `library_names`.
    """
    tower = model.tower if isinstance(model, DualEncoder) else model
    source = tower.backbone.portable_config().name
    inner = name.removeprefix("tower.") if model is not tower else name
    for prefix, theirs in LIBRARY_NAMES.get(source, {}).items():
        if inner.startswith(prefix):
            return theirs + inner.removeprefix(prefix)
    if model is not tower and not name.startswith("tower."):
        return name  # open_clip's text side and the temperature have its names
    raise ConfigError(
        f"a backbone of {source!r} has no names in CLIP's layouts ({name}); open_clip's and transformers' "
        "CLIP have"
    )


def library_state(model: VisionTower | DualEncoder) -> dict[str, Tensor]:
    """The tensors under the names of the library that the backbone comes from, in its shapes.

    Raises:
        ConfigError: as `library_names`.
    """
    state = model.state_dict()
    named = {theirs: state[ours] for ours, theirs in library_names(model).items()}
    if "logit_bias" in named and "text_model.head.weight" in named:  # transformers' SigLIP
        named |= {name: named[name].reshape(1) for name in ("logit_scale", "logit_bias")}
    return named


def _check_processor(settings: PreprocessConfig) -> None:
    if settings.resize == "longest":
        raise ConfigError(
            "preprocess.resize is 'longest', which a CLIPImageProcessor cannot do: export with "
            "'shortest', and let LLaVA pad (image_aspect_ratio: pad)"
        )


def _write(folder: Path, configs: Mapping[str, Any], state: Mapping[str, Tensor], weights: str) -> None:
    check_whole(state, f"{weights} is not written")
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / weights, {"format": "pt"}
    )
