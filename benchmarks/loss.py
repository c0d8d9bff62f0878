"""Time and memory of the contrastive loss against the batch: ours in tiles beside the whole matrix.

    python benchmarks/loss.py --plot docs/images/loss.png

`naive` is `open_clip.loss.ClipLoss`. Each measurement is a process of its own, forward and backward; memory
is its largest, less what it held with the embeddings made and what their gradients take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from open_clip.loss import ClipLoss
from torch.nn.functional import normalize

from vlm_vision.train.losses import info_nce_loss, siglip_loss

KINDS = ("naive", "info_nce", "siglip")


def measure(kind: str, batch: int, width: int, tile: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(batch, width, generator=generator), dim=-1) for _ in range(2))
    image.requires_grad_()
    text.requires_grad_()
    scale = torch.tensor(14.3, requires_grad=True)
    bias = torch.tensor(-10.0, requires_grad=True)
    whole_matrix = ClipLoss()
    held = peak_mib()
    begin = time.perf_counter()
    if kind == "naive":
        loss = whole_matrix(image, text, scale)
    elif kind == "info_nce":
        loss = info_nce_loss(image, text, scale, tile_size=tile)
    else:
        loss = siglip_loss(image, text, scale, bias, tile_size=tile)
    loss.backward()
    seconds = time.perf_counter() - begin
    gradients = 2 * image.numel() * 4 / 2**20
    return {"seconds": seconds, "mib": peak_mib() - held - gradients, "loss": float(loss.detach())}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[2**n for n in range(10, 17)])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--most-naive", type=int, default=2**14, help="largest batch of the naive loss")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, batch = arguments.one
        found = measure(kind, int(batch), arguments.width, arguments.tile, arguments.threads)
        print(json.dumps(found))
        return
    print(f"width {arguments.width}, tiles of {arguments.tile}, {arguments.threads} thread(s)")
    print(f"{'batch':>7} {'loss':9} {'seconds':>9} {'MiB':>9} {'value':>10}")
    results: dict[str, list[tuple[int, float, float]]] = {kind: [] for kind in KINDS}
    for batch in arguments.batches:
        for kind in KINDS:
            if kind == "naive" and batch > arguments.most_naive:
                continue
            command = [sys.executable, __file__, "--one", kind, str(batch)]
            command += [f"--width={arguments.width}", f"--tile={arguments.tile}"]
            command += [f"--threads={arguments.threads}"]
            found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            results[kind].append((batch, found["seconds"], found["mib"]))
            row = f"{found['seconds']:9.2f} {found['mib']:9.0f} {found['loss']:10.6f}"
            print(f"{batch:7} {kind:9} {row}", flush=True)
    if arguments.plot:
        plot(results, arguments.plot)


def plot(results: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (time_axis, memory_axis) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    names = {"naive": "open_clip, whole matrix", "info_nce": "InfoNCE in tiles", "siglip": "SigLIP in tiles"}
    for kind, rows in results.items():
        batches, seconds, mib = zip(*rows, strict=True)
        time_axis.plot(batches, seconds, marker="o", markersize=3, label=names[kind])
        memory_axis.plot(batches, [max(value, 1) for value in mib], marker="o", markersize=3)
    for axis, title in (
        (time_axis, "seconds, forward and backward"),
        (memory_axis, "MiB above the embeddings"),
    ):
        axis.set(xscale="log", yscale="log", xlabel="batch", title=title)
        axis.grid(color="#e3e7ee")
    time_axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
