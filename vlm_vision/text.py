"""Captions to token ids, and what a backbone source gives for the text side of a dual encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vlm_vision.errors import ConfigError


class Tokenizer:
    """The tokenizer an open_clip text tower was trained with: its own BPE, or one of transformers.

    Args:
        text_cfg: `text_cfg` of an open_clip architecture.
    """

    def __init__(self, text_cfg: Mapping[str, Any]) -> None:
        from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer

        self.context_length = int(text_cfg.get("context_length", 77))
        name, kwargs = text_cfg.get("hf_tokenizer_name"), dict(text_cfg.get("tokenizer_kwargs") or {})
        if name:
            kind = SigLipTokenizer if "siglip" in name.lower() else HFTokenizer
            self._encode = kind(name, context_length=self.context_length, **kwargs)
            return
        self._encode = SimpleTokenizer(context_length=self.context_length, **kwargs)
        if text_cfg.get("vocab_size", 49408) < self._encode.vocab_size:
            raise ConfigError(
                f"text_cfg.vocab_size is {text_cfg['vocab_size']}, but CLIP's tokenizer gives ids up to "
                f"{self._encode.vocab_size - 1}: set it to {self._encode.vocab_size}, or name another "
                "hf_tokenizer_name"
            )

    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "b t"]:
        """Token ids padded to the context length; what is longer is cut, its end-of-text token kept."""
        ids: Tensor = self._encode([texts] if isinstance(texts, str) else list(texts))
        return ids.to(torch.long)

    def is_truncated(self, text: str) -> bool:
        """Whether a caption is longer than the context and loses its end."""
        return self.length(text) > self.context_length

    def length(self, text: str) -> int:
        """Tokens of a whole caption, its start and end among them."""
        if hasattr(self._encode, "encode"):
            return len(self._encode.encode(text)) + 2
        return len(self._encode.tokenizer(self._encode.clean_fn(text))["input_ids"])


@dataclass
class TextSide:
    """The text half of a contrastively trained pair.

    Attributes:
        encoder: token ids [B,T] to embeddings [B,E], not normalised.
        tokenizer: captions to those ids.
        logit_scale: log of the temperature's inverse.
    """

    encoder: nn.Module
    tokenizer: Tokenizer
    logit_scale: float
