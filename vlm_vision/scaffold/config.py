"""Config node of the backbone. No torch here: a config is checked and planned before anything heavy loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vlm_vision.tower_config import BackboneConfig

if TYPE_CHECKING:
    from vlm_vision.backbone import Backbone

WIDTH_DEPTH_HEADS = {"small": (192, 4, 3), "base": (384, 8, 6)}


class ViTConfig(BackboneConfig):
    """A ViT: `scaffold:small@weights.safetensors`.

    Attributes:
        model: its size.
        weights: a file with the tensors of its `state_dict()`; `none` for random.
    """

    name: Literal["scaffold"] = "scaffold"
    model: Literal["small", "base"] = "small"

    @classmethod
    def models(cls) -> list[str]:
        return list(WIDTH_DEPTH_HEADS)

    def build(self, *, load_weights: bool = True) -> Backbone:
        from vlm_vision.scaffold.backbone import build

        return build(self, load_weights=load_weights)
