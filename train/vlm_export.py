"""Vision-language models as folders that other libraries load as their own models."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from vlm_vision.adapters.llava_files import FILE, to_llava
from vlm_vision.adapters.save import PREFIX
from vlm_vision.adapters.transformers_files import to_transformers
from vlm_vision.errors import ConfigError
from vlm_vision.export import export_clip, vision_part
from vlm_vision.files import whole_folder
from vlm_vision.integrations.transformers import llava_fields
from vlm_vision.preprocessor_file import PREPROCESSOR_FILE, is_in_transformers
from vlm_vision.train.chat_parts import taking_parts
from vlm_vision.train.conversations import IMAGE_TOKEN
from vlm_vision.train.label_loss import changes_logits
from vlm_vision.train.model_card import write_card
from vlm_vision.train.tiles import NEWLINE, TileFormat
from vlm_vision.train.vlm import VisionLanguageModel
from vlm_vision.train.vlm_folder import LLAVA_HF, LLAVA_NEXT_HF
from vlm_vision.train.vlm_lora import LlmLora
from vlm_vision.weights import check_whole

OWN = (
    "`save_pretrained` keeps this model as it is, and AutoModelForImageTextToText loads it after "
    "`import vlm_vision.train.vlm`"
)
LORA_FOLDER = "adapter"
ROWS = 64
"""A vocabulary that grows becomes a multiple of it, as by transformers' `convert_llava_weights_to_hf.py`."""
# What LLaVA and LLaVA-NeXT call a language model of transformers with pictures: model_type, and class.
LLAVA_KINDS = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mixtral": ("llava_mixtral", "LlavaMixtralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}


def export_llava_for_transformers(
    model: VisionLanguageModel,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    lora: LlmLora | None = None,
) -> None:
    """Write a `LlavaForConditionalGeneration` folder with processor, chat template and model card.

    Of a model with tiles it is a `LlavaNextForConditionalGeneration`, with `image_newline`.

    The layout is the classic one of llava-hf, which every version of transformers reads, and vLLM too but for
    several layers of a tower without tiles (its Llava has one alone):
    `language_model.*`, `vision_tower.vision_model.*` with all layers (freed ones as zeros, which change
    nothing), `multi_modal_projector.linear_1` and `linear_2`. `<image>` becomes a token of the vocabulary;
    where that must grow for it, new rows are the mean of the others, so that their logits are the mean of
    logits and no greedy answer changes. Tensors keep their dtypes.

    Args:
        source: the folder that the model was loaded from, for what the card tells of its training.
        lora: adapters of the language model, taken apart from it: `folder/adapter`, for
            `peft.PeftModel.from_pretrained(model, ...)` and vLLM's `--lora-modules` (LoRA; it has no DoRA).
            Layers have the names of transformers from 4.52 on.

    Raises:
        ConfigError: a tower, a projector or a language model for which Llava has no slot, or pixels that no
            image processor of transformers makes; tells the alternative.
        WeightsError: as `check_whole`.
    """
    llm: Any = model.llm
    if llm.base_model_prefix != "model" or not hasattr(llm, "lm_head"):
        raise ConfigError(
            f"{type(llm).__name__} has no place in a Llava of transformers, whose names begin with `model.` "
            f"and `lm_head.`; {OWN}"
        )
    _check_head(llm)
    try:
        fields = llava_fields(model.vision_tower)
        tiled = {} if model.tiles is None else _llava_next_fields(model.tiles.form)
        vision_config, vision, _ = vision_part(model.vision_tower)
        check_whole(vision, f"{folder} is not written")
        newline = None if model.tiles is None else model.tiles.image_newline
        connector = to_transformers(model.projector, "llava_next" if tiled else "llava", newline)
    except ConfigError as error:
        raise ConfigError(f"a Llava of transformers has no slot for this model: {error}. {OWN}") from error
    _check_pixels(model)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = taking_parts(tokenizer.chat_template)
    language, rows = _language_state(llm, len(tokenizer))
    if lora is not None and rows > len(llm.get_input_embeddings().weight) and "lm_head" in lora.layers:
        lora = _with_more_words(lora, rows)
    language.pop("lm_head.bias", None)  # all zeros, or it were refused
    state = {f"language_model.{name}": tensor for name, tensor in language.items()}
    state |= {f"vision_tower.{name}": tensor for name, tensor in vision.items()}
    state |= connector
    config = {
        "architectures": [f"{'LlavaNext' if tiled else 'Llava'}ForConditionalGeneration"],
        "model_type": LLAVA_NEXT_HF if tiled else LLAVA_HF,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "pad_token_id": tokenizer.pad_token_id,
        "multimodal_projector_bias": True,
        "projector_hidden_act": model.projector.config.activation,  # type: ignore[attr-defined]
        "tie_word_embeddings": bool(llm.config.tie_word_embeddings),
        **fields,
        **tiled,
        "vision_config": vision_config,
        "text_config": {**_plain(llm.config), "vocab_size": rows},
        "torch_dtype": _dtype(llm),
    }
    has_class_token = vision_config["model_type"] == "clip_vision_model"
    processor = {
        "processor_class": "LlavaNextProcessor" if tiled else "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision_config["patch_size"],
        "num_additional_image_tokens": int(has_class_token),
        "vision_feature_select_strategy": fields["vision_feature_select_strategy"],
    }
    with whole_folder(folder) as partial:
        _write_json(partial / "config.json", config)
        _write_json(partial / "processor_config.json", processor)
        tokenizer.save_pretrained(partial)
        model.vision_tower.image_processor.save_pretrained(partial)
        if tiled:
            _cut_into_tiles(partial / PREPROCESSOR_FILE, tiled)
        _generation(model, tokenizer.pad_token_id).save_pretrained(partial)
        save_torch_state_dict(_apart(state), partial, metadata={"format": "pt"})
        write_card(model, partial, "transformers", source)
        if lora is not None:
            (partial / LORA_FOLDER).mkdir()
            lora.save(partial / LORA_FOLDER, str(folder), _llava_name)


