"""Flickr8k's photographs through the whole way: contrastive fit, alignment, caption loss.

    python benchmarks/flickr8k.py --data ../shared/data/flickr8k-800 --output runs/flickr8k

`--data` holds `captions.csv` (image,caption) and its pictures. Prints recall on the photographs, and the
caption loss with the right photographs and with others in their place. A dual encoder that an earlier run
left in the output folder is taken as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlm_vision.config import load_config
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.contrastive import train_contrastive
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.conversations import Conversations
from vlm_vision.train.evaluate import caption_loss
from vlm_vision.train.language import text_chats, warm_start_llm
from vlm_vision.train.language_config import LanguageConfig
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.ranks import default_ranks, run_on_ranks
from vlm_vision.train.run import read_metrics
from vlm_vision.train.vlm import VisionLanguageModel

CONFIGS = Path(__file__).parent.parent / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/flickr8k"))
    arguments = parser.parse_args()
    data, output = arguments.data, arguments.output
    table = data / "captions.csv"
    contrastive = output / "contrastive"
    if not (contrastive / "model").exists():
        config = load_config(ContrastiveConfig, CONFIGS / "flickr8k_contrastive.yaml", [f"data.path={table}"])
        run_on_ranks(default_ranks(), train_contrastive, config, contrastive)
    log = read_metrics(contrastive / "metrics.jsonl")
    scores = {name: log[-1][name] for name in ("image_to_text_r1", "text_to_image_r1")}

    records = caption_records(Pairs(PairsConfig(path=str(table))))
    conversations = output / "captions.json"
    conversations.write_text(json.dumps(records), encoding="utf-8")
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
    stages = run_on_ranks(default_ranks(), align, align_config, output / "align")
    model = VisionLanguageModel.from_pretrained(output / "align" / "model")
    described = Conversations(conversations, data)
    figures = {
        **scores,
        "caption_loss": caption_loss(model, described, max_length=128),
        "caption_loss_wrong_photograph": caption_loss(model, described, max_length=128, swap_seed=0),
        "contrastive_seconds": round(log[-1]["time"] - log[0]["time"]),
        "align_seconds": round(sum(figures["seconds"] for figures in stages.values())),
    }
    (output / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def caption_records(pairs: Pairs) -> list[dict[str, object]]:
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
