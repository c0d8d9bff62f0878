"""Several backbones as one: features side by side along the channels, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm_vision.backbone import Backbone, BackboneInfo
from vlm_vision.backbones.config import FusedConfig
from vlm_vision.errors import ConfigError
from vlm_vision.features import on_grid, resolve_layers
from vlm_vision.tower_config import PreprocessConfig


def build(config: FusedConfig, *, load_weights: bool = True) -> Backbone:
    """All parts, each at its own layer.

    Raises:
        ConfigError: parts that cannot be joined.
    """
    parts = [part.backbone.build(load_weights=load_weights) for part in config.parts]
    return FusedBackbone(parts, config)


class FusedBackbone(Backbone):
    """One layer, made of one layer of each part: patch tokens only.

    Pictures are prepared once, for the part with the largest. The others get the same pixels resampled to
    their size and with their own mean and spread, so that all see the same square, as in Prismatic
    (arXiv:2402.07865, section 4.2) and Eagle (arXiv:2408.15998, section 2.3).
    """

    def __init__(self, parts: Sequence[Backbone], config: FusedConfig) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._config = config
        infos = [part.info for part in parts]
        self._layers = [
            resolve_layers(part.layer, info.num_layers, info.default_layer)[0]
            for part, info in zip(config.parts, infos, strict=True)
        ]
        at = list(zip(infos, self._layers, strict=True))
        widths, grids = [info.widths[n - 1] for info, n in at], [info.grids[n - 1] for info, n in at]
        if config.join == "channels":
            width, grid = sum(widths), config.grid or grids[0]
        elif len(set(widths)) == 1:
            width, grid = widths[0], (1, sum(rows * columns for rows, columns in grids))
        else:
            raise ConfigError(
                f"fused: widths {widths} differ, so the parts' tokens are no one sequence; use join: channels"
            )
        self._grids = grids
        self.info = BackboneInfo(
            widths=(width,),
            grids=(grid,),
            prefix_tokens=0,
            default_layer=-1,
            embed_dim=None,
            preprocess=max(
                (info.preprocess.squashed() for info in infos),
                key=lambda settings: settings.height * settings.width,
            ),
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b n d"]]:
        features = []
        for part, layer, grid in zip(self._backbones(), self._layers, self._grids, strict=True):
            seen = _as_seen_by(pixels, self.info.preprocess, part.info.preprocess)
            tokens = part.forward_layers(seen, [layer])[0][:, part.info.prefix_tokens :].to(pixels.device)
            features.append(
                tokens if self._config.join == "tokens" else on_grid(tokens, grid, self.info.grids[0])
            )
        return [torch.cat(features, dim=1 if self._config.join == "tokens" else 2)]

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        raise ConfigError("fused: several backbones have no one pooled head")

    def truncate(self, layer: int) -> None:
        for part, own in zip(self._backbones(), self._layers, strict=True):
            part.truncate(own)

    def layer_modules(self) -> Sequence[nn.Module]:
        return list(self.parts)

    def checkpoint_activations(self, enabled: bool) -> None:
        for part in self._backbones():
            part.checkpoint_activations(enabled)

    def portable_config(self) -> FusedConfig:
        parts = tuple(
            given.model_copy(update={"backbone": part.portable_config()})
            for given, part in zip(self._config.parts, self._backbones(), strict=True)
        )
        return self._config.model_copy(update={"parts": parts})

    def _backbones(self) -> list[Backbone]:
        return [part for part in self.parts if isinstance(part, Backbone)]


def _as_seen_by(
    pixels: Float[Tensor, "b 3 h w"], prepared: PreprocessConfig, wanted: PreprocessConfig
) -> Float[Tensor, "b 3 h2 w2"]:
    """Pixels prepared for one backbone, at the size and in the normalisation of another."""
    if (prepared.height, prepared.width) != (wanted.height, wanted.width):
        pixels = interpolate(
            pixels.float(), size=(wanted.height, wanted.width), mode="bicubic", antialias=True
        ).to(pixels.dtype)
    if (prepared.mean, prepared.std) == (wanted.mean, wanted.std):
        return pixels
    mean, std, own_mean, own_std = (
        pixels.new_tensor(values)[:, None, None]
        for values in (prepared.mean, prepared.std, wanted.mean, wanted.std)
    )
    return pixels * (std / own_std) + (mean - own_mean) / own_std