def export_llava(
    model: VisionLanguageModel,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    lora: LlmLora | None = None,
) -> None:
    """Write a folder of LLaVA's own code: `config.json` with `mm_*`, weights under `model.`, and the tower.

    `mm_vision_tower` names `FOLDER/vision_tower`, a `CLIPVisionModel`; LLaVA looks for it from where it runs,
    so a folder that moves needs its new place there. `mm_projector.bin` holds the projector once more, for
    `--pretrain_mm_mlp_adapter`. LLaVA writes prompts by its own code (`conv_mode`), not by a chat template.

    Args:
        source: as of `export_llava_for_transformers`.
        lora: adapters of the language model, taken apart from it. The folder then is what LLaVA's LoRA
            training leaves: the adapters, and in `non_lora_trainables.bin` the projector and whatever else
            differs from the language model beneath, which LLaVA's builder takes as `model_base`.

    Raises:
        ConfigError: a part that LLaVA does not have, with the alternative.
        WeightsError: as `check_whole`.
    """
    llm: Any = model.llm
    if llm.config.model_type not in LLAVA_KINDS:
        raise ConfigError(
            f"LLaVA has no model around a {llm.config.model_type!r}, only around "
            f"{', '.join(LLAVA_KINDS)}: --to transformers, or {OWN}"
        )
    select = model.vision_tower.config.select
    if select not in ("patch", "cls_patch") or len(model.vision_tower.layers) > 1:
        raise ConfigError(f"LLaVA reads patches of one layer: --to transformers, or {OWN}")
    model_type, architecture = LLAVA_KINDS[llm.config.model_type]
    folder = Path(folder)
    with whole_folder(folder) as partial:
        try:
            written = export_clip(model.vision_tower, partial / "vision_tower")
            fields = to_llava(model.projector, partial / FILE)
        except ConfigError as error:
            raise ConfigError(f"LLaVA has no slot for this model: {error}. Or {OWN}") from error
        projector = torch.load(partial / FILE, weights_only=True)
        state = _language_state(llm, 0)[0] | projector
        tiled: dict[str, Any] = {}
        if model.tiles is not None:
            height, width = model.tiles.form.tile_size
            tiled = model.tiles.form.config.to_llava(width, height)
            if model.tiles.image_newline is not None:
                state[f"model.{NEWLINE}"] = model.tiles.image_newline.detach()
        config = {
            **_plain(llm.config),
            "architectures": [architecture],
            "model_type": model_type,
            "torch_dtype": _dtype(llm),
            "mm_vision_tower": str(folder.absolute() / "vision_tower"),
            "mm_vision_select_layer": written.select_layers[0],
            "mm_vision_select_feature": select,
            "mm_patch_merge_type": "flat",
            "image_aspect_ratio": None,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "tokenizer_padding_side": "right",
            **tiled,
            **fields,
        }
        _write_json(partial / "config.json", config)
        model.tokenizer.save_pretrained(partial)
        _copy_sentencepiece(model.tokenizer, partial)
        _generation(model, model.chat.pad_id).save_pretrained(partial)
        if lora is None:
            save_torch_state_dict(_apart(state), partial, metadata={"format": "pt"})
        else:
            base = lora.settings["base_model_name_or_path"]
            known = lora.base
            beside = {
                f"{PREFIX}{name}": tensor
                for name, tensor in _apart(state).items()
                if name not in known or not torch.equal(tensor, known[name])
            }
            torch.save(beside, partial / "non_lora_trainables.bin")
            lora.save(partial, base)
        write_card(model, partial, "llava", source)


