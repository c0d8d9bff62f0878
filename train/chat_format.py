"""How a conversation becomes tokens and labels: a tokenizer's chat template, or LLaVA's by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_vision.errors import ConfigError, DataError, nearest

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = -200
"""Stands for one image token in `input_ids`; LLaVA's IMAGE_TOKEN_INDEX, outside every vocabulary."""
IGNORE_INDEX = -100
"""Label of a token that the loss leaves out."""
TEMPLATES = {
    "plain": "plain",
    "v1": "v1",
    "vicuna": "v1",
    "llama_2": "llama_2",
    "chatml": "chatml",
    "qwen": "chatml",
}
"""Names of chat templates, and their files in configs/chat_templates."""
BETWEEN_PICTURES = "{#- Tokenized between pictures, as LLaVA does. -#}"
"""Stands in a template whose text is tokenized piece by piece, each as a text of its own, as by LLaVA's
`tokenizer_image_token`. Without it the text is tokenized whole, as servers do with a model's own template."""


@dataclass(frozen=True)
class Turn:
    """What one side says; `kind` is an answer's optional `type`, by which evaluation splits its figures."""

    role: str
    text: str
    kind: str | None = None

    @property
    def words(self) -> str:
        """The text without the marks of pictures."""
        return self.text.replace(IMAGE_TOKEN, "").strip()


