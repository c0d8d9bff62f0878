"""Projectors that make one token of the patches of a window."""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from vlm_vision.adapters.config import Grid, ProjectorConfig, Width
from vlm_vision.adapters.mlp_config import perceptron_weights
from vlm_vision.errors import ConfigError

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector

Target = Annotated[tuple[Width, Width], Field(description="tokens as (rows, columns)")]


class PixelShuffleConfig(ProjectorConfig):
    """The channels of a square of patches side by side, and a linear layer without bias.

    InternVL has a layer norm and two linear layers in its place: that is `mlp_downsample`, variant `2x2`.

    Paper: arXiv 2408.12637 (Idefics3).
    Reference: nanoVLM, models/modality_projector.py.
    Shape: rows / factor x columns / factor; both must divide.
    Parameters: factor^2 D L.

    Attributes:
        factor: side of the square.
    """

    name: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = Field(4, ge=1)

    def grid_out(self, grid: Grid) -> Grid:
        rows, columns = grid
        if rows % self.factor or columns % self.factor:
            fitting = [str(n) for n in range(2, gcd(rows, columns) + 1) if gcd(rows, columns) % n == 0]
            way_out = (
                f"factors that fit: {', '.join(fitting)}"
                if fitting
                else "no factor does; 'mlp_downsample' fills such grids up with zeros"
            )
            raise ConfigError(
                f"pixel_shuffle: a grid of {rows}x{columns} patches does not divide into squares of "
                f"{self.factor}x{self.factor} ({way_out})"
            )
        return rows // self.factor, columns // self.factor

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        return self.factor**2 * in_features * out_features

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.downsample import PixelShuffleProjector

        return PixelShuffleProjector(self, in_features, out_features, grid)


