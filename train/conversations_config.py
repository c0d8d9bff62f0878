"""Conversations about pictures: which files, and how often. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat

from vlm_vision.config import Config

Share = Annotated[float, Field(ge=0, le=1)]


class ConversationConfig(Config):
    """One source of conversations.

    Attributes:
        file: a JSON list, JSONL or parquet file, several parquet files (`data/*.parquet`, or their folder),
            or a data set of the hub or a folder like one (`hub:owner/name@split`,
            `hub:owner/name:subset@split`). Records hold LLaVA's `conversations` or chat `messages`, and their
            pictures in `image` or `images`: paths or encoded bytes.
        image_folder: what the records' paths are relative to; pictures outside it are refused.
        follow_links: let links in the image folder lead out of it.
        separate: learn every question of a record by itself, with its pictures; for questions that do not
            build on each other. What can be read off an earlier answer teaches nothing about pictures.
        too_long: what happens to the text of a conversation beyond `max_length`.
        max_bad_share: records that cannot be used are replaced, counted and listed up to this share.
        weight: how often an epoch shows each record: 2 is twice, 0.5 one half in one epoch and the other in
            the next.
        workers: processes that prepare samples; 0 prepares them in the training process.
        check: read every record before the first step. `off` takes records as they come: what is bad is
            replaced, counted and bounded all the same, but a run may end late by it.
        feature_cache: a folder to keep the features of a frozen tower in, which are then computed once, and
            read from there by every epoch and by later runs with the same tower and pictures.
    """

    file: str
    image_folder: str | None = None
    follow_links: bool = False
    separate: bool = False
    too_long: Literal["truncate", "refuse"] = "truncate"
    max_bad_share: Share = 0.0
    weight: PositiveFloat = 1.0
    workers: NonNegativeInt = 1
    check: bool = True
    feature_cache: str | None = None


OF_ALL_SOURCES = ("too_long", "workers", "check", "feature_cache")


def _agree(sources: tuple[ConversationConfig, ...]) -> tuple[ConversationConfig, ...]:
    """All sources with what the first says of all, so that they are read back from what is saved of them."""
    of_all = {name: getattr(sources[0], name) for name in OF_ALL_SOURCES}
    for name, value in of_all.items():
        if any(name in other.model_fields_set and getattr(other, name) != value for other in sources[1:]):
            raise ValueError(f"{name} is of all sources: give it with the first")
    return tuple(source.model_copy(update=of_all) for source in sources)


ConversationData = (
    ConversationConfig
    | Annotated[tuple[ConversationConfig, ...], Field(min_length=1), AfterValidator(_agree)]
)
"""One source, or several that are mixed by their weights; the first says what is of all (OF_ALL_SOURCES)."""


class ConversationNode(Config):
    """What of a config is its data."""

    data: ConversationData


def conversation_sources(data: ConversationData) -> tuple[ConversationConfig, ...]:
    """The sources of a stage's data."""
    return (data,) if isinstance(data, ConversationConfig) else data
