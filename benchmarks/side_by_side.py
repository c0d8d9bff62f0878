"""Ours and open_clip_train on the same model, data, batch, steps and seeds: quality, seconds a step, memory.

    python benchmarks/side_by_side.py --data ../shared/data --output runs/side_by_side

Theirs needs `pip install 'open_clip_torch[training]'`.

CIFAR-10 (class names in templates) with a small ModifiedResNet, scored by zero-shot accuracy on held-out
pictures; Flickr8k (one of five captions, fixed) with a small ViT, scored by recall on its 800 photographs,
any caption counting. Both sides read the same table, in bf16 under autocast. Each run has one thread and a
core of its own, and the two sides of a seed run at the same time, with the cores exchanged from seed to
seed. Both models are scored by our code.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

TEMPLATES = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a small picture of a {}.",
    "an image of the {}.",
    "a {} in the picture.",
)
THEIRS = """
import sys, torch, open_clip
torch.set_num_threads(1)
torch.set_flush_denormal(True)
open_clip.add_model_config(sys.argv[1])
from open_clip_train.main import main
main(sys.argv[2:])
"""


@dataclass(frozen=True)
class Case:
    """A data set and how it is trained on."""

    name: str
    architecture: dict[str, Any]
    batch_size: int
    epochs: int
    lr: float
    weight_decay: float
    warmup: int
    score: str


CASES = {
    "cifar10": Case(
        "cifar10",
        {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 32},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
        },
        batch_size=256,
        epochs=2,
        lr=2e-3,
        weight_decay=0.1,
        warmup=11,
        score="zero_shot_top1",
    ),
    "flickr8k": Case(
        "flickr8k",
        {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
            "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
        },
        batch_size=100,
        epochs=15,
        lr=1e-3,
        weight_decay=0.05,
        warmup=12,
        score="image_to_text_r1",
    ),
}


def write_tables(data: Path, folder: Path, pictures: int) -> dict[str, tuple[Path, Path]]:
    """Training and scoring tables of both data sets, with pictures as files."""
    folder.mkdir(parents=True, exist_ok=True)
    cifar, flickr = folder / "cifar10", folder / "flickr8k"
    draw = random.Random(0)
    if not (cifar / "test.csv").exists():
        import pyarrow.parquet as parquet

        for split, limit in (("train", pictures), ("test", 5000)):
            (cifar / split).mkdir(parents=True, exist_ok=True)
            with (cifar / f"{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["image", "caption"])
                rows = parquet.read_table(data / "cifar10" / f"{split}.parquet").slice(0, limit).to_pylist()
                for number, row in enumerate(rows):
                    path = cifar / split / f"{number}.jpg"
                    content = row["image"]
                    path.write_bytes(content["bytes"] if isinstance(content, dict) else content)
                    name = row["class_name"]
                    text = draw.choice(TEMPLATES).format(name) if split == "train" else name
                    writer.writerow([str(path.resolve()), text])
    if not (flickr / "test.csv").exists():
        flickr.mkdir(parents=True, exist_ok=True)
        source = data / "flickr8k-800"
        captions: dict[str, list[str]] = {}
        for row in csv.DictReader((source / "captions.csv").open(encoding="utf-8")):
            captions.setdefault(str((source / row["image"]).resolve()), []).append(row["caption"])
        for split in ("train", "test"):
            with (flickr / f"{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["image", "caption"])
                for path, texts in captions.items():
                    writer.writerows(
                        [path, text] for text in ([draw.choice(texts)] if split == "train" else texts)
                    )
    return {name: (folder / name / "train.csv", folder / name / "test.csv") for name in CASES}


def our_run(
    case: Case, table: Path, seed: int, folder: Path, extra: dict[str, Any] | None = None
) -> list[str]:
    config: dict[str, Any] = {
        "model": {
            "backbone": {
                "name": "open_clip",
                "architecture": case.architecture,
                "weights": "none",
                "preprocess": {
                    "image_size": case.architecture["vision_cfg"]["image_size"],
                    "resize": "squash",
                },
            }
        },
        "recipe": "scratch",
        "data": {"path": str(table), "image_folder": "/"},  # pictures stay where they are
        "augment": {"crop_area": [0.9, 1.0]},
        "batch_size": case.batch_size,
        "epochs": case.epochs,
        "lr": case.lr,
        "weight_decay": case.weight_decay,
        "warmup": case.warmup,
        "precision": "bf16",
        "workers": 0,
        "seed": seed,
        "report": False,
    }
    config |= extra or {}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "vlm_vision.cli", "contrastive", str(path), "-o", str(folder)]


def their_run(case: Case, table: Path, seed: int, folder: Path, models: Path) -> list[str]:
    models.mkdir(exist_ok=True)
    (models / f"side-{case.name}.json").write_text(json.dumps(case.architecture))
    options = {
        "train-data": table,
        "dataset-type": "csv",
        "csv-separator": ",",
        "csv-img-key": "image",
        "csv-caption-key": "caption",
        "model": f"side-{case.name}",
        "batch-size": case.batch_size,
        "epochs": case.epochs,
        "lr": case.lr,
        "wd": case.weight_decay,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "warmup": case.warmup,
        "precision": "amp_bf16",
        "grad-clip-norm": 1.0,
        "workers": 0,
        "seed": seed,
        "logs": folder.parent,
        "name": folder.name,
        "log-every-n-steps": 10,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-c", THEIRS, str(models), *words]


def run_beside(commands: dict[str, list[str]], cores: list[int], logs: Path) -> dict[str, dict[str, float]]:
    """Run commands at the same time, a core each; seconds and largest memory of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = {}
    for (name, command), core in zip(commands.items(), cores, strict=True):
        log = (logs / f"{name}.log").open("w")
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        running[name] = (process, time.perf_counter())
    found: dict[str, dict[str, float]] = {name: {"mib": 0.0} for name in commands}
    while running:
        time.sleep(0.25)
        for name, (process, begin) in list(running.items()):
            if process.poll() is None:
                memory = psutil.Process(process.pid).memory_info().rss / 2**20
                found[name]["mib"] = max(found[name]["mib"], memory)
                continue
            if process.returncode:
                for other, _ in running.values():
                    other.kill()
                raise SystemExit(f"{name} failed: {logs / name}.log")
            found[name]["seconds"] = time.perf_counter() - begin
            del running[name]
    return found


