"""The vision tower that LLaVA-style vision-language models plug in.

Names load on first use, so that `import vlm_vision` pulls in neither transformers, open_clip, peft,
bitsandbytes nor deepspeed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_vision.dual_encoder import DualEncoder, load_dual_encoder
    from vlm_vision.preprocess import ImageProcessor, open_image
    from vlm_vision.search import VisualIndex
    from vlm_vision.tower import VisionTower, list_backbones, load_tower
    from vlm_vision.tower_config import TowerConfig
    from vlm_vision.zero_shot import ZeroShotClassifier

__version__ = "0.1.0"

_HOMES = {
    "DualEncoder": "dual_encoder",
    "ImageProcessor": "preprocess",
    "TowerConfig": "tower_config",
    "VisionTower": "tower",
    "VisualIndex": "search",
    "ZeroShotClassifier": "zero_shot",
    "list_backbones": "tower",
    "load_dual_encoder": "dual_encoder",
    "load_tower": "tower",
    "open_image": "preprocess",
}

__all__ = [  # noqa: RUF022 - the order in which a newcomer meets them
    "load_tower",
    "VisionTower",
    "TowerConfig",
    "list_backbones",
    "load_dual_encoder",
    "DualEncoder",
    "ImageProcessor",
    "open_image",
    "ZeroShotClassifier",
    "VisualIndex",
]

if find_spec("vlm_vision.adapters") is None:
    raise ImportError(
        "vlm_vision was imported from its source folder, where `adapters` and `train` are no part of it yet. "
        "Run `pip install -e .` there, or start Python in another folder to use the installed package"
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm_vision' has no attribute {name!r}")
    return getattr(import_module(f"vlm_vision.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
