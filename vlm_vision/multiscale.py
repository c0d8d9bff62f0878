"""S2: one tower on a picture at several scales, its features joined along the channels (arXiv:2403.13043)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm_vision.errors import ConfigError
from vlm_vision.preprocess import ImageProcessor
from vlm_vision.tower import VisionTower, listed_pixels
from vlm_vision.tower_config import TowerConfig


class MultiscaleTower(nn.Module):
    """A tower's features at several scales: as many tokens as one scale has, wider by the number of scales.

    A picture at k times the tower's size is cut into k x k tiles of the tower's size, whose features are put
    together again and averaged down to one tile's grid. Equal to `s2wrapper.forward` of scaling_on_scales
    (9c008a3), and so to LLaVA's CLIPVisionTowerS2, which evaluates only; here gradients follow
    `requires_grad`. What learns, checkpointing and saving are the inner tower's: `multiscale.tower`.

    Attributes:
        tower: the tower that sees every tile.
        scales: multiples of the tower's size, rising from 1.
        max_batch: most tiles that the tower runs at once; None runs all of a scale's.
        image_processor: pictures to pixels of the largest scale.
        hidden_size: D, the tower's times the number of scales.
    """

    def __init__(
        self, tower: VisionTower, scales: Sequence[int] = (1, 2, 3), *, max_batch: int | None = None
    ) -> None:
        """Take a tower of patches, with its class token or without.

        Raises:
            ConfigError: scales that do not rise from 1, a batch below 1, a tower that selects no patches or
                keeps the shapes of pictures.
        """
        super().__init__()
        rising = all(isinstance(k, int) for k in scales) and all(low < high for low, high in pairwise(scales))
        if not scales or scales[0] != 1 or not rising:
            raise ConfigError(
                f"scales {list(scales)}: must be whole multiples of the tower's size that rise from 1, "
                "such as (1, 2, 3)"
            )
        if max_batch is not None and max_batch < 1:
            raise ConfigError(f"max_batch {max_batch}: must be at least 1, or None")
        if tower.config.select not in ("patch", "cls_patch"):
            raise ConfigError(
                f"select {tower.config.select!r}: scales are joined patch by patch; use select 'patch'"
            )
        tower.image_processor.check_one_size("several scales")
        self.tower = tower
        self.scales = tuple(scales)
        self.max_batch = max_batch
        self.image_processor = ImageProcessor(tower.image_processor.config.at_size(self.image_size))
        self.hidden_size = tower.hidden_size * len(self.scales)

    @classmethod
    def from_llava(
        cls, tower: VisionTower, s2_scales: str = "336,672,1008", *, max_batch: int | None = None
    ) -> MultiscaleTower:
        """From LLaVA's `s2_scales`: sides in pixels, in any order, the smallest of them the tower's own.

        Raises:
            ConfigError: sides that are no numbers, or no multiples of the tower's.
        """
        try:
            sides = sorted(int(side) for side in s2_scales.split(","))
        except ValueError:
            raise ConfigError(f"s2_scales {s2_scales!r}: must be sides in pixels: '336,672,1008'") from None
        native = tower.image_size
        if not isinstance(native, int) or sides[0] != native or any(side % native for side in sides):
            raise ConfigError(
                f"s2_scales {s2_scales!r}: the smallest must be the tower's size, {native}, "
                "and the others multiples of it"
            )
        return cls(tower, [side // native for side in sides], max_batch=max_batch)

    @property
    def config(self) -> TowerConfig:
        """The inner tower's."""
        return self.tower.config

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of the pictures at the largest scale, in pixels; (rows, columns) where they are not square."""
        native, largest = self.tower.image_size, self.scales[-1]
        return native * largest if isinstance(native, int) else (native[0] * largest, native[1] * largest)

    @property
    def grid(self) -> tuple[int, int]:
        return self.tower.grid

    @property
    def patch_size(self) -> int:
        """Pixels between features, on pictures of `image_size`."""
        return self.tower.patch_size * self.scales[-1]

    @property
    def num_patches(self) -> int:
        return self.tower.num_patches

    @property
    def num_patches_per_side(self) -> int:
        return self.tower.num_patches_per_side

    @property
    def num_tokens(self) -> int:
        """Tokens that `forward` gives for a picture, by the tower's `select`."""
        return self.tower.num_tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.tower.dtype

    @property
    def device(self) -> torch.device:
        return self.tower.device

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"] | Sequence[Float[Tensor, "3 h w"]]
    ) -> Float[Tensor, "b n d"]:
        """Features of pictures of `image_size`, channels of the first scale first; a list runs as one batch.

        A class token is the mean over a scale's tiles, and stands before the patches.

        Raises:
            ConfigError: pixels of another size, none at all, or what is no pixels.
        """
        batch = pixels if isinstance(pixels, Tensor) else self._stacked(pixels)
        wanted = (3, self.image_processor.config.height, self.image_processor.config.width)
        if tuple(batch.shape[1:]) != wanted:
            raise ConfigError(
                f"pixels of shape {list(batch.shape)}: this tower takes [B, 3, {wanted[1]}, {wanted[2]}], "
                "its largest scale; its image_processor makes them from pictures of any size"
            )
        batch = batch.to(self.device)
        return torch.cat([self._at_scale(batch, scale) for scale in self.scales], dim=-1)

    @staticmethod
    def _stacked(pixels: Sequence[Tensor]) -> Tensor:
        pictures = listed_pixels(pixels)
        if len({picture.shape for picture in pictures}) != 1:
            raise ConfigError("pixels: a list must hold pictures, all of one size")
        return torch.stack(pictures)

    def _at_scale(self, batch: Float[Tensor, "b 3 h w"], scale: int) -> Float[Tensor, "b n d"]:
        """Features of one scale on the first scale's grid: `forward` of s2wrapper/core.py."""
        native = self.tower.image_processor.config
        size = (native.height * scale, native.width * scale)
        # Without antialiasing, as the features that others' projectors were trained on.
        scaled = interpolate(batch.float(), size=size, mode="bicubic").to(batch.dtype)
        tiles = rearrange(scaled, "b c (tr h) (tc w) -> (tr tc b) c h w", tr=scale, tc=scale)
        tokens = torch.cat([self.tower(part) for part in tiles.split(self.max_batch or len(tiles))])
        patches = rearrange(
            tokens[:, -self.num_patches :],
            "(tr tc b) (h w) d -> b d (tr h) (tc w)",
            tr=scale,
            tc=scale,
            h=self.grid[0],
        )
        pooled = interpolate(patches.float(), size=self.grid, mode="area").to(tokens.dtype)
        features: Tensor = rearrange(pooled, "b d h w -> b (h w) d")
        if tokens.shape[1] == self.num_patches:
            return features
        prefix = reduce(tokens[:, : -self.num_patches], "(tiles b) n d -> b n d", "mean", tiles=scale**2)
        return torch.cat([prefix, features], dim=1)
