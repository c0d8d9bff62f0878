"""Alignment: a tower, a projector and a language model become one model, stage by stage, on DeepSpeed."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlm_vision.adapters.build import build_projector, load_projector
from vlm_vision.adapters.lora import merge_lora
from vlm_vision.adapters.projector_keys import load_projector_weights
from vlm_vision.errors import DataError
from vlm_vision.tower import load_tower
from vlm_vision.train.align_config import AlignConfig, Stage, VlmConfig
from vlm_vision.train.conversation_check import measure_for_training
from vlm_vision.train.conversations import (
    ChatFormat,
    check_sources,
    open_conversations,
    read_template,
)
from vlm_vision.train.deepspeed_engine import current_device, engine_settings, join_ranks
from vlm_vision.train.going_on import DONE_FILE, begin_data, begin_run
from vlm_vision.train.lean_loading import load_llm_lean
from vlm_vision.train.llm_adapters import ADAPTERS_FOLDER, save_llm_lora
from vlm_vision.train.plan import check_fit, picture_tokens
from vlm_vision.train.quantise import check_quantise, load_llm_nf4, onto_whole_weights
from vlm_vision.train.run import prepare_process, training_attention
from vlm_vision.train.stage import run_stage
from vlm_vision.train.tiles import TileFormat, load_newline
from vlm_vision.train.vlm import (
    Part,
    VisionLanguageModel,
    embedding_width,
    load_llm,
    load_text_tokenizer,
    load_tokenizer,
    token_grid,
    with_vocabulary,
)


@training_attention()
def align(config: AlignConfig, output: str | Path, *, resume: bool = False) -> dict[str, dict[str, float]]:
    """Run the stages one after another; the finished model is `output/model`.

    Each stage is a run folder `output/<stage>`. When it ends, it leaves the parts that learnt in its `model`
    and its figures in `done.json`; the next stage starts from these parts. Adapters are merged in them; with
    `keep_adapters` those of the language model are in `output/<stage>/adapters` as well.

    Args:
        resume: skip finished stages and continue the unfinished one from its newest checkpoint, bit-exact.
            Its config and records are those that it began with, but for what changes no number.

    Returns:
        Per stage: last loss, steps, seconds, conversations per second, records replaced and truncated.

    Raises:
        ConfigError: parts that do not fit, rules that name nothing, a batch that does not divide.
        DataError: data that cannot be used, or an output folder with another run in it.
        WeightsError: weights that do not fit.
        VlmVisionError: a loss that is not finite.
    """
    check_fit(config)
    rank, world, _ = join_ranks()
    output = Path(output)
    for stage in config.stages:
        if not (output / stage.name / DONE_FILE).is_file():
            _check_stage(config, stage, world)
    begin_run(config, output, resume=resume, is_main=rank == 0)
    figures: dict[str, dict[str, float]] = {}
    learnt: dict[Part, Path] = {}
    for stage in config.stages:
        folder = output / stage.name
        is_last = stage is config.stages[-1]
        target = output / "model" if is_last else folder / "model"
        done = folder / DONE_FILE
        if not done.is_file():
            prepare_process(config.seed)
            conversations = open_conversations(stage.data)
            if rank == 0:
                begin_data(conversations.digest(), folder)
            seen = config.model_of(stage)
            chat, tiles = text_format(seen, stage)
            measured = measure_for_training(conversations, chat, stage, folder, tiles)
            model = build_model(seen, stage, learnt)
            model.use_loss_kernel(stage.loss_kernel)
            record = run_stage(model, conversations, measured, stage, config.seed, folder, resume=resume)
            if rank == 0:
                if stage.quantise != "none":
                    source = learnt.get("llm", config.model.llm)
                    model.llm = onto_whole_weights(model.llm.cpu(), source, stage.lora)
                if stage.keep_adapters:
                    below = str(learnt.get("llm", config.model.llm))
                    save_llm_lora(model, folder / ADAPTERS_FOLDER, stage.lora, base=below)
                if any(rule.learn == "lora" for rule in stage.learn):
                    merge_lora(model)
                model.save_pretrained(target, parts=model.parts if is_last else record["parts"])
                done.write_text(json.dumps(record, indent=2), encoding="utf-8")
            dist.barrier()
            del model
            gc.collect()  # engine and model refer to each other
        if not target.is_dir():
            raise DataError(
                f"{folder} holds a finished stage, but {target}, which it leaves there, is gone. The last "
                "stage leaves `model`, an earlier one its own folder's: stages cannot be added behind a "
                "finished run, or taken away. Give another output folder, and the parts in "
                f"{output / 'model'} as `model` to begin where it ended"
            )
        record = json.loads(done.read_text(encoding="utf-8"))
        figures[stage.name] = record["figures"]
        learnt |= {part: target / part for part in record["parts"]}
    return figures


def _check_stage(config: AlignConfig, stage: Stage, world: int) -> None:
    """What shows in seconds, of a later stage too: before hours of an earlier one, and before any weight.

    Raises:
        ConfigError: settings of DeepSpeed, a quantised model, a chat template, or a batch that cannot be.
        DataError: a file or an image folder of its data is not there.
    """
    share = stage.conversations_at_once(world)
    engine_settings(stage, world, share, width=1, learning=1)  # what a JSON may not say shows in any model
    if stage.quantise != "none":
        check_quantise(config.model)
    _tokenizer(config.model, stage)
    check_sources(stage.data)


def text_format(config: VlmConfig, stage: Stage) -> tuple[ChatFormat, TileFormat | None]:
    """How the model of a stage writes conversations and cuts pictures, told without a weight."""
    tokens, tiles = picture_tokens(config)
    return ChatFormat(_tokenizer(config, stage), None if tiles else tokens), tiles


def _tokenizer(config: VlmConfig, stage: Stage) -> Any:
    template = stage.chat_template or config.chat_template
    return load_tokenizer(config.llm, None if template is None else read_template(template))


def build_model(config: VlmConfig, stage: Stage, learnt: Mapping[Part, Path]) -> VisionLanguageModel:
    """The model as a stage begins: what learnt in an earlier stage from there, the rest from its source.

    Raises:
        ConfigError, WeightsError: a part cannot be loaded, or the parts do not fit.
    """
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    tokenizer = _tokenizer(config, stage)
    tower = load_tower(learnt.get("tower", config.tower))
    if stage.quantise != "none":
        llm = load_llm_nf4(learnt.get("llm", config.llm), current_device())
    elif "llm" not in learnt and config.llm_weights == "none":
        llm = load_llm(config.llm, dtype=dtype, weights="none")
    elif stage.zero_stage == 3:
        llm = load_llm_lean(learnt.get("llm", config.llm), dtype)
    else:
        llm = load_llm(learnt.get("llm", config.llm), dtype=dtype)
    if "projector" in learnt:
        projector = load_projector(learnt["projector"])
    else:
        projector = build_projector(
            with_vocabulary(config.projector, llm), tower.hidden_size, embedding_width(llm), token_grid(tower)
        )
        if config.projector_weights is not None:
            load_projector_weights(projector, config.projector_weights)
    text_tokenizer = load_text_tokenizer(learnt["projector"]) if "projector" in learnt else None
    model = VisionLanguageModel(
        tower.to(dtype), projector.to(dtype), llm, tokenizer, text_tokenizer, config.tiling
    )
    newline = learnt.get("tiles", config.tiles_weights)
    if model.tiles is not None and newline is not None:
        load_newline(model.tiles, Path(newline), dtype)
    return model
