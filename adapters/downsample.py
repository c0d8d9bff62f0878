"""Projectors that make one token of the patches of a window: shuffled, pooled, or convolved.

All but `pixel_shuffle` start as torch initialises its layers, which their references leave alone.
"""

from __future__ import annotations

from itertools import pairwise

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.downsample_config import (
    MlpDownsampleConfig,
    PixelShuffleConfig,
    PoolConfig,
    PoolerConfig,
    SpatialPoolConfig,
)
from vlm_vision.adapters.mlp import perceptron
from vlm_vision.adapters.projector import Projector


class PixelShuffleProjector(Projector):
    """[B,N,D] -> [B,N/factor^2,L]. Key `proj.weight`, drawn from N(0, 0.02), both as in nanoVLM."""

    config: PixelShuffleConfig

    def __init__(self, config: PixelShuffleConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        self.proj = nn.Linear(config.factor**2 * in_features, out_features, bias=False)
        nn.init.normal_(self.proj.weight, std=0.02)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        rows, _ = self.grid_of(patches, grid)
        squares = side_by_side(rearrange(patches, "b (h w) d -> b h w d", h=rows), self.config.factor)
        tokens: Tensor = self.proj(squares)
        return tokens


class MlpDownsampleProjector(Projector):
    """[B,N,D] -> [B,M,L]. Keys `layers.1.weight`, ..., as in VILA, where layer 0 brings patches together."""

    config: MlpDownsampleConfig

    def __init__(self, config: MlpDownsampleConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        widths = config.widths(in_features, out_features)
        layers: list[nn.Module] = [nn.Identity()]
        for width, following in pairwise(widths):
            layers += [nn.LayerNorm(width), nn.Linear(width, following), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(out_features, out_features))

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        rows, columns = self.grid_of(patches, grid)
        factor = self.config.factor
        plane = rearrange(patches, "b (h w) d -> b h w d", h=rows)
        tokens: Tensor = self.layers(
            side_by_side(F.pad(plane, (0, 0, 0, -columns % factor, 0, -rows % factor)), factor)
        )
        return tokens


class PoolProjector(Projector):
    """[B,N,D] -> [B,M,L]. Keys `mlp.0.weight`, `mlp.2.weight`, ..."""

    config: PoolConfig

    def __init__(self, config: PoolConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        self.mlp = perceptron(config.depth, in_features, out_features)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        rows, columns = self.grid_of(patches, grid)
        mlp_first = self.config.first == "mlp"
        plane = rearrange(self.mlp(patches) if mlp_first else patches, "b (h w) d -> b d h w", h=rows)
        tokens: Tensor = rearrange(self._pool(plane, (rows, columns)), "b d h w -> b (h w) d")
        return tokens if mlp_first else self.mlp(tokens)

    def _pool(self, plane: Float[Tensor, "b d h w"], grid: Grid) -> Float[Tensor, "b d p q"]:
        config = self.config
        if config.mode == "bilinear":
            return F.interpolate(plane, size=config.grid_out(grid), mode="bilinear")
        if config.target is not None:
            adaptive = F.adaptive_avg_pool2d if config.mode == "average" else F.adaptive_max_pool2d
            return adaptive(plane, config.target)
        return (F.avg_pool2d if config.mode == "average" else F.max_pool2d)(plane, config.side)


class PoolerProjector(Projector):
    """[B,N,D] -> [B,M,L]. Keys `conv_pool.weight`, `proj.1.weight`, as LLaVA-NeXT's `pooler`."""

    def __init__(self, config: PoolerConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        self.conv_pool = nn.Conv2d(in_features, out_features, kernel_size=2, stride=2)
        self.proj = nn.Sequential(nn.GELU(), nn.Linear(out_features, out_features))

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        rows, _ = self.grid_of(patches, grid)
        pooled = self.conv_pool(rearrange(patches, "b (h w) d -> b d h w", h=rows))
        tokens: Tensor = self.proj(rearrange(pooled, "b d h w -> b (h w) d"))
        return tokens


class SpatialPoolProjector(Projector):
    """[B,N,D] -> [B,M,L]. Keys `pool.weight`, `mlp.0.weight`: LLaVA-NeXT's resampler and its projector."""

    def __init__(self, config: SpatialPoolConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        width = config.width or in_features
        self.pool = nn.Conv2d(in_features, width, kernel_size=config.stride, stride=config.stride)
        self.mlp = perceptron(config.depth, width, out_features)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        rows, _ = self.grid_of(patches, grid)
        pooled = self.pool(rearrange(patches, "b (h w) d -> b d h w", h=rows))
        tokens: Tensor = self.mlp(rearrange(pooled, "b d h w -> b (h w) d"))
        return tokens


def side_by_side(plane: Float[Tensor, "b h w d"], factor: int) -> Float[Tensor, "b m e"]:
    """The channels of each square of `factor` x `factor` patches, row by row, in one token."""
    tokens: Tensor = rearrange(plane, "b (h i) (w j) d -> b (h w) (i j d)", i=factor, j=factor)
    return tokens
