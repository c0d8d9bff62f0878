"""A tiny Q-Former with text, its tokenizer in BERT's manner, and a batch of pairs, the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import COLOURS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlm_vision.adapters.qformer_config import QFormerConfig
from vlm_vision.train.caption_tokenizer import CaptionTokenizer
from vlm_vision.train.representation import RepresentationModel

QFORMER = {"name": "qformer", "layers": 3, "heads": 2, "hidden_size": 16, "num_queries": 4, "dropout": 0.0}
WIDTH, GRID, LENGTH = 12, (2, 3), 8
WORDS = ("a", "picture", "with", "no", *COLOURS)
TEXTS = (
    "a red picture",
    "a blue picture with no green",
    "green",
    "a white picture with a red",
    "no picture",
    "with white",
)


def bert_tokenizer(folder: Path) -> Path:
    """Whole words, and the marks that BERT's tokenizer has and sets."""
    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: number for number, word in enumerate((*marks, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), marks, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


def tiny_representation(folder: Path, seed: int = 0, **changes: Any) -> RepresentationModel:
    """Weights far enough from 0 that everything depends on everything."""
    tokenizer = CaptionTokenizer(bert_tokenizer(folder), LENGTH)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = QFormerConfig.model_validate({**QFORMER, **changes})
        model = RepresentationModel(config, WIDTH, GRID, tokenizer, embed_dim=10)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "logit_scale":
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tiny_batch(model: RepresentationModel, pairs: int = len(TEXTS)) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, token ids and, of each pair, a number of its own."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(pairs, GRID[0] * GRID[1], WIDTH, generator=generator)
    return patches, model.tokenizer(TEXTS[:pairs]), torch.arange(pairs)[:, None]
