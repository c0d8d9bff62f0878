"""Cambrian's spatial vision aggregator: queries on a grid that look at their region in every tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from vlm_vision.adapters.config import Grid, ProjectorConfig, Width
from vlm_vision.adapters.regions import grid_of_regions
from vlm_vision.errors import ConfigError

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector


class SvaConfig(ProjectorConfig):
    """Cambrian-1's spatial vision aggregator: queries on a grid that look at their region in every tower.

    It is the connector before the language model, with layers of type `joint`: the aggregation layers inside
    the language model are not in it, nor is the newline after a row. Towers come side by side in the channels
    and on one grid, as a `fused` tower gives them, so that a region has as many patches in each; Cambrian's
    towers have grids of their own.

    Paper: arXiv 2406.16860, section 3.2.
    Reference: cambrian, cambrian/model/vision_sampler.py and cambrian_arch.py.
    Shape: rows / regions[0] x columns / regions[0]; all regions must divide both.
    Parameters: of width W with T towers of D_t channels and G regions of side r: the sum of (D_t + W + 4) W;
        layers G (7 + 2 T) W^2 + layers G (4 + 4 T) W, and layers T r^2 W for each r above 1; G W; and
        (G W + L + 2) L.

    Attributes:
        widths: channels of each tower, in order; None for one tower.
        regions: for each group of queries, the side of the patches that one looks at; the grid divided by the
            first is the grid of tokens, onto which the other groups are interpolated.
        layers: `connector_depth` there.
        width: `vision_hidden_size` there.
    """

    name: Literal["sva"] = "sva"
    widths: Annotated[tuple[Width, ...], Field(min_length=1)] | None = None
    regions: Annotated[tuple[Width, ...], Field(min_length=1)] = (1,)
    layers: int = Field(3, gt=0)
    width: int = Field(1024, gt=0)
    heads: int = Field(16, gt=0)

    def grid_out(self, grid: Grid) -> Grid:
        first, *_ = (grid_of_regions("sva.regions", grid, side) for side in self.regions)
        return first

    def towers(self, in_features: int) -> tuple[int, ...]:
        """Channels of each tower."""
        return self.widths or (in_features,)

    def check(self, in_features: int, out_features: int, grid: Grid) -> None:
        if self.width % self.heads:
            raise ConfigError(f"sva: width {self.width} does not divide into {self.heads} heads")
        if sum(self.towers(in_features)) != in_features:
            raise ConfigError(
                f"sva: widths {list(self.towers(in_features))} are {sum(self.towers(in_features))} channels, "
                f"but the tower gives {in_features}; name the channels of every part of the fused tower"
            )
        self.grid_out(grid)

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width, towers, groups = self.width, self.towers(in_features), len(self.regions)
        entry = sum((tower + width + 4) * width for tower in towers)
        layer = (7 + 2 * len(towers)) * width**2 + (4 + 4 * len(towers)) * width
        positions = sum(len(towers) * side**2 * width for side in self.regions if side > 1)
        exit_ = (groups * width + out_features + 2) * out_features
        return entry + self.layers * (groups * layer + positions) + groups * width + exit_

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.sva import SpatialVisionAggregator

        return SpatialVisionAggregator(self, in_features, out_features, grid)
