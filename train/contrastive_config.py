"""What a contrastive run is made of. No torch here: a run can be planned before anything heavy loads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.config import Config
from vlm_vision.tower_config import TowerConfig
from vlm_vision.train.pairs_config import AugmentConfig, DataConfig, Share
from vlm_vision.train.rules import Rule
from vlm_vision.train.validation_config import ValidationConfig

Recipe = Literal["auto", "scratch", "frozen_vision", "lora", "full", "last_n", "lit"]


class DistillConfig(Config):
    """Learn a teacher's similarities: cross-entropy between its softmax over the batch and the student's.

    In both directions, as `open_clip.loss.DistillClipLoss`.

    Attributes:
        teacher: a dual encoder: any source that `load_dual_encoder` takes. It sees the student's pictures at
            its own size and normalisation.
        weight: of this loss beside the contrastive one.
    """

    teacher: str | TowerConfig
    weight: PositiveFloat = 1.0


class KeepConfig(Config):
    """Keep the patch features that a VLM already reads near to what they were before the run.

    Attributes:
        weight: of the mean over patches of the squared distance to the original feature, as a share of that
            feature's squared length.
        data: pictures to keep them on (a replay set); None keeps them on the training pictures.
        batch_size: of replayed pictures beside each batch, over all ranks.
    """

    weight: PositiveFloat = 1.0
    data: DataConfig | None = None
    batch_size: PositiveInt = 64


class LossConfig(Config):
    """What is minimised.

    Attributes:
        name: `info_nce`, or `siglip`, which adds a bias to a model that has none.
        directions: of InfoNCE: their mean, or their sum, which doubles the loss beside other terms.
        tile_size: pictures and texts whose similarities are held at once; None holds all of a rank's.
        duplicates: pairs of a batch with the same caption or the same picture, near-duplicates included:
            `mask` takes them out of each other's negatives, `positive` makes them share the target,
            `negative` does as most training code does and pushes them apart.
        hard_negatives: whether texts of the data's `negative_column` are negatives of the batch's pictures.
        patch_weight: of InfoNCE between attention-pooled patch features, of the layer that a VLM reads, and
            texts; 0 leaves them to what the pooled embedding teaches them.
        caption_weight: of next-token cross-entropy, for models with a decoder (CoCa, arXiv:2205.01917: 2).
        distill: a teacher.
        keep: patch features to be kept.
    """

    name: Literal["info_nce", "siglip"] = "info_nce"
    directions: Literal["mean", "sum"] = "mean"
    tile_size: PositiveInt | None = None
    duplicates: Literal["mask", "positive", "negative"] = "mask"
    hard_negatives: bool = True
    patch_weight: NonNegativeFloat = 0.0
    caption_weight: NonNegativeFloat = 0.0
    distill: DistillConfig | None = None
    keep: KeepConfig | None = None


class TemperatureConfig(Config):
    """The factor on similarities, exp(logit_scale), and SigLIP's bias.

    Attributes:
        init: factor to start with; None keeps the model's own. CLIP starts at 1/0.07, SigLIP at 10.
        max: factor that it never passes (CLIP, arXiv:2103.00020, section 2.5: 100).
        lr: peak learning rate of factor and bias; None takes the run's.
        learns: whether they change at all.
        bias_init: SigLIP's bias to start with; None keeps the model's own, or, where it has none or the
            recipe is `scratch`, takes the log-odds of a pair in this batch size: -log(batch_size - 1).
    """

    init: PositiveFloat | None = None
    max: PositiveFloat = 100.0
    lr: PositiveFloat | None = None
    learns: bool = True
    bias_init: float | None = None


class ContrastiveConfig(Config):
    """A contrastive run.

    Attributes:
        model: a dual encoder's folder or `open_clip:model@weights`, or a tower node.
        data: pictures with captions, from one source or several.
        recipe: what learns: a row of `vlm_vision.train.recipes.RECIPES`; `auto` chooses by counting pairs.
        for_vlm: adapt for a vision-language model: `auto` chooses only among recipes that change the patch
            features it reads, and these learn from texts directly (`loss.patch_weight`).
        last_n: blocks of each tower that the recipe `last_n` trains.
        rules: instead of a recipe's.
        lr: peak learning rate; None takes the recipe's.
        layer_decay: each block's learning rate is this times that of the block after it; 1 for none.
        optimizer: `adamw`, or `adamw_8bit` of bitsandbytes, which holds its moments in a byte each.
        batch_size: pairs per optimizer step over all ranks.
        micro_batch_size: pairs that a rank runs through the towers at once; None runs its whole share.
        cached_gradients: micro-batches share all negatives (GradCache, arXiv:2101.06983), which costs a
            second forward; without, each has only its own (plain gradient accumulation).
        epochs, steps: length of the run; one of them.
        warmup: steps of linear warm-up, never more than a tenth of the run.
        precision: bf16 and fp16 compute under autocast, weights stay in fp32.
        patch_dropout: share of patches left out in training (FLIP, arXiv:2212.00794).
        unmasked_tail: share of the run, at its end, that sees every patch.
        checkpoint_activations: store only what enters a block, and run it again backwards.
        compile: compile the towers with torch.compile.
        parallel: on several ranks, `ddp` holds the model on each; `fsdp` splits it among them (FSDP2).
        ema: decay of an average of the weights, saved as `model_ema`; None keeps none.
        save_every, save_minutes: optimizer steps, or time, between checkpoints; None saves none on the way.
        keep_checkpoints: the newest so many stay.
        best_by: a validation score; the model with the best one is saved as `best`.
        report: write `report.html` at the end: curves, scores before and after, retrieval, drift of features.
        projector: a projector trained on this tower's features before the run, to tell what it loses.
        workers: processes that decode pictures; 0 decodes in the training process.
        wandb: a Weights & Biases project to log to as well.
    """

    model: str | TowerConfig
    data: DataConfig
    validation: ValidationConfig = ValidationConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    temperature: TemperatureConfig = TemperatureConfig()
    recipe: Recipe = "auto"
    for_vlm: bool = False
    last_n: PositiveInt = 4
    rules: tuple[Rule, ...] | None = None
    lora: LoraConfig = LoraConfig()
    lr: PositiveFloat | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    weight_decay: NonNegativeFloat = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    grad_clip: PositiveFloat = 1.0
    batch_size: PositiveInt = 256
    micro_batch_size: PositiveInt | None = None
    cached_gradients: bool = True
    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    warmup: NonNegativeInt = 200
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    unmasked_tail: Share = 0.1
    checkpoint_activations: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    log_every: PositiveInt = 10
    save_every: PositiveInt | None = None
    save_minutes: PositiveFloat | None = None
    keep_checkpoints: PositiveInt = 2
    best_by: str | None = None
    report: bool = True
    projector: str | None = None
    workers: NonNegativeInt = 1
    seed: NonNegativeInt = 0
    wandb: str | None = None

    @model_validator(mode="after")
    def _has_one_length(self) -> ContrastiveConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length of the run once, as `epochs` or as `steps`")
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> ContrastiveConfig:
        if self.patch_dropout and self.loss.keep is not None:
            raise ValueError(
                "loss.keep compares patch by patch, so it needs every patch: set patch_dropout to 0"
            )
        return self

    def loss_of_run(self) -> LossConfig:
        """For a VLM, patch features learn from texts too, unless `loss.patch_weight` says otherwise."""
        if self.for_vlm and "patch_weight" not in self.loss.model_fields_set:
            return self.loss.model_copy(update={"patch_weight": 1.0})
        return self.loss

    def total_steps(self, pictures: int) -> int:
        """Optimizer steps on a data set; pictures that do not fill an epoch's last batch sit it out."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * (pictures // self.batch_size)))
