"""A model of ours in LLaVA's own code and back, in a process of its own: `vlm_in_llava_worker.py FOLDER`.

The last line that it prints is JSON: what LLaVA's loading reported, the largest differences of logits, and
greedy tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from integration.llava_parts import pixels, write_clip
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from tiny import tiny_llm
from torch import Tensor

from vlm_vision import load_tower
from vlm_vision.adapters import build_projector
from vlm_vision.train.conversations import IMAGE_TOKEN_ID
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer
from vlm_vision.train.vlm_export import export_llava


def main(folder: Path) -> dict[str, Any]:
    tower = load_tower(f"transformers:{write_clip(folder / 'clip')}")
    tiny_llm(folder / "llm")
    torch.manual_seed(0)
    model = VisionLanguageModel(
        tower,
        build_projector("mlp2x_gelu", tower.hidden_size, 32, tower.grid),
        load_llm(folder / "llm"),
        load_tokenizer(folder / "llm"),
    ).eval()
    export_llava(model, folder / "llava")
    theirs, report = LlavaLlamaForCausalLM.from_pretrained(folder / "llava", output_loading_info=True)
    theirs.eval().get_vision_tower().load_model()
    theirs.save_pretrained(folder / "saved")  # with the tower's weights among its own, as LLaVA saves
    model.tokenizer.save_pretrained(folder / "saved")
    again = VisionLanguageModel.from_pretrained(folder / "saved")
    words = [2, 5, IMAGE_TOKEN_ID, 9, 10]

    def of_theirs(ids: list[int]) -> Tensor:
        given = torch.tensor([ids])
        return theirs(input_ids=given, attention_mask=torch.ones_like(given), images=pixels(1)).logits

    def of_ours(ids: list[int], one: VisionLanguageModel = model) -> Tensor:
        places = [token for id_ in ids for token in ([id_] * 16 if id_ == IMAGE_TOKEN_ID else [id_])]
        given = torch.tensor([places])
        return one(given, torch.ones_like(given), pixels=pixels(1)).logits

    def greedy(logits_of: Any) -> list[int]:
        ids = list(words)
        for _ in range(6):
            ids.append(int(logits_of(ids)[0, -1].argmax()))
        return ids

    with torch.no_grad():
        return {
            "report": [name for names in report.values() for name in names],
            "exported": float((of_theirs(words) - of_ours(words)).abs().max()),
            "saved": float((of_theirs(words) - of_ours(words, again)).abs().max()),
            "ours": greedy(of_ours),
            "theirs": greedy(of_theirs),
        }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
