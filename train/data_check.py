"""A look at every picture and caption before training: what is bad, there twice, too long, how large."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from vlm_vision.errors import DataError, require
from vlm_vision.picture_list import NamedBytes
from vlm_vision.pictures import open_image
from vlm_vision.progress import progress_bar
from vlm_vision.text import Tokenizer
from vlm_vision.train.fingerprints import caption_id, content_id, join_looks, picture_id
from vlm_vision.train.pairs import Pairs, write_bad_list
from vlm_vision.train.pairs_config import DataConfig, source_nodes
from vlm_vision.train.report import Report
from vlm_vision.train.sources import SourceError, max_bad

CHUNK = 64  # pictures that a worker is given at once
SHOWN = 24  # samples on the page, and at most so many duplicates and bad ones
LISTED = 10_000  # groups of duplicates in the file, the largest first

Column = NDArray[np.int64]
PICTURE = np.dtype([(name, np.int64) for name in ("index", "width", "height", "content", "look")])
CAPTION = np.dtype(
    [(name, np.int64) for name in ("index", "number", "characters", "tokens", "text", "words")]
)


@dataclass(frozen=True)
class Findings:
    """What a source holds.

    Attributes:
        pairs: the source, with whatever is bad in it.
        bad: rows without a caption, and samples that cannot be read, each with its reason.
        allowed: of those that may be, by `max_bad_share`.
        pictures: those that can be read, an array of `PICTURE`: `index` in `pairs`; upright size in pixels;
            `content` the same for equal files, `look` for nearly equal pictures.
        captions: theirs, an array of `CAPTION`: `index` of the picture and `number` of its captions; lengths
            without templates, tokens with start and end; `text` the same for equal captions, `words` for
            those of equal words.
        context_length: tokens that the text tower takes.
    """

    pairs: Pairs
    bad: list[str]
    allowed: int
    pictures: NDArray[Any]
    captions: NDArray[Any]
    context_length: int

    @property
    def table(self) -> dict[str, str]:
        """The findings in short."""
        pictures, captions = self.pictures, self.captions
        sides = np.stack([pictures["width"], pictures["height"]])
        _, per_picture = np.unique(captions["index"], return_counts=True)
        same_file, same_text = _repeats(pictures["content"]), _repeats(captions["text"])
        return {
            "pictures": f"{len(pictures):,}",
            "captions": f"{len(captions):,}",
            "captions per picture": spread(per_picture),
            "bad": f"{len(self.bad):,} (allowed: {self.allowed:,})",
            "pictures whose file came before": f"{same_file:,}",
            "pictures that look like one before": f"{max(0, _repeats(pictures['look']) - same_file):,}",
            "captions that came before": f"{same_text:,}",
            "captions of the same words as one before": f"{_repeats(captions['words']) - same_text:,}",
            "characters of a caption": spread(captions["characters"]),
            "tokens of a caption": spread(captions["tokens"]),
            f"captions over {self.context_length} tokens": f"{self.too_long:,}",
            "shorter side, pixels": spread(sides.min(axis=0)),
            "longer side, pixels": spread(sides.max(axis=0)),
        }

    @property
    def too_long(self) -> int:
        """Captions that lose their end."""
        return int((self.captions["tokens"] > self.context_length).sum())


def check_data(config: DataConfig, *, tokenizer: Tokenizer, workers: int) -> Findings:
    """Read every picture and caption once.

    Args:
        tokenizer: by which captions are measured.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        DataError: a source that is not there or holds nothing that can be used.
    """
    nodes = source_nodes(config)
    pairs = Pairs(tuple(node.model_copy(update={"max_bad_share": 1.0}) for node in nodes))
    parts = list(_inspected(pairs, tokenizer, workers))
    bad = [error for part in parts for error in part.bad]
    pictures, captions = (np.concatenate([part[place] for part in parts]) for place in range(2))
    if not len(pictures):
        raise DataError(f"not one of {len(pairs):,} pictures can be read; the first: {bad[0]}")
    pictures["look"] = join_looks(pictures["look"])
    by_source = zip(nodes, pairs.sources, strict=True)
    allowed = sum(max_bad(node, len(source) + len(source.bad_rows)) for node, source in by_source)
    return Findings(pairs, [*pairs.bad_rows, *bad], allowed, pictures, captions, tokenizer.context_length)


def write_findings(findings: Findings, folder: str | Path, title: str) -> None:
    """`bad_samples.jsonl`, `duplicates.jsonl` and `report.html` in a folder, which is made if absent."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bad_samples.jsonl").unlink(missing_ok=True)
    write_bad_list(folder / "bad_samples.jsonl", findings.bad)
    with (folder / "duplicates.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _duplicates(findings))
    _report(findings, title).save(folder / "report.html")


# Reading ----------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    pictures: NDArray[Any]
    captions: NDArray[Any]
    bad: list[str]


def _inspected(pairs: Pairs, tokenizer: Tokenizer, workers: int) -> Iterator[_Part]:
    chunks = [range(first, min(first + CHUNK, len(pairs))) for first in range(0, len(pairs), CHUNK)]
    loader = DataLoader(
        _Inspector(pairs, tokenizer),
        sampler=chunks,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=as_is,
        num_workers=min(workers, len(chunks)),
    )
    with progress_bar(len(pairs), "reading") as bar:
        for chunk, part in zip(chunks, loader, strict=True):
            if isinstance(part, SourceError):
                raise part
            bar.update(len(chunk))
            yield part


class _Inspector(Dataset[Any]):
    """Numbers of pictures to what is found, in a worker; an error that ends the check comes back in place."""

    def __init__(self, pairs: Pairs, tokenizer: Tokenizer) -> None:
        self.pairs, self.tokenizer = pairs, tokenizer

    def __getitem__(self, chunk: range) -> _Part | SourceError:
        pictures, captions, bad = [], [], []
        for index in chunk:
            try:
                content, (texts, _) = self.pairs.content(index), self.pairs.texts(index)
                image = open_image(NamedBytes(content, self.pairs.place(index)))
            except SourceError as error:
                return error
            except DataError as error:
                bad.append(str(error))
                continue
            pictures.append((index, image.width, image.height, content_id(content), picture_id(image)))
            for number, text in enumerate(texts):
                lengths = (len(text), self.tokenizer.length(text))
                captions.append((index, number, *lengths, content_id(text.encode()), caption_id(text)))
        return _Part(np.array(pictures, dtype=PICTURE), np.array(captions, dtype=CAPTION), bad)


def as_is(item: Any) -> Any:
    """Collates nothing."""
    return item


# Telling ----------------------------------------------------------------------------------------------------


def _repeats(ids: Column) -> int:
    return len(ids) - len(np.unique(ids))


def spread(values: Column) -> str:
    """Least, greatest and median."""
    low, middle, high = np.percentile(values, (0, 50, 100))
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}, median {middle:,.0f}"


