"""What a contrastive run is scored on. No torch here."""

from __future__ import annotations

from pydantic import PositiveInt

from vlm_vision.config import Config
from vlm_vision.train.pairs_config import PairsConfig


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
