"""Tokenizers of the kinds that LLaVA's language models have, trained here on a few sentences or `texts`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: ASSISTANT: [INST] [/INST] <<SYS>> <</SYS>>",
    "system user assistant You are a helpful assistant. What colour is the picture? It is red.\n",
    "The cat sits on the mat, and the dog beside it.\nWhat is in the picture? A cat and a dog.\n",
] * 3
# Qwen2's, of words, single digits, punctuation and white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@lru_cache
def _llama_pieces(texts: tuple[str, ...], size: int) -> dict[str, Any]:
    """Vocabulary and merges as sentencepiece lays them out: special tokens, bytes, pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", "") for text in texts], trainer)  # a newline is a byte
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    learnt = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    # As in Llama's: one token more with a space before it than without, which LLaVA's masks count on.
    merges = [("E", "R"), ("U", "S"), ("▁", "US"), ("US", "ER")]
    merges += [merge for merge in learnt if merge not in merges]
    vocabulary = dict(model["vocab"])
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return {"vocab": vocabulary, "merges": merges}


def llama_tokenizer(*, legacy: bool, texts: Sequence[str] = TEXT, size: int = 420) -> PreTrainedTokenizerFast:
    """As LlamaTokenizerFast: byte fallback, and a space before every text.

    Args:
        legacy: also before a text that follows a special token.
    """
    pieces = _llama_pieces((*texts, *TEXT) if texts is not TEXT else tuple(TEXT), size)
    tokenizer = Tokenizer(models.BPE(**pieces, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **special)
    built.legacy = legacy
    return built


class _AsPinned(PreTrainedTokenizerFast):  # type: ignore[misc]
    """What LLaVA-NeXT's transformers gave: a list of ids, and the ids of additional special tokens."""

    additional_special_tokens_ids: tuple[int, int]

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        text = super().apply_chat_template(conversation, **{**options, "tokenize": False})
        return text if options.get("tokenize") is False else self(text)["input_ids"]


def qwen_tokenizer(texts: Sequence[str] = TEXT, size: int = 420) -> PreTrainedTokenizerFast:
    """As Qwen2's: BPE of bytes, ChatML's special tokens, no token to begin with; a newline is token 198."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    built = _AsPinned(tokenizer_object=tokenizer, model_max_length=2048, **special)
    start, end = built.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    built.additional_special_tokens_ids = (start, end)
    return built
