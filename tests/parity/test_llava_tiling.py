"""Tiles and tokens against LLaVA's and LLaVA-NeXT's own functions, and against recorded numbers of ours.

The code that they were recorded from equalled both; `python tests/parity/test_llava_tiling.py` records anew.
tests/references.py tells how to run the comparison itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from references import (
    LLAVA,
    LLAVA_NEXT,
    clip_processor,
    drawn,
    llava,
    llava_tokens,
    odd_pictures,
    odd_sizes,
    of_this_pillow,
    siglip_processor,
)
from torch import Tensor

from vlm_vision import ImageProcessor
from vlm_vision.tiling import count_tokens, merge_tiles, tile_picture
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.tower_config import PreprocessConfig

RECORDED = Path(__file__).parents[1] / "fixtures" / "tiling.json"
SMALL, GRID, WIDTH = 28, (4, 4), 3
FIVE = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]  # of LLaVA 1.6, in tiles
ASPECTS = ["square", "pad", "anyres", "anyres of a range", "anyres_max_2", "anyres_max_9"]
MERGES = ["flat", "spatial", "spatial_unpad"]  # what LLaVA itself knows
NEXT_MERGES = [*MERGES, "spatial_maxpool2x2", "spatial_nobase", "spatial_unpad_nobase"]


def settings_of(aspect: str, merge: str, side: int, *, as_list: bool = False) -> dict[str, Any]:
    """LLaVA's three settings; a range of pinpoints as text, or as the list that it stands for."""
    pinpoints: Any = [[columns * side, rows * side] for columns, rows in FIVE]
    if aspect != "anyres" and aspect.startswith("anyres"):
        pinpoints = "(1x1),...,(6x6)"
        if as_list:
            pinpoints = [[columns * side, rows * side] for columns in range(1, 7) for rows in range(1, 7)]
    return {
        "image_aspect_ratio": aspect.removesuffix(" of a range"),
        "image_grid_pinpoints": pinpoints,
        "mm_patch_merge_type": merge,
    }


def cases(reference: str) -> Iterator[tuple[str, str]]:
    for aspect in ASPECTS:
        for merge in MERGES if reference == LLAVA else NEXT_MERGES:
            known_to_both = "_max_" not in aspect
            shrinks = merge.startswith("spatial_unpad")
            if known_to_both or (reference == LLAVA_NEXT and shrinks):
                yield aspect, merge


def clip(side: int) -> ImageProcessor:
    return ImageProcessor(PreprocessConfig(image_size=side, crop_rounding="down"))


def features_of(size: tuple[int, int], config: TilingConfig, side: int, grid: tuple[int, int]) -> Tensor:
    """Features from arithmetic alone, for as many tiles as a picture has."""
    blank = config.model_copy(update={"merge": "flat", "max_tiles": None, "base": True})
    count = count_tokens(size, blank, grid=grid, tile_size=side)
    values = torch.arange(count * WIDTH, dtype=torch.float32) * 37 % 101 / 101 - 0.5
    return values.reshape(-1, grid[0] * grid[1], WIDTH)


def newline() -> Tensor:
    return torch.arange(WIDTH) + 0.25


def tokens_of(size: tuple[int, int], config: TilingConfig, side: int, grid: tuple[int, int]) -> Tensor:
    features = features_of(size, config, side, grid)
    return merge_tiles(features, size, config, grid=grid, tile_size=side, image_newline=newline())


@pytest.mark.parametrize("side", [SMALL, 336])
@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("reference", [LLAVA, LLAVA_NEXT])
def test_pixels_equal_process_images(reference: str, aspect: str, side: int) -> None:
    if reference == LLAVA and "_max_" in aspect:
        pytest.skip("LLaVA-NeXT's own")
    mm_utils, theirs = llava(reference).mm_utils, clip_processor(side)
    text_fits = reference == LLAVA_NEXT and side == 336
    asked = settings_of(aspect, "flat", side, as_list=not text_fits)
    merge = "spatial_unpad" if "_max_" in aspect else "flat"
    config = TilingConfig.from_llava(**settings_of(aspect, merge, side))
    compared, worst = 0, 0.0
    for picture in odd_pictures(side):
        pixels = mm_utils.process_images([picture], theirs, SimpleNamespace(**asked))
        ours = tile_picture(picture, clip(side), config)
        worst = max(worst, float((ours - pixels.reshape(ours.shape)).abs().max()))
        compared += len(ours)
    print(f"{reference} {aspect} {side}: {compared} tiles, worst error {worst:.1e}")
    assert worst <= 1e-6  # measured 0, with transformers 4.37 and 5


