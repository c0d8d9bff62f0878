"""What a run will take, before any weight is read: tokens, parameters that learn, steps, memory.

Models are built on the meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vlm_vision.adapters.build import build_projector
from vlm_vision.dual_encoder import describe_dual_encoder
from vlm_vision.errors import ConfigError, DataError, require
from vlm_vision.tower import describe_tower
from vlm_vision.train.align_config import AlignConfig, Stage, VlmConfig
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.conversations import open_conversations
from vlm_vision.train.cost import (
    GPUS,
    UTILISATION,
    Arithmetic,
    Decoder,
    attention_flops,
    decoder_activations,
    logit_bytes,
    part_flops,
)
from vlm_vision.train.deepspeed_engine import engine_settings
from vlm_vision.train.label_loss import CHUNK
from vlm_vision.train.optim import parameter_groups, set_learning, trainable_summary
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import source_nodes
from vlm_vision.train.prepared import prepare_model
from vlm_vision.train.sources import find_files, is_there
from vlm_vision.train.tiles import TileFormat, TileMerger, tile_format
from vlm_vision.train.vlm import embedding_width, load_llm, token_grid, with_vocabulary

Precision = Literal["fp32", "bf16", "autocast"]
GIB = 2**30
SUMMED_AT_ONCE, SUB_GROUP = 500_000_000, 1_000_000_000  # DeepSpeed's own, where no setting says otherwise
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
WITHOUT_WEIGHTS = "\nA plan needs only its config.json: put that into a folder and give model.llm=FOLDER"

# What the hub's config.json of these language models says, so that a run is planned without a network.
_LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
PUBLISHED_LLMS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "lmsys/vicuna-13b-v1.5": {
        **_LLAMA,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "Qwen/Qwen2-7B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}


@dataclass(frozen=True)
class Memory:
    """Bytes on each of the processes; activations (see `cost`) and `Passing` buffers come on top.

    With P parameters of which T learn, on N processes (ZeRO, arXiv:1910.02054, sections 3.1 and 5): weights
    take w·P, gradients w·T, Adam's states k·T. In bf16, w = 2 and k = 12 (an fp32 copy and two moments); in
    fp32 and under autocast, w = 4 and k = 8 (two moments), but 12 under DeepSpeed's stages 1 to 3, which copy
    fp32 weights too. Stage 1 divides the states by N, stage 2 the gradients too, stage 3 the weights too.
    Offloaded states, and weights, take none of a GPU's. In NF4 with double quantisation a weight takes
    4 + 8/64 + 32/(64·256) bits (arXiv:2305.14314, section 3).
    """

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Passing:
    """Bytes on each process that DeepSpeed takes for a part of a step and gives back, on top of `Memory`.

    With N processes, T parameters that learn, t in the largest optimizer group, P in all, w bytes a weight:

    - backward pass: a bucket of b gradients, b·w, twice where reducing overlaps; stage 2 takes the smaller of
      b·w and w·T/N once more where it accumulates; stage 3, on several processes, has up to
      `stage3_max_live_parameters` of P whole, w for each.
    - update: stage 0 flattens up to 5e8 gradients to sum them over processes, and in bf16 has all of them in
      fp32; stages 1 to 3 flatten those of a group, w·t/N, and in bf16 have them in fp32, 4·t/N; stage 3 for
      `sub_group_size` of a group at a time. Stage 1 has given back gradients of other processes by then.

    Attributes:
        backward: beside activations.
        update: after them.
    """

    backward: float = 0.0
    update: float = 0.0


@dataclass(frozen=True)
class PartPlan:
    """One part of the model in one stage."""

    name: str
    parameters: int
    learning: int
    memory: Memory


@dataclass(frozen=True)
class StagePlan:
    """One stage, or the whole of a contrastive run.

    Attributes:
        steps: None where the data is not there and no number of records was given.
        tokens_per_step: at most, text and pictures, over all processes.
        passing: what DeepSpeed takes for a part of a step.
        activations: bytes on each process at most, in the language model and its logits.
        arithmetic: of a step, of a mean length; None for contrastive runs.
        picture_tokens: of these tokens at most pictures', one a conversation, of a model with tiles; or None.
    """

    name: str
    settings: str
    length: str
    steps: int | None
    tokens_per_step: int
    parts: tuple[PartPlan, ...]
    passing: Passing = Passing()
    activations: int | None = None
    arithmetic: Arithmetic | None = None
    picture_tokens: int | None = None

    @property
    def memory(self) -> float:
        return sum(part.memory.total for part in self.parts)

    @property
    def peak(self) -> float:
        """Bytes on each process at the worst moment of a step."""
        return self.memory + max((self.activations or 0) + self.passing.backward, self.passing.update)

    @property
    def told_of_pictures(self) -> str:
        count = self.picture_tokens
        return "" if count is None else f"; of a picture in each conversation up to {count:,}"

    def costs(self, world: int) -> list[str]:
        """Lines about activations, operations and hours."""
        if self.activations is None or self.arithmetic is None:
            return [f"  memory on each of {world} process(es): {_gib(self.memory)} GiB, and activations"]
        passing, tokens = self.passing, self.arithmetic.tokens
        lines = [
            f"  activations of the language model: up to {_gib(self.activations)} GiB; buffers of ZeRO: "
            f"{_gib(passing.backward)} GiB in the backward pass, {_gib(passing.update)} GiB in the update",
            f"  memory on each of {world} process(es): {_gib(self.peak)} GiB; buffers of kernels on top",
            f"  operations per step: {self.arithmetic.total:.3g} at {tokens:,} tokens: 2 x parameters x "
            "tokens forward,",
            "    as much for gradients through, gradients of weights, and recomputing; and attention",
        ]
        if self.parts[0].learning:
            lines.append("  the tower learns, and keeps activations of its own on top")
        if self.steps is not None:
            hours = ", ".join(f"{self.arithmetic.hours(self.steps, world, gpu):.1f} on {gpu}" for gpu in GPUS)
            lines.append(f"  hours on {world} GPU(s), at {UTILISATION:.0%} of their dense bf16 peak: {hours}")
        return lines


@dataclass(frozen=True)
class Plan:
    """What `vlm-vision plan` prints.

    Attributes:
        tokens_per_image: the most, where pictures are in tiles.
        tiles: how many a picture is cut into at most, and the tokens of one; None without.
    """

    tokens_per_image: int
    world: int
    stages: tuple[StagePlan, ...]
    tiles: tuple[int, int] | None = None

    def __str__(self) -> str:
        lines = [f"tokens per image: {self.tokens_per_image}"]
        if self.tiles is not None:
            count, tokens = self.tiles
            lines = [
                f"tokens per image: up to {self.tokens_per_image:,}, by its shape, in up to {count} tiles of "
                f"{tokens:,}"
            ]
        for stage in self.stages:
            lines += [
                "",
                f"{stage.name}: {stage.settings}",
                f"  steps: {stage.length if stage.steps is None else f'{stage.steps:,} ({stage.length})'}",
                f"  tokens per step: up to {stage.tokens_per_step:,}{stage.told_of_pictures}",
                f"  {'part':14}{'parameters':>16}{'that learn':>16}"
                f"{'weights':>10}{'gradients':>11}{'optimizer':>11}",
            ]
            for part in stage.parts:
                memory = part.memory
                lines.append(
                    f"  {part.name:14}{part.parameters:16,}{part.learning:16,}"
                    f"{_gib(memory.weights):>10}{_gib(memory.gradients):>11}{_gib(memory.optimizer):>11}"
                )
            lines += stage.costs(self.world)
        return "\n".join(lines)


def plan_align(
    config: AlignConfig, *, world: int = 1, records: int | None = None, tokens: int | None = None
) -> Plan:
    """Plan every stage of an alignment run.

    Args:
        world: processes that share the work.
        records: conversations of a stage whose file is not there.
        tokens: of a conversation in the mean, its pictures' included, for hours; None takes `max_length`, the
            most.

    Raises:
        ConfigError: a part whose config cannot be had, rules that name nothing, a batch that does not
            divide, or `tokens` above a stage's `max_length`.
        DataError: data that is there and cannot be used.
    """
    stages = []
    tokens_per_image, tiles = 0, None
    for stage in config.stages:
        if tokens is not None and tokens > stage.max_length:
            raise ConfigError(
                f"stage {stage.name!r}: a mean of {tokens} tokens is more than its max_length "
                f"{stage.max_length}, which no conversation exceeds: give the mean of what the stage reads"
            )
        model, tokens_per_image, tiles = _vision_language_model(config.model_of(stage), WITHOUT_WEIGHTS)
        _check_lengths(stage, tokens_per_image, tiles, model["llm"])
        set_learning(model, stage.learn, stage.lora)
        count = _count_conversations(stage, records)
        settings = _deepspeed_settings(model, stage, world)
        files = ", ".join(source.file for source in stage.sources)
        stages.append(
            StagePlan(
                name=f"stage {stage.name!r}",
                settings=f"batch {stage.batch_size}, ZeRO-{stage.zero_stage}, {stage.precision}",
                length=_length(stage.steps, stage.epochs, stage.batch_size, count, files),
                steps=None if stage.steps is None and count is None else stage.total_steps(count or 0),
                tokens_per_step=stage.batch_size * stage.max_length,
                parts=_stage_parts(model, stage, world, settings["zero_optimization"]),
                passing=_passing(model, stage, world, settings),
                activations=_activations(model, stage, world),
                arithmetic=_arithmetic(
                    model, stage, tokens or stage.max_length, 1 if tiles is None else tiles.most_tiles
                ),
                picture_tokens=None
                if config.model.tiling is None
                else stage.batch_size * min(tokens_per_image, stage.max_length),
            )
        )
    cut = None if tiles is None else (tiles.most_tiles, tiles.grid[0] * tiles.grid[1])
    return Plan(tokens_per_image, world, tuple(stages), cut)


def check_fit(config: AlignConfig) -> None:
    """Refuse what cannot be aligned, before a weight is read: in seconds, for parts of any size.

    Raises:
        ConfigError: a projector that the tower's grid and widths do not fit, a picture that takes more tokens
            than a stage or the language model has room for, a rule that names nothing, or a part whose config
            cannot be had.
    """
    for stage in config.stages:
        model, tokens_per_image, tiles = _vision_language_model(config.model_of(stage))
        _check_lengths(stage, tokens_per_image, tiles, model["llm"])
        try:
            set_learning(model, stage.learn, stage.lora)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}: {error}") from error


def picture_tokens(config: VlmConfig) -> tuple[int, TileFormat | None]:
    """Tokens that one picture takes at most, and how it is cut, where it is; told without a weight.

    Raises:
        ConfigError: as `check_fit`.
    """
    return _vision_language_model(config)[1:]


def _check_lengths(stage: Stage, tokens_per_image: int, tiles: TileFormat | None, llm: Any) -> None:
    """In tiles, pictures are refused one by one that take too many; here, where one tile alone does."""
    context = getattr(llm.config, "max_position_embeddings", None)
    if context is not None and stage.max_length > context:
        raise ConfigError(
            f"stage {stage.name!r}: max_length {stage.max_length} is more than the {context} positions "
            "of the language model"
        )
    if tiles is not None:
        tokens_per_image = min(tokens_per_image, tiles.grid[0] * tiles.grid[1])
    if tokens_per_image >= stage.max_length:
        raise ConfigError(
            f"stage {stage.name!r}: one picture takes {tokens_per_image} tokens, max_length is "
            f"{stage.max_length}"
        )


def plan_contrastive(config: ContrastiveConfig, *, world: int = 1, records: int | None = None) -> Plan:
    """Plan a contrastive run.

    Args:
        world: processes that share the work.
        records: pairs, where the data is not there.

    Raises:
        ConfigError: a model that is not known, or rules that name nothing.
        DataError: data that cannot be used, or is not there while the recipe must be chosen by counting it.
    """
    pairs = pictures = records
    nodes = source_nodes(config.data)
    path = ", ".join(node.path for node in nodes)
    if all(map(is_there, nodes)):
        table = Pairs(config.data)
        pairs, pictures = table.num_pairs, table.epoch_size
    if pairs is None and config.recipe == "auto" and config.rules is None:
        raise DataError(
            f"{path!r} does not exist, so there is nothing to count and choose a recipe by: "
            "give --records N, or name a recipe"
        )
    model = describe_dual_encoder(config.model)
    prepared = prepare_model(config, pairs or 0, model)
    tower = model.tower
    tokens_per_image = tower.num_patches + tower.backbone.info.prefix_tokens
    chosen = "its own rules" if config.rules else f"recipe {prepared.recipe!r} ({prepared.reason})"
    stage = StagePlan(
        name="contrastive",
        settings=f"batch {config.batch_size}, {config.precision}, {chosen}",
        length=_length(config.steps, config.epochs, config.batch_size, pictures, path),
        steps=None if config.steps is None and pictures is None else config.total_steps(pictures or 0),
        tokens_per_step=config.batch_size * (tokens_per_image + model.tokenizer.context_length),
        parts=_parts(
            model,
            3 if config.parallel == "fsdp" else 0,  # FSDP2 splits as ZeRO-3 does
            world,
            "fp32" if config.precision == "fp32" else "autocast",
        ),
    )
    return Plan(tokens_per_image, world, (stage,))


def memory_of(
    parameters: int,
    learning: int,
    *,
    zero_stage: int,
    world: int,
    precision: Precision,
    copies_fp32: bool = False,
) -> Memory:
    """Bytes on each process; see `Memory` for the formula.

    Args:
        copies_fp32: whether the optimizer copies fp32 weights as well, as DeepSpeed's stages 1 to 3 do.
    """
    width, states = (2, 12) if precision == "bf16" else (4, 12 if copies_fp32 else 8)
    share = [world if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    return Memory(
        weights=width * parameters / share[0],
        gradients=width * learning / share[1],
        optimizer=states * learning / share[2],
    )


def _vision_language_model(
    config: VlmConfig, way_out: str = ""
) -> tuple[nn.ModuleDict, int, TileFormat | None]:
    """The parts under the names that rules match, the tokens of a picture at most, and how it is cut."""
    tower = describe_tower(config.tower)
    with torch.device("meta"):
        llm = _language_model(config, way_out)
        projector = build_projector(
            with_vocabulary(config.projector, llm), tower.hidden_size, embedding_width(llm), token_grid(tower)
        )
    parts = nn.ModuleDict({"vision_tower": tower, "projector": projector, "llm": llm})
    if config.tiling is None:
        return parts, projector.tokens_out(token_grid(tower)), None
    tiles = tile_format(config.tiling, tower, projector.config, token_grid(tower))
    with torch.device("meta"):
        parts["tiles"] = TileMerger(tiles, embedding_width(llm))
    return parts, tiles.most_tokens, tiles


def _language_model(config: VlmConfig, way_out: str) -> nn.Module:
    published = None if Path(config.llm).exists() else PUBLISHED_LLMS.get(config.llm)
    if published is not None:
        llm: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**published))
        return llm
    try:
        return load_llm(config.llm, weights="none")
    except ConfigError as error:
        raise ConfigError(f"{error}{way_out}") from error


def _parts(
    model: nn.Module, zero_stage: int, world: int, precision: Precision, *, copies_fp32: bool = False
) -> tuple[PartPlan, ...]:
    return tuple(
        PartPlan(
            name,
            total,
            learning,
            memory_of(
                total,
                learning,
                zero_stage=zero_stage,
                world=world,
                precision=precision,
                copies_fp32=copies_fp32,
            ),
        )
        for name, (learning, total) in trainable_summary(model).items()
    )


def _deepspeed_settings(model: nn.ModuleDict, stage: Stage, world: int) -> dict[str, Any]:
    """What DeepSpeed is told, the stage's own JSON included."""
    if stage.deepspeed is not None:
        require("align", "deepspeed")
    learning = sum(count for count, _ in trainable_summary(model).values())
    return engine_settings(
        stage, world, stage.conversations_at_once(world), embedding_width(model["llm"]), learning
    )


