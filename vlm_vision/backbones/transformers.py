"""Vision models of transformers, under 4.37 and today's alike: known families, and the rest by a wrapper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import cached_file, logging

from vlm_vision.backbone import Backbone
from vlm_vision.backbones.config import PUBLISHED, TransformersConfig
from vlm_vision.backbones.transformers_any import HEADS, GenericBackbone
from vlm_vision.backbones.transformers_vit import FAMILIES, IMAGENET, VISION_PART, patch_size
from vlm_vision.compat import clip_vision_trunk
from vlm_vision.errors import ConfigError, DataError, WeightsError, first_line
from vlm_vision.layouts import read_converted
from vlm_vision.preprocess import PREPROCESSOR_FILE, read_preprocess
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import find_weights_file, load_strict, without_init

RANDOM = "none"
DEFAULT_SIZE = 224
POOLER = ".pooler."


def build(config: TransformersConfig, *, load_weights: bool = True) -> Backbone:
    """The vision part of a model.

    Raises:
        ConfigError: the model's config cannot be had, this transformers does not have it, or it is no model
            of pictures.
        WeightsError: missing, unexpected or misshapen tensors.
    """
    random = config.weights == RANDOM or not load_weights
    weights = None if random else (config.weights or config.model)
    if weights is None and not random:
        raise WeightsError(
            f"an `architecture` alone has no weights; name a folder or hub id, or {RANDOM!r} for random ones"
        )
    content = _vision_config(config, random)
    family = FAMILIES.get(content["model_type"])
    if family is None:
        model_config = _any_config(content)
        preprocess = _preprocess(config, weights, model_config, IMAGENET)
        model, missing = _load(AutoModel, model_config, weights, HEADS, may_miss=POOLER)
        if missing:
            model.pooler = None
        return GenericBackbone(model, config, model_config, preprocess)
    model_config = _family_config(_class(family.config, content["model_type"]), content)
    defaults = dict(family.preprocess)
    if family.any_size:
        defaults |= {"max_patches": model_config.num_patches, "patch_size": patch_size(model_config)}
    preprocess = _preprocess(config, weights, model_config, defaults)
    model_class = _class(family.model, content["model_type"])
    model, _ = _load(model_class, model_config, weights, family.beside, **family.loading)
    return family.backbone(model, family, config, model_config, preprocess)


def _vision_config(config: TransformersConfig, random: bool) -> dict[str, Any]:
    """What `config.json` says of the vision part, with its `model_type`.

    Raises:
        ConfigError: there is none.
    """
    content = config.architecture
    needs_no_hub = random or Path(str(config.weights)).exists()
    if content is None and needs_no_hub and not Path(str(config.model)).exists():
        content = PUBLISHED.get(str(config.model))
    if content is None:
        content = read_whole_config(config)
    whole = content.get("model_type")
    vision = dict(content.get("vision_config") or content)
    model_type = vision.get("model_type", VISION_PART.get(str(whole), whole))
    model_type = VISION_PART.get(str(model_type), model_type)
    if model_type is None:
        raise ConfigError(f"transformers:{config.model or 'architecture'}: its config has no `model_type`")
    return {**vision, "model_type": model_type}


def read_whole_config(config: TransformersConfig) -> dict[str, Any]:
    """The content of `config.json` at the model's hub id or folder.

    Raises:
        ConfigError: there is none.
    """
    try:
        content: dict[str, Any] = PretrainedConfig.get_config_dict(config.model)[0]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"transformers:{config.model}: no config at this hub id or folder "
            f"({first_line(error)}). Offline, download it first and name the folder"
        ) from error
    return content


def _class(name: str, model_type: str) -> Any:
    """A class of transformers by its name.

    Raises:
        ConfigError: this version does not have it.
    """
    found = getattr(transformers, name, None)
    if found is None:
        raise ConfigError(
            f"transformers {transformers.__version__} has no {name}, which {model_type!r} needs: "
            "pip install -U transformers"
        )
    return found


def _family_config(config_class: Any, content: Mapping[str, Any]) -> PretrainedConfig:
    try:
        model_config: PretrainedConfig = config_class.from_dict(dict(content))
    except Exception as error:  # each version of the library checks in its own way
        raise ConfigError(f"{content['model_type']!r}: this config is not understood: {error}") from error
    return model_config


def _any_config(content: Mapping[str, Any]) -> PretrainedConfig:
    fields = {name: value for name, value in content.items() if name != "model_type"}
    try:
        return AutoConfig.for_model(content["model_type"], **fields)
    except Exception as error:  # each version of the library checks in its own way
        raise ConfigError(
            f"transformers {transformers.__version__} does not understand a config of type "
            f"{content['model_type']!r}: {error}"
        ) from error


def _native_size(model_config: Any) -> int | tuple[int, int] | None:
    """Side of the pictures that a model's positions are for, or None where its config does not say."""
    if hasattr(model_config, "num_patches") and not hasattr(model_config, "image_size"):  # NaFlex
        return patch_size(model_config) * math.isqrt(model_config.num_patches)
    size = getattr(model_config, "image_size", None)
    if size is None or isinstance(size, int):
        return size
    height, width = (int(side) for side in size)
    return height if height == width else (height, width)


