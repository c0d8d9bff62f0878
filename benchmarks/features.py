"""`vlm-vision features` on a folder against the model alone: what decoding, copying and writing cost.

    python benchmarks/features.py --data ../shared/data/flickr8k-800 --tower open_clip:ViT-B-32-quickgelu@none

Each round measures the model on pixels that are there already, the whole extraction of the same pictures
(from the first asked for to the last shard on the disk), and their decoding on one core. `busy` is the part
of the extraction's time in which the model computes: the figure to read where other load on the machine
makes rates differ from round to round. On a CPU the model has the cores that the decoders leave it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm_vision import VisionTower, load_tower
from vlm_vision.extract import extract_features
from vlm_vision.picture_list import ListedPicture, list_pictures, open_pictures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tower", default="open_clip:ViT-L-14-336-quickgelu@none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - arguments.workers))
    tower = load_tower(arguments.tower, dtype=arguments.dtype).to(device)
    listed = list_pictures([arguments.data])[: arguments.pictures]
    pixels = decode(tower, listed)
    batches = [batch.to(device, tower.dtype) for batch in pixels.split(arguments.batch_size)]
    run_model(tower, batches[:1])  # the first batch chooses kernels and takes memory

    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    print(
        f"{arguments.tower} {arguments.dtype}, {len(listed)} pictures, {name}, {arguments.workers} decoder(s)"
    )
    print(
        f"{'round':>5} {'model /s':>9} {'extraction /s':>14} {'share':>7} {'busy':>7} {'one decoder /s':>15}"
    )
    shares, busy = [], []
    for number in range(1, arguments.rounds + 1):
        model = len(listed) / seconds(lambda: run_model(tower, batches))
        with ModelTime(tower) as computing:
            whole = extraction(tower, listed, arguments)
        decoder = len(listed) / seconds(lambda: decode(tower, listed))
        shares.append(whole / model)
        busy.append(computing.seconds * whole / len(listed))
        print(
            f"{number:>5} {model:>9.1f} {whole:>14.1f} {shares[-1]:>7.1%} {busy[-1]:>7.1%} {decoder:>15.1f}"
        )
    print(
        f"median: {statistics.median(shares):.1%} of the model's own throughput; "
        f"the model computes {statistics.median(busy):.1%} of the time"
    )


class ModelTime:
    """Seconds in which the tower computes, by the clock of its device."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower, self.seconds = tower, 0.0
        self.marks: list[Any] = []

    def __enter__(self) -> ModelTime:
        def mark(*_: object) -> None:
            if self.tower.device.type == "cuda":
                self.marks.append(torch.cuda.Event(enable_timing=True))
                self.marks[-1].record()
            else:
                self.marks.append(time.perf_counter())

        self.hooks = (
            self.tower.register_forward_pre_hook(mark),
            self.tower.register_forward_hook(mark),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for start, end in zip(self.marks[::2], self.marks[1::2], strict=True):
            on_gpu = self.tower.device.type == "cuda"
            self.seconds += start.elapsed_time(end) / 1000 if on_gpu else end - start


@torch.inference_mode()
def run_model(tower: VisionTower, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        tower(batch)
    if tower.device.type == "cuda":
        torch.cuda.synchronize()


def extraction(tower: VisionTower, listed: list[ListedPicture], arguments: argparse.Namespace) -> float:
    """Pictures a second, from the first asked for to the last shard on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        done = extract_features(
            tower,
            [picture.file for picture in listed],
            folder,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
    assert done is not None
    return done.new / done.seconds


def decode(tower: VisionTower, listed: list[ListedPicture]) -> torch.Tensor:
    processor, squares = tower.image_processor, []
    for opened in open_pictures(listed):
        if not isinstance(opened, Image.Image):
            raise opened
        squares.append(processor.to_square(opened))
    return processor.normalise(torch.stack(squares))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
