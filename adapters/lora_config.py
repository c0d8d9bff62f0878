"""Settings of low-rank adapters. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from vlm_vision.config import Config


class LoraConfig(Config):
    """Low-rank adapters (LoRA, arXiv:2106.09685).

    Attributes:
        rank: columns of the low-rank factors.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapter's input, while training.
    """

    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
