"""What a contrastive run is made of. No torch here: a run can be planned before anything heavy loads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.config import Config
from vlm_vision.tower_config import TowerConfig
from vlm_vision.train.pairs_config import AugmentConfig, PairsConfig
from vlm_vision.train.rules import Rule
from vlm_vision.train.validation_config import ValidationConfig

Recipe = Literal["auto", "scratch", "frozen_vision", "lora", "full"]


class ContrastiveConfig(Config):
    """A contrastive run.

    Attributes:
        model: a dual encoder's folder or `open_clip:model@weights`, or a tower node.
        recipe: what learns: a row of `vlm_vision.train.recipes.RECIPES`; `auto` chooses by counting pairs.
        rules: instead of a recipe's.
        lr: peak learning rate; None takes the recipe's.
        batch_size: pairs per optimizer step over all ranks.
        epochs, steps: length of the run; one of them.
        warmup: steps of linear warm-up, never more than a tenth of the run.
        precision: bf16 computes in bfloat16 under autocast, weights stay in fp32.
        save_every: optimizer steps between checkpoints; None saves none before the end.
        workers: processes that decode pictures; 0 decodes in the training process.
    """

    model: str | TowerConfig
    data: PairsConfig
    validation: ValidationConfig = ValidationConfig()
    augment: AugmentConfig = AugmentConfig()
    recipe: Recipe = "auto"
    rules: tuple[Rule, ...] | None = None
    lora: LoraConfig = LoraConfig()
    lr: PositiveFloat | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    grad_clip: PositiveFloat = 1.0
    batch_size: PositiveInt = 256
    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    warmup: Annotated[int, Field(ge=0)] = 200
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: PositiveInt = 10
    save_every: PositiveInt | None = None
    workers: Annotated[int, Field(ge=0)] = 1
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _has_one_length(self) -> ContrastiveConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length of the run once, as `epochs` or as `steps`")
        return self

    def total_steps(self, pictures: int) -> int:
        """Optimizer steps on a data set; pictures that do not fill an epoch's last batch sit it out."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * (pictures // self.batch_size)))
