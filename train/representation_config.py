"""What the representation stage of a Q-Former is made of. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlm_vision.adapters.qformer_config import QFormerConfig
from vlm_vision.config import Config
from vlm_vision.tower_config import TowerConfig
from vlm_vision.train.pairs_config import AugmentConfig, DataConfig, PairsConfig


class ObjectiveConfig(Config):
    """The three objectives, whose sum is minimised (BLIP-2, arXiv:2301.12597, section 3.2).

    Attributes:
        itc, itm, itg: weights of contrasting, matching and captioning.
        embed_dim: width in which pictures and texts are contrasted.
        temperature: that ITC starts with; it is learnt.
        label_smoothing: of ITC and ITG.
    """

    itc: NonNegativeFloat = 1.0
    itm: NonNegativeFloat = 1.0
    itg: NonNegativeFloat = 1.0
    embed_dim: PositiveInt = 256
    temperature: PositiveFloat = 0.07
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _something_is_learnt(self) -> ObjectiveConfig:
        if not (self.itc or self.itm or self.itg):
            raise ValueError("itc, itm and itg are all 0: nothing would be learnt")
        return self


class RepresentationValidationConfig(Config):
    """Held-out pictures with captions, scored at the end of a run and every `every` steps.

    Attributes:
        retrieval: recall of the own caption and picture among all by ITC, and how well ITM tells pairs.
        rerank: so many nearest of each query are ranked again by ITM; BLIP-2 takes 128. 0 leaves it out.
        every: optimizer steps between scores; None scores only at the end.
        batch_size: pictures at once.
        workers: threads that decode pictures.
    """

    retrieval: PairsConfig | None = None
    rerank: NonNegativeInt = 0
    every: PositiveInt | None = None
    batch_size: PositiveInt = 128
    workers: PositiveInt = 4


class RepresentationConfig(Config):
    """A run of BLIP-2's first stage: a Q-Former learns from captions what to read of a frozen tower.

    The rates are those of LAVIS (`projects/blip2/train/pretrain_stage1.yaml`).

    Attributes:
        tower: anything that `load_tower` takes; it stays as it is.
        qformer: what `align` is later given as `projector`.
        bert: folder or hub id of a BERT with whose tokenizer and weights text and self-attention start, as in
            BLIP-2; its sizes must be those of `qformer`. None starts from random weights.
        tokenizer: without a BERT, folder or hub id of any tokenizer of transformers.
        max_text_tokens: of a caption, with its start and end; the rest is cut.
        augment: where nothing of it is random, the tower's patches are computed once and kept.
        cache_gb: as long as all of them take no more.
        lr, min_lr: peak learning rate, and what the cosine ends at.
        warmup: steps of linear warm-up, never more than a tenth of the run.
        grad_clip: largest norm of all gradients; None leaves them as they are.
        batch_size: pairs per optimizer step over all ranks, which are each other's negatives.
        epochs, steps: length of the run; one of them.
        precision: bf16 computes under autocast, weights stay in fp32.
        checkpoint_activations: store only what enters a layer, and run it again backwards.
        save_every: optimizer steps between checkpoints; None saves none on the way.
        keep_checkpoints: the newest so many stay.
        workers: processes that decode pictures; 0 decodes in the training process.
        wandb: a Weights & Biases project to log to as well.
    """

    tower: str | TowerConfig
    data: DataConfig
    validation: RepresentationValidationConfig = RepresentationValidationConfig()
    augment: AugmentConfig = AugmentConfig()
    qformer: QFormerConfig = QFormerConfig.model_validate({})
    bert: str | None = "google-bert/bert-base-uncased"
    tokenizer: str | None = None
    max_text_tokens: Annotated[int, Field(ge=3, le=512)] = 32
    objective: ObjectiveConfig = ObjectiveConfig()
    cache_gb: NonNegativeFloat = 8.0
    lr: PositiveFloat = 1e-4
    min_lr: NonNegativeFloat = 1e-5
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    warmup: NonNegativeInt = 5000
    grad_clip: PositiveFloat | None = None
    batch_size: PositiveInt = 100
    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_activations: bool = False
    log_every: PositiveInt = 10
    save_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2
    workers: NonNegativeInt = 1
    seed: NonNegativeInt = 0
    wandb: str | None = None

    @model_validator(mode="after")
    def _has_one_length(self) -> RepresentationConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length of the run once, as `epochs` or as `steps`")
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> RepresentationConfig:
        if self.bert is None and self.tokenizer is None:
            raise ValueError("without `bert`, name the `tokenizer` of the captions")
        if self.bert is not None and self.tokenizer is not None:
            raise ValueError("a BERT reads its own tokens: leave `tokenizer` out, or set `bert` to null")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        return self

    def total_steps(self, pictures: int) -> int:
        """Optimizer steps on a data set; pictures that do not fill an epoch's last batch sit it out."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * (pictures // self.batch_size)))
