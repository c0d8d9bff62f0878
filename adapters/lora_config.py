"""Settings of low-rank adapters. No torch here."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vlm_vision.config import Config


class LoraConfig(Config):
    """Low-rank adapters (LoRA, arXiv:2106.09685).

    Attributes:
        rank: columns of the low-rank factors.
        alpha: the update is scaled by alpha / rank; by alpha / sqrt(rank) in rsLoRA.
        dropout: on the adapter's input, while training.
        targets: which of the layers that a rule names are adapted: any of `q`, `k`, `v` (projections of
            attention, those that a library fuses too), `out` (its output projection) and `mlp`, and shell
            patterns over names of layers, `*` crossing dots. None adapts all that the rule names.
        variant: `rslora` keeps the update's size at high ranks (arXiv:2312.03732); `dora` learns each row's
            length apart from its direction (arXiv:2402.09353).
    """

    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] | None = None
    variant: Literal["lora", "rslora", "dora"] = "lora"

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)
