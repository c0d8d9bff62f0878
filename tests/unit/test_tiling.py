from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from references import drawn
from torch import Tensor

from vlm_vision import ImageProcessor
from vlm_vision.config import load_config, save_config
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.tiling import count_tokens, merge_tiles, tile_grid, tile_picture
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.tower_config import PreprocessConfig

SIDE, GRID = 28, (4, 4)
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
PROCESSOR = ImageProcessor(PreprocessConfig(image_size=SIDE))


def anyres(merge: Any = "spatial_unpad", **fields: Any) -> TilingConfig:
    return TilingConfig(mode="anyres", merge=merge, **{"grid_pinpoints": PINPOINTS, **fields})


@pytest.mark.parametrize(
    ("llava", "ours"),
    [
        ((None, None, None), TilingConfig()),
        (("square", None, "flat"), TilingConfig()),
        (("pad", "[(336, 672)]", "flat"), TilingConfig(mode="pad")),
        (("pad", None, "spatial_unpad"), TilingConfig(mode="pad", merge="spatial_unpad")),
        (("anyres", [[336, 672]], "spatial"), anyres("spatial", grid_pinpoints=((336, 672),))),
        (
            ("anyres", " [(336, 672), (672, 336)]", "flat"),
            anyres("flat", grid_pinpoints=((336, 672), (672, 336))),
        ),
        (
            ("anyres_max_9", "(1x1),...,(6x6)", "spatial_unpad"),
            anyres(grid_pinpoints="(1x1),...,(6x6)", max_tiles=9),
        ),
        (("anyres", PINPOINTS, "spatial_unpad_nobase"), anyres(base=False)),
        (("anyres", PINPOINTS, "spatial_nobase"), anyres("spatial", base=False)),
        (("anyres", PINPOINTS, "spatial_nobase_maxpool2x2"), anyres("spatial_maxpool2x2", base=False)),
    ],
)
def test_llava_s_settings_map_to_ours(llava: tuple[Any, Any, Any], ours: TilingConfig, tmp_path: Any) -> None:
    assert TilingConfig.from_llava(*llava) == ours
    save_config(ours, tmp_path / "tiling.yaml")
    assert load_config(TilingConfig, tmp_path / "tiling.yaml") == ours


