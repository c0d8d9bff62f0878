"""The page of a contrastive run: curves, scores before and after, retrieval, confusion, drift."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import require
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.drift import Drift, drift, open_projector
from vlm_vision.train.held_out import Pictures
from vlm_vision.train.pairs import BAD_FILE, Pairs
from vlm_vision.train.report import Ranked, Report, style_axis
from vlm_vision.train.run import read_metrics
from vlm_vision.train.validation import Evaluation, Retrieval, ZeroShot, evaluate

REPORT_FILE = "report.html"
SCORES = ("zero_shot_", "image_to_text_", "text_to_image_", "linear_probe_")
RATES = ("truncated", "duplicate", "masked", "bad", "skipped")  # parts of the names of logged shares
SHOWN_QUERIES, SHOWN_HITS, SHOWN_ROWS = 3, 5, 12
LABELLED_CLASSES, PLOTTED_CLASSES = 25, 200
DRIFT_PICTURES = 64


def write_contrastive_report(
    run_folder: str | Path,
    before: DualEncoder | None,
    after: DualEncoder,
    config: ContrastiveConfig,
    *,
    found_before: Evaluation | None = None,
    found_after: Evaluation | None = None,
    projector: str | Path | None = None,
) -> Path:
    """Write `report.html` into the folder of a run; what is not there, or says nothing, is left out.

    Works in this process alone and may take as long as scoring twice, so with ranks it belongs after the
    group has been left.

    Args:
        before: the model that the run started from. None, or the recipe `scratch`, whose start is random,
            leaves out what compares with it.
        found_before, found_after: what `evaluate` found of each on the config's validation data; None finds
            it now.
        projector: of a VLM that reads `before`, to tell what it loses; see `open_projector`.

    Raises:
        DataError: a held-out picture cannot be read.
        ConfigError: models that do not compare.
        MissingExtraError: matplotlib is not installed.
    """
    require("train", "matplotlib")
    folder = Path(run_folder)
    if config.recipe == "scratch":
        before, found_before = None, None
    if found_after is None:
        found_after = evaluate(after, config.validation)
    if before is not None and found_before is None:
        found_before = evaluate(before, config.validation)
    metrics = read_metrics(folder / "metrics.jsonl")

    report = Report(f"Contrastive run: {folder.name}", _introduction(config))
    _facts(report, config, metrics)
    _scores(report, found_before, found_after)
    _curves(report, metrics)
    if found_after.zero_shot is not None:
        _zero_shot(report, None if found_before is None else found_before.zero_shot, found_after.zero_shot)
    if found_after.retrieval is not None:
        _retrieval(report, None if found_before is None else found_before.retrieval, found_after.retrieval)
    if before is not None:
        pictures = _drift_pictures(config, found_after)
        chosen = _evenly(len(pictures), DRIFT_PICTURES)
        read = None if projector is None else open_projector(projector, before.tower)
        opened = (pictures.open(index) for index in chosen)
        _drift(report, drift(before, after, opened, projector=read, total=len(chosen)))
    _skipped(report, folder, metrics)
    return report.save(folder / REPORT_FILE)


def _introduction(config: ContrastiveConfig) -> str:
    model = config.model if isinstance(config.model, str) else "an architecture of the config"
    if config.recipe == "scratch":
        return f"Trained from random weights ({model}), so there is no model before it to compare with."
    scored = " Scores are of held-out data, before the run and after it."
    return f"Adapted from {model}.{scored if config.validation.is_asked else ''}"


def _facts(report: Report, config: ContrastiveConfig, metrics: Sequence[Mapping[str, Any]]) -> None:
    facts: list[tuple[str, Any]] = [("recipe", config.recipe), ("batch size", config.batch_size)]
    if metrics:
        facts.append(("optimizer steps", int(metrics[-1]["step"])))
        seconds = metrics[-1]["time"] - metrics[0]["time"]
        facts.append(("time, first to last line logged", _duration(seconds)))
    last = {name: value for line in metrics for name, value in line.items()}
    for name in ("loss", "logit_scale"):
        if name in last:
            facts.append((f"last {name}", float(last[name])))
    report.heading("The run")
    report.table(facts)


def _scores(report: Report, before: Evaluation | None, after: Evaluation) -> None:
    if not after.scores:
        return
    report.heading("Scores on held-out data")
    if before is None:
        report.table([(_readable(name), value) for name, value in after.scores.items()], ("score", "value"))
        return
    report.before_after(
        [(_readable(name), before.scores[name], value) for name, value in after.scores.items()]
    )


def _curves(report: Report, metrics: Sequence[Mapping[str, Any]]) -> None:
    names = dict.fromkeys(name for line in metrics for name in line if name not in ("step", "time"))
    is_score = {name: name.startswith(SCORES) for name in names}
    # What is nought throughout, such as skipped steps, is told in the table of skips, not drawn.
    training = [name for name in names if not is_score[name] and any(line.get(name) for line in metrics)]
    scores = [
        name for name in names if is_score[name] and sum(name in line for line in metrics) > 1
    ]  # one point is no curve
    if training:
        report.heading("Training curves")
        report.curves({"": metrics}, training)
    if scores:
        report.heading("Scores on the way")
        report.curves({"": metrics}, scores)


def _zero_shot(report: Report, before: ZeroShot | None, after: ZeroShot) -> None:
    names, count = after.data.classes, len(after.data.classes)
    report.heading("Zero-shot: what is taken for what")
    report.text(
        f"{len(after.data.targets):,} pictures of {count:,} classes, under {len(after.data.templates)} "
        "template(s). Each row is a true class, and shows which classes its pictures were taken for."
    )
    if count <= PLOTTED_CLASSES:
        parts = {"after": after} if before is None else {"before": before, "after": after}
        report.figure(_confusion_figure({name: part.found.confusion for name, part in parts.items()}, names))
    of_class = after.found.confusion.sum(dim=1)
    wrong = after.found.confusion - after.found.confusion.diagonal().diag()
    worst = wrong.flatten().sort(descending=True, stable=True)
    rows = [
        (names[place // count], names[place % count], pictures, pictures / int(of_class[place // count]))
        for pictures, place in zip(
            worst.values[:SHOWN_ROWS].tolist(), worst.indices[:SHOWN_ROWS].tolist(), strict=True
        )
        if pictures
    ]
    if rows:
        report.text("The most frequent mistakes after the run:")
        report.table(rows, ("true class", "taken for", "pictures", "share of the class"))
    if before is not None:
        _class_changes(report, before.found.confusion, after.found.confusion, names)


def _class_changes(
    report: Report, before: Int[Tensor, "c c"], after: Int[Tensor, "c c"], names: Sequence[str]
) -> None:
    there = [number for number in range(len(names)) if int(after[number].sum())]
    recalls = {
        number: [int(part[number, number]) / int(part[number].sum()) for part in (before, after)]
        for number in there
    }
    changed = sorted(
        (number for number in there if recalls[number][0] != recalls[number][1]),
        key=lambda number: -abs(recalls[number][1] - recalls[number][0]),
    )
    if changed:
        report.text("Share of a class told right, for the classes that changed most:")
        rows = [(names[number], recalls[number][0], recalls[number][1]) for number in changed[:SHOWN_ROWS]]
        report.before_after(rows, "class")


def _confusion_figure(matrices: Mapping[str, Int[Tensor, "c c"]], names: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    labelled = len(names) <= LABELLED_CLASSES
    side = min(5.4, 1.6 + 0.32 * len(names)) if labelled else 5.2
    figure = Figure(figsize=(10.8 if len(matrices) > 1 else side + 1.2, side + 0.3), layout="constrained")
    for place, (title, matrix) in enumerate(matrices.items(), start=1):
        axis = figure.add_subplot(1, len(matrices), place)
        share = matrix.double() / matrix.sum(dim=1, keepdim=True).clamp(min=1)
        shown = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10, loc="left", color="#1c2430")
        axis.set_xlabel("taken for", fontsize=8, color="#5d6878")
        axis.tick_params(labelsize=8, colors="#5d6878", length=0)
        axis.set_xticks(range(len(names)) if labelled else [])
        axis.set_yticks(range(len(names)) if labelled else [])
        if labelled:
            short = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
            axis.set_xticklabels(short, rotation=60, ha="right", rotation_mode="anchor")
            axis.set_yticklabels(short if place == 1 else [])
        if len(names) <= 12:
            for row in range(len(names)):
                for column in range(len(names)):
                    value = float(share[row, column])
                    if value >= 0.005:
                        colour = "white" if value > 0.5 else "#1c2430"
                        text = f"{100 * value:.0f}"
                        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        for spine in axis.spines.values():
            spine.set_color("#c5ccd8")
    bar = figure.colorbar(shown, ax=figure.axes, shrink=0.6, pad=0.01)
    bar.set_label("share of the true class", fontsize=8, color="#5d6878")
    bar.ax.tick_params(labelsize=8, colors="#5d6878")
    bar.outline.set_visible(False)
    return figure


def _retrieval(report: Report, before: Retrieval | None, after: Retrieval) -> None:
    found = after.to_image
    margin = (found.own - found.wrong).tolist()
    ranks = found.ranks.tolist()
    by_margin = sorted(range(len(ranks)), key=lambda query: (ranks[query], -margin[query]))
    report.heading("Retrieval: from caption to picture")
    report.text(
        f"The {SHOWN_HITS} nearest of {len(after.pictures):,} held-out pictures for some of "
        f"{len(after.captions):,} captions, with their similarity; the true one is framed, and comes last "
        "where it is not among them."
    )
    report.text("Found with the widest margin over any wrong picture:")
    report.ranked_pictures([_ranked(query, before, after) for query in _several(by_margin, after)])
    worst = [query for query in reversed(by_margin) if ranks[query]]
    if worst:
        report.text("Missed by most:")
        report.ranked_pictures([_ranked(query, before, after) for query in _several(worst, after)])
    if before is None:
        return
    change = (before.to_image.ranks - found.ranks).tolist()
    for sign, title in ((1, "Gained most by the run:"), (-1, "Lost most by the run:")):
        moved = [query for query in range(len(change)) if sign * change[query] > 0]
        moved.sort(key=lambda query: (-abs(change[query]), ranks[query]))
        if moved:
            report.text(title)
            report.ranked_pictures(
                [_ranked(query, before, after, both=True) for query in _several(moved, after)]
            )


def _several(queries: Sequence[int], found: Retrieval) -> list[int]:
    """The first few, of different pictures."""
    of_picture: dict[int, int] = {}
    for query in queries:
        of_picture.setdefault(int(found.owner[query]), query)
        if len(of_picture) == SHOWN_QUERIES:
            break
    return list(of_picture.values())


def _ranked(query: int, before: Retrieval | None, after: Retrieval, *, both: bool = False) -> Ranked:
    ranks = [int(part.to_image.ranks[query]) + 1 for part in (before, after) if part is not None]
    note = f"rank of the true picture: {ranks[-1]:,}" + (f", before: {ranks[0]:,}" if before else "")
    rows = [("after", _hits(query, after))] if both else [("", _hits(query, after))]
    if both and before is not None:
        rows.insert(0, ("before", _hits(query, before)))
    return Ranked(after.captions[query], note, rows)


def _hits(query: int, found: Retrieval) -> list[tuple[Image.Image, float, bool]]:
    scores = found.images.double() @ found.texts[query].double()
    nearest = scores.argsort(descending=True, stable=True)[:SHOWN_HITS].tolist()
    owner = int(found.owner[query])
    shown = nearest if owner in nearest else [*nearest, owner]
    return [(found.pictures.open(index), float(scores[index]), index == owner) for index in shown]


def _drift(report: Report, found: Drift) -> None:
    report.heading("Drift of the patch features")
    read = [layer for layer in found.layers if layer.layer in found.read]
    named = " and ".join(str(layer.layer) for layer in read)
    if all(layer.relative == 0 for layer in found.layers):
        report.text(
            f"On {found.pictures} pictures the patch features of every layer are what they were, to the bit: "
            "a VLM that reads them is not touched by this run, and gains nothing from it."
        )
        return
    report.text(
        f"Patch features of {found.pictures} pictures before and after the run, layer by layer; a VLM reads "
        f"layer {named}. The cosine is of each patch to itself, the mean and the lowest; CKA compares how "
        "all patches lie to each other, whatever the axes; the change is the norm of the difference by the "
        "norm before."
    )
    report.figure(_drift_figure(found))
    rows = [
        (f"layer {layer.layer}", layer.cosine, layer.cosine_min, _number(layer.cka), layer.relative)
        for layer in read
    ]
    if found.projected is not None:
        made = found.projected
        rows.append(("behind the projector", made.cosine, made.cosine_min, "", made.relative))
    report.table(rows, ("what is read", "mean cosine", "lowest cosine", "CKA", "relative change"))


def _drift_figure(found: Drift) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = [layer.layer for layer in found.layers]
    figure = Figure(figsize=(10.8, 3.0), layout="constrained")
    likeness, change = figure.subplots(1, 2)
    for name, colour, values in (
        ("mean cosine", "#2f6fdb", [layer.cosine for layer in found.layers]),
        ("lowest cosine", "#9dbcf0", [layer.cosine_min for layer in found.layers]),
        ("CKA", "#d9822b", [layer.cka for layer in found.layers]),
    ):
        likeness.plot(layers, values, marker="o", markersize=3.5, color=colour, label=name)
    likeness.set_title("likeness to what it was", fontsize=9, loc="left", color="#1c2430")
    values = [layer.relative for layer in found.layers]
    change.plot(layers, values, marker="o", markersize=3.5, color="#2f6fdb")
    change.set_title("relative change", fontsize=9, loc="left", color="#1c2430")
    change.set_ylim(bottom=0)
    for axis in (likeness, change):
        for number, layer in enumerate(found.read):
            label = "read by a VLM" if axis is likeness and number == 0 else None
            axis.axvline(layer, color="#1c2430", linewidth=0.9, linestyle=":", label=label)
        style_axis(axis, "layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    likeness.legend(fontsize=8, frameon=False)
    return figure


def _skipped(report: Report, folder: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    last = {name: value for line in metrics for name, value in line.items()}
    rates = [(_readable(name), float(value)) for name, value in last.items() if any(r in name for r in RATES)]
    skipped = list(_bad_samples(folder / BAD_FILE))
    if not rates and not skipped:
        return
    report.heading("What of the data did not count as it stands")
    if rates:
        report.text("Shares, as last logged:")
        report.table(rates)
    if skipped:
        report.text(
            f"{len(skipped):,} sample(s) could not be used and were replaced; all of them are in {BAD_FILE}."
        )
        report.table([(line,) for line in skipped[:SHOWN_ROWS]])


def _bad_samples(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        content = json.loads(line)
        yield str(content.get("error", line)) if isinstance(content, dict) else line


def _drift_pictures(config: ContrastiveConfig, found: Evaluation) -> Pictures:
    """Held-out pictures where there are any, else those that were trained on."""
    if found.retrieval is not None:
        return found.retrieval.pictures
    if found.zero_shot is not None:
        return found.zero_shot.data.pictures
    return Pairs(config.data)


def _evenly(count: int, wanted: int) -> list[int]:
    return torch.linspace(0, count - 1, min(count, wanted)).round().long().tolist()


def _readable(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float) -> float | str:
    return "none varies" if math.isnan(value) else value


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02} min" if hours else f"{minute} min {second:02} s"
