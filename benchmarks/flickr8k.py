"""Flickr8k's photographs through the whole way: contrastive fit, alignment, caption loss.

    python benchmarks/flickr8k.py --data ../shared/data/flickr8k-800 --output runs/flickr8k

`--data` holds `captions.csv` (image,caption) and its pictures. Prints recall on the photographs, and the
caption loss with the right photographs and with others in their place. With `--held-out 50` neither tower nor
language model sees 50 of the photographs; all is then told of them, and the losses of as many that were seen.
What an earlier run left whole in the output folder is taken as it is: dual encoder, language model, aligned
model.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path
from typing import Any

from vlm_vision.config import load_config
from vlm_vision.dual_encoder import load_dual_encoder
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.contrastive import train_contrastive
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.conversations import Conversations
from vlm_vision.train.evaluate import caption_loss
from vlm_vision.train.going_on import DONE_FILE
from vlm_vision.train.language import text_chats, warm_start_llm
from vlm_vision.train.language_config import LanguageConfig
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.ranks import default_ranks, run_on_ranks
from vlm_vision.train.run import read_metrics
from vlm_vision.train.validation import validate_dual_encoder
from vlm_vision.train.validation_config import ValidationConfig
from vlm_vision.train.vlm import VisionLanguageModel

CONFIGS = Path(__file__).parent.parent / "configs"
RECALL = ("image_to_text_r1", "text_to_image_r1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/flickr8k"))
    parser.add_argument("--held-out", type=int, default=0, help="photographs that are not learnt")
    parser.add_argument("--epochs", type=int, help="of the contrastive fit (default: the config's)")
    arguments = parser.parse_args()
    data, output = arguments.data, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    learnt, held_out = split(data, output, arguments.held_out)
    contrastive = output / "contrastive"
    if not (contrastive / "model").exists():
        changes = [
            f"{where}.{change}"
            for where in ("data", "validation.retrieval")
            for change in (f"path={learnt.path}", f"image_folder={data}")
        ]
        changes += [f"epochs={arguments.epochs}"] if arguments.epochs else []
        config = load_config(ContrastiveConfig, CONFIGS / "flickr8k_contrastive.yaml", changes)
        run_on_ranks(default_ranks(), train_contrastive, config, contrastive)
    log = read_metrics(contrastive / "metrics.jsonl")
    scores = {name: log[-1][name] for name in RECALL}

    records = caption_records(Pairs(learnt))
    conversations = written(records, output / "captions.json")
    if not (output / "llm").exists():
        captions = [record["conversations"][1]["value"] for record in records]
        language = LanguageConfig(hidden_size=192, layers=4, heads=6, vocab_size=2048, steps=300, lr=1e-3)
        warm_start_llm(text_chats(records), captions, language, output / "llm")
    align_config = load_config(
        AlignConfig,
        CONFIGS / "flickr8k_align.yaml",
        [
            f"model.tower={contrastive / 'model'}",
            f"model.llm={output / 'llm'}",
            *(f"stages.{stage}.data.file={conversations}" for stage in (0, 1)),
            *(f"stages.{stage}.data.image_folder={data}" for stage in (0, 1)),
        ],
    )
    aligned = output / "align"
    if not (aligned / "model").exists():
        run_on_ranks(default_ranks(), align, align_config, aligned)
    stages = [json.loads((aligned / stage.name / DONE_FILE).read_text()) for stage in align_config.stages]
    model = VisionLanguageModel.from_pretrained(aligned / "model")
    figures = {
        **scores,
        **losses(model, first(conversations, arguments.held_out or len(Pairs(learnt))), data),
        "contrastive_seconds": round(log[-1]["time"] - log[0]["time"]),
        "align_seconds": round(sum(stage["figures"]["seconds"] for stage in stages)),
    }
    if held_out is not None:
        dual = load_dual_encoder(contrastive / "model")
        recall = validate_dual_encoder(dual, ValidationConfig(retrieval=held_out))
        unseen = written(caption_records(Pairs(held_out)), output / "held_out.json")
        found = {**{name: recall[name] for name in RECALL}, **losses(model, unseen, data)}
        figures |= {f"held_out_{name}": value for name, value in found.items()}
    (output / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def split(data: Path, output: Path, count: int) -> tuple[PairsConfig, PairsConfig | None]:
    """The photographs to learn, and `count` others, drawn once for all."""
    with (data / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["image"] for row in rows})
    kept = set(random.Random(0).sample(names, count))
    tables = []
    for name, inside in (("learnt", False), ("held_out", True)):
        path = output / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["image", "caption"])
            writer.writeheader()
            writer.writerows(row for row in rows if (row["image"] in kept) == inside)
        tables.append(PairsConfig(path=str(path), image_folder=str(data)))
    return tables[0], tables[1] if count else None


def written(records: list[dict[str, Any]], path: Path) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def first(source: Path, count: int) -> Path:
    """The records of the first `count` photographs."""
    records = json.loads(source.read_text(encoding="utf-8"))
    names = list(dict.fromkeys(record["image"] for record in records))[:count]
    return written([record for record in records if record["image"] in names], source.with_stem("seen"))


def losses(model: VisionLanguageModel, records: Path, data: Path) -> dict[str, float]:
    described = Conversations(records, data)
    return {
        "caption_loss": caption_loss(model, described, max_length=128),
        "caption_loss_wrong_photograph": caption_loss(model, described, max_length=128, swap_seed=0),
    }


def caption_records(pairs: Pairs) -> list[dict[str, Any]]:
    """Every caption of every photograph as a LLaVA-format record."""
    return [
        {
            "id": f"{pairs.name(index)}#{number}",
            "image": pairs.name(index),
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe the picture."},
                {"from": "gpt", "value": caption},
            ],
        }
        for index in range(len(pairs))
        for number, caption in enumerate(pairs.captions(index))
    ]


if __name__ == "__main__":
    main()