def _preprocess(
    config: TransformersConfig,
    weights: str | None,
    model_config: PretrainedConfig,
    defaults: Mapping[str, Any],
) -> PreprocessConfig:
    """Settings of the node, else of the weights, else of the family, at the model's native size."""
    native = _native_size(model_config)
    if config.preprocess is not None:
        settings = config.preprocess
    elif weights is None:
        settings = PreprocessConfig(image_size=native or DEFAULT_SIZE, **defaults)
    else:
        settings = _read_settings(config, weights, native, defaults)
    # DINOv2 was trained at 518 and its processor crops 224.
    return settings if native in (None, settings.image_size) else settings.at_size(native)


def _read_settings(
    config: TransformersConfig,
    weights: str,
    native: int | tuple[int, int] | None,
    defaults: Mapping[str, Any],
) -> PreprocessConfig:
    """What lies beside the weights says, else what lies beside the model that they are for."""
    for place in (weights, config.model):
        folder = str(Path(place).parent) if place and Path(place).is_file() else place
        try:
            found = folder and cached_file(folder, PREPROCESSOR_FILE)
        except OSError:
            continue
        if found:
            return read_preprocess(Path(found))
    if Path(weights).exists() and config.model in PUBLISHED:  # they are prepared as their family is
        return PreprocessConfig(image_size=native or DEFAULT_SIZE, **defaults)
    raise DataError(
        f"{weights} has no {PREPROCESSOR_FILE}, so the right preprocessing of these weights is unknown; "
        "add the file, or set `backbone.preprocess`"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load(
    model_class: Any,
    model_config: PretrainedConfig,
    weights: str | None,
    beside: tuple[str, ...],
    may_miss: str | None = None,
    **loading: Any,
) -> tuple[Any, list[str]]:
    """A model in float32 with random weights, or with those of a folder or hub id.

    Args:
        beside: beginnings of names of tensors that whole checkpoints hold beside this model.
        may_miss: the level in names of tensors that may be missing.
        loading: arguments of the library's `from_pretrained`.

    Returns:
        The model, and the names of tensors that are missing.

    Raises:
        ConfigError: transformers cannot build a model from this config.
        WeightsError: weights that cannot be had or do not fit.
    """
    if weights is None:
        try:
            model: nn.Module = (
                AutoModel.from_config(model_config) if model_class is AutoModel else model_class(model_config)
            )
        except Exception as error:  # each version of the library checks in its own way
            raise ConfigError(
                f"transformers builds no model of type {model_config.model_type!r}: {first_line(error)}"
            ) from error
        return model, []
    if model_config.model_type == "clip_vision_model" and Path(weights).exists():
        return _load_clip(model_class, model_config, weights, beside), []
    try:
        with _quiet():  # its report of what is wrong is raised below, and the text side is not wrong
            model, report = model_class.from_pretrained(
                weights,
                config=model_config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **loading,
            )
    except Exception as error:  # the hub, safetensors and torch each have their own family
        raise WeightsError(f"transformers:{weights}: weights cannot be loaded: {error}") from error
    missing = [name for name in report["missing_keys"] if not name.endswith("position_ids")]
    forgiven = [name for name in missing if may_miss is not None and may_miss in f".{name}"]
    wrong = {
        "missing": [name for name in missing if name not in forgiven],
        "unexpected": [
            name
            for name in report["unexpected_keys"]
            if not name.startswith(beside) and not name.endswith("position_ids")
        ],
        "of another shape": [
            f"{name}: file has {tuple(found)}, model needs {tuple(needed)}"
            for name, found, needed in report["mismatched_keys"]
        ],
    }
    lines = [
        f"  {len(names)} {kind}: {', '.join(sorted(names)[:5])}" for kind, names in wrong.items() if names
    ]
    if lines:
        raise WeightsError(
            f"transformers:{weights}: these weights are not for this model\n" + "\n".join(lines)
        )
    return model.to(torch.float32), forgiven


def _load_clip(model_class: Any, model_config: Any, weights: str, beside: tuple[str, ...]) -> nn.Module:
    """CLIP's vision model from a file or folder, in any layout that `vlm_vision.layouts` converts."""
    path, origin = Path(weights), f"transformers:{weights}"
    try:
        state, quick_gelu = read_converted(find_weights_file(path) if path.is_dir() else path, "transformers")
    except WeightsError as error:
        raise WeightsError(f"{origin}: weights cannot be loaded: {error}") from error
    if quick_gelu is not None and quick_gelu != (model_config.hidden_act == "quick_gelu"):
        trained = "QuickGELU" if quick_gelu else "GELU"
        raise WeightsError(
            f"{origin}: these weights were trained with {trained}, this model computes "
            f"{model_config.hidden_act!r}, so its features would be wrong; use a model, or an "
            f"`architecture`, whose hidden_act is {'quick_gelu' if quick_gelu else 'gelu'!r}"
        )
    with without_init():
        model: nn.Module = model_class(model_config)
    own = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in state.items()
        if not name.startswith(beside)
    }
    load_strict(clip_vision_trunk(model), own, origin)
    return model
