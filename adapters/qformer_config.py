"""The querying transformer of BLIP-2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from vlm_vision.adapters.config import Grid, ProjectorConfig

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector


class QFormerConfig(ProjectorConfig):
    """BLIP-2's querying transformer and the linear layer behind it.

    Paper: arXiv 2301.12597, section 3.1.
    Reference: LAVIS, lavis/models/blip2_models/Qformer.py.
    Shape: the queries, 32 by default.
    Parameters: of width W with Q queries, layers (12 W + 13) W, and (2 W + 2 D + 6) W for each that looks at
        patches; 2 W + Q W of norm and queries; (W + 1) L.

    Attributes:
        num_queries: learnt queries, which are the tokens that come out, however many patches go in.
        layers, heads, hidden_size: BERT-base by default.
        cross_attention_frequency: every how many layers the queries look at the patches.
        dropout: on hidden states and attention while training.
    """

    name: Literal["qformer"] = "qformer"
    num_queries: int = Field(32, gt=0)
    layers: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)
    hidden_size: int = Field(768, gt=0)
    cross_attention_frequency: int = Field(2, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> QFormerConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.heads} heads")
        return self

    def grid_out(self, grid: Grid) -> Grid:
        return 1, self.num_queries

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width, looks = self.hidden_size, -(-self.layers // self.cross_attention_frequency)
        attention = 4 * (width + 1) * width + 2 * width
        cross_attention = 2 * (width + 1) * width + 2 * (in_features + 1) * width + 2 * width
        perceptron = (width + 1) * 4 * width + (4 * width + 1) * width + 2 * width
        blocks = self.layers * (attention + perceptron) + looks * cross_attention
        return blocks + 2 * width + self.num_queries * width + (width + 1) * out_features

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.qformer import QFormerProjector

        return QFormerProjector(self, in_features, out_features, grid)
