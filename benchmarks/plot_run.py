"""Curves of a training run as a picture, for docs/.

python benchmarks/plot_run.py runs/cifar10 -o docs/images/cifar10.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vlm_vision.train.run import read_metrics

SHOWN = ("loss", "accuracy", "lr")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder with a metrics.jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    lines = read_metrics(arguments.run / "metrics.jsonl")
    names = [name for name in SHOWN if any(name in line for line in lines)]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 2.8), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True))
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