def _is_offloaded(zero: Mapping[str, Any], what: Literal["optimizer", "param"]) -> bool:
    return ((zero.get(f"offload_{what}") or {}).get("device") or "none") != "none"


def _stage_parts(
    model: nn.ModuleDict, stage: Stage, world: int, zero: Mapping[str, Any]
) -> tuple[PartPlan, ...]:
    """What `_parts` gives, without what is offloaded, and with a language model of 4 bits."""
    parts = []
    for part in _parts(model, stage.zero_stage, world, stage.precision, copies_fp32=stage.zero_stage > 0):
        weights, memory = part.memory.weights, part.memory
        if stage.quantise != "none" and part.name == "llm":
            weights -= (2 - NF4_BYTES) * sum(
                layer.weight.numel()
                for name, layer in model["llm"].named_modules()
                if isinstance(layer, nn.Linear) and ".lora_" not in name and name != "lm_head"
            )
        memory = replace(
            memory,
            weights=0.0 if _is_offloaded(zero, "param") else weights,
            optimizer=0.0 if _is_offloaded(zero, "optimizer") else memory.optimizer,
        )
        parts.append(replace(part, memory=memory))
    return tuple(parts)


def _passing(model: nn.ModuleDict, stage: Stage, world: int, settings: Mapping[str, Any]) -> Passing:
    """See `Passing` for the formula."""
    zero, width = settings["zero_optimization"], 2 if stage.precision == "bf16" else 4
    groups = parameter_groups(model, stage.learn, lr=stage.lr, weight_decay=stage.weight_decay)
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    learning, largest = sum(sizes), max(sizes)
    if stage.zero_stage == 0:
        in_fp32 = 4 * learning if stage.precision == "bf16" else 0
        return Passing(update=max(width * min(learning, SUMMED_AT_ONCE), in_fp32))
    backward = width * zero["reduce_bucket_size"] * (2 if zero["overlap_comm"] else 1)
    if stage.zero_stage == 2 and settings["gradient_accumulation_steps"] > 1:
        backward += width * min(zero["reduce_bucket_size"], learning / world)
    if stage.zero_stage == 3:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if world > 1:
            backward += width * min(parameters, zero["stage3_max_live_parameters"])
        largest = min(largest, world * zero.get("sub_group_size", SUB_GROUP))
    update = 0.0
    if not _is_offloaded(zero, "optimizer"):
        update = (width + (4 if stage.precision == "bf16" else 0)) * largest / world
        if stage.zero_stage == 1:
            update -= width * (learning - learning / world)
    return Passing(backward, update)


