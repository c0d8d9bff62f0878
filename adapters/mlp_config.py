"""Projectors that map every patch on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vlm_vision.adapters.config import Grid, ProjectorConfig

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector


class LinearConfig(ProjectorConfig):
    """One linear layer per patch, as in the first LLaVA (arXiv 2304.08485, section 4.1)."""

    name: Literal["linear"] = "linear"

    def grid_out(self, grid: Grid) -> Grid:
        return grid

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        return (in_features + 1) * out_features

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.mlp import LinearProjector

        return LinearProjector(self, in_features, out_features, grid)


class MlpConfig(ProjectorConfig):
    """A perceptron per patch, LLaVA-1.5's connector (arXiv 2310.03744, section 3.2); `mlp2x_gelu` is depth 2.

    Attributes:
        depth: number of linear layers; the first goes to the language model's width, the rest stay there.
        activation: between two linear layers.
    """

    name: Literal["mlp"] = "mlp"
    depth: int = Field(2, ge=1)
    activation: Literal["gelu", "relu", "silu"] = "gelu"

    def grid_out(self, grid: Grid) -> Grid:
        return grid

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        return (in_features + 1) * out_features + (self.depth - 1) * (out_features + 1) * out_features

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.mlp import MlpProjector

        return MlpProjector(self, in_features, out_features, grid)
