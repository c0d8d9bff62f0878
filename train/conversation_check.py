"""A look at every conversation before training: what is bad, how many tokens and pictures it takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from vlm_vision.errors import DataError, require
from vlm_vision.files import whole_file
from vlm_vision.progress import progress_bar
from vlm_vision.train.align_config import Stage
from vlm_vision.train.conversations import (
    ChatFormat,
    Conversations,
    MixedConversations,
    Record,
    open_conversations,
    picture_tokens,
)
from vlm_vision.train.conversations_config import ConversationData, conversation_sources
from vlm_vision.train.data_check import SHOWN, as_is, spread
from vlm_vision.train.file_cache import cache_folder, file_key
from vlm_vision.train.pairs import write_bad_list
from vlm_vision.train.report import Report, style_axis
from vlm_vision.train.tiles import TileFormat

CHUNK = 256  # records that a worker is given at once
MEASURE = np.dtype(
    [(name, np.int64) for name in ("index", "turns", "pictures", "characters", "tokens", "kept", "labels")]
)


class Measures(NamedTuple):
    """What was found by reading records.

    Attributes:
        records: of those that can be used, an array of `MEASURE`: `index` among the conversations; `tokens`
            of the whole, with its pictures', `kept` those within `max_length`, `labels` that are learnt.
        bad: index of a record that cannot be used, to the reason, which names it.
    """

    records: NDArray[Any]
    bad: dict[int, str]


def measure(
    conversations: Conversations | MixedConversations,
    chat: ChatFormat | None,
    *,
    max_length: int,
    too_long: Literal["truncate", "refuse"] = "truncate",
    read_pictures: bool = False,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    tiles: TileFormat | None = None,
) -> Measures:
    """Read every record once.

    Args:
        chat: without it no token is counted.
        read_pictures: decode them too; else it is only seen that their paths stay within the image folder.
        workers: processes that read; 0 reads in this one.
        rank, world: read every world-th chunk alone, from this one on.
        tiles: of a model that takes pictures in tiles, whose headers then tell how many tokens they take.
    """
    starts = range(rank * CHUNK, len(conversations), world * CHUNK)
    chunks = [range(first, min(first + CHUNK, len(conversations))) for first in starts]
    loader = DataLoader(
        _Measurer(conversations, chat, max_length, too_long, read_pictures, tiles),
        sampler=chunks,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=as_is,
        num_workers=min(workers, len(chunks)),
        generator=torch.Generator(),  # or one rank alone would draw from the run's own
    )
    found, bad = [np.empty(0, MEASURE)], dict(conversations.bad)
    with progress_bar(sum(map(len, chunks)), "read conversations", disable=rank > 0) as bar:
        for chunk, part in zip(chunks, loader, strict=True):
            found.append(part.records)
            bad |= part.bad
            bar.update(len(chunk))
    return Measures(np.concatenate(found), bad)


def measure_for_training(
    conversations: Conversations | MixedConversations,
    chat: ChatFormat,
    stage: Stage,
    folder: Path,
    tiles: TileFormat | None = None,
) -> NDArray[Any]:
    """Measures of a stage's records, of which each rank reads its share; what is bad will be replaced.

    They are kept in `folder`, and on this machine in the user's cache folder, by what they were found in: a
    stage that goes on, or another of the same data, tokenizer and length, reads no record. So the files of
    pictures are not looked for again; what is wrong with them by then, training finds.

    Returns:
        None of them with `check: off`.

    Raises:
        DataError: more records than `max_bad_share` allows have too many tokens, cut off pictures or no
            label, or a picture outside the image folder; lists the first ones.
    """
    first = stage.sources[0]
    if not first.check:
        return np.empty(0, MEASURE)
    rank, world = dist.get_rank(), dist.get_world_size()
    name = ""
    found: list[Any] = [None]
    if rank == 0:
        cut = "" if tiles is None else (repr(tiles.config), tiles.tile_size, tiles.grid)
        facts = (conversations.digest(), chat.digest, stage.max_length, first.too_long, cut)
        name = f"measured-{file_key(*facts)}.npz"
        found = [next((_read(place) for place in _places(folder, name) if place.is_file()), None)]
    dist.broadcast_object_list(found)
    if found[0] is None:
        mine = measure(
            conversations,
            chat,
            max_length=stage.max_length,
            too_long=first.too_long,
            workers=first.workers,
            rank=rank,
            world=world,
            tiles=tiles,
        )
        found = [None] * world
        dist.all_gather_object(found, mine)
    records = np.concatenate([share.records for share in found])
    measures = Measures(
        records[np.argsort(records["index"])],
        {index: why for share in found for index, why in share.bad.items()},
    )
    if rank == 0:
        for place in _places(folder, name):
            if not place.is_file():
                _write(measures, place)
    conversations.refuse(measures.bad)
    return measures.records


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / name, cache_folder() / "measured" / name


def _write(measures: Measures, path: Path) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, records=measures.records, bad=np.array(json.dumps(measures.bad)))


def _read(path: Path) -> Measures:
    with np.load(path, allow_pickle=False) as kept:
        bad = {int(index): why for index, why in json.loads(str(kept["bad"])).items()}
        return Measures(kept["records"], bad)


class _Measurer(Dataset[Measures]):
    """Numbers of records to their measures, in a worker."""

    def __init__(
        self,
        conversations: Conversations | MixedConversations,
        chat: ChatFormat | None,
        max_length: int,
        too_long: Literal["truncate", "refuse"],
        read_pictures: bool,
        tiles: TileFormat | None,
    ) -> None:
        self.conversations, self.chat, self.tiles = conversations, chat, tiles
        self.max_length, self.too_long, self.read_pictures = max_length, too_long, read_pictures

    def __getitem__(self, chunk: range) -> Measures:
        rows, bad = [], {}
        for index in chunk:
            if index in self.conversations.bad:
                continue
            record = self.conversations[index]
            try:
                rows.append((index, *self._measures(record)))
            except DataError as error:
                bad[index] = str(error)
        return Measures(np.array(rows, dtype=MEASURE), bad)

    def _measures(self, record: Record) -> tuple[int, ...]:
        if self.read_pictures:
            self.conversations.pictures(record)
        else:
            self.conversations.check_paths(record)
        characters = sum(len(turn.words) for turn in record.turns)
        measures = (len(record.turns), len(record.images), characters)
        if self.chat is None:
            return (*measures, 0, 0, 0)
        image_tokens = picture_tokens(self.conversations, record, self.tiles)
        try:
            counts = self.chat.count(record.turns, self.max_length, self.too_long, image_tokens)
        except DataError as error:
            raise DataError(f"{record.file}: record {record.id!r}: {error}") from error
        return (*measures, counts.length, counts.kept, counts.labels)


# Telling ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConversationFindings:
    """What conversations hold.

    Attributes:
        conversations: all sources, with whatever is bad in them.
        measures: of their records.
        allowed: records that may be bad, by `max_bad_share`.
        max_length: tokens that are kept; None where no tokenizer was named.
    """

    conversations: Conversations | MixedConversations
    measures: Measures
    allowed: int
    max_length: int | None

    @property
    def bad(self) -> list[str]:
        """Why records cannot be used, in their order."""
        return [reason for _, reason in sorted(self.measures.bad.items())]

    @property
    def table(self) -> dict[str, str]:
        """The findings in short."""
        records = self.measures.records
        shown = records["pictures"]
        rows = {
            "records": f"{len(self.conversations):,}",
            "bad": f"{len(self.measures.bad):,} (allowed: {self.allowed:,})",
            "of one picture": f"{int((shown == 1).sum()):,}",
            "of several pictures": f"{int((shown > 1).sum()):,}",
            "of text alone": f"{int((shown == 0).sum()):,}",
            "pictures of a record": spread(shown),
            "questions of a record": spread(records["turns"] // 2),  # a system turn is no pair
            "characters of a record": spread(records["characters"]),
        }
        if self.max_length is not None:
            rows |= {
                "tokens of a record": spread(records["tokens"]),
                "of these learnt": spread(records["labels"]),
                f"records over {self.max_length:,} tokens": f"{self.too_long:,}",
                "tokens in all": f"{int(records['kept'].sum()):,}",
            }
        return rows

    @property
    def too_long(self) -> int:
        """Records that lose their end."""
        return int((self.measures.records["tokens"] > (self.max_length or 0)).sum())


def check_conversations(
    data: ConversationData,
    *,
    chat: ChatFormat | None,
    max_length: int,
    workers: int,
    tiles: TileFormat | None = None,
) -> ConversationFindings:
    """Read every record with its pictures once.

    Args:
        chat: by which tokens and labels are counted; None counts none.
        max_length: tokens that are kept of a record.
        workers: processes that read; 0 reads in this one.
        tiles: as of `measure`.

    Raises:
        DataError: a source that is not there or holds nothing that can be used.
    """
    nodes = conversation_sources(data)
    lenient = tuple(node.model_copy(update={"max_bad_share": 1.0}) for node in nodes)
    conversations = open_conversations(lenient)
    measures = measure(
        conversations,
        chat,
        max_length=max_length,
        too_long=nodes[0].too_long,
        read_pictures=True,
        workers=workers,
        tiles=tiles,
    )
    if not len(measures.records):
        raise DataError(
            f"not one of {len(conversations):,} records can be used; the first: {measures.bad[0]}"
        )
    by_source = zip(
        nodes,
        conversations.sources if isinstance(conversations, MixedConversations) else [conversations],
        strict=True,
    )
    allowed = sum(int(node.max_bad_share * len(source)) for node, source in by_source)
    return ConversationFindings(conversations, measures, allowed, None if chat is None else max_length)


def write_conversation_findings(findings: ConversationFindings, folder: str | Path, title: str) -> None:
    """`bad_samples.jsonl` and `report.html` in a folder, which is made if absent."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bad_samples.jsonl").unlink(missing_ok=True)
    write_bad_list(folder / "bad_samples.jsonl", findings.bad)
    report = Report(title, "Every record, read once.")
    report.table(list(findings.table.items()))
    report.heading("Lengths")
    report.figure(_histograms(findings))
    records = findings.measures.records
    drawn = np.sort(np.random.default_rng(0).permutation(len(records))[:SHOWN])
    sample = [findings.conversations[int(records["index"][place])] for place in drawn]
    pictured = [record for record in sample if record.images]
    if pictured:
        report.heading("Samples")
        report.picture_grid(
            [findings.conversations.pictures(record)[0] for record in pictured], list(map(_told, pictured))
        )
    if len(pictured) < len(sample):
        report.heading("Samples of text alone")
        report.table([(record.id, _told(record)) for record in sample if not record.images])
    if findings.bad:
        report.heading("Records that cannot be used")
        report.text(f"The first of {len(findings.bad):,}; all are in bad_samples.jsonl.")
        report.table([(reason,) for reason in findings.bad[:SHOWN]])
    report.text(f"Data: {findings.conversations.path}")
    report.save(folder / "report.html")


def _told(record: Record) -> str:
    """A conversation in short."""
    beside = f" (first of {len(record.images)} pictures)" if len(record.images) > 1 else ""
    words = " / ".join(turn.words for turn in record.turns)
    return (words if len(words) <= 300 else f"{words[:299]}…") + beside


def _histograms(findings: ConversationFindings) -> Any:
    require("train", "matplotlib")
    from matplotlib.figure import Figure

    records = findings.measures.records
    plots = [("characters of a record", records["characters"]), ("pictures of a record", records["pictures"])]
    if findings.max_length is not None:
        plots += [("tokens of a record", records["tokens"]), ("labels of a record", records["labels"])]
    figure = Figure(figsize=(10.8, 2.7), layout="constrained")
    for place, (name, values) in enumerate(plots, start=1):
        axis = figure.add_subplot(1, len(plots), place)
        axis.hist(values, bins=min(40, len(np.unique(values))), color="#2f6fdb")
        style_axis(axis, name)
        if name.startswith("tokens") and findings.max_length and values.max() > findings.max_length / 2:
            axis.axvline(findings.max_length, color="#b42318", linewidth=1)
    return figure
