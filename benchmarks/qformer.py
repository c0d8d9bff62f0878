"""What BLIP-2's representation stage is worth: a prepared Q-Former beside a cold one, equally long aligned.

    make demo
    OMP_NUM_THREADS=1 python benchmarks/qformer.py --demo runs/demo --output runs/qformer

Takes the scenes, the tower and the language model of the demo. A Q-Former learns from captions by
configs/demo_qformer.yaml; then `align` teaches it and the language model to answer questions, once from there
and once from random weights, for each seed. What is done is taken as it is when the script runs again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from vlm_vision.config import load_config
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.conversations import Conversations
from vlm_vision.train.evaluate import answer_questions, vqa_accuracy
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.representation_config import RepresentationConfig
from vlm_vision.train.representation_stage import train_representation
from vlm_vision.train.run import read_metrics
from vlm_vision.train.vlm import VisionLanguageModel

CONFIGS = Path(__file__).parent.parent / "configs"
SMOOTHED = 20  # steps of the loss that a point of its curve averages


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `vlm-vision demo`")
    parser.add_argument("--output", type=Path, default=Path("runs/qformer"))
    parser.add_argument("--steps", type=int, help="of the representation stage (default: the config's)")
    parser.add_argument("--align-steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--records", type=int, default=120, help="held-out pictures to ask about")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    demo, output = arguments.demo, arguments.output
    output.mkdir(parents=True, exist_ok=True)

    config = representation_config(demo, arguments.steps)
    representation = output / "representation"
    if not (representation / "projector").exists():
        train_representation(config, representation, resume=representation.exists())
    lines = read_metrics(representation / "metrics.jsonl")
    scores = [line for line in lines if "image_to_text_r1" in line]
    held_out = first_records(demo / "data" / "val.json", arguments.records, output / "val.json")

    curves: dict[str, list[list[float]]] = {"prepared": [], "cold": []}
    accuracies: dict[str, list[dict[str, float]]] = {"prepared": [], "cold": []}
    for seed in range(arguments.seeds):
        for kind in curves:
            folder = output / f"{kind}-{seed}"
            weights = representation / "projector" if kind == "prepared" else None
            settings = align_config(demo, config, weights, arguments.align_steps, seed)
            align(settings, folder, resume=folder.exists())
            lines = read_metrics(folder / "answers" / "metrics.jsonl")
            curves[kind].append([line["loss"] for line in lines])
            accuracies[kind].append(accuracy(folder, held_out, demo / "data"))
    found = {"retrieval": scores[-1], "accuracy": accuracies}
    (output / "figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    gallery = len(Pairs(PairsConfig(path=str(demo / "data" / "val.csv"))))
    tell(scores[-1], 1 / gallery, curves, accuracies, arguments.align_steps)
    if arguments.plot is not None:
        plot(scores, curves, accuracies, arguments.plot)


def representation_config(demo: Path, steps: int | None) -> RepresentationConfig:
    changes = [
        f"tower={demo / 'tower'}",
        f"tokenizer={demo / 'llm'}",
        f"data.path={demo / 'data' / 'train.csv'}",
        f"validation.retrieval.path={demo / 'data' / 'val.csv'}",
        "save_every=250",
    ]
    changes += [] if steps is None else [f"steps={steps}"]
    config = load_config(RepresentationConfig, CONFIGS / "demo_qformer.yaml", changes)
    every = max(1, config.total_steps(0) // 4)
    return config.model_copy(update={"validation": config.validation.model_copy(update={"every": every})})


def align_config(
    demo: Path, config: RepresentationConfig, weights: Path | None, steps: int, seed: int
) -> AlignConfig:
    """One stage in which projector and language model learn to answer; the kinds differ by the weights."""
    stage = {
        "name": "answers",
        "data": {
            "file": str(demo / "data" / "train.json"),
            "image_folder": str((demo / "data").resolve()),
            "separate": True,
            "workers": 0,
        },
        "learn": [{"match": "projector.*"}, {"match": "llm.*"}],
        "lr": 1e-3,
        "warmup": 0.05,
        "steps": steps,
        "batch_size": 32,
        "max_length": 128,
        "zero_stage": 0,
        "log_every": 1,
        "precision": "bf16",
    }
    model: dict[str, Any] = {
        "tower": str(demo / "tower"),
        "projector": config.qformer.model_dump(),
        "projector_weights": None if weights is None else str(weights),
        "llm": str(demo / "llm"),
    }
    return load_config(AlignConfig, {"model": model, "stages": [stage], "seed": seed})


def first_records(source: Path, count: int, target: Path) -> Path:
    records = json.loads(source.read_text(encoding="utf-8"))[:count]
    target.write_text(json.dumps(records), encoding="utf-8")
    return target


def accuracy(folder: Path, held_out: Path, pictures: Path) -> dict[str, float]:
    """By kind of question, with the right pictures and, as `wrong picture`, with others."""
    kept = folder / "accuracy.json"
    if not kept.exists():
        model = VisionLanguageModel.from_pretrained(folder / "model")
        asked = Conversations(held_out, pictures)
        right = vqa_accuracy(answer_questions(model, asked, max_new_tokens=4))
        wrong = vqa_accuracy(answer_questions(model, asked, max_new_tokens=4, swap_seed=0))
        kept.write_text(json.dumps({**right, "wrong picture": wrong["all"]}), encoding="utf-8")
    found: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def tell(
    scores: dict[str, Any],
    chance: float,
    curves: dict[str, list[list[float]]],
    accuracies: dict[str, list[dict[str, float]]],
    steps: int,
) -> None:
    print(f"\nheld-out scenes; chance is {chance:.4f} for r1")
    for name, value in scores.items():
        if name not in ("step", "time"):
            print(f"  {name:24} {value:.3f}")
    print(f"\nafter {steps} alignment steps, mean and range of {len(curves['cold'])} seeds")
    rows = {
        "loss, last tenth": {kind: [np.mean(c[-len(c) // 10 :]) for c in curves[kind]] for kind in curves}
    }
    for name in accuracies["cold"][0]:
        rows[name] = {kind: [found[name] for found in accuracies[kind]] for kind in accuracies}
    print(f"  {'':18} {'prepared':24} {'cold':24}")
    for name, row in rows.items():
        cells = [f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in row.values()]
        print(f"  {name:18} {cells[0]:24} {cells[1]:24}")


def plot(
    scores: list[dict[str, Any]],
    curves: dict[str, list[list[float]]],
    accuracies: dict[str, list[dict[str, float]]],
    path: Path,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    recall, loss, bars = figure.subplots(1, 3)
    steps = [line["step"] for line in scores]
    for way, label in (("image_to_text", "picture to caption"), ("text_to_image", "caption to picture")):
        (line,) = recall.plot(steps, [line[f"{way}_r1"] for line in scores], marker="o", ms=3, label=label)
        again = [line[f"{way}_r1_itm"] for line in scores]
        recall.plot(steps, again, marker="o", ms=3, ls="--", color=line.get_color(), label=f"{label}, by ITM")
    recall.set(title="Representation stage: recall at 1", xlabel="step", ylim=(0, 1))
    colours = {"prepared": "tab:blue", "cold": "tab:orange"}
    for kind, runs in curves.items():
        smooth = np.array([np.convolve(run, np.ones(SMOOTHED) / SMOOTHED, "valid") for run in runs])
        at = np.arange(smooth.shape[1]) + SMOOTHED
        loss.plot(at, smooth.mean(axis=0), color=colours[kind], label=kind)
        loss.fill_between(at, smooth.min(axis=0), smooth.max(axis=0), color=colours[kind], alpha=0.25, lw=0)
    loss.set(title="Alignment: loss of answers", xlabel="step")
    names = list(accuracies["cold"][0])
    for offset, (kind, found) in zip((-0.2, 0.2), accuracies.items(), strict=True):
        values = np.array([[run[name] for name in names] for run in found])
        at, middle = np.arange(len(names)) + offset, values.mean(axis=0)
        spread = [middle - values.min(axis=0), values.max(axis=0) - middle]
        bars.bar(at, middle, 0.4, yerr=spread, color=colours[kind], label=kind, capsize=2)
    bars.set_xticks(np.arange(len(names)), names, rotation=30, ha="right")
    bars.set(title="Answers that are right", ylim=(0, 1))
    for axes in (recall, loss, bars):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
