"""How a conversation becomes tokens and labels: a tokenizer's chat template, or LLaVA's by name."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
import transformers
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import vlm_vision
from vlm_vision.errors import ConfigError, DataError, nearest
from vlm_vision.train.file_cache import file_key

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

# Renders beginnings of one conversation at once: most of what a rendering takes is its preparation. The
# template stands on lines of its own, so that its white space is what it was.
BEGINNINGS = """\
{%% macro rendered(messages, add_generation_prompt) %%}
%s{{ '' }}{%% endmacro %%}
{{- '[' -}}
{%%- for beginning in beginnings -%%}
{{- ',' if not loop.first -}}
{{- rendered(messages[:beginning[0]], beginning[1]) | string | tojson -}}
{%%- endfor -%%}
{{- ']' -}}"""


def check_text(text: str) -> None:
    """Refuse what no tokenizer takes and no file holds: JSON may say half of a character.

    Raises:
        DataError: there is a surrogate on its own in the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{text[error.start]!r} is a part of a character: the text was cut within one, or was no UTF-8"
        ) from None


@dataclass(frozen=True)
class Turn:
    """What one side says; `kind` is an answer's optional `type`, by which evaluation splits its figures.

    Raises:
        DataError: as `check_text`.
    """

    role: str
    text: str
    kind: str | None = None

    def __post_init__(self) -> None:
        check_text(self.text)

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


