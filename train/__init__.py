"""Losses, data, the contrastive loop, the alignment stages, evaluation. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_vision.train.contrastive import train_contrastive
    from vlm_vision.train.losses import distill_loss, info_nce_loss, siglip_loss

_HOMES = {
    "distill_loss": "losses",
    "info_nce_loss": "losses",
    "siglip_loss": "losses",
    "train_contrastive": "contrastive",
}

__all__ = ["distill_loss", "info_nce_loss", "siglip_loss", "train_contrastive"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm_vision.train' has no attribute {name!r}")
    return getattr(import_module(f"vlm_vision.train.{_HOMES[name]}"), name)
