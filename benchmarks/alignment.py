"""Our alignment stages beside transformers' `LlavaForConditionalGeneration` trained the usual way.

    python benchmarks/alignment.py --data ../shared/data/flickr8k-800 --output runs/alignment

`--data` holds `captions.csv` (image,caption) and its pictures. Of them conversations are made in the mixture
of LLaVA-1.5: short answers in several turns, captions, sentences, paragraphs, and text alone. One random
model is written in our layout and, by `export --to transformers`, in theirs. Both sides see the same records
in the same order and batches, one epoch, AdamW, clipped gradients, a frozen tower. Each run is a process of
its own; the two sides take turns, and medians count.

`theirs` is the loop of the guides: the processor's batches, padded to the longest, `model(**batch).loss`,
`backward`. `ours` is `train/stage.py` with packed rows. Once each, for where the difference comes from: both
with batches of about one length, ours padded, and ours with the tower's features kept, which is less work.
Memory is the peak above the loaded model. A sample is a conversation; the first step is not timed. `CPU s`
is the processor's time for a step, which other work on the machine changes less; take one thread for it, as
two wait for each other. `loss` is the worst relative difference from theirs over all steps.

On a GPU (`--device cuda`): ViT-L/14-336 and 0.5B parameters in bf16, ours by its precision, theirs under
autocast, as transformers' Trainer does it; and the share of the GPU's operations that counts, by the formula
of `train/cost.py`.
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
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from vlm_vision import load_tower
from vlm_vision.adapters.build import build_projector
from vlm_vision.adapters.mlp_config import MlpConfig
from vlm_vision.config import load_config
from vlm_vision.preprocess import open_image
from vlm_vision.train.align import build_model, text_format
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.conversation_check import measure_for_training
from vlm_vision.train.conversations import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    Conversations,
    open_conversations,
)
from vlm_vision.train.cost import GPUS
from vlm_vision.train.deepspeed_engine import join_ranks
from vlm_vision.train.language import text_chats, train_tokenizer
from vlm_vision.train.length_groups import LengthGroups
from vlm_vision.train.order import EpochOrder
from vlm_vision.train.pairs import EpochBatches
from vlm_vision.train.plan import plan_align
from vlm_vision.train.run import prepare_process, read_metrics, training_attention
from vlm_vision.train.stage import run_stage
from vlm_vision.train.vlm import PARTS, VisionLanguageModel, token_grid
from vlm_vision.train.vlm_export import export_llava_for_transformers

SEED = 0
VOCABULARY = 32_000


@dataclass(frozen=True)
class Size:
    """Shapes of the model, and how long texts are.

    Attributes:
        sentences: captions that stand for one sentence of an answer.
    """

    tower: dict[str, Any]
    llm: dict[str, Any]
    max_length: int
    sentences: int
    batch_size: int
    records: int
    workers: int


SIZES = {
    "cpu": Size(
        {"image_size": 112, "patch_size": 14, "width": 192, "layers": 6, "head_width": 64},
        {
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        max_length=512,
        sentences=1,
        batch_size=16,
        records=112,
        workers=0,
    ),
    "cuda": Size(
        {"image_size": 336, "patch_size": 14, "width": 1024, "layers": 24, "head_width": 64},
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        max_length=2048,
        sentences=4,
        batch_size=16,
        records=1600,
        workers=4,
    ),
}
PROJECTOR, LLM = {"match": "projector.*"}, {"match": "llm.*"}
STAGES: dict[str, dict[str, Any]] = {
    "stage1": {"learn": [PROJECTOR], "lr": 1e-3},
    "stage2": {"learn": [PROJECTOR, LLM], "lr": 1e-4},
}
MAIN: dict[str, dict[str, Any]] = {"theirs": {}, "ours": {"packing": True}}
MORE: dict[str, dict[str, Any]] = {
    "theirs, by length": {"group_by_length": True},
    "ours, by length": {"group_by_length": True},
    "ours, padded": {},
    "ours, features kept": {"packing": True, "feature_cache": "features"},
}
SIDES = MAIN | MORE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--records", type=int)
    parser.add_argument("--bf16", action="store_true", help="on a CPU too")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--without-more", action="store_true", help="only the two sides, no breakdown")
    parser.add_argument("--peak", type=float, help="dense bf16 TFLOP/s of the GPU (default: by its name)")
    parser.add_argument("--run", nargs=2, metavar=("SIDE", "STAGE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.size = SIZES[arguments.device]
    arguments.batch_size = arguments.batch_size or arguments.size.batch_size
    arguments.records = arguments.records or arguments.size.records
    if arguments.run:
        torch.set_num_threads(arguments.threads)
        side, stage = arguments.run
        way = ours if side.startswith("ours") else theirs
        print(json.dumps(way(arguments, side, stage)))
        return
    prepare(arguments)
    tell(arguments, measure(arguments))


# The data and the model, once for both sides.


def prepare(arguments: argparse.Namespace) -> None:
    """Write records, our model, theirs, and what the records come to in their processor."""
    output, size = arguments.output, arguments.size
    output.mkdir(parents=True, exist_ok=True)
    records = conversations(arguments.data / "captions.csv", arguments.records, size)
    (output / "train.json").write_text(json.dumps(records), encoding="utf-8")
    torch.manual_seed(SEED)
    chats = text_chats(records)
    tokenizer = train_tokenizer((message["content"] for chat in chats for message in chat), 4096)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    positions = {"max_position_embeddings": size.max_length}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **positions, **size.llm, **ids))
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    side = size.tower["image_size"]
    backbone = {
        "name": "open_clip",
        "architecture": {"embed_dim": 64, "quick_gelu": True, "vision_cfg": size.tower, "text_cfg": text},
        "weights": "none",
        "preprocess": {"image_size": side, "resize": "squash"},
    }
    tower = load_tower({"backbone": backbone})
    projector = build_projector(
        MlpConfig(depth=2), tower.hidden_size, llm.config.hidden_size, token_grid(tower)
    )
    model = VisionLanguageModel(tower, projector, llm, tokenizer)
    model.save_pretrained(output / "ours")
    export_llava_for_transformers(model, output / "theirs")
    encoded = encode_for_them(model, arguments)
    (output / "theirs.json").write_text(json.dumps(encoded), encoding="utf-8")
    parameters = {name: sum(p.numel() for p in model.part(name).parameters()) for name in PARTS}
    lengths = [len(record["labels"]) for record in encoded]
    labels = sum(label != IGNORE_INDEX for record in encoded for label in record["labels"][1:])
    print(", ".join(f"{name} {count / 1e6:.1f}M" for name, count in parameters.items()), "parameters")
    print(
        f"{len(records)} conversations of {min(lengths)} to {max(lengths)} tokens, {np.mean(lengths):.0f} "
        f"in the mean, {model.tokens_per_image} of a picture; {labels / sum(lengths):.0%} are labels; "
        f"{sum('image' not in record for record in records)} of text alone"
    )


def conversations(table: Path, count: int, size: Size) -> list[dict[str, Any]]:
    """LLaVA records about photographs, each shown twice, in about the shares of LLaVA-1.5's 665k."""
    captions: dict[str, list[str]] = {}
    for row in csv.DictReader(table.open(encoding="utf-8")):
        captions.setdefault(row["image"], []).append(row["caption"])
    draw = random.Random(SEED)
    shown = draw.sample(sorted(captions), min(len(captions), -(-count // 2)))
    everything = [caption for texts in captions.values() for caption in texts]
    kinds = draw.choices(list(KINDS), weights=[share for share, _ in KINDS.values()], k=count)
    records = []
    for number, kind in enumerate(kinds):
        image = shown[number % len(shown)]
        told = everything if kind == "text" else captions[image]
        turns = KINDS[kind][1](draw, told, size.sentences)
        record: dict[str, Any] = {"id": f"{kind}{number}"}
        if kind != "text":
            record["image"] = image
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        said = [(who, words) for turn in turns for who, words in zip(("human", "gpt"), turn, strict=True)]
        record["conversations"] = [{"from": who, "value": words} for who, words in said]
        records.append(record)
    return records


Turns = list[tuple[str, str]]
Told = list[str]


def _short(draw: random.Random, told: Told, sentences: int) -> Turns:
    words = [word for caption in told for word in caption.split() if len(word) > 3]
    return [
        (f"Is there something {draw.choice(words)} in the picture, and what is it called in one word?", word)
        for word in draw.choices(words, k=draw.randint(2, 9) * sentences)
    ]


def _caption(draw: random.Random, told: Told, sentences: int) -> Turns:
    return [("Describe the picture in a sentence.", " ".join(draw.choices(told, k=sentences)))]


def _sentences(draw: random.Random, told: Told, sentences: int) -> Turns:
    return [
        ("What else do you see in it, and what happens there?", " ".join(draw.choices(told, k=sentences)))
        for _ in range(draw.randint(3, 5))
    ]


def _paragraph(draw: random.Random, told: Told, sentences: int) -> Turns:
    length = draw.randint(4, 9) * sentences
    return [("Explain in detail what the picture shows and why.", " ".join(draw.choices(told, k=length)))]


def _text(draw: random.Random, told: Told, sentences: int) -> Turns:
    turns: Turns = []
    left = draw.randint(10, 28) * sentences
    while left > 0:
        length = min(left, draw.randint(3, 8) * sentences)
        turns.append((draw.choice(told), " ".join(draw.choices(told, k=length))))
        left -= length + 1
    return turns


KINDS: dict[str, tuple[float, Callable[[random.Random, Told, int], Turns]]] = {
    "short": (0.50, _short),
    "caption": (0.15, _caption),
    "sentences": (0.10, _sentences),
    "paragraph": (0.19, _paragraph),
    "text": (0.06, _text),
}


def encode_for_them(model: VisionLanguageModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each record's prompt by their chat template and its labels; their tokens are seen to be ours."""
    processor = AutoProcessor.from_pretrained(arguments.output / "theirs")
    found = []
    for record in Conversations(arguments.output / "train.json", arguments.data):
        ours = model.chat.encode(record.turns, arguments.size.max_length, "refuse")
        messages = [
            {
                "role": turn.role,
                "content": [
                    {"type": "image"} if piece == IMAGE_TOKEN else {"type": "text", "text": piece}
                    for piece in re.split(f"({IMAGE_TOKEN})", turn.text)
                    if piece
                ],
            }
            for turn in record.turns
        ]
        text = processor.apply_chat_template(messages)
        pictures = [open_image(arguments.data / name) for name in record.images] or None
        ids = processor(images=pictures, text=[text])["input_ids"][0]
        mine = [processor.image_token_id if token == IMAGE_TOKEN_ID else token for token in ours.input_ids]
        if list(ids) != mine:
            raise SystemExit(f"record {record.id}: their tokens are not ours: {list(ids)} against {mine}")
        found.append({"text": text, "images": list(record.images), "labels": list(ours.labels)})
    return found


# One run of a side, in a process of its own.


def align_config(arguments: argparse.Namespace, side: str, stage: str) -> AlignConfig:
    output = arguments.output
    settings = dict(SIDES[side])
    data = {
        "file": str(output / "train.json"),
        "image_folder": str(arguments.data.resolve()),
        "workers": arguments.size.workers,
        "too_long": "refuse",
    }
    if "feature_cache" in settings:
        data["feature_cache"] = str(output / settings.pop("feature_cache"))
    common = {
        "name": stage,
        "data": data,
        "schedule": "constant",
        "warmup_steps": 0,
        "epochs": 1,
        "batch_size": arguments.batch_size,
        "max_length": arguments.size.max_length,
        "zero_stage": 0 if arguments.device == "cpu" else 2,
        "precision": "bf16" if in_bf16(arguments) else "fp32",
        "log_every": 1,
    }
    parts = {
        "tower": str(output / "ours" / "tower"),
        "projector": "mlp2x_gelu",
        "projector_weights": str(output / "ours" / "projector"),
        "llm": str(output / "ours" / "llm"),
    }
    stages = [{**common, **STAGES[stage], **settings}]
    return load_config(AlignConfig, {"model": parts, "stages": stages, "seed": SEED})


def in_bf16(arguments: argparse.Namespace) -> bool:
    return arguments.bf16 or arguments.device == "cuda"


def ours(arguments: argparse.Namespace, side: str, stage: str) -> dict[str, Any]:
    config = align_config(arguments, side, stage)
    _, _, device = join_ranks()
    prepare_process(SEED)
    model = build_model(config.model, config.stages[0], {}).to(device)
    (settings,) = config.stages
    with tempfile.TemporaryDirectory() as folder, training_attention():
        conversations = open_conversations(settings.data)
        chat, _ = text_format(config.model, settings)
        measured = measure_for_training(conversations, chat, settings, Path(folder))
        memory, clock = Memory(model), Clock()
        figures = run_stage(model, conversations, measured, settings, SEED, Path(folder))["figures"]
        mib = memory.peak()
        lines = read_metrics(Path(folder) / "metrics.jsonl")
    return {
        "losses": [line["loss"] for line in lines],
        **clock.spent(),
        "mib": mib,
        "padding": figures["padding"],
    }


def theirs(arguments: argparse.Namespace, side: str, stage: str) -> dict[str, Any]:
    """A training loop as guides for `LlavaForConditionalGeneration` have it."""
    prepare_process(SEED)
    torch.backends.cuda.enable_flash_sdp(True)  # what transformers runs by default, on a CPU too
    device = torch.device(arguments.device)
    folder = arguments.output / "theirs"
    processor = AutoProcessor.from_pretrained(folder, backend="pil")  # pixels as ours; 1 ms a picture
    processor.tokenizer.padding_side = "right"
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device)
    model.train()
    model.model.vision_tower.requires_grad_(False)
    if stage == "stage1":
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    memory, clock = Memory(model), Clock()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=STAGES[stage]["lr"], weight_decay=0.0, fused=True)
    records = json.loads((arguments.output / "theirs.json").read_text(encoding="utf-8"))

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = [open_image(arguments.data / name) for row in rows for name in row["images"]]
        texts = [row["text"] for row in rows]
        batch = processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for place, row in enumerate(rows):
            batch["labels"][place, : len(row["labels"])] = torch.tensor(row["labels"])
        return batch  # type: ignore[no-any-return]

    loader = DataLoader(
        records,  # type: ignore[arg-type]
        batch_sampler=list(batches(arguments, side, records)),
        collate_fn=collate,
        num_workers=arguments.size.workers,
    )
    losses, places, tokens = [], 0, 0
    for batch in loader:
        places, tokens = places + batch["input_ids"].numel(), tokens + int(batch["attention_mask"].sum())
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16) if in_bf16(arguments) else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "losses": losses,
        **clock.spent(),
        "mib": memory.peak(),
        "padding": 1 - tokens / places,
    }


