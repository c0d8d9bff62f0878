"""Any model of timm with `forward_intermediates`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from einops import rearrange
from jaxtyping import Float
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import torch
from vlm_vision.backbone import Backbone, BackboneInfo
from vlm_vision.backbones.config import TimmConfig
from vlm_vision.errors import ConfigError, WeightsError, nearest
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import load_strict, read_state_dict

RANDOM = "none"


def list_models() -> list[str]:
    """Architectures of timm; each also takes its pretrained tags, as `NAME.TAG`."""
    return list(timm.list_models())


def build(config: TimmConfig, *, load_weights: bool = True) -> Backbone:
    """A timm model without its classifier.

    Raises:
        ConfigError: unknown model, or one without `forward_intermediates`.
        WeightsError: weights that cannot be had or do not fit.
    """
    name = str(config.model)
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    from_tag = load_weights and config.weights is None
    try:
        model = timm.create_model(name, pretrained=from_tag, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"timm:{name}: pretrained weights cannot be had ({str(error).splitlines()[0]}); "
            f"name a weights file, or {RANDOM!r} for random weights"
        ) from error
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"timm model {name!r} has no forward_intermediates, so it gives no patch features")
    if load_weights and config.weights not in (None, RANDOM):
        state = read_state_dict(Path(str(config.weights)))
        own = {key: value for key, value in state.items() if not key.startswith(_classifier_names(model))}
        load_strict(model, own, f"timm:{name}@{config.weights}")
    return TimmBackbone(model, config)


class TimmBackbone(Backbone):
    """Layers are timm's feature entries: blocks of a ViT, stages of the rest."""

    def __init__(self, model: nn.Module, config: TimmConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config
        self._is_sequence = getattr(model, "num_prefix_tokens", None) is not None and hasattr(model, "patch_embed")
        preprocess = config.preprocess or _preprocess(model)
        side = preprocess.image_size
        entries = model.feature_info
        self.info = BackboneInfo(
            widths=tuple(int(entry["num_chs"]) for entry in entries),
            grids=tuple((side // int(entry["reduction"]),) * 2 for entry in entries),
            prefix_tokens=int(model.num_prefix_tokens) if self._is_sequence else 0,
            default_layer=-2 if self._is_sequence and len(entries) > 1 else -1,
            embed_dim=int(model.num_features),
            preprocess=preprocess,
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        common: dict[str, Any] = {"indices": [layer - 1 for layer in layers], "stop_early": True, "intermediates_only": True}
        if not self._is_sequence:
            stages = self.model.forward_intermediates(pixels, output_fmt="NCHW", **common)
            return [rearrange(stage, "b d h w -> b (h w) d") for stage in stages]
        outputs = self.model.forward_intermediates(pixels, output_fmt="NLC", return_prefix_tokens=True, **common)
        if not self.info.prefix_tokens:
            return [output[0] if isinstance(output, tuple) else output for output in outputs]
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        pooled: Tensor = self.model(pixels)
        return pooled

    def truncate(self, layer: int) -> None:
        self.model.prune_intermediate_layers([layer - 1], prune_norm=True, prune_head=True)

    def portable_config(self) -> TimmConfig:
        return self._config.model_copy(update={"preprocess": self.info.preprocess})


def _preprocess(model: nn.Module) -> PreprocessConfig:
    data = resolve_model_data_config(model)
    side = int(data["input_size"][-1])
    return PreprocessConfig(
        image_size=side,
        resize="squash" if data["crop_mode"] == "squash" else "shortest",
        resize_to=int(side / data["crop_pct"]),
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
