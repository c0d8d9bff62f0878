"""A model of ours in LLaVA's own code and back, in a process of its own: `vlm_in_llava_worker.py FOLDER`.

The last line that it prints is JSON, for pictures of one tile and in tiles (anyres): what LLaVA's loading
reported, the largest differences of pixels and logits, and greedy tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from integration.llava_parts import picture, pixels, write_clip
from llava.mm_utils import process_anyres_image
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from tiny import tiny_llm
from torch import Tensor

from vlm_vision import load_tower
from vlm_vision.adapters import build_projector
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.train.conversations import IMAGE_TOKEN_ID
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer
from vlm_vision.train.vlm_export import export_llava

SIZES = [(60, 40), (31, 57), (90, 20), (64, 64)]
TILING = TilingConfig(
    mode="anyres", merge="spatial_unpad", grid_pinpoints=((32, 64), (64, 32), (64, 64), (96, 32))
)


def main(folder: Path, tiling: TilingConfig | None) -> dict[str, Any]:
    tower = load_tower(f"transformers:{write_clip(folder / 'clip')}")
    tiny_llm(folder / "llm", max_position_embeddings=512)
    torch.manual_seed(0)
    model = VisionLanguageModel(
        tower,
        build_projector("mlp2x_gelu", tower.hidden_size, 32, tower.grid),
        load_llm(folder / "llm"),
        load_tokenizer(folder / "llm"),
        tiling=tiling,
    ).eval()
    export_llava(model, folder / "llava")
    theirs, report = LlavaLlamaForCausalLM.from_pretrained(folder / "llava", output_loading_info=True)
    theirs.eval().get_vision_tower().load_model()
    theirs.save_pretrained(folder / "saved")  # with the tower's weights among its own, as LLaVA saves
    model.tokenizer.save_pretrained(folder / "saved")
    again = VisionLanguageModel.from_pretrained(folder / "saved")
    words = [2, 5, IMAGE_TOKEN_ID, 9, 10]

    cases: list[tuple[dict[str, Any], dict[str, Any], int]] = [
        ({"images": pixels(1)}, {"pixels": pixels(1)}, 16)
    ]
    differences = [0.0]
    if model.tiles is not None:
        cases = []
        for size in SIZES:
            made, sizes = model.prepare_pictures([picture(*size)])
            given = process_anyres_image(
                picture(*size), theirs.get_vision_tower().image_processor, theirs.config.image_grid_pinpoints
            )
            differences.append(float((given - made).abs().max()))
            cases.append(
                (
                    {"images": [given], "image_sizes": [size]},
                    {"pixels": made, "image_sizes": sizes},
                    model.tiles.form.num_tokens(size),
                )
            )

    def of_theirs(ids: list[int], shown: dict[str, Any]) -> Tensor:
        given = torch.tensor([ids])
        return theirs(input_ids=given, attention_mask=torch.ones_like(given), **shown).logits

    def of_ours(
        ids: list[int], shown: dict[str, Any], count: int, one: VisionLanguageModel = model
    ) -> Tensor:
        places = [token for id_ in ids for token in ([id_] * count if id_ == IMAGE_TOKEN_ID else [id_])]
        given = torch.tensor([places])
        return one(given, torch.ones_like(given), **shown).logits

    def greedy(logits_of: Any, *shown: Any) -> list[int]:
        ids = list(words)
        for _ in range(6):
            ids.append(int(logits_of(ids, *shown)[0, -1].argmax()))
        return ids

    def worst(one: VisionLanguageModel) -> float:
        return max(
            float((of_theirs(words, theirs_of) - of_ours(words, own, count, one)).abs().max())
            for theirs_of, own, count in cases
        )

    with torch.no_grad():
        return {
            "report": [name for names in report.values() for name in names],
            "pixels": max(differences),
            "exported": worst(model),
            "saved": worst(again),
            "ours": [greedy(of_ours, own, count) for _, own, count in cases],
            "theirs": [greedy(of_theirs, theirs_of) for theirs_of, _, _ in cases],
        }


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(json.dumps({"one": main(place / "one", None), "tiles": main(place / "tiles", TILING)}))