@pytest.mark.parametrize(
    ("llava", "message"),
    [
        (("anyres_max", PINPOINTS, "flat"), "mode: input should be .* 'anyres'.*did you mean 'anyres'"),
        (("highres", "224,448", "flat"), "mode: input should be 'square', 'pad' or 'anyres'"),
        (("anyres_max_0", PINPOINTS, "spatial_unpad"), "max_tiles: input should be greater than 0"),
        (("square", None, "unires"), "merge: input should be"),
        (("square", None, "spatial_unpad_maxpool2x2"), "merge: input should be"),
        (("anyres", None, "flat"), "mode 'anyres' needs grid_pinpoints"),
        (("anyres", [], "flat"), "grid_pinpoints: must be .*a rising range"),
        (("anyres", "[(336, 672)", "flat"), "is not a list of \\(width, height\\)"),
        (("anyres", "[__import__('os')]", "flat"), "is not a list of \\(width, height\\)"),
        (("anyres", [[336]], "flat"), "1 wrong value.*\n.*grid_pinpoints: must be .*a rising range"),
        (("anyres", [[336, 0]], "flat"), "grid_pinpoints: must be .*a rising range"),
        (("anyres", "(1x1),(2x2)", "flat"), "a rising range"),
        (("anyres", "(2x2),...,(1x3)", "flat"), "a rising range"),
        (("anyres", "(0x1),...,(2x2)", "flat"), "a rising range"),
        (("anyres_max_9", PINPOINTS, "spatial"), "max_tiles shrinks what merge 'spatial_unpad' gives"),
        (("anyres", PINPOINTS, "flat_nobase"), "merge 'flat' always has the whole picture's tokens"),
    ],
)
def test_settings_that_make_no_sense_are_named(llava: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TilingConfig.from_llava(*llava)


def test_pinpoints_of_a_whole_picture_are_refused() -> None:
    with pytest.raises(ConfigError, match="mode 'pad' has no grid_pinpoints"):
        load_config(TilingConfig, {"mode": "pad", "grid_pinpoints": [[28, 56]]})


def test_a_range_counts_in_tiles_columns_first() -> None:
    config = anyres(grid_pinpoints="(1x1),...,(2x3)")
    assert config.resolutions(10, 7) == [(10, 7), (10, 14), (10, 21), (20, 7), (20, 14), (20, 21)]


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((28, 28), (2, 1)),  # all keep the same and the first two waste the same
        ((56, 56), (2, 2)),
        ((2000, 1000), (1, 2)),
        ((1000, 2000), (2, 1)),
        ((3000, 1000), (1, 3)),
        ((100, 300), (3, 1)),
        ((50, 49), (2, 2)),
    ],
)
def test_the_grid_that_keeps_most_is_taken(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert tile_grid(size, anyres(), SIDE) == grid
    assert tile_grid(size, TilingConfig(mode="pad"), SIDE) is None


def test_one_tile_is_what_the_image_processor_makes() -> None:
    picture = drawn(70, 41)
    assert torch.equal(tile_picture(picture, PROCESSOR, TilingConfig()), PROCESSOR(picture))


def test_pad_puts_the_picture_amid_the_mean_colour() -> None:
    picture = drawn(SIDE, 11)
    tile = PROCESSOR.denormalise(tile_picture(picture, PROCESSOR, TilingConfig(mode="pad")))[0]
    mean = [int(level * 255) for level in PROCESSOR.config.mean]
    assert tile[:8].unique(dim=0)[0].unique(dim=0).tolist() == [mean]
    assert tile[19:].unique(dim=0)[0].unique(dim=0).tolist() == [mean]
    assert torch.equal(tile[8:19], torch.from_numpy(np.array(picture)))


def test_tiles_are_the_whole_and_then_its_parts_row_by_row() -> None:
    picture = drawn(84, 28)
    tiles = PROCESSOR.denormalise(tile_picture(picture, PROCESSOR, anyres()))
    assert len(tiles) == 4
    small = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert torch.equal(tiles[0], torch.from_numpy(np.array(small)))
    assert torch.equal(rearrange(tiles[1:], "t h w c -> h (t w) c"), torch.from_numpy(np.array(picture)))
    picture = drawn(56, 40)
    canvas = rearrange(
        PROCESSOR.denormalise(tile_picture(picture, PROCESSOR, anyres()))[1:],
        "(tr tc) h w c -> (tr h) (tc w) c",
        tr=2,
    )
    assert torch.equal(canvas[8:48], torch.from_numpy(np.array(picture)))
    assert not canvas[:8].any()
    assert not canvas[48:].any()


def places(tiles: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Features that say where they are: -1 in the whole picture's tile, then row and column in the parts."""
    rows, columns = torch.meshgrid(
        torch.arange(tiles[0] * grid[0]), torch.arange(tiles[1] * grid[1]), indexing="ij"
    )
    parts = rearrange(
        torch.stack([rows, columns], dim=-1), "(tr h) (tc w) d -> (tr tc) (h w) d", tr=tiles[0], tc=tiles[1]
    )
    return torch.cat([torch.full_like(parts[:1], -1), parts]).float()


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (5, 3)])
def test_tokens_stand_in_the_order_of_the_picture_on_any_grid(grid: tuple[int, int]) -> None:
    tile_size, size = (grid[0] * 7, grid[1] * 7), (grid[1] * 7 * 2, grid[0] * 7 * 3)
    features = places((3, 2), grid)
    count = grid[0] * grid[1]
    facts: Any = {"grid": grid, "tile_size": tile_size}
    rows, columns = 3 * grid[0], 2 * grid[1]
    wanted = [[row, column] for row in range(rows) for column in range(columns)]

    def merged(merge: str, image_size: tuple[int, int] = size, **fields: Any) -> list[list[float]]:
        config = anyres(merge, grid_pinpoints="(2x3),...,(2x3)", **fields)
        newline = torch.tensor([9.0, 9.0])
        tokens = merge_tiles(features, image_size, config, image_newline=newline, **facts)
        assert len(tokens) == count_tokens(image_size, config, **facts)
        return list(tokens.tolist())

    assert merged("flat") == features.flatten(0, 1).tolist()
    assert merged("spatial") == [[-1, -1]] * count + wanted
    assert merged("spatial", base=False) == wanted
    pooled = [[row, column] for row in range(1, rows, 2) for column in range(1, columns, 2)]
    assert merged("spatial_maxpool2x2", base=False) == pooled
    with_ends = [line for row in range(rows) for line in [*([row, c] for c in range(columns)), [9, 9]]]
    assert merged("spatial_unpad", base=False) == with_ends
    flat_picture = (size[0], size[1] // 2)  # fills half of the rows
    top = (rows - rows // 2) // 2
    kept = with_ends[top * (columns + 1) : (rows - top) * (columns + 1)]
    assert merged("spatial_unpad", flat_picture, base=False) == kept


def test_a_picture_of_one_tile_ends_with_a_newline_where_rows_do() -> None:
    features, newline = torch.randn(1, 16, 2), torch.tensor([1.0, 2.0])
    facts: Any = {"grid": GRID, "tile_size": SIDE}
    for merge, more in (("flat", 0), ("spatial", 0), ("spatial_maxpool2x2", 0), ("spatial_unpad", 1)):
        config = TilingConfig(mode="pad", merge=merge)  # type: ignore[arg-type]
        tokens = merge_tiles(features, (50, 20), config, image_newline=newline, **facts)
        assert len(tokens) == count_tokens((50, 20), config, **facts) == 16 + more
        assert torch.equal(tokens[:16], features[0])
        assert torch.equal(tokens[16:], newline.expand(more, 2))


@pytest.mark.parametrize("limit", [1, 4, 9])
def test_more_tokens_than_the_limit_are_shrunk_to_about_that_many(limit: int) -> None:
    facts: Any = {"grid": (24, 24), "tile_size": 336}
    config = anyres(grid_pinpoints="(1x1),...,(6x6)", max_tiles=limit)
    count = count_tokens((2016, 2016), config, **facts)
    side = round(24 * limit**0.5)
    assert count == 576 + side * (side + 1)
    assert count_tokens((300, 300), config, **facts) == 576 + 24 * 25  # one tile is left as it is


def test_the_count_is_the_length_for_many_sizes() -> None:
    generator = np.random.default_rng(0)
    sizes = [(int(w), int(h)) for w, h in np.exp(generator.uniform(1.5, 7.5, (150, 2)))]
    checked = 0
    for grid in (GRID, (3, 5)):
        tile_size = (grid[0] * 7, grid[1] * 7)
        facts: Any = {"grid": grid, "tile_size": tile_size}
        for fields in (
            {"merge": "flat"},
            {"merge": "spatial", "base": False},
            {"merge": "spatial_maxpool2x2"},
            {"merge": "spatial_unpad"},
            {"merge": "spatial_unpad", "max_tiles": 1},
            {"merge": "spatial_unpad", "max_tiles": 4, "base": False},
        ):
            config = anyres(grid_pinpoints="(1x1),...,(4x4)", **fields)
            for size in sizes:
                try:
                    tiles = tile_grid(size, config, tile_size)
                except DataError:
                    continue
                assert tiles is not None
                features = torch.zeros(1 + tiles[0] * tiles[1], grid[0] * grid[1], 2)
                tokens = merge_tiles(features, size, config, image_newline=torch.zeros(2), **facts)
                assert len(tokens) == count_tokens(size, config, **facts), (size, config)
                checked += 1
    assert checked > 1500


def test_gradients_reach_features_and_newline() -> None:
    config = anyres(grid_pinpoints="(2x2),...,(2x2)", max_tiles=2)
    features = torch.randn(5, 16, 3, requires_grad=True)
    newline = torch.randn(3, requires_grad=True)
    tokens = merge_tiles(features, (56, 50), config, grid=GRID, tile_size=SIDE, image_newline=newline)
    torch.autograd.backward(tokens.square().sum())
    assert features.grad is not None
    assert bool(features.grad.any(dim=-1).any(dim=-1).all())
    assert newline.grad is not None
    assert bool(newline.grad.all())


def test_tokens_keep_the_features_kind() -> None:
    features = torch.randn(5, 16, 3, dtype=torch.bfloat16)
    tokens = merge_tiles(
        features, (56, 50), anyres(), grid=GRID, tile_size=SIDE, image_newline=torch.zeros(3)
    )
    assert tokens.dtype == torch.bfloat16


def test_what_does_not_fit_is_named() -> None:
    facts: Any = {"grid": GRID, "tile_size": SIDE, "image_newline": torch.zeros(3)}
    features, size, config = torch.zeros(5, 16, 3), (56, 56), anyres()
    with pytest.raises(ConfigError, match=r"features of shape \[5, 17, 3\].*select 'patch'"):
        merge_tiles(torch.zeros(5, 17, 3), size, config, **facts)
    with pytest.raises(ConfigError, match=r"features of 5 tile\(s\): a picture of 28x84 has 4"):
        merge_tiles(features, (28, 84), config, **facts)
    with pytest.raises(ConfigError, match=r"features of 5 tile\(s\).*has 1 with mode 'pad'"):
        merge_tiles(features, size, TilingConfig(mode="pad"), **facts)
    with pytest.raises(ConfigError, match="image_newline, which was not given"):
        merge_tiles(features, size, config, **{**facts, "image_newline": None})
    with pytest.raises(ConfigError, match=r"image_newline of shape \[4\].*want \[3\]"):
        merge_tiles(features, size, config, **{**facts, "image_newline": torch.zeros(4)})
    odd = anyres(grid_pinpoints=((28, 56), (50, 28)))
    with pytest.raises(ConfigError, match="grid_pinpoints 50x28: not multiples of the tower's tile, 28x28"):
        count_tokens(size, odd, grid=GRID, tile_size=SIDE)
    with pytest.raises(ConfigError, match="grid_pinpoints 50x28"):
        tile_picture(drawn(50, 28), PROCESSOR, odd)
    with pytest.raises(DataError, match="picture of mode 'L'"):
        tile_picture(Image.new("L", (9, 9)), PROCESSOR, config)
    with pytest.raises(DataError, match="a picture of 1x200 is too thin"):
        tile_picture(drawn(1, 200), PROCESSOR, config)
