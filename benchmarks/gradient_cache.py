"""Cached gradients: the same training in a fraction of the memory, beside whole batches and open_clip_train.

    python benchmarks/gradient_cache.py --data ../shared/data --output runs/gradient_cache

Flickr8k's 800 photographs and a small ViT in batches of 400, one after another on one thread: ours whole,
ours in micro-batches, open_clip_train whole. Memory is a process's largest, less that of the same run with
four pairs a batch; recall is on the photographs trained on, any caption counting.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from side_by_side import CASES, our_run, run_beside, score, seconds_a_step, their_run, write_tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar10/ and flickr8k-800/")
    parser.add_argument("--output", type=Path, default=Path("runs/gradient_cache"))
    parser.add_argument("--batch-size", type=int, default=400)
    parser.add_argument("--micro", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    output: Path = arguments.output
    train, test = write_tables(arguments.data, output / "data", pictures=10)["flickr8k"]
    case = replace(CASES["flickr8k"], batch_size=arguments.batch_size, epochs=arguments.epochs)
    small = replace(case, batch_size=4, epochs=1)
    core = sorted(os.sched_getaffinity(0))[:1]
    runs = {
        "ours-base": our_run(small, train, 0, output / "ours-base", extra={"steps": 2, "epochs": None}),
        "ours-whole": our_run(case, train, 0, output / "ours-whole"),
        "ours-cached": our_run(
            case, train, 0, output / "ours-cached", extra={"micro_batch_size": arguments.micro}
        ),
        "theirs-base": their_run(small, train, 0, output / "theirs-base", output / "models"),
        "theirs-whole": their_run(case, train, 0, output / "theirs-whole", output / "models"),
    }
    found = {name: run_beside({name: command}, core, output)[name] for name, command in runs.items()}
    print(f"batch {case.batch_size}, micro-batches of {arguments.micro}, {case.epochs} epochs")
    print(f"{'run':14} {'MiB':>7} {'above':>7} {'s/step':>8} {case.score:>18}")
    for name in ("ours-whole", "ours-cached", "theirs-whole"):
        folder = output / name
        above = found[name]["mib"] - found[f"{name.partition('-')[0]}-base"]["mib"]
        step = seconds_a_step(output / f"{name}.log", folder, case.batch_size)
        recall = score(case, test, folder)[case.score]
        print(f"{name:14} {found[name]['mib']:7.0f} {above:7.0f} {step:8.2f} {recall:18.3f}")


if __name__ == "__main__":
    main()