def _groups(ids: Column) -> list[NDArray[np.int64]]:
    """Places of ids that occur more than once, the largest groups first."""
    order = np.argsort(ids, kind="stable")
    changes = np.flatnonzero(np.diff(ids[order])) + 1
    groups = [group for group in np.split(order, changes) if len(group) > 1]
    return sorted(groups, key=len, reverse=True)


def _duplicates(findings: Findings) -> Iterator[dict[str, Any]]:
    """Groups of pictures and captions that are the same or nearly so."""
    pairs, pictures, captions = findings.pairs, findings.pictures, findings.captions
    for kind, ids in (("same file", pictures["content"]), ("same look", pictures["look"])):
        for group in _groups(ids)[:LISTED]:
            members = pictures[group]
            if kind == "same look" and len(set(members["content"].tolist())) == 1:
                continue  # told before
            yield {"kind": kind, "pictures": [pairs.place(int(index)) for index in members["index"]]}
    for group in _groups(captions["words"])[:LISTED]:
        yield {"kind": "same words", "caption": _caption(findings, int(group[0])), "times": len(group)}


def _caption(findings: Findings, place: int) -> str:
    row = findings.captions[place]
    return findings.pairs.captions(int(row["index"]))[int(row["number"])]


def _report(findings: Findings, title: str) -> Report:
    pairs, pictures = findings.pairs, findings.pictures
    report = Report(title, "Every picture and caption, read once.")
    report.table(list(findings.table.items()))
    report.heading("Lengths and sizes")
    report.figure(_histograms(findings))
    report.heading("Samples")
    drawn = np.random.default_rng(0).permutation(len(pictures))[:SHOWN]
    _show(report, findings, np.sort(drawn))
    looks = [group for group in _groups(pictures["look"]) if len(set(pictures[group]["index"])) > 1]
    if looks:
        report.heading("Pictures that are there more than once, or nearly")
        report.text(f"{len(looks):,} groups; two of each of the largest. All are in duplicates.jsonl.")
        _show(report, findings, np.concatenate([group[:2] for group in looks[: SHOWN // 2]]))
    words = _groups(findings.captions["words"])
    if words:
        report.heading("Captions that are there more than once")
        report.text(
            "In a batch they are each other's false negatives, unless the loss is told so. "
            "Case and punctuation do not count."
        )
        rows = [(_caption(findings, int(group[0])), len(group)) for group in words[:SHOWN]]
        report.table(rows, header=("caption", "times"))
    if findings.bad:
        report.heading("Rows and samples that cannot be used")
        report.text(f"The first of {len(findings.bad):,}; all are in bad_samples.jsonl.")
        report.table([(reason,) for reason in findings.bad[:SHOWN]])
    report.text(f"Data: {', '.join(source.config.path for source in pairs.sources)}")
    return report


def _show(report: Report, findings: Findings, places: Sequence[int] | Column) -> None:
    indices = [int(findings.pictures[place]["index"]) for place in places]
    images = [findings.pairs.open(index) for index in indices]
    texts = [findings.pairs.captions(index) for index in indices]
    shown = [" / ".join(some[:2]) + (f" (and {len(some) - 2} more)" if some[2:] else "") for some in texts]
    report.picture_grid(images, shown)


def _histograms(findings: Findings) -> Any:
    require("train", "matplotlib")
    from matplotlib.figure import Figure

    sides = np.stack([findings.pictures["width"], findings.pictures["height"]])
    plots = (
        ("characters of a caption", findings.captions["characters"]),
        ("tokens of a caption", findings.captions["tokens"]),
        ("shorter side, pixels", sides.min(axis=0)),
        ("width / height", sides[0] / sides[1]),
    )
    figure = Figure(figsize=(10.8, 2.7), layout="constrained")
    for place, (name, values) in enumerate(plots, start=1):
        axis = figure.add_subplot(1, len(plots), place)
        axis.hist(values, bins=min(40, max(1, len(np.unique(values)))), color="#2f6fdb")
        axis.set_title(name, fontsize=9, loc="left", color="#1c2430")
        axis.tick_params(labelsize=8, colors="#5d6878")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        if name.startswith("tokens") and values.max() > findings.context_length / 2:
            axis.axvline(findings.context_length, color="#b42318", linewidth=1)
    return figure
