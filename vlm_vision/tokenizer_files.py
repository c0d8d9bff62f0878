"""open_clip's tokenizers as files of transformers, which give the same ids.

open_clip cleans a text in Python before it splits it: `ftfy.fix_text`, HTML entities, white space, case. What
of that is a table is written into the tokenizer's normaliser. What is none, and so stays as it is in
transformers: text that was decoded wrongly (`âœ”`), which ftfy guesses back, and HTML entities beyond those
that every page has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_vision.errors import ConfigError
from vlm_vision.text import OpenClipTokenizer, Tokenizer, TransformersTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"  # as CLIP's files on the hub name them
ENTITIES = {"lt": "<", "gt": ">", "quot": '"', "apos": "'", "#39": "'", "nbsp": " "}
PUNCTUATION = r"[!-/:-@\[-`{-~]"  # `string.punctuation`
# A sigma that ends a word has its own small letter, which lowering letter by letter does not know.
FINAL_SIGMA = r"(?<=\p{L})Σ(?!\p{L})"


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what `AutoTokenizer`, and `CLIPProcessor` or `SiglipProcessor`, load from a folder.

    open_clip's own BPE becomes `tokenizer.json`, and `vocab.json` and `merges.txt`, from which
    `CLIPTokenizer` by name is made, with transformers' plainer cleaning. Texts are padded with the end token,
    as CLIP's are there, where open_clip pads with 0: CLIP's text looks back only, so nothing depends on it.

    Raises:
        ConfigError: a tokenizer of open_clip that does more than tokenizers of transformers do.
    """
    if not isinstance(tokenizer, OpenClipTokenizer):
        tokenizer.save_pretrained(folder)
    elif hasattr(tokenizer.library, "tokenizer"):
        _write_cleaning(tokenizer, folder)
    else:
        _write_clip(tokenizer, folder)


def is_clip_tokenizer(tokenizer: Tokenizer) -> bool:
    """Whether it gives the ids that open_clip's own tokenizer gives, but for how texts are cleaned."""
    from open_clip.tokenizer import SimpleTokenizer

    if isinstance(tokenizer, OpenClipTokenizer):
        return not hasattr(tokenizer.library, "tokenizer")
    if not isinstance(tokenizer, TransformersTokenizer):
        return False
    found, own = tokenizer.library.get_vocab(), SimpleTokenizer()
    marks = set(own.all_special_ids)
    words = {token: number for token, number in own.encoder.items() if number not in marks}
    ends = {tokenizer.library.bos_token_id, tokenizer.library.eos_token_id}
    return len(found) == len(own.encoder) and ends == marks and words.items() <= found.items()


def _write_clip(tokenizer: OpenClipTokenizer, folder: Path) -> None:
    from tokenizers import Regex, decoders, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    library = tokenizer.library
    if library.reduction_fn is not None or len(library.all_special_ids) != 2:
        raise ConfigError(
            "tokenizer_kwargs: transformers has no tokenizer that masks texts at random or has marks beside "
            "start and end; leave out reduction_mask and additional_special_tokens"
        )
    marks = dict(zip(library.all_special_ids, (START, END), strict=True))
    vocabulary = {marks.get(number, token): number for token, number in library.encoder.items()}
    merges = sorted(library.bpe_ranks, key=library.bpe_ranks.get)
    backend = Backend(BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END))
    backend.normalizer = _cleaning(tokenizer.clean)
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
    )
    backend.add_special_tokens([START, END])
    _write(folder / "tokenizer.json", _content(backend))
    _write(folder / "vocab.json", vocabulary)
    text = "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    _write_settings(
        folder, tokenizer, bos_token=START, eos_token=END, unk_token=END, pad_token=END, padding_side="right"
    )


def _write_cleaning(tokenizer: OpenClipTokenizer, folder: Path) -> None:
    """A tokenizer of transformers with open_clip's cleaning before its own."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import Sequence

    wrapper, library = tokenizer.library, tokenizer.library.tokenizer
    if wrapper.strip_sep_token or wrapper.tokenizer_mode:
        raise ConfigError(
            "text_cfg.tokenizer_mode and strip_sep_token: transformers has no tokenizer that does this"
        )
    if not getattr(library, "is_fast", False):
        raise ConfigError(
            f"a {type(library).__name__} has no tokenizer.json, into which open_clip's cleaning of texts "
            "could be written; save the tokenizer of its model with use_fast=True first"
        )
    library.save_pretrained(str(folder))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = Sequence([_cleaning(tokenizer.clean), *own])
    _write(folder / "tokenizer.json", _content(backend))
    marks = {name: str(mark) for name, mark in library.special_tokens_map.items() if isinstance(mark, str)}
    _write_settings(folder, tokenizer, padding_side=library.padding_side, **marks)


def _content(backend: Any) -> dict[str, Any]:
    """`tokenizer.json`, merges as lines where they can be: LLaVA's tokenizers do not understand pairs."""
    content: dict[str, Any] = json.loads(backend.to_str())
    merges = content["model"].get("merges") or []
    if merges and not any(" " in part for pair in merges for part in pair):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
    return content


def _cleaning(clean: str) -> Any:
    """`get_clean_fn` of open_clip's tokenizer.py as a normaliser."""
    from ftfy.chardata import CONTROL_CHARS, LIGATURES, WIDTH_MAP
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Lowercase, Replace, Sequence, Strip

    controls = "".join(f"\\x{{{code:x}}}" for code in sorted(CONTROL_CHARS))
    steps: list[Any] = [Replace(Regex("&(?:amp;)+"), "&")]
    steps += [Replace(f"&{name};", mark) for name, mark in ENTITIES.items()]
    steps += [Replace(Regex(r"\x1b\[[\d;]*[a-zA-Z]"), "")]
    steps += [Replace(chr(code), letter) for code, letter in _windows_1252()]
    steps += [Replace(chr(code), letters) for code, letters in {**LIGATURES, **WIDTH_MAP}.items()]
    steps += [Replace(Regex("[\u02bc\u2018-\u201b]"), "'"), Replace(Regex("[\u201c-\u201f]"), '"')]
    steps += [Replace(Regex(f"[{controls}]"), ""), NFC()]
    if clean == "canonicalize":
        steps += [Replace("_", " "), Replace(Regex(PUNCTUATION), "")]
    if clean != "whitespace":
        steps += [Replace(Regex(FINAL_SIGMA), "ς"), Lowercase()]
    return Sequence([*steps, Replace(Regex(r"\s+"), " "), Strip()])


def _windows_1252() -> list[tuple[int, str]]:
    """What ftfy takes control codes from 128 to 159 for: they are in no text, but are letters there."""
    letters = [(code, bytes([code]).decode("cp1252", errors="ignore")) for code in range(0x80, 0xA0)]
    return [(code, letter) for code, letter in letters if letter]


def _write_settings(folder: Path, tokenizer: OpenClipTokenizer, **settings: Any) -> None:
    """`tokenizer_config.json` of the one class that takes `tokenizer.json` as it is, normaliser and all."""
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    _write(folder / "tokenizer_config.json", content)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
