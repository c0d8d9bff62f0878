"""What every backbone gives the tower: features after any layer, a pooled head, and its own facts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from vlm_vision.tower_config import BackboneConfig, PreprocessConfig


@dataclass(frozen=True)
class BackboneInfo:
    """Facts of a backbone that are known before any weight is read.

    Attributes:
        widths: channels after each layer; its length is the number of layers (or stages).
        grids: rows and columns of patches after each layer.
        prefix_tokens: tokens before the patches (class token, registers).
        default_layer: layer given when the config names none.
        embed_dim: width of the pooled head, or None when there is none.
        preprocess: how pictures are prepared for these weights.
    """

    widths: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    prefix_tokens: int
    default_layer: int
    embed_dim: int | None
    preprocess: PreprocessConfig

    @property
    def num_layers(self) -> int:
        return len(self.widths)


class Backbone(nn.Module, ABC):
    """Base class of backbones; a plug-in subclasses it, and `tower_config.BackboneConfig`.

    Layers are counted from 1: layer k is the k-th block or stage. `vlm_vision.testing.check_tower` tests it.
    """

    info: BackboneInfo

    @abstractmethod
    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        """Raw output of the given layers (ascending, from 1), prefix tokens first; none past the last."""

    @abstractmethod
    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Output of the whole backbone with its head, not normalised."""

    @abstractmethod
    def truncate(self, layer: int) -> None:
        """Free every parameter past `layer`, the head included."""

    @abstractmethod
    def portable_config(self) -> BackboneConfig:
        """This backbone's config, complete enough to build it again without any hub or file."""
