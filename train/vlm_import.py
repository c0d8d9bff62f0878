"""Models of llava-hf and of LLaVA's own code, as the parts of ours: nothing is computed, only renamed."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig

from vlm_vision.adapters.llava_files import from_llava
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.transformers_files import NEWLINE, from_transformers
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.export import library_names
from vlm_vision.layouts import with_vision_level
from vlm_vision.preprocessor_file import PREPROCESSOR_FILE, PROCESSOR_FILE, read_preprocess
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.tower import VisionTower, load_tower, tower_config
from vlm_vision.train.chat_format import read_template
from vlm_vision.train.chat_parts import taking_text
from vlm_vision.train.vlm_folder import LLAVA, LLAVA_NEXT_HF
from vlm_vision.weights import find_weights_file, load_strict, read_state_dict, without_init

# The prompts that LLaVA's code writes for a model of this kind, whose files say nothing of it.
_TEMPLATES = {"llava_llama": "v1"}
_TOWER_IN_LLAVA = "model.vision_tower.vision_tower."
_NO_LANGUAGE = (
    "model.mm_projector.",
    "model.vision_tower.",
    "model.vision_resampler.",
    f"model.{NEWLINE}",
)


class Parts(NamedTuple):
    """What a vision-language model is made of; `image_newline` [L] where its `tiling` ends rows with it."""

    tower: VisionTower
    projector: Projector
    llm: nn.Module
    tokenizer: Any
    tiling: TilingConfig | None = None
    image_newline: Tensor | None = None


def read_parts(folder: Path, dtype: torch.dtype | None = None) -> Parts:
    """The parts of a folder whose `model_type` is one of FOREIGN.

    Args:
        dtype: of all parts; by default each as it is in the files.

    Raises:
        ConfigError: settings that no model here has.
        WeightsError: tensors that are missing, unexpected or misshapen.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = _read_llava(folder, config) if config["model_type"] in LLAVA else _read_llava_hf(folder)
    if dtype is None:
        return parts
    newline = None if parts.image_newline is None else parts.image_newline.to(dtype)
    return parts._replace(
        tower=parts.tower.to(dtype),
        projector=parts.projector.to(dtype),
        llm=parts.llm.to(dtype),
        image_newline=newline,
    )


