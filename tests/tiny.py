"""Tiny parts for tests: a tower, a Llama and a word-level tokenizer, all with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlm_vision import DualEncoder, VisionTower, load_dual_encoder, load_tower

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "white": (240, 240, 240)}
WORDS = ("what", "colour", "is", "it", "the", "a", "picture", "of", "?", "x", *COLOURS)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}answer: {{ message.content }}{{ eos_token }}\n"
    "{% else %}{{ message.role }}: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)
# A CLIPVisionConfig of transformers: 16 patches of width 32.
CLIP_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TOWER = {
    "backbone": {
        "name": "open_clip",
        "architecture": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        },
        "weights": "none",
    }
}
RESNET = {
    "backbone": {
        "name": "open_clip",
        "architecture": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        },
        "weights": "none",
    }
}


def tiny_tower(**overrides: Any) -> VisionTower:
    """16 patches of width 64 from pictures of 32 pixels; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_tower(TOWER, **overrides)


def half_runs_on_cpu() -> bool:
    """False for torch 2.1, which LLaVA pins."""
    try:
        torch.nn.functional.conv2d(torch.ones(1, 1, 1, 1).half(), torch.ones(1, 1, 1, 1).half())
    except RuntimeError:
        return False
    return True


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<unk>", "<s>", "</s>", "system", "user", "answer", ":", "\n", *WORDS]
    model = models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation(),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llm(folder: Path, **config: Any) -> Path:
    """Save a Llama of width 32 and its tokenizer; the same weights every time."""
    tokenizer = tiny_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        llm = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def colour_records(folder: Path, count: int = 16, text_only: int = 0) -> Path:
    """Plain coloured pictures in `folder/images`, asked about in `folder/train.json` in LLaVA's format.

    Args:
        text_only: of `count`, the last so many have no picture.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        has_picture = number < count - text_only
        question = "what colour is it ?" if has_picture else f"what colour is the {colour} picture ?"
        record: dict[str, Any] = {
            "id": f"r{number}",
            "conversations": [
                {"from": "human", "value": ("<image>\n" if has_picture else "") + question},
                {"from": "gpt", "value": colour, "type": "colour"},
            ],
        }
        if has_picture:
            record["image"] = f"{number}.png"
            Image.new("RGB", (40, 36), COLOURS[colour]).save(folder / "images" / f"{number}.png")
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "train.json"


def tiny_dual_encoder() -> DualEncoder:
    """The tiny tower with a text tower of width 32; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_dual_encoder(TOWER)


def captioned_pictures(folder: Path, count: int = 16) -> Path:
    """Plain coloured pictures in `folder`, each with the name of its colour, in `folder/train.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,caption"]
    for number in range(count):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        shade = tuple(max(0, level - number) for level in colour)  # no two pictures are the same
        Image.new("RGB", (40, 36), shade).save(folder / f"{number}.png")
        lines.append(f"{number}.png,a {name} picture")
    (folder / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "train.csv"


def clip_tokenizer_files(folder: Path) -> None:
    """A CLIP tokenizer of bytes and six merges, as transformers saves it: 520 ids, the last two its marks."""
    from transformers import CLIPTokenizer

    letters = list(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("c", "a"), ("ca", "t"), ("r", "e"), ("re", "d</w>"), ("t", "w"), ("tw", "o</w>")]
    tokens = [*sorted(letters), *(f"{letter}</w>" for letter in sorted(letters)), *map("".join, pairs)]
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in pairs)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder, model_max_length=16).save_pretrained(folder)
