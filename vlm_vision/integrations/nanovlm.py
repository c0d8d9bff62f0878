"""Our towers in nanoVLM, unmodified: after importing this module its `vit_model_type` also takes ours.

    cfg = VLMConfig(**vlm_fields("open_clip:ViT-B-16-quickgelu@openai", pixel_shuffle=2), ...)
    model = VisionLanguageModel(cfg)

The vision encoder it replaces is `models/vision_transformer.py` of huggingface/nanoVLM 4e0c096.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_vision.errors import ConfigError, MissingExtraError
from vlm_vision.tower import VisionTower, describe_tower, load_tower, tower_config

try:
    from models import vision_language_model
except ImportError as error:
    raise MissingExtraError(
        "vlm_vision.integrations.nanovlm needs nanoVLM, and what it imports: put its checkout on PYTHONPATH "
        f"({error})"
    ) from error

PREFIX = "vlm_vision:"


def vlm_fields(source: str | Path, pixel_shuffle: int = 1) -> dict[str, Any]:
    """Fields of nanoVLM's `VLMConfig` for a tower.

    Args:
        source: whatever `load_tower` takes in one line.
        pixel_shuffle: how many patches by how many become one token.

    Raises:
        ConfigError: the source is not known, or its grid cannot be shuffled so.
    """
    tower = describe_tower(source)
    rows, columns = tower.grid
    if tower.config.select != "patch" or rows != columns or rows % pixel_shuffle:
        raise ConfigError(
            f"{source}: nanoVLM needs patches alone, in a square whose side {pixel_shuffle} divides; this "
            f"tower gives {tower.config.select!r} of {rows} x {columns}"
        )
    return {
        "vit_model_type": f"{PREFIX}{source}",
        "vit_hidden_dim": tower.hidden_size,
        "vit_img_size": tower.image_size,
        "vit_patch_size": tower.patch_size,
        "mp_pixel_shuffle_factor": pixel_shuffle,
        "mp_image_token_length": tower.num_patches // pixel_shuffle**2,
    }


class TowerEncoder(nn.Module):
    """A tower in the place of nanoVLM's `ViT`, on pictures of 0 to 1 as nanoVLM makes them.

    Attributes:
        tower: the `VisionTower`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: Any, tower: VisionTower | None = None) -> None:
        """With random weights unless a tower is given: nanoVLM loads its own checkpoints into it.

        Raises:
            ConfigError: fields of `cfg` that are not the tower's.
        """
        super().__init__()
        source = cfg.vit_model_type.removeprefix(PREFIX)
        wanted = vlm_fields(source, cfg.mp_pixel_shuffle_factor)
        wrong = {name: value for name, value in wanted.items() if getattr(cfg, name) != value}
        if wrong:
            raise ConfigError(f"{source}: VLMConfig must have {wrong}; vlm_fields(source) gives them")
        if tower is None:
            config = tower_config(source)
            tower = VisionTower(config, config.backbone.build(load_weights=False))
        self.tower = tower
        settings = tower.image_processor.config
        for name in ("mean", "std"):
            values = torch.tensor(getattr(settings, name))[:, None, None]
            self.register_buffer(name, values, persistent=False)

    @classmethod
    def from_pretrained(cls, cfg: Any) -> TowerEncoder:
        """With the weights of the source.

        Raises:
            ConfigError: as building it.
            WeightsError: the weights are missing or do not fit.
        """
        return cls(cfg, load_tower(cfg.vit_model_type.removeprefix(PREFIX)))

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        features: Tensor = self.tower((pictures - self.mean) / self.std)
        return features


def install() -> None:
    """Let nanoVLM build a `TowerEncoder` where the name is ours; done again, it changes nothing."""
    theirs = vision_language_model.ViT
    if hasattr(theirs, "takes_vlm_vision"):
        return

    def class_for(cfg: Any) -> Any:
        return TowerEncoder if cfg.vit_model_type.startswith(PREFIX) else theirs

    class ViT:
        takes_vlm_vision = True

        def __new__(cls, cfg: Any) -> Any:
            return class_for(cfg)(cfg)

        @classmethod
        def from_pretrained(cls, cfg: Any) -> Any:
            return class_for(cfg).from_pretrained(cfg)

    vision_language_model.ViT = ViT


install()
