"""Any model of timm with `forward_intermediates`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from timm.data import resolve_model_data_config
from torch import Tensor

from vlm_vision.backbone import Backbone, BackboneInfo
from vlm_vision.backbones.config import TimmConfig
from vlm_vision.errors import ConfigError, WeightsError, first_line, nearest
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
            f"timm:{name}: pretrained weights cannot be had ({first_line(error)}); "
            f"name a weights file, or {RANDOM!r} for random weights"
        ) from error
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"timm model {name!r} has no forward_intermediates, so it gives no patch features")
    if load_weights and config.weights not in (None, RANDOM):
        state = read_state_dict(Path(str(config.weights)))
        classifiers = tuple(f"{layer}." for layer in _classifier_names(model))
        own = {key: value for key, value in state.items() if not key.startswith(classifiers)}
        load_strict(model, own, f"timm:{name}@{config.weights}")
    return TimmBackbone(model, config)


class TimmBackbone(Backbone):
    """Layers are timm's feature entries: blocks of a ViT, stages of the rest.

    Trunks whose entries all have one shape are blocks, so that -2 is their default as for every ViT.
    """

    model: Any

    def __init__(self, model: Any, config: TimmConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config
        takes_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
        self._prefix_tokens = int(getattr(model, "num_prefix_tokens", 0)) if takes_prefix else 0
        preprocess = config.preprocess or _preprocess(model)
        shapes, embed_dim = _measure(str(config.model), preprocess.image_size)
        self.info = BackboneInfo(
            widths=tuple(width for width, _, _ in shapes),
            grids=tuple((rows, columns) for _, rows, columns in shapes),
            prefix_tokens=self._prefix_tokens,
            default_layer=-2 if len(set(shapes)) == 1 < len(shapes) else -1,
            embed_dim=embed_dim,
            preprocess=preprocess,
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        common: dict[str, Any] = {
            "indices": [layer - 1 for layer in layers],
            "stop_early": True,
            "intermediates_only": True,
        }
        if not self._prefix_tokens:
            maps = self.model.forward_intermediates(pixels, output_fmt="NCHW", **common)
            return [rearrange(features, "b d h w -> b (h w) d") for features in maps]
        outputs = self.model.forward_intermediates(
            pixels, output_fmt="NLC", return_prefix_tokens=True, **common
        )
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        pooled: Tensor = self.model(pixels)
        return pooled

    def truncate(self, layer: int) -> None:
        self.model.prune_intermediate_layers([layer - 1], prune_norm=True, prune_head=True)

    def portable_config(self) -> TimmConfig:
        return self._config.model_copy(update={"preprocess": self.info.preprocess})


def _measure(name: str, side: int) -> tuple[list[tuple[int, int, int]], int]:
    """Channels, rows and columns after each layer, and the width of the pooled head.

    Measured on a copy without memory: `feature_info` only tells strides, and whether a stage of an odd size
    rounds up or down depends on its padding.

    Raises:
        ConfigError: the model does not take pictures of this size.
    """
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name, num_classes=0).eval()
        picture = torch.empty(1, 3, side, side)
        try:
            maps = model.forward_intermediates(picture, output_fmt="NCHW", intermediates_only=True)
            embed_dim = model(picture).shape[-1]
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(f"timm:{name} does not take pictures of {side}x{side}: {error}") from error
    return [tuple(features.shape[1:]) for features in maps], int(embed_dim)


def _preprocess(model: Any) -> PreprocessConfig:
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


def _classifier_names(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
