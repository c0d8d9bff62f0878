"""Our towers in Prismatic VLMs, unmodified.

    register("my-tower", "open_clip:ViT-L-14-336-quickgelu@openai")
    python scripts/pretrain.py --model.vision_backbone_id my-tower ...  # with the line above in front

The interface is that of `VisionBackbone` in `prismatic/models/backbones/vision/base_vision.py` of
TRI-ML/prismatic-vlms 874c5bb.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp.wrap import _module_wrap_policy
from torchvision.transforms import Compose

from vlm_vision.errors import ConfigError, MissingExtraError
from vlm_vision.preprocess import ImageProcessor
from vlm_vision.tower import VisionTower, load_tower

try:
    from prismatic.models.backbones.vision.base_vision import LetterboxPad, VisionBackbone
    from prismatic.models.materialize import VISION_BACKBONES
except ImportError as error:
    raise MissingExtraError(
        "vlm_vision.integrations.prismatic needs Prismatic VLMs, and what it imports: `pip install -e .` in "
        f"its checkout ({error})"
    ) from error


class TowerBackbone(VisionBackbone):  # type: ignore[misc]
    """A tower as Prismatic's vision backbone.

    Attributes:
        featurizer: the `VisionTower`.
        dtype: of mixed precision; Prismatic sets float32 where the tower is trained.
    """

    def __init__(
        self,
        vision_backbone_id: str,
        image_resize_strategy: str,
        source: str | Path | dict[str, Any],
        **overrides: Any,
    ) -> None:
        """Load the tower with its weights.

        Args:
            image_resize_strategy: `resize-crop` is the tower's own; `resize-naive` squashes to the square;
                `letterbox` pads to a square with the mean colour, then goes on as the tower's own.
            source, overrides: as of `load_tower`.

        Raises:
            ConfigError: an unknown strategy, or what `load_tower` raises.
        """
        tower = load_tower(source, **overrides)
        super().__init__(vision_backbone_id, image_resize_strategy, default_image_size=tower.image_size)
        self.featurizer = tower
        self.dtype = torch.bfloat16
        self.image_transform = _image_transform(tower.image_processor, image_resize_strategy)

    def get_fsdp_wrapping_policy(self) -> Callable[..., bool]:
        """The tower as one unit: its blocks are of a class for each backbone library."""
        return partial(_module_wrap_policy, module_classes={VisionTower})

    def forward(self, pixel_values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        features: Tensor = self.featurizer(pixel_values)
        return features

    @property
    def default_image_resolution(self) -> tuple[int, int, int]:
        settings = self.featurizer.image_processor.config
        return (3, settings.height, settings.width)

    @property
    def embed_dim(self) -> int:
        return int(self.featurizer.hidden_size)

    @property
    def num_patches(self) -> int:
        """Tokens that the projector gets for a picture."""
        return int(self.featurizer.num_tokens)

    @property
    def half_precision_dtype(self) -> torch.dtype:
        return self.dtype


def register(vision_backbone_id: str, source: str | Path | dict[str, Any], **overrides: Any) -> None:
    """Let Prismatic's `vision_backbone_id` name a tower.

    Args:
        source, overrides: as of `load_tower`.

    Raises:
        ConfigError: the name is one of Prismatic's own.
    """
    known = VISION_BACKBONES.get(vision_backbone_id)
    if known is not None and known["cls"] is not TowerBackbone:
        raise ConfigError(f"{vision_backbone_id!r} is a backbone of Prismatic's own: choose another name")
    VISION_BACKBONES[vision_backbone_id] = {"cls": TowerBackbone, "kwargs": {"source": source, **overrides}}


def _image_transform(processor: ImageProcessor, strategy: str) -> Compose:
    """Picture to pixels [3,H,W]."""
    before = []
    if strategy == "resize-naive":
        processor = ImageProcessor(processor.config.squashed().model_copy(update={"resize": "squash"}))
    elif strategy == "letterbox":
        before = [LetterboxPad(tuple(int(value * 255) for value in processor.config.mean))]
    elif strategy != "resize-crop":
        raise ConfigError(
            f"image_resize_strategy {strategy!r} is not known: give resize-naive, resize-crop or letterbox"
        )
    processor.check_one_size(f"image_resize_strategy {strategy!r}")
    return Compose([*before, processor, itemgetter(0)])
