"""Our towers in TinyLLaVA Factory, unmodified: importing this module registers them as `vlm_vision`.

Its `--vision_tower` then takes `vlm_vision:FOLDER`, a folder written by a tower's or a dual encoder's
`save_pretrained`. Which layer and tokens are given is settled in the folder, and must be what
`--mm_vision_select_layer` and `--mm_vision_select_feature` ask for.

The interface is that of `VisionTower` in `tinyllava/model/vision_tower/base.py` of
TinyLLaVA/TinyLLaVA_Factory 53f12c7.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from vlm_vision.errors import ConfigError, MissingExtraError
from vlm_vision.features import resolve_layers
from vlm_vision.integrations.clip_processor import ClipProcessor
from vlm_vision.tower import DUAL_ENCODER_TYPE, MODEL_TYPE, VisionTower, describe_tower, tower_config
from vlm_vision.weights import load_strict

try:
    from tinyllava.model.vision_tower import register_vision_tower
    from tinyllava.model.vision_tower.base import VisionTower as TinyLlavaTower
except ImportError as error:
    raise MissingExtraError(
        "vlm_vision.integrations.tinyllava needs TinyLLaVA Factory, and what it imports: put its checkout on "
        f"PYTHONPATH ({error})"
    ) from error


class TowerFolderConfig(PretrainedConfig):  # type: ignore[misc]
    """The `config.json` of a tower's folder, with the facts that TinyLLaVA's connectors read.

    Attributes:
        tower: fields of `TowerConfig`.
        hidden_size, image_size, patch_size: follow from it.
    """

    model_type = MODEL_TYPE

    def __init__(self, tower: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tower = tower
        if tower is not None:
            facts = describe_tower(tower)
            self.hidden_size, self.image_size = facts.hidden_size, facts.image_size
            self.patch_size = facts.patch_size


class DualEncoderFolderConfig(TowerFolderConfig):
    """The same for a dual encoder's folder, of which the tower is a part."""

    model_type = DUAL_ENCODER_TYPE


@register_vision_tower("vlm_vision")  # type: ignore[untyped-decorator]
class TowerEncoder(TinyLlavaTower):  # type: ignore[misc]
    """A tower as TinyLLaVA's vision tower; its weights come with `load_model`, or with a whole checkpoint."""

    def __init__(self, cfg: TowerFolderConfig) -> None:
        super().__init__(cfg)
        config = tower_config(cfg.tower or {}, pooled_head=False)
        self._vision_tower = VisionTower(config, config.backbone.build(load_weights=False))
        self._image_processor = ClipProcessor(self._vision_tower.image_processor)

    def _load_model(self, vision_tower_name: str, **kwargs: Any) -> None:
        """Weights of the folder, then, where TinyLLaVA names them, those of an earlier stage of its own.

        Raises:
            ConfigError: no such folder.
            WeightsError: weights that do not fit.
        """
        stored = VisionTower.from_pretrained(vision_tower_name, pooled_head=False)
        load_strict(self._vision_tower, stored.state_dict(), vision_tower_name)
        super()._load_model(vision_tower_name, **kwargs)

    def forward(
        self,
        x: Float[Tensor, "b 3 h w"],
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "b n d"]:
        """Features of the tower.

        Raises:
            ConfigError: TinyLLaVA asks for another layer or other tokens than the folder's.
        """
        tower: VisionTower = self._vision_tower
        info = tower.backbone.info
        layers = resolve_layers(vision_feature_layer, info.num_layers, info.default_layer)
        select = vision_feature_select_strategy or tower.config.select
        if (vision_feature_layer is not None and layers != tower.layers) or select != tower.config.select:
            raise ConfigError(
                f"mm_vision_select_layer {vision_feature_layer} and mm_vision_select_feature {select!r} are "
                f"asked for; this tower's folder gives layer {tower.config.layer or info.default_layer} and "
                f"{tower.config.select!r}. Change one of them, the folder with "
                "VisionTower.from_pretrained(folder, layer=..., select=...).save_pretrained(folder)"
            )
        features: Tensor = tower(x)
        return features


AutoConfig.register(MODEL_TYPE, TowerFolderConfig)
AutoConfig.register(DUAL_ENCODER_TYPE, DualEncoderFolderConfig)
