"""What an alignment run is made of: the parts, and the stages in which they learn. No torch here."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from vlm_vision.adapters.config import ProjectorNode
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.adapters.mlp_config import MlpConfig
from vlm_vision.config import Config
from vlm_vision.errors import ConfigError
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.tower_config import TowerConfig
from vlm_vision.train.conversations_config import (
    ConversationConfig,
    ConversationData,
    Share,
    conversation_sources,
)
from vlm_vision.train.rules import Rule

__all__ = ["AlignConfig", "ConversationConfig", "Share", "Stage", "VlmConfig"]


def _tower_source(value: Any) -> str | TowerConfig:
    if isinstance(value, (str, TowerConfig)):
        return value
    if isinstance(value, dict):
        return TowerConfig.model_validate(value)
    raise ValueError("must be a folder, a `source:model[@weights]`, a YAML file, or a tower's fields")


def _tower_fields(value: str | TowerConfig) -> Any:
    return value if isinstance(value, str) else value.model_dump(mode="json")


class VlmConfig(Config):
    """The parts of a vision-language model.

    Attributes:
        tower: anything that `load_tower` takes.
        projector: a name or a node; built anew unless `projector_weights` is given.
        projector_weights: a projector's folder, a safetensors file, or LLaVA's `mm_projector.bin`.
        llm: folder or hub id of a causal language model of transformers.
        llm_weights: `none` builds the language model from its config, with random weights.
        chat_template: plain, v1, llama_2, chatml, qwen, or a .jinja file, in place of the tokenizer's own.
        tiling: how pictures are cut into tiles of the tower's size (LLaVA's anyres); None takes each as one.
        tiles_weights: folder `tiles` of a model, with the end of rows that it learnt; drawn anew without.
    """

    tower: Annotated[str | TowerConfig, PlainValidator(_tower_source), PlainSerializer(_tower_fields)]
    projector: ProjectorNode = MlpConfig(depth=2)
    projector_weights: str | None = None
    llm: str
    llm_weights: Literal["pretrained", "none"] = "pretrained"
    chat_template: str | None = None
    tiling: TilingConfig | None = None
    tiles_weights: str | None = None

    @model_validator(mode="after")
    def _rows_have_an_end(self) -> VlmConfig:
        if self.tiles_weights and (self.tiling is None or self.tiling.merge != "spatial_unpad"):
            raise ValueError("tiles_weights are of `tiling` with merge: spatial_unpad, which ends rows")
        return self


class Stage(Config):
    """One stage: what learns, on which data, how long.

    Attributes:
        name: of the stage and its folder.
        data: one source of conversations, or a list of several, mixed by their weights.
        learn: rules over parameter names, which begin with `vision_tower.`, `projector.` or `llm.`.
        lora: settings of the adapters that rules with `learn: lora` put on.
        chat_template: a name or a .jinja file for this stage alone.
        lr, weight_decay: peak learning rate and decay; a rule may have its own of each.
        schedule: what follows the warm-up: a cosine or a line down to `lr_floor`, or no change.
        warmup: share of the steps with linear warm-up.
        warmup_steps: their number, in place of the share.
        lr_floor: share of the peak rate that is left at the end.
        epochs, steps: length; one of them.
        batch_size: conversations per optimizer step over all ranks.
        group_by_length: batches of about one length, of text alone apart from those with pictures.
        tiles: take pictures in the model's tiles; false shows each as one, as LLaVA-NeXT's first stage does.
        packing: several conversations in a row, up to `max_length` tokens, none of which sees another: the
            same loss and gradients with less padding.
        micro_batch_size: conversations that a rank runs at once; None means its whole share.
        max_length: tokens of a conversation, its pictures' included.
        zero_stage: what DeepSpeed shards over the ranks: 0 nothing, 1 optimizer states, 2 and gradients,
            3 and weights.
        offload: what DeepSpeed keeps in the CPU's memory: the optimizer's states, from ZeRO-1 on, or
            `parameters` as well, with ZeRO-3.
        keep_adapters: leave the language model's adapters, as peft reads them, in the stage's `adapters`;
            they are merged in its `model` all the same.
        deepspeed: a JSON file of DeepSpeed's own settings, merged over those that are made of the stage.
        quantise: `nf4` holds the language model's linear layers in 4 bits while adapters on them learn
            (QLoRA, arXiv:2305.14314); takes bitsandbytes. It saves memory, and on a CPU no time.
        precision: bf16 computes in bfloat16 and keeps an fp32 copy of what learns.
        activation_checkpointing: recompute the language model's activations in the backward pass.
        loss_kernel: `chunks` computes the logits of labels a few thousand at a time; `liger` runs
            liger-kernel's fused kernel, on a GPU.
        save_every: optimizer steps between checkpoints; None saves none within the stage.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    data: ConversationData
    learn: Annotated[tuple[Rule, ...], Field(min_length=1)]
    lora: LoraConfig = LoraConfig()
    chat_template: str | None = None
    lr: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.03
    warmup_steps: NonNegativeInt | None = None
    lr_floor: Share = 0.0
    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    group_by_length: bool = False
    tiles: bool = True
    packing: bool = False
    max_length: PositiveInt = 2048
    grad_clip: PositiveFloat | None = 1.0
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "optimizer", "parameters"] = "none"
    keep_adapters: bool = False
    deepspeed: str | None = None
    quantise: Literal["none", "nf4"] = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    loss_kernel: Literal["chunks", "liger"] = "chunks"
    log_every: PositiveInt = 10
    save_every: PositiveInt | None = None

    @model_validator(mode="after")
    def _has_one_warmup(self) -> Stage:
        if self.warmup_steps is not None and "warmup" in self.model_fields_set:
            raise ValueError("give the warm-up once, as `warmup` or as `warmup_steps`")
        return self

    @model_validator(mode="after")
    def _has_one_length(self) -> Stage:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length of the stage once, as `epochs` or as `steps`")
        return self

    @model_validator(mode="after")
    def _lengths_are_known(self) -> Stage:
        if self.group_by_length and not self.sources[0].check:
            raise ValueError("group_by_length takes the lengths that the check finds: leave `check: off` out")
        return self

    @model_validator(mode="after")
    def _offload_fits(self) -> Stage:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload {self.offload!r} takes zero_stage {least} or more")
        return self

    @model_validator(mode="after")
    def _nf4_fits(self) -> Stage:
        if self.quantise == "none":
            return self
        if self.zero_stage == 3:
            raise ValueError(
                "quantise: nf4 takes zero_stage 2 or less: ZeRO-3 cannot shard weights of 4 bits"
            )
        if self.precision != "bf16":
            raise ValueError("quantise: nf4 computes in bfloat16: set precision: bf16")
        if self.lora.variant == "dora":
            raise ValueError(
                "quantise: nf4 goes with the LoRA variants lora and rslora: DoRA reads whole weights"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Stage:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    def conversations_at_once(self, world: int) -> int:
        """The micro batch of each of `world` ranks.

        Raises:
            ConfigError: the batch does not divide into these.
        """
        size = self.micro_batch_size or self.batch_size // world
        if size == 0 or self.batch_size % (size * world):
            raise ConfigError(
                f"stage {self.name!r}: batch_size {self.batch_size} does not divide into micro batches of "
                f"{size} on {world} process(es)"
            )
        return size

    def warm_steps(self, total: int) -> int:
        """Steps of warm-up, of `total`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(total, max(1, math.ceil(self.warmup * total)))

    @property
    def sources(self) -> tuple[ConversationConfig, ...]:
        """Where its conversations come from; the first says what is of all."""
        return conversation_sources(self.data)

    def total_steps(self, records: int) -> int:
        """Optimizer steps on a data set; conversations that do not fill an epoch's last batch sit it out."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * (records // self.batch_size)))


class AlignConfig(Config):
    """Tower, projector and language model, and the stages that make them one model."""

    model: VlmConfig
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    seed: int = 0

    def model_of(self, stage: Stage) -> VlmConfig:
        """The model as a stage sees it: without tiles where it takes each picture as one."""
        return self.model if stage.tiles else self.model.model_copy(update={"tiling": None})

    @model_validator(mode="after")
    def _tiles_are_there(self) -> AlignConfig:
        if self.model.tiling is None and not all(stage.tiles for stage in self.stages):
            raise ValueError("tiles: false is of a stage of a model with `tiling`, and this one has none")
        if not self.stages[-1].tiles:
            raise ValueError(
                "tiles: false in the last stage: it leaves the model, which `tiling` says is in tiles"
            )
        return self

    @model_validator(mode="after")
    def _stages_are_told_apart(self) -> AlignConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names) or "model" in names:
            raise ValueError(
                f"stages need names of their own, and none may be 'model', got {', '.join(names)}"
            )
        return self