@dataclass(frozen=True)
class Encoded:
    """Token ids with IMAGE_TOKEN_ID for image tokens, labels with IGNORE_INDEX where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]
    length: int
    """Tokens before the text was cut."""

    @property
    def truncated(self) -> bool:
        return len(self.input_ids) < self.length

    @property
    def num_labels(self) -> int:
        """Tokens to learn from; the first is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class ChatFormat:
    """Turns conversations into tokens by a chat template.

    Where the template says so (`BETWEEN_PICTURES`), tokens and labels are those of LLaVA's
    `preprocess_plain`, `preprocess_v1` and `preprocess_llama_2` (llava/train/train.py), but no sample is
    masked as a whole.

    Args:
        tokenizer: any fast tokenizer of transformers; it is left as it is.
        tokens_per_image: image tokens that one `<image>` stands for; None where that depends on the picture.
        chat_template: text of a template to use in place of the tokenizer's own.

    Raises:
        ConfigError: no chat template, or a tokenizer that cannot tell where in the text its tokens lie.
    """

    def __init__(
        self, tokenizer: Any, tokens_per_image: int | None, chat_template: str | None = None
    ) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ConfigError(
                f"tokenizer {name!r} gives no offsets: a fast tokenizer (tokenizer.json) is needed"
            )
        if not (chat_template or tokenizer.chat_template):
            raise ConfigError(
                f"tokenizer {name!r} has no chat template: name one by `chat_template`, for example v1 for "
                f"a Vicuna (known: {', '.join(TEMPLATES)}, or a .jinja file)"
            )
        # The mark becomes a token of a private copy, so that it is cut out cleanly; no vocabulary grows.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        if chat_template:
            self.tokenizer.chat_template = chat_template
        self.name = name
        self.tokens_per_image = tokens_per_image
        template = self.tokenizer.chat_template
        self._between_pictures = isinstance(template, str) and BETWEEN_PICTURES in template
        begin = self.tokenizer.bos_token_id
        self._begins = begin is not None and self.tokenizer("")["input_ids"][:1] == [begin]
        self._mark = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._special = {token: str(text) for token, text in self.tokenizer.added_tokens_decoder.items()}

    @property
    def pad_id(self) -> int:
        """What fills up short rows; always masked, so any token does where there is no padding token."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the end-of-text token and what the template writes after an answer."""
        answer = "x"
        ending = self._render([Turn("user", answer), Turn("assistant", answer)]).rpartition(answer)[2]
        ids = self.tokenizer(ending, add_special_tokens=False)["input_ids"]
        # The last, for a tokenizer that puts a space before every text begins with that.
        turn_end = [token for token in ids if token in self._special][:1] or ids[-1:]
        end_of_text = self.tokenizer.eos_token_id
        return sorted({*turn_end, *([] if end_of_text is None else [end_of_text])})

    def encode(
        self,
        turns: Sequence[Turn],
        max_length: int,
        too_long: Literal["truncate", "refuse"] = "truncate",
        image_tokens: Sequence[int] | None = None,
    ) -> Encoded:
        """Tokens of a whole conversation; its answers, each with its end-of-turn token, are the labels.

        Rendering up to and through every answer shows where in the text it lies. The text is tokenized only
        as a whole, and a token is a label when it holds a character of an answer.

        Args:
            image_tokens: tokens of each picture in order, where `tokens_per_image` is None.

        Raises:
            ConfigError: the template writes a turn differently when more follows.
            DataError: too long, no label left, or not as many pictures as marks.
        """
        text = self._render(turns)
        ids, starts, ends = self._tokenize(text)
        learnt = np.zeros(len(starts), dtype=bool)
        for first, last in self._answers(turns, text):
            learnt |= (ends > first) & (starts < last)
        labels = np.where(learnt, ids, IGNORE_INDEX)
        ids, labels = self._expand(ids, labels, image_tokens)
        if len(ids) > max_length and too_long == "refuse":
            raise DataError(f"{len(ids)} tokens, max_length is {max_length}")
        if (ids[max_length:] == IMAGE_TOKEN_ID).any():
            raise DataError(f"max_length {max_length} would cut off a picture: {len(ids)} tokens")
        encoded = Encoded(ids[:max_length].tolist(), labels[:max_length].tolist(), len(ids))
        if not encoded.num_labels:
            raise DataError("no token to learn from: the answers are empty, or cut off by max_length")
        return encoded

    def prompt(self, turns: Sequence[Turn], image_tokens: Sequence[int] | None = None) -> list[int]:
        """Tokens up to where an answer is to begin; arguments as of `encode`."""
        ids, _, _ = self._tokenize(self._render(turns, add_generation_prompt=True))
        return list(self._expand(ids, ids, image_tokens)[0].tolist())

    def _tokenize(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Token ids, and the first and past the last character of each; a mark of a picture is one token."""
        at, pieces = 0, []
        begin = str(self.tokenizer.bos_token)
        if not self._between_pictures:
            texts = [text]
        elif self._begins and text.startswith(begin):
            # As the tokenizer puts it there: a space before the text depends on where the text begins.
            pieces.append([(self.tokenizer.bos_token_id, 0, len(begin))])
            at, texts = len(begin), text[len(begin) :].split(IMAGE_TOKEN)
        else:
            texts = text.split(IMAGE_TOKEN)
        for number, piece in enumerate(texts):
            if number:
                pieces.append([(self._mark, at, at + len(IMAGE_TOKEN))])
                at += len(IMAGE_TOKEN)
            encoding = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            pieces.append([(token, at + first, at + last) for token, (first, last) in spans])
            at += len(piece)
        tokens = np.array([token for piece in pieces for token in piece], dtype=np.int64).reshape(-1, 3)
        ids, starts, ends = tokens.T
        return ids, starts, ends

    def _answers(self, turns: Sequence[Turn], text: str) -> Iterator[tuple[int, int]]:
        """First and last character of every answer with its end of turn."""
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(turns[:index], add_generation_prompt=True)
            through = text if index + 1 == len(turns) else self._render(turns[: index + 1])
            if not (through.startswith(before) and text.startswith(through)):
                raise ConfigError(
                    f"the chat template of {self.name!r} writes turn {index} differently once more "
                    "turns follow, so answers cannot be told from questions; name another by `chat_template`"
                )
            yield len(before), len(self._without_layout(through))

    def _without_layout(self, text: str) -> str:
        """The text without white space after a closing special token, which is layout."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(tuple(self._special.values())) else text

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        messages = [{"role": turn.role, "content": _picture_first(turn.text)} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of {self.name!r} refuses a conversation: {error}"
            ) from error
        return str(text)

    def _expand(self, ids: Any, labels: Any, image_tokens: Sequence[int] | None) -> tuple[Any, Any]:
        """Every mark becomes as many image tokens as its picture takes."""
        marks = ids == self._mark
        counts = image_tokens
        if self.tokens_per_image is not None:
            counts = [self.tokens_per_image] * int(marks.sum())
        if len(counts or ()) != marks.sum():
            raise DataError(f"{marks.sum()} {IMAGE_TOKEN} in the text, but {len(counts or ())} picture(s)")
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[marks] = counts or 0
        ids, labels = np.where(marks, IMAGE_TOKEN_ID, ids), np.where(marks, IGNORE_INDEX, labels)
        return np.repeat(ids, repeats), np.repeat(labels, repeats)


class Instructions:
    """What is asked about a picture, as the tokens that an instruction-aware projector reads.

    Args:
        tokenizer: any of transformers; special tokens are put around as it does, as InstructBLIP's processor.
        max_length: tokens that are kept.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, turns: Sequence[Turn]) -> Tensor:
        """Tokens [T] of the user's turns without the marks of pictures; one at least, whatever it is."""
        asked = "\n".join(turn.words for turn in turns if turn.role == "user")
        ids = self.tokenizer(asked, truncation=True, max_length=self.max_length)["input_ids"]
        return torch.tensor(ids or [0])


def stack_instructions(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """`text_ids` and `text_mask` [P,T] of the instruction of each picture."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence(list(rows), batch_first=True)
    return {"text_ids": ids, "text_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def read_template(source: str | Path) -> str:
    """Text of a chat template, by its name in `TEMPLATES` or from a .jinja file.

    Raises:
        ConfigError: no such name or file.
    """
    if str(source) in TEMPLATES:
        shipped = files("vlm_vision.configs") / "chat_templates" / f"{TEMPLATES[str(source)]}.jinja"
        return shipped.read_text(encoding="utf-8")
    try:
        return Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"chat_template {str(source)!r} is no file{nearest(str(source), TEMPLATES)}; "
            f"by name there are {', '.join(TEMPLATES)} ({error.strerror})"
        ) from error


def _picture_first(text: str) -> str:
    """A turn's only picture goes before its words, as LLaVA trains (`train.py`, `preprocess_multimodal`)."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
