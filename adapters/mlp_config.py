"""Projectors that map every patch on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vlm_vision.adapters.config import Grid, ProjectorConfig
from vlm_vision.errors import ConfigError

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector


class IdentityConfig(ProjectorConfig):
    """Patches as they are, for features that have the language model's width already.

    Paper: none.
    Reference: LLaVA, llava/model/multimodal_projector/builder.py.
    Shape: every patch a token; the widths must be equal.
    Parameters: 0.
    """

    name: Literal["identity"] = "identity"

    def grid_out(self, grid: Grid) -> Grid:
        return grid

    def check(self, in_features: int, out_features: int, grid: Grid) -> None:
        if in_features != out_features:
            raise ConfigError(
                f"identity: patches have {in_features} channels, and tokens need {out_features}; "
                "'linear' maps one to the other"
            )

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        return 0

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.mlp import IdentityProjector

        return IdentityProjector(self, in_features, out_features, grid)


class LinearConfig(ProjectorConfig):
    """One linear layer per patch, as in the first LLaVA.

    Paper: arXiv 2304.08485, section 4.1.
    Reference: LLaVA, llava/model/multimodal_projector/builder.py.
    Shape: every patch a token.
    Parameters: (D + 1) L.
    """

    name: Literal["linear"] = "linear"

    def grid_out(self, grid: Grid) -> Grid:
        return grid

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        return (in_features + 1) * out_features

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.mlp import LinearProjector

        return LinearProjector(self, in_features, out_features, grid)


class MlpConfig(ProjectorConfig):
    """A perceptron per patch, LLaVA-1.5's connector; `mlp2x_gelu` is depth 2.

    Paper: arXiv 2310.03744, section 3.2.
    Reference: LLaVA, llava/model/multimodal_projector/builder.py.
    Shape: every patch a token.
    Parameters: (D + 1) L + (depth - 1) (L + 1) L.

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
        return perceptron_weights(self.depth, in_features, out_features)

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.mlp import MlpProjector

        return MlpProjector(self, in_features, out_features, grid)


class MlpResConfig(ProjectorConfig):
    """LLaVA-NeXT's perceptron per patch with residual blocks behind it; `mlp2x_res2x_gelu` is 2 and 2.

    A block is layer norm, then two linear layers with GELU between, added to what the norm gave.

    Paper: none.
    Reference: LLaVA-NeXT, llava/model/multimodal_projector/builder.py.
    Shape: every patch a token.
    Parameters: (D + 1) L + (depth - 1) (L + 1) L + blocks (2 L + 2 (L + 1) L).

    Attributes:
        depth: number of linear layers before the blocks.
        blocks: residual blocks.
    """

    name: Literal["mlp_res"] = "mlp_res"
    depth: int = Field(2, ge=1)
    blocks: int = Field(2, ge=1)

    def grid_out(self, grid: Grid) -> Grid:
        return grid

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        block = 2 * out_features + perceptron_weights(2, out_features, out_features)
        return perceptron_weights(self.depth, in_features, out_features) + self.blocks * block

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.mlp import MlpResProjector

        return MlpResProjector(self, in_features, out_features, grid)


class FusedGeluMlpConfig(ProjectorConfig):
    """Prismatic's perceptron for the concatenated features of several towers, D -> 4 D -> L -> L.

    Paper: arXiv 2402.07865.
    Reference: prismatic-vlms, prismatic/util/nn_utils.py, `fused-gelu-mlp`.
    Shape: every patch a token.
    Parameters: (D + 1) 4 D + (4 D + 1) L + (L + 1) L.
    """

    name: Literal["fused_gelu_mlp"] = "fused_gelu_mlp"

    def grid_out(self, grid: Grid) -> Grid:
        return grid

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        return (in_features + 1) * 4 * in_features + perceptron_weights(2, 4 * in_features, out_features)

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.mlp import FusedGeluMlpProjector

        return FusedGeluMlpProjector(self, in_features, out_features, grid)


def perceptron_weights(depth: int, in_features: int, out_features: int) -> int:
    """Weights of `vlm_vision.adapters.mlp.perceptron`."""
    return (in_features + 1) * out_features + (depth - 1) * (out_features + 1) * out_features