def _llava_next_fields(form: TileFormat) -> dict[str, Any]:
    """Settings of `LlavaNextConfig` that cut pictures as a model does.

    Raises:
        ConfigError: a way of cutting or merging that LlavaNext does not have.
    """
    height, width = form.tile_size
    config, patches = form.config, form.grid
    if config.mode != "anyres" or config.merge != "spatial_unpad" or not config.base or config.max_tiles:
        raise ConfigError(
            "LlavaNext has the tiling of mode 'anyres', merge 'spatial_unpad', with base and without "
            f"max_tiles alone, not {config!r}"
        )
    if height != width or patches[0] != patches[1]:
        raise ConfigError(f"LlavaNext has square tiles alone, not {height}x{width} pixels")
    return {"image_grid_pinpoints": [[rows, columns] for columns, rows in config.resolutions(width, height)]}


def _cut_into_tiles(path: Path, tiled: Mapping[str, Any]) -> None:
    """Make a `preprocessor_config.json` that of LlavaNext's image processor."""
    content = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {**content, "image_processor_type": "LlavaNextImageProcessor", "do_pad": True, **tiled})


def _llava_name(name: str) -> str:
    """A layer of a language model in a `LlavaForConditionalGeneration`."""
    inner = name.removeprefix("model.")
    return name if inner == name else f"model.language_model.{inner}"


def _with_more_words(lora: LlmLora, rows: int) -> LlmLora:
    """Adapters of the head for words that are the mean of the others, as the head itself then has them."""
    if lora.settings["use_dora"]:
        raise ConfigError("DoRA on lm_head does not go with a vocabulary that grows: export it merged")
    factor = "lm_head.lora_B.weight"
    return replace(lora, tensors={**lora.tensors, factor: _with_mean_rows(lora.tensors[factor], rows)})


def _check_head(llm: Any) -> None:
    """Llava's own head is a matrix alone, and nothing comes after it: its logits would be others."""
    bias = getattr(llm.get_output_embeddings(), "bias", None)
    adds = bias is not None and bool(bias.any())
    if adds or changes_logits(llm):
        what = "a bias to its logits" if adds else "a scale or cap to its logits"
        raise ConfigError(
            f"a Llava of transformers has no slot for this model: {type(llm).__name__} adds {what}. {OWN}"
        )


def _language_state(llm: Any, rows: int) -> tuple[dict[str, Tensor], int]:
    """A language model's tensors as its files hold them, for at least so many tokens; and for how many."""
    state = llm.state_dict()
    check_whole(state, "the language model is not written")
    owners = {"input": llm.get_input_embeddings().weight, "output": llm.get_output_embeddings().weight}
    names = {
        side: [name for name, own in llm.named_parameters(remove_duplicate=False) if own is weight]
        for side, weight in owners.items()
    }
    tied = owners["input"] is owners["output"]
    kept, dropped = names["input"][0], names["input"][1:] if tied else []
    for name in dropped:
        del state[name]
    held = len(owners["input"])
    if held < rows:
        rows = -(-rows // ROWS) * ROWS
        tables = {kept} if tied else {kept, names["output"][0]}
        bias = getattr(llm.get_output_embeddings(), "bias", None)
        tables |= {name for name, own in llm.named_parameters() if own is bias}
        for name in tables:
            state[name] = _with_mean_rows(state[name], rows)
        held = rows
    return dict(revert_weight_conversion(llm, state)), held


def _with_mean_rows(table: Tensor, rows: int) -> Tensor:
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), *table.shape[1:])])


def _generation(model: VisionLanguageModel, pad_id: int) -> GenerationConfig:
    """How the language model generates, ending where our answers end."""
    config: Any = copy.deepcopy(model.llm.generation_config)
    config.eos_token_id, config.pad_token_id = model.chat.stop_ids, pad_id
    return config  # type: ignore[no-any-return]


def _check_pixels(model: VisionLanguageModel) -> None:
    settings = model.vision_tower.image_processor.config
    if model.tiles is not None and not (
        settings.resize in ("shortest", "squash")
        and settings.resize_in == "bytes"
        and settings.interpolation == "bicubic"
    ):
        raise ConfigError(
            f"LlavaNext's image processor makes no such pixels of tiles, {settings!r}: take 'shortest' or "
            f"'squash', bicubic, on bytes; or {OWN}"
        )
    if not is_in_transformers(settings):
        raise ConfigError(
            f"no image processor of transformers makes these pixels, {settings!r}: take 'shortest', 'squash' "
            f"or 'longest' filled with the mean colour; or {OWN}"
        )


def _copy_sentencepiece(tokenizer: Any, folder: Path) -> None:
    """LLaVA reads Llama's slow tokenizer; what was loaded from a folder with its file goes on having it."""
    beside = Path(str(tokenizer.name_or_path)) / "tokenizer.model"
    if beside.is_file() and not (folder / beside.name).exists():
        shutil.copyfile(beside, folder / beside.name)


def _plain(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = config.to_dict()
    for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version"):
        fields.pop(name, None)
    return fields


def _dtype(llm: Any) -> str:
    return str(next(llm.parameters()).dtype).removeprefix("torch.")


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with memory of their own: queries, keys and values are parts of one in open_clip."""

    def own(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu().contiguous()
        is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
        return tensor.clone() if is_part else tensor

    return {name: own(tensor) for name, tensor in state.items()}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
