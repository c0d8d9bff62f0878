"""Captions to token ids, and what a backbone source gives for a dual encoder beside its tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vlm_vision.errors import ConfigError, first_line


class Tokenizer(ABC):
    """Texts to the token ids of one text tower.

    Attributes:
        context_length: T, tokens of a text with its start and end.
        pad_id: what shorter texts are filled up with.
    """

    context_length: int
    pad_id: int

    @abstractmethod
    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "b t"]:
        """Token ids padded to the context length; what is longer is cut, its end-of-text token kept."""

    @abstractmethod
    def length(self, text: str) -> int:
        """Tokens of a whole caption, its start and end among them."""

    def is_truncated(self, text: str) -> bool:
        """Whether a caption is longer than the context and loses its end."""
        return self.length(text) > self.context_length

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files it was made of; nothing where it comes with its library."""


class OpenClipTokenizer(Tokenizer):
    """The tokenizer an open_clip text tower was trained with: its own BPE, or one of transformers.

    Args:
        text_cfg: `text_cfg` of an open_clip architecture.
        source: folder or hub id of the files of a tokenizer of transformers; None takes the architecture's.

    Raises:
        ConfigError: a vocabulary that the text tower has not.
        OSError: the files cannot be had.
    """

    def __init__(self, text_cfg: Mapping[str, Any], source: str | None = None) -> None:
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

        self.context_length = int(text_cfg.get("context_length", 77))
        kwargs = dict(text_cfg.get("tokenizer_kwargs") or {})
        of_library = bool(text_cfg.get("hf_tokenizer_name"))
        self.clean: str = kwargs.get("clean", "whitespace" if of_library else "lower")
        self.library: Any
        if of_library:
            mode = text_cfg.get("tokenizer_mode")
            self.library = HFTokenizer(
                source or text_cfg["hf_tokenizer_name"],
                context_length=self.context_length,
                tokenizer_mode=mode,
                **kwargs,
            )
            self.pad_id = int(self.library.tokenizer.pad_token_id or 0)
            return
        self.library, self.pad_id = SimpleTokenizer(context_length=self.context_length, **kwargs), 0
        if text_cfg.get("vocab_size", 49408) < self.library.vocab_size:
            raise ConfigError(
                f"text_cfg.vocab_size is {text_cfg['vocab_size']}, but CLIP's tokenizer gives ids up to "
                f"{self.library.vocab_size - 1}: set it to {self.library.vocab_size}, or name another "
                "hf_tokenizer_name"
            )

    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "b t"]:
        ids: Tensor = self.library([texts] if isinstance(texts, str) else list(texts))
        return ids.to(torch.long)

    def length(self, text: str) -> int:
        ids: list[int]
        if hasattr(self.library, "encode"):
            ids = self.library.encode(text)
            return len(ids) + 2
        ids = self.library.tokenizer(self.library.clean_fn(text), verbose=False)["input_ids"]
        return len(ids)

    def save_pretrained(self, folder: str | Path) -> None:
        if hasattr(self.library, "tokenizer"):
            self.library.tokenizer.save_pretrained(folder)


class TransformersTokenizer(Tokenizer):
    """The tokenizer of a folder or hub id, as transformers loads it.

    Texts are padded to the context length, as SigLIP was trained; a mask is neither needed nor given: CLIP's
    text looks back only, SigLIP's looks at its padding too.

    Raises:
        ConfigError: there is none, or it has no token to pad with.
    """

    def __init__(self, source: str, context_length: int) -> None:
        self.library = read_tokenizer(
            source,
            "a dual encoder needs the one of its text tower: name its folder or hub id as "
            "`backbone.tokenizer`",
        )
        if not set(self.library.get_vocab()) - set(self.library.all_special_tokens):
            # transformers 5 makes a tokenizer of marks alone where a model's folder has no file of one.
            raise ConfigError(
                f"{source!r} has no vocabulary of a tokenizer (tokenizer.json, vocab.json and merges.txt, "
                "spiece.model); name a folder or hub id that has one as `backbone.tokenizer`"
            )
        if self.library.pad_token_id is None:
            raise ConfigError(f"the tokenizer of {source!r} has no padding token; set its `pad_token`")
        self.context_length, self.pad_id = context_length, int(self.library.pad_token_id)

    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "b t"]:
        batch = self.library(
            [texts] if isinstance(texts, str) else list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        ids: Tensor = batch["input_ids"]
        return ids

    def length(self, text: str) -> int:
        ids: list[int] = self.library(text, verbose=False)["input_ids"]
        return len(ids)

    def save_pretrained(self, folder: str | Path) -> None:
        self.library.save_pretrained(str(folder))


@dataclass
class TextSide:
    """What a contrastively trained pair has beside its vision tower.

    Attributes:
        encoder: token ids [B,T] to embeddings [B,E], not normalised; where there is a decoder, to a pair of
            them and the tokens' states [B,T,D].
        tokenizer: captions to those ids.
        logit_scale: log of the temperature's inverse.
        logit_bias: what SigLIP adds to its logits (arXiv:2303.15343, section 3.2); None in a CLIP.
        image_projection: the tower's pooled output [B,P] to embeddings [B,E], where the tower has it not.
        text_decoder: of CoCa (arXiv:2205.01917): image tokens [B,M,D] and states of text tokens [B,T,D] to
            logits of the token after each [B,T,V].
        fields: what the backbone's portable config must say beside, to build this side again.
    """

    encoder: nn.Module
    tokenizer: Tokenizer
    logit_scale: float
    logit_bias: float | None = None
    image_projection: nn.Module | None = None
    text_decoder: nn.Module | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def read_tokenizer(source: str | Path, way_out: str) -> Any:
    """A tokenizer of transformers, from a folder or hub id.

    Raises:
        ConfigError: none can be loaded; ends with `way_out`.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the hub and each kind of tokenizer have their own family
        raise ConfigError(
            f"no tokenizer can be loaded from {str(source)!r} ({first_line(error)}); {way_out}"
        ) from error