def test_pixels_equal_llava_next_with_siglip() -> None:
    mm_utils, theirs = llava(LLAVA_NEXT).mm_utils, siglip_processor(LLAVA_NEXT)
    half = (0.5, 0.5, 0.5)
    ours = ImageProcessor(PreprocessConfig(image_size=384, resize="squash", mean=half, std=half))
    for aspect in ("square", "pad", "anyres_max_9"):
        asked = settings_of(aspect, "spatial_unpad", 384)
        worst = 0.0
        for picture in odd_pictures(384):
            if min(picture.size) <= 3:
                continue  # their processor takes a side of 1 or 3 pixels for the channels
            pixels = torch.as_tensor(
                np.asarray(mm_utils.process_images([picture], theirs, SimpleNamespace(**asked)))
            )
            mine = tile_picture(picture, ours, TilingConfig.from_llava(**asked))
            worst = max(worst, float((mine - pixels.reshape(mine.shape)).abs().max()))
        print(f"SigLIP {aspect}: worst error {worst:.1e}")
        assert worst <= 1e-6  # measured 0, with transformers 4.37 and 5


@pytest.mark.parametrize(("side", "grid"), [(SMALL, GRID), (336, (24, 24)), (384, (27, 27))])
@pytest.mark.parametrize("reference", [LLAVA, LLAVA_NEXT])
def test_tokens_equal_prepare_inputs(reference: str, side: int, grid: tuple[int, int]) -> None:
    arch = llava(reference).arch
    generator = np.random.default_rng(0)
    sizes = [*odd_sizes(side), *((int(w), int(h)) for w, h in generator.integers(100, 2400, (100, 2)))]
    for aspect, merge in cases(reference):
        text_fits = reference == LLAVA_NEXT and side != SMALL
        asked = settings_of(aspect, merge, side, as_list=not text_fits)
        config = TilingConfig.from_llava(**settings_of(aspect, merge, side))
        for dtype in (torch.float32, torch.bfloat16):
            for size in sizes if dtype == torch.float32 else sizes[::10]:
                features, end = features_of(size, config, side, grid).to(dtype), newline().to(dtype)
                wanted = llava_tokens(arch, features, size, asked, side=side, newline=end)
                ours = merge_tiles(features, size, config, grid=grid, tile_size=side, image_newline=end)
                assert torch.equal(ours, wanted), (aspect, merge, size, dtype)
    print(
        f"{reference} {side}: {len(list(cases(reference)))} settings x {len(sizes)} sizes, equal to the bit"
    )


def recordable() -> dict[str, Any]:
    """Of drawn pictures: digests of their tiles' bytes; the count of their merged tokens, and a number."""
    processor, pixels, tokens = clip(SMALL), {}, {}
    sizes = [size for size in odd_sizes(SMALL) if max(size) <= 700][::2]
    pictures = [drawn(*size) for size in sizes]
    for aspect in ASPECTS[:4]:
        config = TilingConfig.from_llava(**settings_of(aspect, "spatial", SMALL))
        made = [processor.denormalise(tile_picture(picture, processor, config)) for picture in pictures]
        pixels[aspect] = [f"{len(tiles)} {sha256(tiles.numpy().tobytes()).hexdigest()[:8]}" for tiles in made]
    for aspect, merge in cases(LLAVA_NEXT):
        config = TilingConfig.from_llava(**settings_of(aspect, merge, SMALL))
        merged = [tokens_of(size, config, SMALL, GRID) for size in sizes[::2]]
        tokens[f"{aspect}, {merge}"] = [[len(sequence), weighed(sequence)] for sequence in merged]
    return {"pixels": pixels, "tokens": tokens}


def weighed(tokens: Tensor) -> float:
    """One number that every value, and its place, has a part in."""
    weights = torch.arange(tokens.numel(), dtype=torch.float64) * 53 % 97 / 48 - 1
    return round(float((tokens.double().flatten() * weights).sum()), 5)


@of_this_pillow
def test_pixels_and_tokens_are_those_recorded() -> None:
    recorded, found = json.loads(RECORDED.read_text(encoding="utf-8")), recordable()
    assert found["pixels"] == recorded["pixels"]
    assert found["tokens"].keys() == recorded["tokens"].keys()
    for setting, numbers in recorded["tokens"].items():
        ours = np.array(found["tokens"][setting])
        np.testing.assert_allclose(ours, np.array(numbers), rtol=0, atol=1e-4, err_msg=setting)


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(
        json.dumps(recordable()).replace("}, ", "},\n").replace('], "', '],\n"') + "\n", encoding="utf-8"
    )
