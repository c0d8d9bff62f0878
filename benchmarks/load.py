"""Loading ViT-L/14-336 from safetensors: time and memory against reading the file, and against transformers.

    python benchmarks/load.py

Every way loads the same 1.2 GB of float32 weights, in a process of its own whose imports are done, from a
file that the system has in memory: what counts is what loading adds. `read` takes in the file's bytes.
Seconds include a pass over the weights afterwards, since a mapped file is not read before it is used.
`private` is memory that no file stands for, so that a second copy of the weights would show in it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tower import memory, save_random_clip
from transformers import CLIPVisionModel

from vlm_vision import load_tower

OPEN_CLIP = "ViT-L-14-336-quickgelu"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments.way, arguments.weights)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)
        save_random_clip(weights / "transformers")
        load_tower(open_clip_node(weights)).save_pretrained(weights / "own")
        load_tower(open_clip_node(weights), dtype="bfloat16").save_pretrained(weights / "half")
        compare(weights, arguments.rounds)


def compare(weights: Path, rounds: int) -> None:
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--weights", str(weights)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way].append([float(figure) for figure in told.splitlines()[-1].split()])
    medians = {
        way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()
    }
    print(f"{'':28} {'seconds':>8} {'of reading':>11} {'private MiB':>12} {'peak MiB':>9}")
    for way, (seconds, private, peak) in medians.items():
        ratio = seconds / medians["read"][0]
        print(f"{way:28} {seconds:>8.2f} {ratio:>11.2f} {private:>12.0f} {peak:>9.0f}")


def open_clip_node(weights: Path) -> dict[str, Any]:
    node = {"name": "open_clip", "model": OPEN_CLIP, "weights": str(weights / "transformers")}
    return {"backbone": node}


WAYS: dict[str, Callable[[Path], Any]] = {
    "read": lambda weights: (weights / "transformers" / "model.safetensors").read_bytes(),
    "transformers.from_pretrained": lambda weights: CLIPVisionModel.from_pretrained(weights / "transformers"),
    "tower, transformers' file": lambda weights: load_tower(f"transformers:{weights / 'transformers'}"),
    "tower, own folder": lambda weights: load_tower(weights / "own"),
    "tower, own, bfloat16": lambda weights: load_tower(weights / "half"),
    "tower, converted": lambda weights: load_tower(open_clip_node(weights)),
}


def measure(way: str, weights: Path) -> None:
    """Print the seconds, and the MiB of private memory and of all at its peak, that one way adds."""
    load_tower("open_clip:RN50@none")  # imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    private, peak = memory("RssAnon"), memory("VmHWM")
    start = time.perf_counter()
    loaded = WAYS[way](weights)
    for parameter in getattr(loaded, "parameters", tuple)():
        float(parameter.detach().sum())
    print(time.perf_counter() - start, memory("RssAnon") - private, memory("VmHWM") - peak)


if __name__ == "__main__":
    main()
