"""Pictures in tiles for a language model: cut before the tower, laid together after the projector.

LLaVA's `anyres` (`vlm_vision.tiling`) as a part of a model: `TileFormat` says what becomes of a picture's
size, `TileMerger` has the vector that is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm_vision.adapters.config import Grid, ProjectorConfig
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.preprocess import ImageProcessor, Picture, open_image
from vlm_vision.tiling import count_tiles, count_tokens, merge_tiles, most_tokens, tile_picture
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.tower import VisionTower
from vlm_vision.weights import check_whole

NEWLINE = "image_newline"
_FILE = "model.safetensors"


@dataclass(frozen=True)
class TileFormat:
    """How a model's pictures are cut, and how many tokens that makes of them. No weights are here.

    Attributes:
        config: the model's `tiling`.
        processor: the tower's; its size is the tiles'.
        grid: rows and columns of a tile's tokens, after the projector.
    """

    config: TilingConfig
    processor: ImageProcessor
    grid: Grid

    @property
    def tile_size(self) -> tuple[int, int]:
        return self.processor.config.height, self.processor.config.width

    @property
    def most_tokens(self) -> int:
        """The most tokens that a picture takes, whatever its size."""
        return most_tokens(self.config, grid=self.grid, tile_size=self.tile_size)

    @property
    def most_tiles(self) -> int:
        """The most tiles that a picture is cut into."""
        if self.config.mode != "anyres":
            return 1
        height, width = self.tile_size
        return 1 + max(w * h // (width * height) for w, h in self.config.resolutions(width, height))

    def num_tiles(self, size: tuple[int, int]) -> int:
        """Tiles of a picture of (width, height); raises as `vlm_vision.tiling.tile_grid`."""
        return count_tiles(size, self.config, self.tile_size)

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of a picture of (width, height); raises as `vlm_vision.tiling.tile_grid`."""
        return count_tokens(size, self.config, grid=self.grid, tile_size=self.tile_size)

    def __call__(
        self, pictures: Sequence[Picture]
    ) -> tuple[Float[Tensor, "tiles 3 h w"], Int[Tensor, "p 2"]]:
        """Tiles of all pictures in order, and the pictures' (height, width), as transformers has them.

        Raises:
            DataError: a picture that cannot be read, or is too thin for every size that the config offers.
        """
        opened = [open_image(picture) for picture in pictures]
        tiles = [tile_picture(picture, self.processor, self.config) for picture in opened]
        return torch.cat(tiles), torch.tensor([(picture.height, picture.width) for picture in opened])


class TileMerger(nn.Module):
    """Tokens of tiles as each picture's one sequence; a language model's image tokens take them in order.

    Attributes:
        image_newline: [L], ends each row of a picture with merge `spatial_unpad`; None with others. Fresh, it
            is drawn as LLaVA does (`initialize_vision_modules` of llava/model/llava_arch.py).
    """

    def __init__(self, form: TileFormat, width: int) -> None:
        super().__init__()
        self.form = form
        self.image_newline: nn.Parameter | None = None
        if form.config.merge == "spatial_unpad":
            self.image_newline = nn.Parameter(torch.randn(width) / math.sqrt(width))

    def forward(
        self, tokens: Float[Tensor, "tiles m l"], sizes: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "n l"]:
        """All pictures' sequences behind each other.

        Args:
            sizes: of the pictures, as (width, height).
        """
        form = self.form
        parts = torch.split(tokens, [form.num_tiles(size) for size in sizes])
        merged = [
            merge_tiles(
                part,
                size,
                form.config,
                grid=form.grid,
                tile_size=form.tile_size,
                image_newline=self.image_newline,
            )
            for part, size in zip(parts, sizes, strict=True)
        ]
        return torch.cat(merged)


def tile_format(
    config: TilingConfig, tower: VisionTower, projector: ProjectorConfig, patches: Grid
) -> TileFormat:
    """How a model cuts pictures, whose tower gives a grid of `patches` to a projector.

    Raises:
        ConfigError: tokens of a tile that lie on no grid, under a merge that lays tiles beside each other, or
            sizes that tiles do not fill.
    """
    processor = tower.image_processor
    processor.check_one_size("tiling")
    height, width = processor.config.height, processor.config.width
    config.resolutions(width, height)
    grid = projector.grid_out(patches)
    if config.merge == "flat":
        return TileFormat(config, processor, grid)
    if tower.config.select != "patch":
        raise ConfigError(
            f"tiling: merge {config.merge!r} lays tiles beside each other, which class tokens would part: "
            "set the tower's select: patch, or merge: flat"
        )
    if grid[0] == 1 and grid[1] > 1 and patches[0] > 1:
        raise ConfigError(
            f"tiling: merge {config.merge!r} lays tiles beside each other, but the {grid[1]} tokens of the "
            f"projector {projector.name!r} lie on no grid: set merge: flat, or take one of patches, such as "
            "mlp2x_gelu"
        )
    return TileFormat(config, processor, grid)


def save_newline(merger: TileMerger, folder: Path) -> None:
    """Write `model.safetensors` with the `image_newline`.

    Raises:
        WeightsError: as `check_whole`.
    """
    state = merger.state_dict()
    check_whole(state, f"{folder} is not written")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / _FILE)


def load_newline(merger: TileMerger, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Give a merger the `image_newline` that `save_newline` wrote, in a dtype or its own.

    Raises:
        WeightsError: it is not there, or is of another width.
    """
    path = folder / _FILE
    if not path.is_file():
        raise WeightsError(f"{path} is not there: it holds the {NEWLINE} of a model with tiles")
    set_newline(merger, load_file(path).get(NEWLINE), path)
    if dtype is not None:
        merger.to(dtype)


def set_newline(merger: TileMerger, newline: Tensor | None, source: str | Path) -> None:
    """Give a merger its `image_newline`, of whatever dtype.

    Raises:
        WeightsError: there is none, or it is of another width.
    """
    own = merger.image_newline
    if own is None:
        return
    if newline is None or newline.shape != own.shape:
        found = "none" if newline is None else f"{list(newline.shape)}"
        raise WeightsError(f"{source}: {NEWLINE} of {list(own.shape)} is wanted, found {found}")
    own.data = newline.to(own.device)
