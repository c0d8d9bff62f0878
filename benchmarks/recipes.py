"""Adaptation at 1,000, 20,000 and 50,000 pictures of CIFAR-10: what is gained, and what is kept.

    python benchmarks/recipes.py --data ../shared/data --output runs/recipes

A base is trained from scratch on all ten classes. The domain it is then adapted to is another: the pictures
are turned upside down and their colours inverted, and two classes (ship, truck) are left out. The three sizes
take the three recipes of the policy, with and without feature keeping, and each result is mixed half and half
with the base (WiSE-FT). Scores, all on held-out pictures and among all ten names:

gained: zero-shot accuracy on the new domain's eight classes.
kept:   zero-shot accuracy on the two left-out classes, in pictures as the base knew them.
drift:  mean cosine of patch features (of the layer a VLM reads) before and after, on pictures as they were.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
import yaml
from PIL import Image, ImageOps

from vlm_vision.config import load_config
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.train.contrastive import train_contrastive
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.drift import drift
from vlm_vision.train.merge import merge
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.validation import validate_dual_encoder
from vlm_vision.train.validation_config import ValidationConfig, ZeroShotConfig

LEFT_OUT = ("ship", "truck")
SIZES = (1_000, 20_000, 50_000)
STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar10/")
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--base-epochs", type=float, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    output: Path = arguments.output
    tables = write_tables(arguments.data / "cifar10", output / "data")
    recipe = yaml.safe_load((Path(__file__).parent.parent / "configs/cifar10_contrastive.yaml").read_text())
    common = {key: recipe[key] for key in ("augment", "batch_size", "weight_decay", "precision")}
    templates = recipe["data"]["templates"]
    common |= {"workers": 0, "report": False, "log_every": 10}

    base_folder = output / "base"
    if not (base_folder / "model").exists():
        tree = {key: recipe[key] for key in ("model", "recipe", "lr")}
        data = {"path": str(tables["base"]), "templates": templates}
        config = load_config(
            ContrastiveConfig, {**common, **tree, "data": data, "epochs": arguments.base_epochs}
        )
        train_contrastive(config, base_folder)
    base = DualEncoder.from_pretrained(base_folder / "model")
    names = sorted({row["caption"] for row in csv.DictReader(tables["gained"].open())} | set(LEFT_OUT))
    rows = [{"pairs": 0, "run": "base", **score(base, base, tables, names, templates)}]
    print(json.dumps(rows[-1]), flush=True)
    for size in arguments.sizes:
        for keeping in (False, True):
            name = f"{size}{'-keep' if keeping else ''}"
            rates: dict[str, Any] = {"lr": {1_000: 2e-4, 20_000: 2e-3}.get(size, 5e-4)}
            loss = {"keep": {"weight": 3.0}} if keeping else {}
            config = load_config(
                ContrastiveConfig,
                {
                    **common,
                    **rates,
                    "model": str(base_folder / "model"),
                    "recipe": {1_000: "frozen_vision", 20_000: "lora"}.get(size, "full"),
                    "data": {"path": str(tables[f"train-{size}"]), "templates": templates},
                    "loss": loss,
                    "steps": arguments.steps,
                },
            )
            folder = output / name
            if not (folder / "model").exists():
                train_contrastive(config, folder)
            tuned, mixed = (DualEncoder.from_pretrained(folder / "model") for _ in range(2))
            merge(base, mixed, 0.5)
            for label, model in ((config.recipe, tuned), (f"{config.recipe}, WiSE-FT 0.5", mixed)):
                keep = ", features kept" if keeping else ""
                found = score(base, model, tables, names, templates)
                rows.append({"pairs": size, "run": f"{label}{keep}", **found})
                print(json.dumps(rows[-1]), flush=True)
    (output / "results.json").write_text(json.dumps(rows, indent=1))
    print(f"\n{'pairs':>7} {'run':40} {'gained':>7} {'kept':>7} {'drift':>7}")
    for row in rows:
        print(f"{row['pairs']:7} {row['run']:40} {row['gained']:7.3f} {row['kept']:7.3f} {row['drift']:7.3f}")


def score(
    base: DualEncoder, model: DualEncoder, tables: dict[str, Path], names: list[str], templates: list[str]
) -> dict[str, float]:
    found = {}
    for key in ("gained", "kept"):
        zero_shot = ZeroShotConfig(path=str(tables[key]), templates=tuple(templates), classes=tuple(names))
        found[key] = validate_dual_encoder(model, ValidationConfig(zero_shot=zero_shot))["zero_shot_top1"]
    pictures = Pairs(PairsConfig(path=str(tables["kept"])))
    opened = (pictures.open(index) for index in range(200))
    moved = drift(base, model, opened, total=200)
    (read,) = (layer.cosine for layer in moved.layers if layer.layer in moved.read)
    return {**found, "drift": read}


def write_tables(source: Path, folder: Path) -> dict[str, Path]:
    """CSV files over pictures: the base's, the new domain's by size, and those that are scored."""
    tables = {
        name: folder / f"{name}.csv" for name in ("base", "gained", "kept", *(f"train-{n}" for n in SIZES))
    }
    if all(path.exists() for path in tables.values()):
        return tables
    changed: list[tuple[str, str]] = []
    for split, limit in (("train", 50_000), ("test", 5_000)):
        original = []
        for kind in ("original", "changed"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        rows = parquet.read_table(source / f"{split}.parquet").slice(0, limit).to_pylist()
        changed = []
        for number, row in enumerate(rows):
            content = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
            path = folder / "original" / split / f"{number}.jpg"
            path.write_bytes(content)
            original.append((str(path.resolve()), row["class_name"]))
            if row["class_name"] in LEFT_OUT:
                continue
            path = folder / "changed" / split / f"{number}.png"
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            ImageOps.invert(ImageOps.flip(picture)).save(path, compress_level=1)
            changed.append((str(path.resolve()), row["class_name"]))
        if split == "train":
            write(tables["base"], original)
            for size in SIZES:  # the largest is all that is left of the 50,000 without two classes
                write(tables[f"train-{size}"], changed[:size])
    write(tables["gained"], changed)
    write(tables["kept"], [row for row in original if row[1] in LEFT_OUT])
    return tables


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