def seconds_a_step(log: Path, folder: Path, batch_size: int) -> float:
    """The median over the run, waiting for data included."""
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
        return batch_size / statistics.median(rates[1:])
    found = re.findall(r"Batch \(t\): ([\d.]+)", log.read_text())
    return statistics.median(float(value) for value in found[1:])


def score(case: Case, table: Path, folder: Path) -> dict[str, float]:
    """Of the model that a run left, ours or theirs."""
    from vlm_vision.dual_encoder import load_dual_encoder
    from vlm_vision.train.pairs_config import PairsConfig
    from vlm_vision.train.validation import validate_dual_encoder
    from vlm_vision.train.validation_config import ValidationConfig, ZeroShotConfig

    side = case.architecture["vision_cfg"]["image_size"]
    backbone = {
        "name": "open_clip",
        "architecture": case.architecture,
        "preprocess": {"image_size": side, "resize": "squash"},
    }
    if (folder / "model").exists():
        model = load_dual_encoder(folder / "model")
    else:
        weights = folder / "checkpoints" / f"epoch_{case.epochs}.pt"
        model = load_dual_encoder({"backbone": {**backbone, "weights": str(weights)}})
    if case.name == "cifar10":
        config = ValidationConfig(zero_shot=ZeroShotConfig(path=str(table), templates=TEMPLATES))
    else:
        config = ValidationConfig(retrieval=PairsConfig(path=str(table), image_folder="/"))
    return validate_dual_encoder(model, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar10/ and flickr8k-800/")
    parser.add_argument("--output", type=Path, default=Path("runs/side_by_side"))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=50_000, help="of CIFAR-10")
    arguments = parser.parse_args()
    output: Path = arguments.output
    tables = write_tables(arguments.data, output / "data", arguments.pictures)
    cores = sorted(os.sched_getaffinity(0))[:2]
    rows = []
    for name in arguments.cases:
        case, (train, test) = CASES[name], tables[name]
        for number, seed in enumerate(arguments.seeds):
            folders = {side: output / f"{name}-{side}-{seed}" for side in ("ours", "theirs")}
            commands = {
                f"{name}-ours-{seed}": our_run(case, train, seed, folders["ours"]),
                f"{name}-theirs-{seed}": their_run(case, train, seed, folders["theirs"], output / "models"),
            }
            found = run_beside(commands, cores if number % 2 == 0 else cores[::-1], output)
            for side, folder in folders.items():
                label = f"{name}-{side}-{seed}"
                step = seconds_a_step(output / f"{label}.log", folder, case.batch_size)
                scores = score(case, test, folder)
                row = {"data": name, "side": side, "seed": seed, "step": step, **found[label], **scores}
                rows.append(row)
                print(json.dumps(row), flush=True)
    (output / "results.json").write_text(json.dumps(rows, indent=1))
    print(f"\n{'data':9} {'side':7} {'score':>24} {'s/step':>8} {'MiB':>6}")
    for name in arguments.cases:
        for side in ("ours", "theirs"):
            mine = [row for row in rows if (row["data"], row["side"]) == (name, side)]
            scores = [row[CASES[name].score] for row in mine]
            spread = f"{statistics.mean(scores):.3f} ({min(scores):.3f}..{max(scores):.3f})"
            step = statistics.median(row["step"] for row in mine)
            mib = statistics.median(row["mib"] for row in mine)
            print(f"{name:9} {side:7} {spread:>24} {step:8.3f} {mib:6.0f}")


if __name__ == "__main__":
    main()
