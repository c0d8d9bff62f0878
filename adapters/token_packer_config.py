"""TokenPacker: coarse tokens that each look at their own region of fine ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vlm_vision.adapters.config import Grid, ProjectorConfig
from vlm_vision.adapters.regions import grid_of_regions
from vlm_vision.errors import ConfigError

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector


class TokenPackerConfig(ProjectorConfig):
    """TokenPacker (arXiv 2407.02392, section 3.2), numbers as of its `multimodal_projector/builder.py`.

    Patches of the last of `levels` layers, shrunk bilinearly, are the queries; all layers together are the
    keys and values of a query's region. The tower gives the layers by `layer: [12, 16, 22, 23]`.

    [B,N,D] -> [B,N/scale²,L] for rows and columns that `scale` divides. With W the width and D/levels the
    width of one layer: (D/levels)·W + 2(D + W + 2)·W + 6W + 4(W + 1)·W + (W + L + 2)·L weights.

    Attributes:
        scale: a token stands for `scale` x `scale` patches.
        levels: layers of the tower that lie side by side in a patch; 1 for a tower that gives one layer.
        width: of queries, keys and values.
    """

    name: Literal["token_packer"] = "token_packer"
    scale: int = Field(2, gt=0)
    levels: int = Field(4, gt=0)
    width: int = Field(1024, gt=0)
    heads: int = Field(8, gt=0)

    def grid_out(self, grid: Grid) -> Grid:
        return grid_of_regions("token_packer.scale", grid, self.scale)

    def check(self, in_features: int, out_features: int, grid: Grid) -> None:
        if self.width % self.heads:
            raise ConfigError(f"token_packer: width {self.width} does not divide into {self.heads} heads")
        if in_features % self.levels:
            raise ConfigError(
                f"token_packer: {in_features} channels are no {self.levels} layers of one width; a tower "
                "with layer: [12, 16, 22, 23] gives 4, one that gives a single layer takes levels: 1"
            )
        self.grid_out(grid)

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width = self.width
        query = in_features // self.levels * width
        keys_and_values = 2 * ((in_features + 1) * width + (width + 1) * width)
        attention = 6 * width + 4 * (width + 1) * width
        perceptron = (width + 1) * out_features + (out_features + 1) * out_features
        return query + keys_and_values + attention + perceptron

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.token_packer import TokenPacker

        return TokenPacker(self, in_features, out_features, grid)
