"""Captions as a Q-Former reads them: `[CLS] text [SEP]`, and `[DEC]` in the first place to write one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from vlm_vision.text import Tokenizer, read_tokenizer


class CaptionTokenizer(Tokenizer):
    """Any tokenizer of transformers, with the marks of BLIP-2 where it has none of its own.

    Of BERT's it gives the ids that LAVIS gives (`blip2_models/blip2.py`, `init_tokenizer`), whose only new
    token is `[DEC]`.

    Attributes:
        dec_id: takes the place of the first token where the text is to be written, token after token.

    Raises:
        ConfigError: it cannot be loaded.
    """

    def __init__(self, source: str | Path, context_length: int) -> None:
        self.library = read_tokenizer(source, "name the folder or hub id of one as `tokenizer`")
        library = self.library
        end = library.sep_token or library.eos_token or "[SEP]"
        # A padding token that ends texts too would hide their end.
        pad = "[PAD]" if library.pad_token in (None, end) else library.pad_token
        marks = {"bos_token": "[DEC]", "cls_token": library.cls_token or "[CLS]"}
        library.add_special_tokens({**marks, "sep_token": end, "pad_token": pad})
        self.context_length = context_length
        self.pad_id, self.dec_id = int(library.pad_token_id), int(library.bos_token_id)

    def __len__(self) -> int:
        """Size of the vocabulary."""
        return len(self.library)

    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "b t"]:
        rows = [
            [self.library.cls_token_id, *ids[: self.context_length - 2], self.library.sep_token_id]
            for ids in self._words([texts] if isinstance(texts, str) else list(texts))
        ]
        padded = torch.full((len(rows), self.context_length), self.pad_id)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return padded

    def length(self, text: str) -> int:
        return len(self._words([text])[0]) + 2

    def save_pretrained(self, folder: str | Path) -> None:
        self.library.save_pretrained(str(folder))

    def _words(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.library(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
