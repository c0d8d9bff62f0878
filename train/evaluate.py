"""How well a vision-language model answers, and how much of that comes from the picture."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vlm_vision.errors import DataError
from vlm_vision.progress import progress_bar
from vlm_vision.train.conversations import (
    ConversationDataset,
    Conversations,
    Record,
    Sample,
    Turn,
    collate,
    separate_questions,
)
from vlm_vision.train.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Answer:
    """A question of a record, its true answer and the model's.

    Attributes:
        images: the pictures that were shown, which are others' where pictures were swapped.
        kind: the true answer's `type` in the data.
    """

    id: str
    images: tuple[str, ...]
    question: str
    truth: str
    answer: str
    kind: str | None = None

    @property
    def is_correct(self) -> bool:
        return normalise(self.answer) == normalise(self.truth)


def answer_questions(
    model: VisionLanguageModel,
    conversations: Conversations,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    swap_seed: int | None = None,
    description: str = "answer",
) -> list[Answer]:
    """Ask every question of every record on its own, with the record's pictures; greedy.

    Args:
        swap_seed: show another picture in every picture's place, the same one for all its questions; what is
            right even then was answered without looking.

    Raises:
        DataError: a picture cannot be read, or there is no other to swap it with.
    """
    shown = {} if swap_seed is None else swapped_pictures(conversations, swap_seed)
    asked = list(_questions(conversations, shown))
    answers: list[Answer] = []
    with progress_bar(len(asked), description) as bar:
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            pictures = [picture for record, _ in batch for picture in conversations.pictures(record)]
            pixels, sizes = model.prepare_pictures(pictures)
            spoken = model.answer(
                pixels, [record.turns for record, _ in batch], max_new_tokens, image_sizes=sizes
            )
            answers += [
                Answer(record.id, record.images, record.turns[-1].words, truth.text, said, truth.kind)
                for (record, truth), said in zip(batch, spoken, strict=True)
            ]
            bar.update(len(batch))
    return answers


def vqa_accuracy(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of right answers: `all`, and one entry for each kind of question.

    Raises:
        DataError: no answers.
    """
    if not answers:
        raise DataError("there is no question to score")
    groups: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        groups["all"].append(answer.is_correct)
        if answer.kind is not None:
            groups[answer.kind].append(answer.is_correct)
    return {kind: sum(right) / len(right) for kind, right in groups.items()}


@torch.no_grad()
def caption_loss(
    model: VisionLanguageModel,
    conversations: Conversations,
    *,
    batch_size: int = 32,
    max_length: int = 2048,
    swap_seed: int | None = None,
    description: str = "caption loss",
) -> float:
    """Mean loss over the tokens of all answers, with the right pictures or, given `swap_seed`, others."""
    shown = {} if swap_seed is None else swapped_pictures(conversations, swap_seed)
    data = ConversationDataset(
        conversations,
        model.chat,
        model.vision_tower.image_processor,
        max_length=max_length,
        instructions=model.instructions,
        tiles=None if model.tiles is None else model.tiles.form,
    )
    device = next(model.parameters()).device
    total, labels = 0.0, 0
    was_training = model.training
    model.eval()
    with progress_bar(len(data), description) as bar:
        for first in range(0, len(data), batch_size):
            indices = range(first, min(first + batch_size, len(data)))
            samples: list[Sample] = [data[index] for index in indices]
            if shown:
                kept = [
                    conversations[(index + len(sample.replaced)) % len(data)]
                    for index, sample in zip(indices, samples, strict=True)
                ]
                samples = [data.sample(_show(record, shown)) for record in kept]
            batch = collate(samples, model.chat.pad_id)
            output = model(
                batch.input_ids.to(device),
                batch.attention_mask.to(device),
                batch.labels.to(device),
                None if batch.pixels is None else batch.pixels.to(device),
                text=None if batch.text is None else {k: v.to(device) for k, v in batch.text.items()},
                image_sizes=batch.image_sizes,
            )
            total += float(output.loss) * batch.num_labels
            labels += batch.num_labels
            bar.update(len(samples))
    model.train(was_training)
    return total / labels


def swapped_pictures(conversations: Conversations, seed: int) -> dict[str, str]:
    """Every picture's name to another's: one random cycle, so that none stays in its place.

    Raises:
        DataError: fewer than two pictures.
    """
    names = sorted({name for record in conversations for name in record.images})
    if len(names) < 2:
        raise DataError(f"{conversations.path}: swapping pictures takes at least two, found {len(names)}")
    random.Random(seed).shuffle(names)
    return dict(zip(names, names[1:] + names[:1], strict=True))


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and outer or double spaces."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _questions(conversations: Conversations, shown: Mapping[str, str]) -> Iterator[tuple[Record, Turn]]:
    """Every question as a record that ends with it, and its true answer."""
    for record in conversations:
        for asked in separate_questions(record):
            *question, truth = asked.turns
            yield _show(replace(asked, id=record.id, turns=tuple(question)), shown), truth


def _show(record: Record, shown: Mapping[str, str]) -> Record:
    return replace(record, images=tuple(shown.get(name, name) for name in record.images))
