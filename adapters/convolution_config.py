"""Projectors that mix neighbouring patches by convolutions on their way to fewer tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vlm_vision.adapters.config import Grid, ProjectorConfig
from vlm_vision.adapters.downsample_config import Target, within
from vlm_vision.adapters.mlp_config import perceptron_weights
from vlm_vision.errors import ConfigError

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector


class CAbstractorConfig(ProjectorConfig):
    """Honeybee's C-Abstractor: RegNet blocks, average pooling to a grid, RegNet blocks, a perceptron.

    Paper: arXiv 2312.06742.
    Reference: honeybee, honeybee/projectors/projectors.py, `CAbstractor`.
    Shape: the target, 12x12 by default.
    Parameters: N D of the embedding of places; a block of w -> H channels has
        (w + H + 16) H + (2 H + 1) s, s = w / 4 rounded, and (w + 2) H more where w is not H; there are
        2 depth blocks, the first from w = D; (H + 1) L + (mlp_depth - 1) (L + 1) L of the perceptron.

    Attributes:
        target: tokens as (rows, columns), at most as many as patches.
        depth: blocks before the pooling, and behind it.
        hidden_size: channels H of the blocks.
        mlp_depth: linear layers of the perceptron, with SiLU between.
        pos_emb: whether a learnt embedding of each place is added to the patches; it has the grid that the
            projector is built for, and is interpolated for others.
    """

    name: Literal["c_abstractor"] = "c_abstractor"
    target: Target = (12, 12)
    depth: int = Field(3, ge=1)
    hidden_size: int = Field(1024, gt=0)
    mlp_depth: int = Field(2, ge=1)
    pos_emb: bool = True

    def grid_out(self, grid: Grid) -> Grid:
        return within(self.name, self.target, grid)

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        places = grid[0] * grid[1] * in_features if self.pos_emb else 0
        later = (2 * self.depth - 1) * _block_weights(self.hidden_size, self.hidden_size)
        readout = perceptron_weights(self.mlp_depth, self.hidden_size, out_features)
        return places + _block_weights(in_features, self.hidden_size) + later + readout

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.convolution import CAbstractorProjector

        return CAbstractorProjector(self, in_features, out_features, grid)


class LdpConfig(ProjectorConfig):
    """MobileVLM's lightweight downsample projector: a perceptron and two depthwise blocks of MobileNetV3.

    Paper: arXiv 2312.16886.
    Reference: MobileVLM, mobilevlm/model/vision_projector.py, `LDPNetProjector`.
    Shape: rows / 2 x columns / 2, rounded up.
    Parameters: (D + 1) L + (L + 1) L, and twice 13 L + L^2 + (L + 1) s + (s + 1) L, s = L / 4 to a multiple
        of 8.
    """

    name: Literal["ldp"] = "ldp"

    def grid_out(self, grid: Grid) -> Grid:
        return -(-grid[0] // 2), -(-grid[1] // 2)

    def check(self, in_features: int, out_features: int, grid: Grid) -> None:
        super().check(in_features, out_features, grid)
        if out_features % 8:
            raise ConfigError(
                f"ldp: its blocks have channels by the 8, and the language model's width is {out_features}; "
                "'ldpv2' takes any"
            )

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width, squeezed = out_features, _squeezed(out_features)
        excitation = (width + 1) * squeezed + (squeezed + 1) * width
        return perceptron_weights(2, in_features, width) + 2 * (13 * width + width**2 + excitation)

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.convolution import LdpProjector

        return LdpProjector(self, in_features, out_features, grid)


class LdpV2Config(ProjectorConfig):
    """MobileVLM V2's projector: a perceptron, average pooling to a grid, and a depthwise convolution.

    Paper: arXiv 2402.03766.
    Reference: MobileVLM, mobilevlm/model/vision_projector.py, `LDPNetV2Projector`.
    Shape: the target, 12x12 by default.
    Parameters: (D + 1) L + (L + 1) L + 10 L.

    Attributes:
        target: tokens as (rows, columns), at most as many as patches.
    """

    name: Literal["ldpv2"] = "ldpv2"
    target: Target = (12, 12)

    def grid_out(self, grid: Grid) -> Grid:
        return within(self.name, self.target, grid)

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        return perceptron_weights(2, in_features, out_features) + 10 * out_features

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.convolution import LdpV2Projector

        return LdpV2Projector(self, in_features, out_features, grid)


def _block_weights(width: int, hidden: int) -> int:
    """A RegNet block: convolutions of 1, 3 (depthwise) and 1 with norms, excitation, a shortcut."""
    squeezed = round(width / 4)
    excitation = (hidden + 1) * squeezed + (squeezed + 1) * hidden
    shortcut = (width + 2) * hidden if width != hidden else 0
    return (width + hidden + 15) * hidden + excitation + shortcut


def _squeezed(width: int) -> int:
    """A fourth, to the nearest multiple of 8 that is not below 90 % of it, as torchvision rounds."""
    fourth = width // 4
    rounded = max(8, (fourth + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * fourth else rounded