@dataclass(frozen=True)
class Counts:
    """`Encoded` in numbers: tokens before the text was cut, and after, and those to learn from."""

    length: int
    kept: int
    labels: int


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
        self.template = str(self.tokenizer.get_chat_template())
        self._between_pictures = BETWEEN_PICTURES in self.template
        self._beginnings = BEGINNINGS % re.sub(r"(\r\n|\r|\n)\Z", "", self.template)
        # What calls of the tokenizer would set anew each time.
        self._backend = self.tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self.tokenizer.split_special_tokens
        begin = self.tokenizer.bos_token_id
        self._begins = begin is not None and self.tokenizer("")["input_ids"][:1] == [begin]
        self._mark = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._special = {token: str(text) for token, text in self.tokenizer.added_tokens_decoder.items()}
        self._closing = tuple(self._special.values())

    @property
    def digest(self) -> str:
        """A hash of all that tokens and labels depend on, the versions of the libraries included."""
        versions = (vlm_vision.__version__, transformers.__version__, tokenizers.__version__)
        settings = (self.template, self.tokens_per_image, self._backend.encode_special_tokens, self._special)
        named = sorted(self.tokenizer.special_tokens_map.items())
        return file_key(self._backend.to_str(), *settings, named, *versions)

    @property
    def pad_id(self) -> int:
        """What fills up short rows; always masked, so any token does where there is no padding token."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the end-of-text token and what the template writes after an answer."""
        answer = "x"
        (text,) = self._render([Turn("user", answer), Turn("assistant", answer)], [(2, False)])
        ending = text.rpartition(answer)[2]
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
        ids, labels, counts = self._encode(turns, max_length, too_long, image_tokens)
        return Encoded(ids.tolist(), labels.tolist(), counts.length)

    def count(
        self,
        turns: Sequence[Turn],
        max_length: int,
        too_long: Literal["truncate", "refuse"] = "truncate",
        image_tokens: Sequence[int] | None = None,
    ) -> Counts:
        """What `encode` gives, in numbers; raises as it does."""
        return self._encode(turns, max_length, too_long, image_tokens)[2]

    def prompt(self, turns: Sequence[Turn], image_tokens: Sequence[int] | None = None) -> list[int]:
        """Tokens up to where an answer is to begin; `image_tokens` as of `encode`."""
        (text,) = self._render(turns, [(len(turns), True)])
        ids, _, _ = self._tokenize(text)
        return list(self._expand(ids, ids, image_tokens)[0].tolist())

    def _encode(
        self,
        turns: Sequence[Turn],
        max_length: int,
        too_long: Literal["truncate", "refuse"],
        image_tokens: Sequence[int] | None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Counts]:
        text, answers = self._answers(turns)
        ids, starts, ends = self._tokenize(text)
        learnt = np.zeros(len(starts), dtype=bool)
        for first, last in answers:
            learnt |= (ends > first) & (starts < last)
        labels = np.where(learnt, ids, IGNORE_INDEX)
        ids, labels = self._expand(ids, labels, image_tokens)
        if len(ids) > max_length and too_long == "refuse":
            raise DataError(f"{len(ids)} tokens, max_length is {max_length}")
        if (ids[max_length:] == IMAGE_TOKEN_ID).any():
            raise DataError(f"max_length {max_length} would cut off a picture: {len(ids)} tokens")
        length, ids, labels = len(ids), ids[:max_length], labels[:max_length]
        to_learn = int((labels[1:] != IGNORE_INDEX).sum())
        if not to_learn:
            raise DataError("no token to learn from: the answers are empty, or cut off by max_length")
        return ids, labels, Counts(length, len(ids), to_learn)

    def _tokenize(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Token ids, and the first and past the last character of each; a mark of a picture is one token."""
        at = 0
        ids, starts, ends = list[Any](), list[Any](), list[Any]()
        begin = str(self.tokenizer.bos_token)
        if not self._between_pictures:
            texts = [text]
        elif self._begins and text.startswith(begin):
            # As the tokenizer puts it there: a space before the text depends on where the text begins.
            ids, starts, ends = [[self.tokenizer.bos_token_id]], [[0]], [[len(begin)]]
            at, texts = len(begin), text[len(begin) :].split(IMAGE_TOKEN)
        else:
            texts = text.split(IMAGE_TOKEN)
        for number, piece in enumerate(texts):
            if number:
                ids.append([self._mark])
                starts.append([at])
                at += len(IMAGE_TOKEN)
                ends.append([at])
            encoding = self._backend.encode(piece, add_special_tokens=False)
            spans = np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2) + at
            ids.append(encoding.ids)
            starts.append(spans[:, 0])
            ends.append(spans[:, 1])
            at += len(piece)
        token_ids, firsts, lasts = (np.concatenate(parts).astype(np.int64) for parts in (ids, starts, ends))
        return token_ids, firsts, lasts

    def _answers(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and the first and past the last character of every answer with its end of turn."""
        places = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        beginnings = [part for index in places for part in ((index, True), (index + 1, False))]
        *parts, text = self._render(turns, [*beginnings, (len(turns), False)])
        spans = []
        for index, before, through in zip(places, parts[::2], parts[1::2], strict=True):
            if not (through.startswith(before) and text.startswith(through)):
                raise ConfigError(
                    f"the chat template of {self.name!r} writes turn {index} differently once more "
                    "turns follow, so answers cannot be told from questions; name another by `chat_template`"
                )
            spans.append((len(before), len(self._without_layout(through))))
        return text, spans

    def _without_layout(self, text: str) -> str:
        """The text without white space after a closing special token, which is layout."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(self._closing) else text

    def _render(self, turns: Sequence[Turn], beginnings: Sequence[tuple[int, bool]]) -> list[str]:
        """Texts of the first so many turns, each with or without what an answer is asked for by."""
        messages = [{"role": turn.role, "content": _picture_first(turn.text)} for turn in turns]
        try:
            texts = self.tokenizer.apply_chat_template(
                messages, chat_template=self._beginnings, tokenize=False, beginnings=beginnings
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of {self.name!r} refuses a conversation: {error}"
            ) from error
        return [str(text) for text in json.loads(texts)]

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

    That is the text of the turn that shows it, as in InstructBLIP, which has one turn. Later questions are no
    part of it, though a conversation goes on: a picture is seen once, and what is asked after an answer must
    not tell of that answer, whose prompt does not have it either.

    Args:
        tokenizer: any of transformers; special tokens are put around as it does, as InstructBLIP's processor.
        max_length: tokens that are kept.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, turns: Sequence[Turn]) -> list[Tensor]:
        """For each picture its tokens [T], without the marks of pictures; one at least, whatever it is."""
        return [
            tokens
            for turn in turns
            if (pictures := turn.text.count(IMAGE_TOKEN))
            for tokens in [self._tokens(turn.words)] * pictures
        ]

    def _tokens(self, words: str) -> Tensor:
        ids = self.tokenizer(words, truncation=True, max_length=self.max_length)["input_ids"]
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
        shipped = files("vlm_vision.configs.chat_templates") / f"{TEMPLATES[str(source)]}.jinja"
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
