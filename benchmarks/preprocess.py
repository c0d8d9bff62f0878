"""From JPEG bytes to normalised pixels, pictures per second of one core: ours, transformers', open_clip's.

    python benchmarks/preprocess.py --data ../shared/data/flickr8k-800/images

`--data` is a folder of JPEG photographs. A row of the table takes those of its size, and where there are none
it enlarges the largest, in memory. In one process with one thread the ways take turns: each goes through all
pictures of the row, as a loader does, then the next; of each picture the best round counts. Throughput is of
a core: pictures per second of CPU time, on which other processes weigh little; `by the clock` is the same in
wall time. The gains are over `default`: transformers' CLIP processor as `AutoImageProcessor` gives it, fed by
Pillow.

`max`, `mean` and `PSNR` (dB) tell, over all pictures of the row, by how many of 255 levels the pixels of
`fast=True` differ from the exact ones; `cosine` by how much patch features do, of a random ViT of that size:
the least similar pair of patches.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import transformers
from PIL import Image

from vlm_vision import ImageProcessor
from vlm_vision.pictures import find_pictures
from vlm_vision.tower_config import PreprocessConfig

LONGEST_SIDES = (200, 500, 640, 1024, 2000, 4000)
Way = Callable[[Sequence[bytes]], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--longest-sides", type=int, nargs="+", default=LONGEST_SIDES)
    parser.add_argument("--pictures", type=int, default=16, help="at most; a quarter of the largest")
    parser.add_argument("--batch", type=int, default=1, help="pictures in a call")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    exact, fast = (
        ImageProcessor(PreprocessConfig(image_size=arguments.image_size, crop_rounding="down"), fast=quick)
        for quick in (False, True)
    )
    ways = {"exact": exact, "fast": fast, **reference_ways(arguments.image_size)}
    backbone = random_vit(arguments.image_size)
    columns = [*ways, "exact gains", "fast gains", "by the clock", "max", "mean", "PSNR", "cosine"]
    print(f"{arguments.image_size} pixels; JPEG files are decoded by {decoder()}")
    print(f"{'pictures':18}" + " ".join(f"{name:>12}" for name in columns))
    for side, pictures in photographs(arguments.data, arguments.longest_sides, arguments.pictures):
        spent = race(ways, pictures, arguments.batch, arguments.rounds)
        row = [f"{len(pictures) / each.cpu:.1f}/s" for each in spent.values()]
        row += [f"{spent['default'].cpu / spent[name].cpu:.2f}x" for name in ("exact", "fast")]
        row += [f"{spent['default'].clock / spent['fast'].clock:.2f}x"]
        most, mean, psnr = difference(exact, fast, pictures)
        row += [
            f"{most:.0f}",
            f"{mean:.3f}",
            f"{psnr:.1f}",
            f"{similarity(backbone, exact, fast, pictures):.5f}",
        ]
        print(f"{side:18}" + " ".join(f"{cell:>12}" for cell in row), flush=True)


def decoder() -> str:
    found = next((name for name in ("simplejpeg", "torchvision") if importlib.util.find_spec(name)), "Pillow")
    return f"{found} {importlib.metadata.version(found)}"


def photographs(folder: Path, sides: Sequence[int], most: int) -> list[tuple[str, list[bytes]]]:
    """For each side the files that have it as their longest, `most` at most; else the largest, enlarged."""
    by_side: dict[int, list[bytes]] = {}
    for path in find_pictures(folder):
        with Image.open(path) as image:
            by_side.setdefault(max(image.size), []).append(path.read_bytes())
    rows = []
    for side in sides:
        count = most if side < 2000 else max(1, most // 4)
        files = by_side.get(side, [])[:count]
        made = "" if files else " (enlarged)"
        files = files or [enlarged(file, side) for file in by_side[max(by_side)][:count]]
        rows.append((f"{side} px{made}", files))
    return rows


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


class Seconds(NamedTuple):
    cpu: float
    clock: float


def race(ways: dict[str, Way], pictures: Sequence[bytes], batch: int, rounds: int) -> dict[str, Seconds]:
    """What each way takes for all pictures, of the CPU and by the clock, each batch in its best round."""
    starts = range(0, len(pictures), batch)
    best = {name: [Seconds(math.inf, math.inf)] * len(starts) for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            for place, start in enumerate(starts):
                cpu, clock = time.process_time(), time.perf_counter()
                way(pictures[start : start + batch])
                taken = Seconds(time.process_time() - cpu, time.perf_counter() - clock)
                best[name][place] = Seconds(*map(min, best[name][place], taken))
    return {name: Seconds(*map(sum, zip(*each, strict=True))) for name, each in best.items()}


def difference(
    exact: ImageProcessor, fast: ImageProcessor, pictures: Sequence[bytes]
) -> tuple[float, float, float]:
    """Largest and mean difference in levels, and their PSNR in decibels."""
    pairs = [(exact.to_square(file).float(), fast.to_square(file).float()) for file in pictures]
    levels = torch.stack([(one - other).abs() for one, other in pairs])
    return float(levels.max()), float(levels.mean()), 10 * math.log10(255**2 / float(levels.square().mean()))


def random_vit(side: int) -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=side,
        patch_size=14,
    )
    return transformers.CLIPVisionModel(config).eval()


@torch.inference_mode()
def similarity(vit: Any, exact: ImageProcessor, fast: ImageProcessor, pictures: Sequence[bytes]) -> float:
    """Cosine of the penultimate layer's features, of the patch that suffers most."""
    one, other = (
        vit(processor(list(pictures)), output_hidden_states=True).hidden_states[-2]
        for processor in (exact, fast)
    )
    return float(torch.cosine_similarity(one, other, dim=-1).min())


if __name__ == "__main__":
    main()
