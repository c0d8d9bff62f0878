"""Honeybee's D-Abstractor: queries on a grid that look at patches near their own place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from vlm_vision.adapters.config import Grid, ProjectorConfig
from vlm_vision.adapters.downsample_config import Target, within

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector


class DAbstractorConfig(ProjectorConfig):
    """Honeybee's D-Abstractor: Deformable DETR's decoder, its queries placed by the pooled patches.

    Paper: arXiv 2312.06742.
    Reference: honeybee, honeybee/projectors/dabs.py, with `pooled_v_target: query` as in its configs.
    Shape: the target, 12x12 by default.
    Parameters: of width H, M tokens, s = 3 heads points: (D + 1) H where D is not H, N H of the embedding of
        places, M (H + 2) of queries, layers (6 (H + 1) H + (H + 1) s + 6 H + (2 H + 1) F + H), F the
        perceptron's width, (H + 1) L where L is not H.

    Attributes:
        target: tokens as (rows, columns), at most as many as patches.
        layers, heads, hidden_size, intermediate_size: of the decoder.
        points: places of patches that each head of a token looks at, which it chooses itself.
        pos_emb: whether a learnt embedding of each place is added to the patches; it has the grid that the
            projector is built for, and is interpolated for others.
        dropout: of what a layer adds, while training.
    """

    name: Literal["d_abstractor"] = "d_abstractor"
    target: Target = (12, 12)
    layers: int = Field(6, gt=0)
    heads: int = Field(8, gt=0)
    hidden_size: int = Field(1024, gt=0)
    intermediate_size: int = Field(1024, gt=0)
    points: int = Field(4, gt=0)
    pos_emb: bool = True
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DAbstractorConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.heads} heads")
        return self

    def grid_out(self, grid: Grid) -> Grid:
        return within(self.name, self.target, grid)

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width, inner, looks = self.hidden_size, self.intermediate_size, 3 * self.heads * self.points
        layer = 6 * (width + 1) * width + (width + 1) * looks + 6 * width + (2 * width + 1) * inner + width
        first = (in_features + 1) * width if in_features != width else 0
        last = (width + 1) * out_features if out_features != width else 0
        places = grid[0] * grid[1] * width if self.pos_emb else 0
        return first + places + self.tokens_out(grid) * (width + 2) + self.layers * layer + last

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.deformable import DAbstractorProjector

        return DAbstractorProjector(self, in_features, out_features, grid)
