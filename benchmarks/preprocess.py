"""From JPEG bytes to normalised pixels, pictures per second of one core: ours, transformers', open_clip's.

    python benchmarks/preprocess.py --data ../shared/data/flickr8k-800/images

`--data` is a folder of JPEG photographs; each is also enlarged to the sizes of the table, in memory. All ways
take turns, batch by batch, in one process with one thread; its CPU time counts, of the best round. `max` and
`mean` are levels, of 255, by which `fast=True` differs from the exact way, over all pictures of the row.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from PIL import Image

from vlm_vision import ImageProcessor
from vlm_vision.pictures import find_pictures
from vlm_vision.tower_config import PreprocessConfig

LONGEST_SIDES = (None, 500, 640, 1024, 2000, 4000)  # None leaves the files as they are
Way = Callable[[Sequence[bytes]], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--pictures", type=int, default=16, help="at most; a quarter of the largest")
    parser.add_argument("--batch", type=int, default=1, help="pictures in a call")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in find_pictures(arguments.data)[: arguments.pictures]]
    exact, fast = (
        ImageProcessor(PreprocessConfig(image_size=arguments.image_size, crop_rounding="down"), fast=quick)
        for quick in (False, True)
    )
    ways = {"exact": exact, "fast": fast, **reference_ways(arguments.image_size)}
    header = ["pictures", *ways, "exact/default", "fast/default", "max", "mean"]
    print(" ".join(f"{name:>13}" for name in header))
    for side in LONGEST_SIDES:
        pictures = files if side is None else [enlarged(file, side) for file in files]
        if side is not None and side >= 2000:
            pictures = pictures[: max(1, len(pictures) // 4)]
        seconds = race(ways, pictures, arguments.batch, arguments.rounds)
        rates = {name: len(pictures) / duration for name, duration in seconds.items()}
        gains = [rates[name] / rates["default"] for name in ("exact", "fast")]
        most, mean = difference(exact, fast, pictures)
        sides = Image.open(io.BytesIO(pictures[0])).size
        row = [f"{max(sides)}x{min(sides)}", *(f"{rate:.1f}/s" for rate in rates.values())]
        row += [*(f"{gain:.2f}x" for gain in gains), f"{most:.0f}", f"{mean:.3f}"]
        print(" ".join(f"{cell:>13}" for cell in row))


def reference_ways(side: int) -> dict[str, Way]:
    """transformers' CLIP processor as it comes (`default`), its PIL twin if there is one, and open_clip."""
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processors = {"default": transformers.CLIPImageProcessor(**size)}
    if hasattr(transformers, "CLIPImageProcessorPil"):
        processors["PIL twin"] = transformers.CLIPImageProcessorPil(**size)
    transform = open_clip.image_transform(side, is_train=False)
    ways: dict[str, Way] = {
        name: lambda files, processor=processor: processor(
            [Image.open(io.BytesIO(file)) for file in files], return_tensors="pt"
        )
        for name, processor in processors.items()
    }
    ways["open_clip"] = lambda files: torch.stack([transform(Image.open(io.BytesIO(f))) for f in files])
    return ways


def enlarged(file: bytes, longest: int) -> bytes:
    image = Image.open(io.BytesIO(file)).convert("RGB")
    ratio = longest / max(image.size)
    large = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    large.save(content, "JPEG", quality=90)
    return content.getvalue()


def race(ways: dict[str, Way], pictures: Sequence[bytes], batch: int, rounds: int) -> dict[str, float]:
    """Seconds each way takes for all pictures, its best round."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        spent = dict.fromkeys(ways, 0.0)
        for start in range(0, len(pictures), batch):
            for name, way in ways.items():
                began = time.process_time()
                way(pictures[start : start + batch])
                spent[name] += time.process_time() - began
        best = {name: min(best[name], spent[name]) for name in ways}
    return best


def difference(exact: ImageProcessor, fast: ImageProcessor, pictures: Sequence[bytes]) -> tuple[float, float]:
    levels = [(exact.to_square(file).float() - fast.to_square(file).float()).abs() for file in pictures]
    return max(float(each.max()) for each in levels), sum(float(each.mean()) for each in levels) / len(levels)


if __name__ == "__main__":
    main()