class MlpDownsampleConfig(ProjectorConfig):
    """The channels of a square of patches side by side, then layer norms and linear layers, as in VILA.

    Rows and columns that are short of a square are filled up with zeros. `mlp_downsample_3x3_fix` and the
    like are understood as names; VILA's plain `mlp_downsample` computes what its `2x2_fix` does.

    Paper: arXiv 2412.04468 (NVILA).
    Reference: VILA, llava/model/multimodal_projector/base_projector.py.
    Shape: rows / factor x columns / factor, rounded up; factor 2 or 3.
    Parameters: the sum of 2 w + (w + 1) v over the widths w -> v from factor^2 D to L by the variant's, and
        (L + 1) L.

    Attributes:
        variant: size of the square and the widths between: `2x2` none, `3x3` 3 D, `3x3_s2` 3 D, D, D / 3,
            `3x3_s2_new` 4 D, 2 D, D, D / 3.
    """

    name: Literal["mlp_downsample"] = "mlp_downsample"
    variant: Literal["2x2", "3x3", "3x3_s2", "3x3_s2_new"] = "2x2"

    @property
    def factor(self) -> int:
        """Side of the square."""
        return int(self.variant[0])

    def widths(self, in_features: int, out_features: int) -> list[int]:
        """Widths from the square's channels to the language model's, a layer norm and a layer from each."""
        d = in_features
        between = {
            "2x2": [],
            "3x3": [3 * d],
            "3x3_s2": [3 * d, d, d // 3],
            "3x3_s2_new": [4 * d, 2 * d, d, d // 3],
        }
        return [self.factor**2 * d, *between[self.variant], out_features]

    def grid_out(self, grid: Grid) -> Grid:
        rows, columns = grid
        return -(-rows // self.factor), -(-columns // self.factor)

    def check(self, in_features: int, out_features: int, grid: Grid) -> None:
        super().check(in_features, out_features, grid)
        if 0 in self.widths(in_features, out_features):
            raise ConfigError(f"mlp_downsample: variant {self.variant!r} needs 3 channels, not {in_features}")

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        widths = self.widths(in_features, out_features)
        steps = sum(2 * w + (w + 1) * v for w, v in pairwise(widths))
        return steps + (out_features + 1) * out_features

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.downsample import MlpDownsampleProjector

        return MlpDownsampleProjector(self, in_features, out_features, grid)


class PoolConfig(ProjectorConfig):
    """Patches pooled over windows, or to a grid of any size, and a perceptron; no weights but the latter's.

    Paper: arXiv 2408.03326 (LLaVA-OneVision).
    Reference: LLaVA-NeXT, llava/model/llava_arch.py, `get_2dPool`, with `first: mlp`.
    Shape: the target; or rows / stride x columns / stride, rounded up if bilinear, else down.
    Parameters: (D + 1) L + (depth - 1) (L + 1) L.

    Attributes:
        mode: mean or largest value of a window, or bilinear interpolation without smoothing, as there.
        stride: side of a window; 2 where no target is given. Average and largest value leave out the rows
            and columns that do not fill one, as there.
        target: tokens as (rows, columns), at most as many as patches; windows then differ in size.
        depth: linear layers of the perceptron, with GELU between.
        first: what comes first; pooling first takes stride^2 times less work.
    """

    name: Literal["pool"] = "pool"
    mode: Literal["average", "bilinear", "max"] = "average"
    stride: int | None = Field(None, ge=1)
    target: Target | None = None
    depth: int = Field(2, ge=1)
    first: Literal["pool", "mlp"] = "pool"

    @model_validator(mode="after")
    def _one_way(self) -> PoolConfig:
        if self.stride is not None and self.target is not None:
            raise ValueError("stride and target both say how many tokens come out: give one of them")
        return self

    @property
    def side(self) -> int:
        """Side of a window where there is no target."""
        return self.stride or 2

    def grid_out(self, grid: Grid) -> Grid:
        if self.target is not None:
            return within(self.name, self.target, grid)
        if self.mode == "bilinear":
            return -(-grid[0] // self.side), -(-grid[1] // self.side)
        return windows(self.name, self.side, grid)

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        return perceptron_weights(self.depth, in_features, out_features)

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.downsample import PoolProjector

        return PoolProjector(self, in_features, out_features, grid)


class PoolerConfig(ProjectorConfig):
    """A convolution over windows of 2x2, GELU, and a linear layer: LLaVA-NeXT's projector of that name.

    Paper: none.
    Reference: LLaVA-NeXT, llava/model/multimodal_projector/pooler_projector.py.
    Shape: rows / 2 x columns / 2, rounded down: an odd row or column is left out, as there.
    Parameters: (4 D + 1) L + (L + 1) L.
    """

    name: Literal["pooler"] = "pooler"

    def grid_out(self, grid: Grid) -> Grid:
        return windows(self.name, 2, grid)

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        return perceptron_weights(2, 4 * in_features, out_features)

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.downsample import PoolerProjector

        return PoolerProjector(self, in_features, out_features, grid)


class SpatialPoolConfig(ProjectorConfig):
    """A learnt convolution over windows, then a perceptron: LLaVA-NeXT's resampler with its projector.

    Its other modes, average and largest value, are those of `pool`.

    Paper: none.
    Reference: LLaVA-NeXT, llava/model/multimodal_resampler/spatial_pool.py, mode `conv`.
    Shape: rows / stride x columns / stride, rounded down: what does not fill a window is left out, as there.
    Parameters: (stride^2 D + 1) W + (W + 1) L + (depth - 1) (L + 1) L, with W the width, or D.

    Attributes:
        stride: side of a window.
        width: channels W that the convolution gives; None keeps those of a patch.
        depth: linear layers of the perceptron, with GELU between.
    """

    name: Literal["spatial_pool"] = "spatial_pool"
    stride: int = Field(2, ge=1)
    width: int | None = Field(None, gt=0)
    depth: int = Field(2, ge=1)

    def grid_out(self, grid: Grid) -> Grid:
        return windows(self.name, self.stride, grid)

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width = self.width or in_features
        convolution = (self.stride**2 * in_features + 1) * width
        return convolution + perceptron_weights(self.depth, width, out_features)

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.downsample import SpatialPoolProjector

        return SpatialPoolProjector(self, in_features, out_features, grid)


def windows(name: str, side: int, grid: Grid) -> Grid:
    """Whole windows of `side` x `side` that lie on a grid beside each other.

    Raises:
        ConfigError: there is none.
    """
    rows, columns = grid
    if side > min(rows, columns):
        raise ConfigError(
            f"{name}: a grid of {rows}x{columns} patches holds no window of {side}x{side} "
            f"(the largest that fits: {min(rows, columns)}x{min(rows, columns)})"
        )
    return rows // side, columns // side


def within(name: str, target: Grid, grid: Grid) -> Grid:
    """The target, where a grid has at least its rows and columns.

    Raises:
        ConfigError: it has not, so that patches would be repeated.
    """
    if target[0] > grid[0] or target[1] > grid[1]:
        raise ConfigError(
            f"{name}: a grid of {grid[0]}x{grid[1]} patches is smaller than the target of "
            f"{target[0]}x{target[1]} tokens (the largest target that fits: {grid[0]}x{grid[1]})"
        )
    return target
