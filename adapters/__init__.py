"""What is put onto a frozen model: projectors, Q-Former, LoRA. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_vision.adapters.build import build_projector, list_projectors
    from vlm_vision.adapters.llava_files import from_llava, to_llava
    from vlm_vision.adapters.load import load_adapter
    from vlm_vision.adapters.save import save_lora

_HOMES = {
    "build_projector": "build",
    "from_llava": "llava_files",
    "list_projectors": "build",
    "load_adapter": "load",
    "save_lora": "save",
    "to_llava": "llava_files",
}

__all__ = ["build_projector", "from_llava", "list_projectors", "load_adapter", "save_lora", "to_llava"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm_vision.adapters' has no attribute {name!r}")
    return getattr(import_module(f"vlm_vision.adapters.{_HOMES[name]}"), name)
