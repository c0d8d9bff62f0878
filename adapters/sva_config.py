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
    """The connector of Cambrian-1 before the language model (arXiv 2406.16860, section 3.2).

    Numbers as of its `vision_sampler.py` and `cambrian_arch.py`, with layers of type `joint`. The aggregation
    layers inside the language model are not in it, nor is the newline after a row.

    The towers come side by side in the channels, on one grid, as a `fused` tower gives them; a region is the
    same for all, where Cambrian gives every tower one of its own.

    [B,N,D] -> [B,N/regions[0]²,L] for rows and columns that all regions divide. With W the width, G = len(
    regions), T towers of widths D_t: sum over towers (D_t + W + 4)·W, for each of G·layers layers
    (7 + 2T)·W² + (4 + 4T)·W and T·r²·W where its region r is above 1, then G·W and (G·W + L + 2)·L weights.

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
