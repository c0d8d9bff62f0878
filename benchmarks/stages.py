"""What a stage's settings cost and what they are worth: the demo's second stage, the same steps in each way.

    make demo
    python benchmarks/stages.py --demo runs/demo --output runs/stages

Takes the scenes, the tower and the language model of the demo. Each row runs both stages anew, from the same
seed and in the same order of samples: all weights, LoRA and QLoRA; a tower that has learnt nothing; packed
rows; ZeRO 2 and 3. Held-out questions are asked about the right pictures and about others in their place.
Memory is the largest of all processes together. What is done is taken as it is when the script runs again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vlm_vision import VisionTower, load_tower
from vlm_vision.config import load_config
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.conversations import Conversations
from vlm_vision.train.evaluate import answer_questions, vqa_accuracy
from vlm_vision.train.ranks import default_ranks, run_on_ranks
from vlm_vision.train.run import PeakMemory, read_metrics
from vlm_vision.train.vlm import VisionLanguageModel

CONFIGS = Path(__file__).parent.parent / "configs"
SMOOTHED = 25  # steps of the loss that a point of its curve averages
PROJECTOR = {"match": "projector.*"}
FULL: dict[str, Any] = {"learn": [PROJECTOR, {"match": "llm.*"}], "lr": 2.5e-3}
LORA: dict[str, Any] = {
    "learn": [
        PROJECTOR,
        *(
            {"match": f"llm.model.layers.*{layer}.weight", "learn": "lora"}
            for layer in ("_proj", "dense", "fc?")
        ),
    ],
    "lora": {"rank": 32, "alpha": 64},
    "lr": 5e-3,
}
ROWS: dict[str, dict[str, Any]] = {
    "full, ZeRO-2": FULL,
    "LoRA, ZeRO-2": LORA,
    "QLoRA, ZeRO-2": {**LORA, "quantise": "nf4"},
    "full, ZeRO-2, tower not adapted": FULL,
    "full, ZeRO-2, packed": {**FULL, "packing": True},
    "full, ZeRO-3": {**FULL, "zero_stage": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `vlm-vision demo`")
    parser.add_argument("--output", type=Path, default=Path("runs/stages"))
    parser.add_argument("--steps", type=int, default=600, help="of the second stage")
    parser.add_argument("--records", type=int, default=240, help="held-out pictures to ask about")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    held_out = first_records(arguments.demo / "data" / "val.json", arguments.records, output / "val.json")
    found = {name: row(name, arguments.demo, output, held_out, arguments.steps) for name in arguments.rows}
    print(f"\n| {arguments.steps} steps | right picture | wrong picture | loss | seconds | MiB |")
    print("|---|---|---|---|---|---|")
    for name, of in found.items():
        print(
            f"| {name} | {of['right']['all']:.3f} | {of['wrong']['all']:.3f} | {of['loss']:.3f} | "
            f"{of['seconds']:.0f} | {of['mib']:,.0f} |"
        )
    if arguments.plot is not None:
        plot(found, {name: curve(output / folder_of(name)) for name in found}, arguments.plot)


def row(name: str, demo: Path, output: Path, held_out: Path, steps: int) -> dict[str, Any]:
    """Both stages and the questions of a row, or what an earlier run of it found."""
    folder = output / folder_of(name)
    kept = folder / "row.json"
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)  # half of a row
        tower = demo / "tower"
        if "not adapted" in name:
            tower = random_tower(tower, output / "random_tower")
        with PeakMemory() as memory:
            stages = run_on_ranks(default_ranks(), align, align_config(name, demo, tower, steps), folder)
        model = VisionLanguageModel.from_pretrained(folder / "model")
        asked = Conversations(held_out, demo / "data")
        losses = curve(folder)
        figures = {
            "right": vqa_accuracy(answer_questions(model, asked, max_new_tokens=4)),
            "wrong": vqa_accuracy(answer_questions(model, asked, max_new_tokens=4, swap_seed=0)),
            "loss": sum(losses[-len(losses) // 10 :]) / len(losses[-len(losses) // 10 :]),
            "seconds": stages["stage2"]["seconds"],
            "mib": memory.mb,
            "padding": stages["stage2"]["padding"],
            "padding_saved": stages["stage2"]["padding_saved"],
        }
        kept.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(name, json.dumps(figures), flush=True)
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def folder_of(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "_")


def align_config(name: str, demo: Path, tower: Path, steps: int) -> AlignConfig:
    """The demo's stages, the second as the row says; both with its ZeRO stage."""
    pictures = str((demo / "data").resolve())
    shipped = load_config(
        AlignConfig,
        CONFIGS / "demo_align.yaml",
        [
            f"model.tower={tower}",
            f"model.llm={demo / 'llm'}",
            f"stages.0.data.file={demo / 'data' / 'captions.json'}",
            f"stages.1.data.file={demo / 'data' / 'train.json'}",
            *(f"stages.{stage}.data.image_folder={pictures}" for stage in (0, 1)),
        ],
    ).model_dump(mode="json", exclude_unset=True)
    first, second = shipped["stages"]
    first["zero_stage"] = ROWS[name].get("zero_stage", 2)
    second |= {**ROWS[name], "steps": steps, "log_every": 1}
    return load_config(AlignConfig, shipped)


def random_tower(like: Path, folder: Path) -> Path:
    if not folder.exists():
        torch.manual_seed(0)
        load_tower(VisionTower.from_pretrained(like).config).save_pretrained(folder)
    return folder


def first_records(source: Path, count: int, target: Path) -> Path:
    records = json.loads(source.read_text(encoding="utf-8"))[:count]
    target.write_text(json.dumps(records), encoding="utf-8")
    return target


def curve(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "stage2" / "metrics.jsonl")]


def plot(found: dict[str, dict[str, Any]], curves: dict[str, list[float]], path: Path) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    losses, bars = figure.subplots(1, 2)
    for name, run in curves.items():
        smooth = np.convolve(run, np.ones(SMOOTHED) / SMOOTHED, "valid")
        losses.plot(np.arange(len(smooth)) + SMOOTHED, smooth, lw=1.2, label=name)
    losses.set(title="Stage 2: loss of answers", xlabel="step")
    losses.legend(fontsize=7)
    places = np.arange(len(found))
    for offset, kind, colour in ((-0.2, "right", "tab:blue"), (0.2, "wrong", "tab:orange")):
        values = [of[kind]["all"] for of in found.values()]
        bars.barh(places + offset, values, 0.4, color=colour, label=f"{kind} picture")
    bars.set_yticks(places, list(found), fontsize=8)
    bars.invert_yaxis()
    bars.set(title="Held-out answers that are right", xlim=(0, 1))
    bars.legend(fontsize=8)
    for axes in (losses, bars):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
