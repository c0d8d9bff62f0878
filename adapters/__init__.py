"""What is put onto a frozen model: projectors, Q-Former, LoRA. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_vision.adapters.build import build_projector, list_projectors

__all__ = ["build_projector", "list_projectors"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vlm_vision.adapters' has no attribute {name!r}")
    from vlm_vision.adapters import build

    return getattr(build, name)