def batches(arguments: argparse.Namespace, side: str, records: list[dict[str, Any]]) -> Iterator[list[int]]:
    """Records of each batch, in the order of our stages."""
    order: EpochOrder = Conversations(arguments.output / "train.json", arguments.data).order(SEED)
    if SIDES[side].get("group_by_length"):
        lengths = np.array([len(record["labels"]) for record in records])
        pictures = np.array([len(record["images"]) for record in records])
        order = LengthGroups(order, lengths, pictures, arguments.batch_size, SEED)
    steps = len(records) // arguments.batch_size
    for batch in EpochBatches(order, arguments.batch_size, SEED, 0, steps, 0, 1):
        yield [draw % len(records) for _, draw in batch]


class Memory:
    """The peak above a loaded model, MiB: of its GPU, or of the process."""

    def __init__(self, model: torch.nn.Module) -> None:
        import torch.utils.tensorboard  # a library's own memory is not the training's

        self.on_gpu = torch.cuda.is_available()
        for tensor in model.state_dict().values():
            tensor.double().sum()  # weights that are mapped from a file are read now
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
            self.before = self.peak_of_process()

    def peak(self) -> float:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return self.peak_of_process() - self.before

    @staticmethod
    def peak_of_process() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


class Clock:
    """Time from the end of the first optimizer step to that of the last: of a clock, and of the process."""

    def __init__(self) -> None:
        self.moments: list[tuple[float, float]] = []
        register_optimizer_step_post_hook(self._look)

    def _look(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.moments.append((time.perf_counter(), time.process_time()))

    def spent(self) -> dict[str, float]:
        seconds, cpu = (last - first for first, last in zip(self.moments[0], self.moments[-1], strict=True))
        return {"seconds": seconds, "cpu": cpu}


# All runs, and what they come to.

Runs = dict[tuple[str, str], list[dict[str, Any]]]


def measure(arguments: argparse.Namespace) -> Runs:
    """Every run by stage and side."""
    runs: Runs = {}
    for number in range(arguments.rounds):
        more = MORE if number == 0 and not arguments.without_more else {}
        for stage in STAGES:
            for side in (*MAIN, *more):
                found = run_apart(arguments, side, stage)
                runs.setdefault((stage, side), []).append(found)
                print(
                    f"  {stage} {side}: {rate(found, arguments):.2f} samples/s, {found['mib']:.0f} MiB",
                    flush=True,
                )
    return runs


def run_apart(arguments: argparse.Namespace, side: str, stage: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", side, stage]
    for name in ("data", "output", "device", "batch_size", "records", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += ["--bf16"] if arguments.bf16 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(f"{side}, {stage} failed:\n{told.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def rate(run: dict[str, Any], arguments: argparse.Namespace) -> float:
    """Samples a second, from the end of the first step to that of the last."""
    return float((len(run["losses"]) - 1) * arguments.batch_size / run["seconds"])


def tell(arguments: argparse.Namespace, runs: Runs) -> None:
    precision = "bf16" if in_bf16(arguments) else "fp32"
    where = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} thread(s)"
    )
    print(f"\nbatch {arguments.batch_size}, {precision}, {where}, torch {torch.__version__}")
    peak = peak_of(arguments, where)
    results = []
    for stage in STAGES:
        heads = (
            "samples/s",
            "of theirs",
            "CPU s",
            "of theirs",
            "MiB",
            "of theirs",
            "padding",
            "loss",
            "TFLOP/s",
        )
        print(f"\n| {stage} | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
        flops = operations(arguments, stage)
        base = runs[stage, "theirs"]
        for side in SIDES:
            if (stage, side) not in runs:
                continue
            mine = runs[stage, side]
            speed, mib = middle(mine, lambda run: rate(run, arguments)), middle(mine, lambda run: run["mib"])
            faster = speed / middle(base, lambda run: rate(run, arguments))
            cpu = middle(mine, lambda run: run["cpu"] / (len(run["losses"]) - 1))
            lighter = cpu / middle(base, lambda run: run["cpu"] / (len(run["losses"]) - 1))
            less = mib / middle(base, lambda run: run["mib"])
            same_order = not SIDES[side].get("group_by_length")
            differs = worst(base[0]["losses"], mine[0]["losses"]) if same_order and side != "theirs" else None
            useful = flops * speed / arguments.batch_size
            results.append(
                {"stage": stage, "side": side, "samples": speed, "cpu": cpu, "mib": mib, "runs": mine}
            )
            cells = [
                f"{speed:.2f}",
                f"{faster:.2f}",
                f"{cpu:.2f}",
                f"{lighter:.2f}",
                f"{mib:,.0f}",
                f"{less:.2f}",
                f"{mine[0]['padding']:.0%}",
                "" if differs is None else f"{differs:.1e}",
                f"{useful / 1e12:.3f}" + (f" ({useful / peak:.1%})" if peak else ""),
            ]
            print(f"| {side} | {' | '.join(cells)} |")
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def middle(runs: list[dict[str, Any]], figure: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(figure, runs))


def worst(theirs: list[float], ours: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(theirs, ours, strict=True))


def operations(arguments: argparse.Namespace, stage: str) -> float:
    """Of a step without padding, by the plan's formula, which takes every conversation to have a picture."""
    records = json.loads((arguments.output / "theirs.json").read_text(encoding="utf-8"))
    mean = round(float(np.mean([len(record["labels"]) for record in records])))
    arithmetic = plan_align(align_config(arguments, "ours", stage), tokens=mean).stages[0].arithmetic
    assert arithmetic is not None
    return arithmetic.total


def peak_of(arguments: argparse.Namespace, where: str) -> float | None:
    if arguments.peak:
        return float(arguments.peak * 1e12)
    return next((value for name, value in GPUS.items() if name in where), None)


if __name__ == "__main__":
    main()