def _decoder(llm: Any) -> Decoder:
    config = llm.config
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Decoder(
        width=config.hidden_size,
        perceptron_width=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        key_width=head_width * (getattr(config, "num_key_value_heads", None) or heads),
        vocabulary=config.vocab_size,
    )


def _activations(model: nn.ModuleDict, stage: Stage, world: int) -> int:
    """Where nothing before the language model learns, and nothing in it, it keeps nothing."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return 0
    decoder, size = _decoder(model["llm"]), 2 if stage.precision == "bf16" else 4
    tokens = stage.conversations_at_once(world) * stage.max_length
    kept = decoder_activations(
        decoder,
        tokens,
        size=size,
        learns=any(parameter.requires_grad for parameter in model["llm"].parameters()),
        checkpointing=stage.activation_checkpointing,
        zero3=stage.zero_stage == 3,
    )
    return kept + logit_bytes(decoder, min(tokens, CHUNK), size=size)


def _arithmetic(model: nn.ModuleDict, stage: Stage, length: int, tiles: int) -> Arithmetic:
    """Operations of a step whose conversations are of one length, with a picture of so many tiles each."""
    learning = trainable_summary(model)
    tower: Any = model["vision_tower"]
    rows, decoder = stage.batch_size, _decoder(model["llm"])
    patches = rows * tiles * (tower.num_patches + tower.backbone.info.prefix_tokens)
    llm: Any = model["llm"]
    embeddings = llm.get_input_embeddings().weight
    looked_up = 0 if llm.get_output_embeddings().weight is embeddings else int(embeddings.numel())
    total = 0.0
    reached = False  # whether a gradient passes back through this part
    for name, tokens in (("vision_tower", patches), ("projector", patches), ("llm", rows * length)):
        learns, parameters = learning[name][0], learning[name][1]
        if name == "llm":  # looking a row up is no product
            parameters -= looked_up
        recompute = name == "llm" and stage.activation_checkpointing
        total += part_flops(parameters, tokens, backward=reached, learns=learns > 0, recompute=recompute)
        # Adapters are few: weights under them pass gradients on, and get none.
        if 0 < learns < learning[name][1] / 2:
            total -= 2.0 * (parameters - learns) * tokens
        reached = reached or learns > 0
    total += attention_flops(
        decoder.width,
        decoder.layers,
        rows,
        length,
        backward=reached,
        recompute=stage.activation_checkpointing,
    )
    return Arithmetic(rows * length, total)


def _count_conversations(stage: Stage, records: int | None) -> int | None:
    if not all(find_files(source.file) for source in stage.sources):
        return records
    return open_conversations(stage.data).epoch_size


def _length(steps: int | None, epochs: float | None, batch_size: int, count: int | None, path: str) -> str:
    if steps is not None:
        return "as given"
    if count is None:
        return f"{epochs:g} epoch(s) of N // {batch_size}; {path!r} is not there, give --records N"
    return f"{epochs:g} epoch(s) of {count:,} // {batch_size}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
