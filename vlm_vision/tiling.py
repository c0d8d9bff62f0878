"""Pictures of any shape as tiles of a tower's size, and the tiles' features as one sequence of tokens.

    tiles = [tile_picture(picture, tower.image_processor, config) for picture in pictures]
    features = projector(tower(torch.cat(tiles))).split([len(part) for part in tiles])
    tokens = merge_tiles(features[0], pictures[0].size, config, grid=tower.grid, tile_size=tower.image_size)

Equal to LLaVA (c121f04) and LLaVA-NeXT (df17966): pixels to `process_images` of llava/mm_utils.py, tokens to
`prepare_inputs_labels_for_multimodal` of llava/model/llava_arch.py. The two differ in that LLaVA-NeXT adds
`anyres_max_N`, ranges of pinpoints, `maxpool2x2` and `nobase`; what both have, they do alike. Where a setting
does not fit, both go on with a grid of 2x2 or fail inside torch; here it is a ConfigError.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.preprocess import ImageProcessor
from vlm_vision.tiling_config import TilingConfig

# LLaVA calls `Image.resize` without naming a filter, whatever the image processor's is: Pillow's default.
_RESAMPLING = Image.Resampling.BICUBIC
# `anyres_max_N` leaves pictures alone whose sides have up to this many times the tokens that N tiles have.
_SHRINK_ABOVE = 1.1


def tile_picture(
    image: Image.Image, processor: ImageProcessor, config: TilingConfig
) -> Float[Tensor, "tiles 3 h w"]:
    """The pixels of a picture, ready for the tower: one tile, or for `anyres` the whole and then its parts.

    Args:
        image: as `open_image` gives it. Its `size` is what `merge_tiles` and `count_tokens` want later.
        processor: the tower's own; its size is the tiles'.

    Raises:
        DataError: a picture that is not RGB, or too thin for every size that the config offers.
        ConfigError: sizes that tiles do not fill, or a tower that keeps the shapes of pictures.
    """
    return processor.normalise([processor.to_square(tile) for tile in cut_picture(image, processor, config)])


def cut_picture(image: Image.Image, processor: ImageProcessor, config: TilingConfig) -> list[Image.Image]:
    """The tiles of a picture before the image processor; arguments and errors are those of `tile_picture`."""
    if image.mode != "RGB":
        raise DataError(
            f"picture of mode {image.mode!r}: open it with vlm_vision.open_image, which gives RGB"
        )
    processor.check_one_size("tiles")
    if config.mode == "anyres":
        return [_thumbnail(image, processor), *_parts(image, processor, config)]
    return [_expand_to_square(image, processor) if config.mode == "pad" else image]


def tile_grid(
    image_size: tuple[int, int], config: TilingConfig, tile_size: int | tuple[int, int]
) -> tuple[int, int] | None:
    """Rows and columns of a picture's parts; None where the picture is one tile.

    Of all pinpoints the one is taken that keeps most of the picture's pixels, then the one that wastes least,
    then the first: `select_best_resolution` and `get_anyres_image_grid_shape` of llava/mm_utils.py.

    Args:
        image_size: of the picture, as (width, height).
        tile_size: the tower's `image_size`: side of a tile, or (rows, columns), in pixels.

    Raises:
        DataError: too thin a picture: at every size it would be less than a pixel wide.
        ConfigError: sizes that tiles do not fill.
    """
    if config.mode != "anyres":
        return None
    tile_height, tile_width = (tile_size, tile_size) if isinstance(tile_size, int) else tile_size
    return _best_grid(image_size, config, tile_height, tile_width)


def merge_tiles(
    features: Float[Tensor, "tiles n d"],
    image_size: tuple[int, int],
    config: TilingConfig,
    *,
    grid: tuple[int, int],
    tile_size: int | tuple[int, int],
    image_newline: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "m d"]:
    """One picture's features, of the tiles that `tile_picture` made, as one sequence; m is `count_tokens`.

    A picture of one tile keeps its tokens in order; with `spatial_unpad` one newline follows them, as in
    LLaVA when it gets a list of pictures (from a tensor of equal pictures it leaves the newline out).

    Args:
        features: of the tower's patches, after the projector.
        image_size: of the picture, as (width, height).
        grid: rows and columns of a tile's features: the tower's `grid`, or what the projector makes of it.
        tile_size: the tower's `image_size`: side of a tile, or (rows, columns), in pixels.
        image_newline: the learnt vector that ends a row, for `spatial_unpad`.

    Raises:
        ConfigError: features that are not of this grid or not of this picture's tiles, or no newline.
        DataError: see `tile_grid`.
    """
    tiles = tile_grid(image_size, config, tile_size)
    _check_features(features, image_size, config, grid, tiles)
    newline = _newline(features, image_newline) if config.merge == "spatial_unpad" else None
    if tiles is None or config.merge == "flat":
        tokens: Tensor = rearrange(features, "tiles n d -> (tiles n) d")
        return tokens if newline is None else torch.cat([tokens, newline[None]])
    picture = rearrange(
        features[1:], "(tr tc) (h w) d -> d (tr h) (tc w)", tr=tiles[0], tc=tiles[1], h=grid[0], w=grid[1]
    )
    if newline is not None:
        top, left = _margins(picture.shape[1], picture.shape[2], image_size, config)
        picture = picture[:, top : picture.shape[1] - top, left : picture.shape[2] - left]
        size = _shrunk(picture.shape[1], picture.shape[2], config, grid)
        if size != tuple(picture.shape[1:]):
            picture = interpolate(picture[None], size, mode="bilinear")[0]
        ends = newline[:, None, None].expand(-1, picture.shape[1], 1)
        picture = torch.cat([picture, ends], dim=-1)
    elif config.merge == "spatial_maxpool2x2":
        picture = max_pool2d(picture, 2)
    tokens = rearrange(picture, "d h w -> (h w) d")
    return torch.cat([features[0], tokens]) if config.base else tokens


def count_tokens(
    image_size: tuple[int, int],
    config: TilingConfig,
    *,
    grid: tuple[int, int],
    tile_size: int | tuple[int, int],
) -> int:
    """How many tokens `merge_tiles` gives for a picture of this size, known before anything runs.

    Arguments and errors are those of `merge_tiles`.
    """
    tiles = tile_grid(image_size, config, tile_size)
    if tiles is None:
        return grid[0] * grid[1] + (config.merge == "spatial_unpad")
    rows, columns = tiles[0] * grid[0], tiles[1] * grid[1]
    if config.merge == "spatial_unpad":
        top, left = _margins(rows, columns, image_size, config)
        rows, columns = rows - 2 * top, columns - 2 * left
    return _count(rows, columns, config, grid)


def count_tiles(image_size: tuple[int, int], config: TilingConfig, tile_size: int | tuple[int, int]) -> int:
    """How many tiles `tile_picture` makes of a picture; arguments and errors are those of `tile_grid`."""
    tiles = tile_grid(image_size, config, tile_size)
    return 1 if tiles is None else 1 + tiles[0] * tiles[1]


def most_tokens(config: TilingConfig, *, grid: tuple[int, int], tile_size: int | tuple[int, int]) -> int:
    """The most tokens that `merge_tiles` gives, whatever the picture's size.

    Raises:
        ConfigError: sizes that tiles do not fill.
    """
    if config.mode != "anyres":
        return count_tokens((1, 1), config, grid=grid, tile_size=tile_size)
    height, width = (tile_size, tile_size) if isinstance(tile_size, int) else tile_size
    return max(
        _count(rows - 2 * top, columns - 2 * left, config, grid)
        for resolution in config.resolutions(width, height)
        for rows, columns in [(resolution[1] // height * grid[0], resolution[0] // width * grid[1])]
        for top, left in [
            *((top, 0) for top in range((rows + 1) // 2)),
            *((0, left) for left in range((columns + 1) // 2)),
        ]
    )


def _count(rows: int, columns: int, config: TilingConfig, grid: tuple[int, int]) -> int:
    """Tokens of a picture in parts, of which so many rows and columns are left."""
    if config.merge == "spatial_unpad":
        rows, columns = _shrunk(rows, columns, config, grid)
        columns += 1
    elif config.merge == "spatial_maxpool2x2":
        rows, columns = rows // 2, columns // 2
    return rows * columns + (grid[0] * grid[1] if config.base else 0)


def _best_grid(
    image_size: tuple[int, int], config: TilingConfig, tile_height: int, tile_width: int
) -> tuple[int, int]:
    width, height = image_size

    def kept_and_wasted(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    best = max(config.resolutions(tile_width, tile_height), key=kept_and_wasted)
    if kept_and_wasted(best)[0] == 0:
        raise DataError(
            f"a picture of {width}x{height} is too thin for grid_pinpoints {config.grid_pinpoints}: "
            "scaled to any of them it would be less than one pixel wide; crop it first"
        )
    return best[1] // tile_height, best[0] // tile_width


def _expand_to_square(image: Image.Image, processor: ImageProcessor) -> Image.Image:
    """In the middle of a square of the mean colour: `expand2square` of llava/mm_utils.py."""
    if image.width == image.height:
        return image
    side = max(image.size)
    red, green, blue = (int(level * 255) for level in processor.config.mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _thumbnail(image: Image.Image, processor: ImageProcessor) -> Image.Image:
    """The whole picture squashed to one tile: `process_anyres_image` of llava/mm_utils.py."""
    height, width = processor.config.height, processor.config.width
    shorter = min(height, width)
    resize_to = processor.config.resize_to or shorter
    scaled = resize_to if isinstance(resize_to, int) else min(resize_to)
    return image.resize((width * scaled // shorter, height * scaled // shorter), _RESAMPLING)


def _parts(image: Image.Image, processor: ImageProcessor, config: TilingConfig) -> list[Image.Image]:
    """The picture scaled to fit its resolution, on black, cut row by row.

    `resize_and_pad_image` and `divide_to_patches` of llava/mm_utils.py.
    """
    height, width = processor.config.height, processor.config.width
    rows, columns = _best_grid(image.size, config, height, width)
    canvas = Image.new("RGB", (columns * width, rows * height))
    scale_x, scale_y = canvas.width / image.width, canvas.height / image.height
    if scale_x < scale_y:
        size = (canvas.width, min(math.ceil(image.height * scale_x), canvas.height))
    else:
        size = (min(math.ceil(image.width * scale_y), canvas.width), canvas.height)
    canvas.paste(
        image.resize(size, _RESAMPLING), ((canvas.width - size[0]) // 2, (canvas.height - size[1]) // 2)
    )
    corners = [(x, y) for y in range(0, canvas.height, height) for x in range(0, canvas.width, width)]
    return [canvas.crop((x, y, x + width, y + height)) for x, y in corners]


def _margins(rows: int, columns: int, image_size: tuple[int, int], config: TilingConfig) -> tuple[int, int]:
    """Rows on top and columns at the left that show padding alone; as many lie opposite.

    `unpad_image` of llava/model/llava_arch.py, which cuts both fractions off, so may keep a row of padding;
    or of transformers' models/llava_next/modeling_llava_next.py.
    """

    def whole(length: float) -> int:
        return int(length if config.margins == "llava" else round(length, 7))

    width, height = image_size
    if width / height > columns / rows:
        return (rows - whole(height * (columns / width))) // 2, 0
    return 0, (columns - whole(width * (rows / height))) // 2


def _shrunk(rows: int, columns: int, config: TilingConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that `anyres_max_N` leaves; at least one, where llava_arch.py fails on none."""
    if config.max_tiles is None:
        return rows, columns
    times = math.sqrt(rows * columns / (config.max_tiles * grid[0] * grid[1]))
    if times <= _SHRINK_ABOVE:
        return rows, columns
    return max(1, int(rows // times)), max(1, int(columns // times))


def _check_features(
    features: Tensor,
    image_size: tuple[int, int],
    config: TilingConfig,
    grid: tuple[int, int],
    tiles: tuple[int, int] | None,
) -> None:
    if features.ndim != 3 or features.shape[1] != grid[0] * grid[1]:
        raise ConfigError(
            f"features of shape {list(features.shape)}: a grid of {grid[0]}x{grid[1]} has "
            f"[tiles, {grid[0] * grid[1]}, D]; a tower with select 'patch' gives them"
        )
    count = 1 if tiles is None else 1 + tiles[0] * tiles[1]
    if len(features) != count:
        raise ConfigError(
            f"features of {len(features)} tile(s): a picture of {image_size[0]}x{image_size[1]} has {count} "
            f"with mode {config.mode!r}; give the size of the picture and the config that tile_picture took"
        )


def _newline(features: Tensor, image_newline: Tensor | None) -> Float[Tensor, " d"]:
    if image_newline is None:
        raise ConfigError("merge 'spatial_unpad' ends each row with image_newline, which was not given")
    if image_newline.shape != features.shape[2:]:
        raise ConfigError(
            f"image_newline of shape {list(image_newline.shape)}: features of width {features.shape[2]} want "
            f"[{features.shape[2]}]"
        )
    return image_newline.to(features)