def _read_llava_hf(folder: Path) -> Parts:
    config: Any = AutoConfig.from_pretrained(folder)
    state = _classic(read_state_dict(find_weights_file(folder)))
    vision = config.vision_config.to_dict()
    has_class_token = vision["model_type"] == "clip_vision_model"
    layers, keeps_all = config.vision_feature_layer, config.vision_feature_select_strategy == "full"
    if not has_class_token and not keeps_all:
        raise ConfigError(
            f"{folder}: vision_feature_select_strategy 'default' drops the first token, a patch in a "
            f"{vision['model_type']!r}; it should be 'full'"
        )
    processor = next(
        (folder / name for name in (PREPROCESSOR_FILE, PROCESSOR_FILE) if (folder / name).is_file()),
        folder / PREPROCESSOR_FILE,
    )
    described = {
        "backbone": {
            "name": "transformers",
            "architecture": vision,
            "weights": "none",
            "preprocess": read_preprocess(processor).model_dump(mode="json"),
        },
        "layer": layers if isinstance(layers, int) else list(layers),
        "select": "cls_patch" if has_class_token and keeps_all else "patch",
    }
    tower = _filled_tower(described, _part(state, "vision_tower."), folder)
    llm = _language_model(config.text_config, _part(state, "language_model."), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = taking_text(tokenizer)
    tiling = None
    if config.model_type == LLAVA_NEXT_HF:  # its code has no other merge
        sizes = tuple((width, height) for height, width in config.image_grid_pinpoints)
        tiling = TilingConfig(
            mode="anyres", grid_pinpoints=sizes, merge="spatial_unpad", margins="transformers"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{NEWLINE}, which ends a row of tiles")
        projector = from_transformers(folder)
    return Parts(tower, _like(projector, state), llm, tokenizer, tiling, state.get(NEWLINE))


def _read_llava(folder: Path, content: dict[str, Any]) -> Parts:
    if content.get("mm_use_im_start_end"):
        raise ConfigError(
            f"{folder}: mm_use_im_start_end is true: pictures between tokens of their own are not offered in "
            "a model; adapters.from_llava gives its projector"
        )
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder}: holds LoRA adapters, and no language model beneath them: merge them with LLaVA's "
            "scripts/merge_lora_weights.py; a run of ours is exported merged without --lora apart"
        )
    tiling = _llava_tiling(folder, content)
    state = read_state_dict(find_weights_file(folder))
    tower = _llava_tower(folder, content, state)
    described = {**content, "model_type": LLAVA[content["model_type"]]}
    fields = {name: value for name, value in described.items() if not name.startswith(("mm_", "image_"))}
    language = {name: tensor for name, tensor in state.items() if not name.startswith(_NO_LANGUAGE)}
    llm = _language_model(AutoConfig.for_model(**fields), language, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None and content["model_type"] in _TEMPLATES:
        tokenizer.chat_template = read_template(_TEMPLATES[content["model_type"]])
    projector = from_llava(folder, tower.grid).to(_dtype(state))
    return Parts(tower, projector, llm, tokenizer, tiling, state.get(f"model.{NEWLINE}"))


def _llava_tiling(folder: Path, content: Mapping[str, Any]) -> TilingConfig | None:
    """How LLaVA cuts the pictures of a model; None where each is one tile.

    Raises:
        ConfigError: settings that LLaVA does not know, or a newline after pictures of one tile, which LLaVA
            writes or leaves out by how it is handed the pictures.
    """
    aspect, merge = content.get("image_aspect_ratio"), content.get("mm_patch_merge_type")
    if str(aspect).startswith("anyres"):
        return TilingConfig.from_llava(aspect, content.get("image_grid_pinpoints"), merge)
    if "unpad" in str(merge):
        raise ConfigError(
            f"{folder}: mm_patch_merge_type {merge!r} with image_aspect_ratio {aspect!r}: LLaVA ends a "
            "picture of one tile with image_newline, or does not, by how it is handed over; write 'flat', or "
            "an image_aspect_ratio of 'anyres' with image_grid_pinpoints"
        )
    return None


def _llava_tower(folder: Path, content: Mapping[str, Any], state: Mapping[str, Tensor]) -> VisionTower:
    """The tower that `mm_vision_tower` names, beside the config where the folder has moved; with its weights
    from the model's own file where that has them.

    Raises:
        ConfigError: it is not there, or is no CLIP.
    """
    named = Path(str(content.get("mm_vision_tower")))
    place = folder / named.name if not named.exists() and (folder / named.name).is_dir() else named
    ratio = content.get("image_aspect_ratio")
    tower = load_tower(
        f"transformers:{place}",
        layer=content.get("mm_vision_select_layer", -2),
        select=content.get("mm_vision_select_feature", "patch"),
    )
    trained = _part(state, _TOWER_IN_LLAVA)
    if ratio == "pad":
        settings = tower.image_processor.config
        fill = [int(value * 255) for value in settings.mean]
        padded = {**settings.model_dump(mode="json"), "resize": "longest", "resize_to": None, "fill": fill}
        tree = tower.config.model_dump(mode="json")
        tree["backbone"] = {**tree["backbone"], "preprocess": padded}
        tower = load_tower(tree)
    if trained:
        _fill(tower, trained, folder)
    return tower


def _filled_tower(described: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> VisionTower:
    config = tower_config(described, dtype=str(_dtype(state)).removeprefix("torch."))
    with without_init():
        backbone = config.backbone.build(load_weights=False)
    tower = VisionTower(config, backbone)
    _fill(tower, state, folder)
    return tower.eval()


def _fill(tower: VisionTower, state: Mapping[str, Tensor], folder: Path) -> None:
    """Give a tower its tensors by transformers' names; layers after its last, which it frees, are left."""
    given = {with_vision_level(name): tensor for name, tensor in state.items()}
    names = library_names(tower)
    load_strict(
        tower, {ours: given[theirs] for ours, theirs in names.items() if theirs in given}, str(folder)
    )


def _language_model(config: Any, state: Mapping[str, Tensor], folder: Path) -> nn.Module:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{folder}: transformers has no causal language model of {config.model_type!r}")
    llm, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=dict(state), dtype=_dtype(state), output_loading_info=True
    )
    check_loaded(info, folder)
    if (folder / "generation_config.json").is_file():
        llm.generation_config = GenerationConfig.from_pretrained(folder)
    return llm  # type: ignore[no-any-return]


def check_loaded(info: Mapping[str, Any], source: str | Path) -> None:
    """Refuse a language model that `from_pretrained` could not fill, by its loading info.

    Raises:
        WeightsError: tensors are missing, unexpected or misshapen.
    """
    # Old checkpoints store the rotary frequencies, which are computed today.
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")]
    problems = {
        "missing": info["missing_keys"],
        "unexpected": unexpected,
        "misshapen": info["mismatched_keys"],
    }
    found = [f"{kind} {', '.join(sorted(map(str, keys))[:5])}" for kind, keys in problems.items() if keys]
    if found:
        raise WeightsError(f"language model {str(source)!r}: {'; '.join(found)}")


def _classic(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a Llava of any version of transformers as llava-hf's folders have them."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        if name.startswith("lm_head."):
            name = f"language_model.{name}"
        name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
        renamed[name] = tensor
    return renamed


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _like(projector: Projector, state: Mapping[str, Tensor]) -> Projector:
    return projector.to(_dtype(_part(state, "multi_modal_projector.")))


def _dtype(state: Mapping[str, Tensor]) -> Any:
    return next(iter(state.values())).dtype
