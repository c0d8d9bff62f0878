"""What a contrastive run is scored on. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from vlm_vision.config import Config
from vlm_vision.train.pairs_config import PairsConfig


class ZeroShotConfig(PairsConfig):
    """Pictures with the class of each in `caption_column`: a name, or its number from 0.

    `path` also takes a folder in CLIP_benchmark's layout, or one split of it.

    Attributes:
        classes: names, a file with one a line, or `imagenet` (open_clip's); None takes those in the data.
        templates: texts with `{}` for the class, the mean of whose embeddings stands for it; a file with one
            a line; or `openai_80`, `openai_7`. None takes those of the folder, or the bare name.
    """

    classes: str | tuple[str, ...] | None = None
    templates: str | tuple[str, ...] | None = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _templates_take_a_caption(self) -> ZeroShotConfig:
        given = () if self.templates is None or isinstance(self.templates, str) else self.templates
        wrong = [template for template in given if template.count("{}") != 1]
        if wrong or self.templates == ():
            raise ValueError(f"templates must each hold one {{}}, but {wrong or 'there are none'}")
        return self


class LinearProbeConfig(Config):
    """A linear classifier on frozen features; classes as in `ZeroShotConfig`.

    Attributes:
        train, test: pictures to fit it on and to score it on.
        features: `pooled` embeddings, the mean over the penultimate `patches` that a VLM reads, or both.
    """

    train: ZeroShotConfig
    test: ZeroShotConfig
    features: Literal["pooled", "patches", "both"] = "pooled"


class ValidationConfig(Config):
    """Held-out data, scored at the end of a run and every `every` steps.

    Attributes:
        zero_shot: pictures with class names; scored by the nearest class.
        retrieval: pictures with captions; recall of the own caption and picture among all.
        linear_probe: pictures with class names; scored by a classifier fitted on frozen features.
        every: optimizer steps between scores; None scores only at the end.
        batch_size: pictures at once.
        workers: threads that decode pictures.
    """

    zero_shot: ZeroShotConfig | None = None
    retrieval: PairsConfig | None = None
    linear_probe: LinearProbeConfig | None = None
    every: PositiveInt | None = None
    batch_size: PositiveInt = 128
    workers: PositiveInt = 4

    @property
    def is_asked(self) -> bool:
        """Whether there is anything to score on."""
        return any((self.zero_shot, self.retrieval, self.linear_probe))
