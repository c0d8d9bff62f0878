"""What a contrastive run is made of. No torch here: a run can be planned before anything heavy loads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.config import Config
from vlm_vision.tower_config import TowerConfig
from vlm_vision.train.rules import Rule

Share = Annotated[float, Field(ge=0, le=1)]
Recipe = Literal["auto", "scratch", "frozen_vision", "lora", "full"]


class PairsConfig(Config):
    """Pictures with captions.

    Attributes:
        path: CSV, TSV, JSONL or parquet file, or a folder of class folders (`folder/cat/1.jpg`).
        image_column: paths (relative to `image_folder`) or encoded bytes.
        caption_column: captions, or class names where `templates` are given. Rows that share a picture give
            it several captions, one of which is drawn each epoch.
        image_folder: None means the folder of the file.
        templates: one is drawn per picture and epoch; `{}` takes the caption.
        max_bad_share: pictures that cannot be read are replaced, counted and listed up to this share.
    """

    path: str
    image_column: str = "image"
    caption_column: str = "caption"
    image_folder: str | None = None
    templates: tuple[str, ...] = ("{}",)
    max_bad_share: Share = 0.0

    @model_validator(mode="after")
    def _templates_take_a_caption(self) -> PairsConfig:
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong or not self.templates:
            raise ValueError(f"templates must each hold one {{}}, but {wrong or 'there are none'}")
        return self


class ValidationConfig(Config):
    """Held-out data, scored at the end of a run and every `every` steps.

    Attributes:
        zero_shot: pictures with class names in `caption_column`; scored by the mean over `templates`.
        retrieval: pictures with captions; recall of the own caption and picture among all.
        every: optimizer steps between scores; None scores only at the end.
    """

    zero_shot: PairsConfig | None = None
    retrieval: PairsConfig | None = None
    every: PositiveInt | None = None


class AugmentConfig(Config):
    """Training-time changes to pictures.

    Attributes:
        crop_area: share of the picture's area that a random crop keeps, drawn between the two.
        aspect: width / height of the crop, log-uniform between the two.
        brightness, contrast, saturation: factors are drawn from 1 - amount to 1 + amount.
        hue: shift of at most this share of the colour circle.
        flip: how often a picture is mirrored; 0 where captions speak of left and right.
    """

    crop_area: tuple[Share, Share] = (0.9, 1.0)
    aspect: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    flip: Share = 0.0

    @model_validator(mode="after")
    def _ranges_ascend(self) -> AugmentConfig:
        for name, (low, high) in (("crop_area", self.crop_area), ("aspect", self.aspect)):
            if low > high:
                raise ValueError(f"{name} must be a range from low to high, but is {low:g} to {high:g}")
        return self


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
