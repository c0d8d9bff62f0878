"""Small parts that LLaVA's own code runs on: a CLIP folder, a Llama with its tokenizer, records, a tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

SIDE, PATCH, WIDTH, LAYERS = 32, 8, 32, 12
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "white": (240, 240, 240)}


def fill(model: nn.Module, leaving: str = "nothing") -> None:
    """Weights by a formula of their names' order, so that no version of a library or generator matters."""
    named = {name.removeprefix("vision_model."): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(named.items())):
            if leaving in name:
                continue
            values = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + number)
            scale = 1.0 if parameter.ndim == 1 else 2.0 / parameter[0].numel() ** 0.5
            parameter.copy_((values * scale).reshape(parameter.shape))


def write_clip(folder: Path) -> Path:
    """A CLIPVisionModel of 12 layers as `save_pretrained` writes it, with its image processor."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModel(config)
    fill(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    return folder


def picture(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows * 0.3 + columns * (0.1 + 0.2 * channel)) for channel in range(3)]
    return Image.fromarray((np.stack(waves, axis=-1) * 120 + 128).astype(np.uint8))


def pixels(count: int = 2) -> torch.Tensor:
    values = torch.sin(torch.arange(count * 3 * SIDE * SIDE, dtype=torch.float64) * 0.37)
    return values.reshape(count, 3, SIDE, SIDE).float()


def write_llama(folder: Path, **config: Any) -> Path:
    """A random Llama of width 32 with a sentencepiece tokenizer trained on the records' words."""
    import sentencepiece  # an extra of these tests: LLaVA pins it

    folder.mkdir(parents=True, exist_ok=True)
    sentences = ["A chat between a curious user and an artificial intelligence assistant.", *_sentences()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=True)
    tokenizer.save_pretrained(folder)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        **config,
    }
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


def _sentences() -> list[str]:
    return [
        f"USER: What colour is the picture? ASSISTANT: The picture is {name}. It helps with questions."
        for name in COLOURS
    ]


def write_records(folder: Path, count: int = 16) -> Path:
    """Plain coloured pictures in LLaVA's format; every fourth record has text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        sees = number % 4 != 3
        record: dict[str, Any] = {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": ("<image>\n" if sees else "") + "What colour is the picture?"},
                {"from": "gpt", "value": f"The picture is {name}."},
            ],
        }
        if sees:
            record["image"] = f"{number}.png"
            Image.new("RGB", (48, 40), COLOURS[name]).save(folder / f"{number}.png")
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    captions = [record for record in records if "image" in record]
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    return folder
