"""Projectors that map every patch on its own: a linear layer, or a perceptron of any depth.

All start as torch initialises its linear layers, which their references leave alone.
"""

from __future__ import annotations

from itertools import chain

from jaxtyping import Float
from torch import Tensor, nn

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.mlp_config import (
    FusedGeluMlpConfig,
    IdentityConfig,
    LinearConfig,
    MlpConfig,
    MlpResConfig,
)
from vlm_vision.adapters.projector import Projector

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class IdentityProjector(Projector):
    """[B,N,D] -> [B,N,D], without weights."""

    def __init__(self, config: IdentityConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b n d"]:
        return patches


class LinearProjector(Projector, nn.Linear):
    """[B,N,D] -> [B,N,L]. Keys `weight`, `bias`, as LLaVA's `linear` (`multimodal_projector/builder.py`)."""

    def __init__(self, config: LinearConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid, in_features, out_features)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b n l"]:
        return nn.Linear.forward(self, patches)


class SequentialProjector(Projector, nn.Sequential):
    """[B,N,D] -> [B,N,L] by layers one after another, whose keys begin with their numbers."""

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b n l"]:
        tokens: Tensor = nn.Sequential.forward(self, patches)  # type: ignore[no-untyped-call]
        return tokens


class MlpProjector(SequentialProjector):
    """[B,N,D] -> [B,N,L]. Keys `0.weight`, `2.weight`, ..., as LLaVA's `mlp2x_gelu` (same file)."""

    def __init__(self, config: MlpConfig, in_features: int, out_features: int, grid: Grid) -> None:
        layers = perceptron(config.depth, in_features, out_features, config.activation)
        super().__init__(config, in_features, out_features, grid, *layers)


class MlpResProjector(SequentialProjector):
    """[B,N,D] -> [B,N,L]. Keys 0, 2, 3.pre_norm, 3.proj.0, ..., as LLaVA-NeXT's `mlp2x_res2x_gelu`."""

    def __init__(self, config: MlpResConfig, in_features: int, out_features: int, grid: Grid) -> None:
        layers = perceptron(config.depth, in_features, out_features)
        blocks = (ResidualBlock(out_features) for _ in range(config.blocks))
        super().__init__(config, in_features, out_features, grid, *layers, *blocks)


class ResidualBlock(nn.Module):
    """[B,N,L] -> [B,N,L]. The residual begins behind the norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.proj = perceptron(2, width, width)

    def forward(self, tokens: Float[Tensor, "b n l"]) -> Float[Tensor, "b n l"]:
        normed: Tensor = self.pre_norm(tokens)
        added: Tensor = self.proj(normed)
        return normed + added


class FusedGeluMlpProjector(SequentialProjector):
    """[B,N,D] -> [B,N,L]. Keys `0.weight`, `2.weight`, `4.weight`, as in Prismatic's `projector`."""

    def __init__(self, config: FusedGeluMlpConfig, in_features: int, out_features: int, grid: Grid) -> None:
        wide = 4 * in_features
        layers = (nn.Linear(in_features, wide), nn.GELU(), *perceptron(2, wide, out_features))
        super().__init__(config, in_features, out_features, grid, *layers)


def perceptron(depth: int, in_features: int, out_features: int, activation: str = "gelu") -> nn.Sequential:
    """Linear layers, the first to `out_features`, with an activation between each two."""
    between = _ACTIVATIONS[activation]
    deeper = ((between(), nn.Linear(out_features, out_features)) for _ in range(depth - 1))
    return nn.Sequential(nn.Linear(in_features, out_features), *chain.from_iterable(deeper))
