"""One self-contained HTML page about a run: tables, curves, answers, retrieval, patch similarity.

The blocks take plain arrays and PIL pictures, never models, so that any run can fill them. The page refers to
nothing outside itself: pictures and plots are inlined, the style is in its head, and there is no script.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vlm_vision.errors import require

LARGEST_SIDE = 384  # pixels of an inlined picture; photographs are scaled down to it
THUMBNAIL_SIDE = 208  # of one among many, which is shown at half of that
CURVE_COLUMNS = 3
HEAT_SIDE = 256

STYLE = """
:root { --ink: #1c2430; --soft: #5d6878; --line: #e3e7ee; --panel: #ffffff; --accent: #2f6fdb;
  --right: #137a3e; --right-tint: #e4f5ea; --wrong: #b42318; --wrong-tint: #fdeae8; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 40px 0 12px; }
p { max-width: 75ch; margin: 0 0 12px; color: var(--soft); }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: 20px;
  margin: 0 0 16px; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 40px 6px 0; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
th:not(:first-child):last-child { text-align: right; }
td.number { text-align: right; }
img { display: block; max-width: 100%; }
img.picture { border-radius: 6px; width: 100%; image-rendering: pixelated; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 8px 14px;
  align-items: center; }
.bars .track { background: #edf0f5; border-radius: 5px; height: 14px; }
.bars .fill { background: var(--accent); border-radius: 5px; height: 14px; min-width: 2px; }
.bars .value { text-align: right; font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 16px; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 12px; background: var(--panel); }
.card .caption { font-size: 13px; color: var(--soft); margin-top: 8px; overflow-wrap: anywhere; }
.turn { font-size: 13px; margin-top: 10px; line-height: 1.35; overflow-wrap: anywhere; }
.turn b { display: inline-block; padding: 0 7px; border-radius: 5px; margin-top: 3px; }
.turn.right b { color: var(--right); background: var(--right-tint); }
.turn.wrong b { color: var(--wrong); background: var(--wrong-tint); }
.query { display: grid; grid-template-columns: 300px 1fr; gap: 20px; align-items: center; padding: 10px 0;
  border-bottom: 1px solid var(--line); }
.query:last-child { border-bottom: 0; }
.query .hits { display: grid; grid-template-columns: repeat(var(--hits), minmax(0, 104px)); gap: 12px; }
.hit { font-size: 12px; color: var(--soft); text-align: center; }
.hit img { border: 3px solid transparent; border-radius: 9px; }
.hit.true img { border-color: var(--right); }
.hit.true { color: var(--right); font-weight: 600; }
.query.from-picture { grid-template-columns: 104px 1fr; }
.hits.squares img { aspect-ratio: 1; object-fit: cover; }
.query .label { font-size: 12px; color: var(--soft); margin: 6px 0 4px; }
.query .label:first-child { margin-top: 0; }
td.better { color: var(--right); }
td.worse { color: var(--wrong); }
td.better, td.worse, td.same { text-align: right; }
td.same { color: var(--soft); }
ol.texts { margin: 0; padding-left: 24px; }
ol.texts li { padding: 1px 8px; border-radius: 5px; }
ol.texts li.true { color: var(--right); background: var(--right-tint); font-weight: 600; }
ol.texts span { color: var(--soft); font-weight: 400; font-size: 12px; margin-left: 6px; }
"""


@dataclass(frozen=True)
class Answered:
    """A picture with its questions: (question, answer given, true answer)."""

    picture: Image.Image
    turns: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Retrieval:
    """Similarities [texts, pictures] of a held-out set in which text i belongs to picture i."""

    similarity: NDArray[np.floating[Any]]
    texts: Sequence[str]
    pictures: Sequence[Image.Image]

    def __post_init__(self) -> None:
        expected = (len(self.texts), len(self.pictures))
        if self.similarity.shape != expected:
            raise ValueError(f"similarity is {self.similarity.shape}, but texts and pictures are {expected}")


@dataclass(frozen=True)
class Ranked:
    """A text and the pictures nearest to it, in one row or several.

    Attributes:
        note: what is told under the text.
        rows: a label (empty for none) and hits: picture, similarity, whether it is the true one.
    """

    text: str
    note: str
    rows: Sequence[tuple[str, Sequence[tuple[Image.Image, float, bool]]]]


@dataclass(frozen=True)
class PatchFeatures:
    """Penultimate features [N, D] of a picture's patches, row by row on a grid (rows, columns)."""

    picture: Image.Image
    features: NDArray[np.floating[Any]]
    grid: tuple[int, int]

    def similarity_to(self, patch: tuple[int, int]) -> NDArray[np.floating[Any]]:
        """Cosine similarity [rows, columns] of every patch to the one at (row, column)."""
        rows, columns = self.grid
        if self.features.ndim != 2 or len(self.features) != rows * columns:
            raise ValueError(
                f"features are {self.features.shape}, but the grid is {rows} by {columns} patches"
            )
        unit = self.features / np.linalg.norm(self.features, axis=1, keepdims=True).clip(1e-12)
        cosines: NDArray[np.floating[Any]] = unit @ unit[patch[0] * columns + patch[1]]
        return cosines.reshape(rows, columns)


class Report:
    """Blocks in the order of the calls; `save` writes the page. Every text is escaped."""

    def __init__(self, title: str, introduction: str = "") -> None:
        self._title = title
        self._blocks = [f"<h1>{escape(title)}</h1>"]
        if introduction:
            self.text(introduction)

    def heading(self, text: str) -> None:
        self._blocks.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._blocks.append(f"<p>{escape(text)}</p>")

    def table(self, rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> None:
        """Rows of cells; numbers stand right, small ones with four decimals unless they are whole."""
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
        self._panel(f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>")

    def before_after(self, rows: Sequence[tuple[str, float, float]], what: str = "score") -> None:
        """Scores by name, before and after, with what changed: a gain green, a loss red.

        Args:
            what: heads the names.
        """
        body = ""
        for name, before, after in rows:
            change = after - before
            kind = "same" if abs(change) < 5e-5 else "better" if change > 0 else "worse"
            signed = f'<td class="{kind}">{change:+.4f}</td>'
            body += f"<tr><td>{escape(name)}</td>{_cell(before)}{_cell(after)}{signed}</tr>"
        head = f"<th>{escape(what)}</th>" + "".join(
            f'<th style="text-align:right">{name}</th>' for name in ("before", "after", "change")
        )
        self._panel(f"<table><tr>{head}</tr>{body}</table>")

    def bars(self, values: Mapping[str, float], unit: str = "") -> None:
        """One horizontal bar per value, the longest across the panel."""
        largest = max(values.values(), default=0.0) or 1.0
        rows = (
            f"<div>{escape(name)}</div>"
            f'<div class="track"><div class="fill" style="width:{100 * value / largest:.1f}%"></div></div>'
            f'<div class="value">{value:.1f}{escape(unit)}</div>'
            for name, value in values.items()
        )
        self._panel(f'<div class="bars">{"".join(rows)}</div>')

    def curves(
        self,
        runs: Mapping[str, Sequence[Mapping[str, Any]]],
        keys: Sequence[str] = ("loss", "accuracy"),
    ) -> None:
        """A plot for each run and each of `keys` that it logged, over the optimizer steps.

        Args:
            runs: lines of `metrics.jsonl`, as `read_metrics` gives them, by the name of the run, which may be
                empty where there is one.
        """
        plots = [
            (name, key, [(line["step"], line[key]) for line in lines if key in line])
            for name, lines in runs.items()
            for key in keys
        ]
        plots = [plot for plot in plots if plot[2]]
        if not plots:
            self.text("No curves: the runs logged none of " + ", ".join(keys) + ".")
            return
        require("train", "matplotlib")
        from matplotlib.figure import Figure

        rows = math.ceil(len(plots) / CURVE_COLUMNS)
        figure = Figure(figsize=(10.8, 2.7 * rows), layout="constrained")
        for place, (name, key, points) in enumerate(plots, start=1):
            steps, values = np.array(points, dtype=float).T
            title = f"{name}: {key}" if name else key
            _plot_curve(figure.add_subplot(rows, CURVE_COLUMNS, place), title, steps, values)
        self.figure(figure)

    def picture_grid(
        self, pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 6
    ) -> None:
        self._grid(
            (
                f'{_picture(picture)}<div class="caption">{escape(caption)}</div>'
                for picture, caption in zip(pictures, captions, strict=True)
            ),
            columns,
        )

    def figure(self, figure: Any) -> None:
        """A matplotlib figure, as SVG."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        self._panel(f'<img alt="plot" src="{_data_uri("svg+xml", buffer.getvalue())}">')

    def answers(self, items: Sequence[Answered], columns: int = 4) -> None:
        """Pictures with questions and answers: right ones green, wrong ones red with the truth beside."""
        self._grid(
            (_picture(item.picture) + "".join(_turn(*turn) for turn in item.turns) for item in items), columns
        )

    def text_to_pictures(self, retrieval: Retrieval, queries: Sequence[int], top: int = 5) -> None:
        """The `top` pictures for each text whose index is in `queries`; the true one is framed."""
        rows = []
        for query in queries:
            scores = retrieval.similarity[query]
            hits = "".join(
                f'<div class="hit{" true" if index == query else ""}">'
                f"{_picture(retrieval.pictures[index])}{scores[index]:.2f}</div>"
                for index in np.argsort(-scores, kind="stable")[:top].tolist()
            )
            rank = int((scores > scores[query]).sum()) + 1
            rows.append(
                f'<div class="query"><div>{escape(retrieval.texts[query])}'
                f'<div class="hit" style="text-align:left">rank of the true picture: {rank}</div></div>'
                f'<div class="hits" style="--hits:{top}">{hits}</div></div>'
            )
        self._panel("".join(rows))

    def ranked_pictures(self, items: Sequence[Ranked]) -> None:
        """The pictures nearest to each text; the true one is framed."""
        blocks = []
        for item in items:
            rows = ""
            for label, hits in item.rows:
                cells = "".join(
                    f'<div class="hit{" true" if is_true else ""}">{_thumbnail(picture)}{score:.2f}</div>'
                    for picture, score, is_true in hits
                )
                rows += f'<div class="label">{escape(label)}</div>' if label else ""
                rows += f'<div class="hits squares" style="--hits:{len(hits)}">{cells}</div>'
            blocks.append(
                f'<div class="query"><div>{escape(item.text)}'
                f'<div class="hit" style="text-align:left">{escape(item.note)}</div></div>'
                f"<div>{rows}</div></div>"
            )
        self._panel("".join(blocks))

    def picture_to_texts(self, retrieval: Retrieval, queries: Sequence[int], top: int = 5) -> None:
        """The `top` texts for each picture whose index is in `queries`; the true one is marked."""
        rows = []
        for query in queries:
            scores = retrieval.similarity[:, query]
            hits = "".join(
                f"<li{' class=true' if index == query else ''}>{escape(retrieval.texts[index])}"
                f"<span>{scores[index]:.2f}</span></li>"
                for index in np.argsort(-scores, kind="stable")[:top].tolist()
            )
            rows.append(
                f'<div class="query from-picture">{_picture(retrieval.pictures[query])}'
                f'<ol class="texts">{hits}</ol></div>'
            )
        self._panel("".join(rows))

    def patch_similarity(
        self, items: Sequence[tuple[PatchFeatures, tuple[int, int]]], columns: int = 3
    ) -> None:
        """For each picture and chosen patch: how similar the features of all patches are to that patch's."""
        cards = []
        for patches, patch in items:
            similarity = patches.similarity_to(patch)
            pair = _picture(_mark_patch(patches.picture, patches.grid, patch)) + _picture(
                heat_map(patches.picture, similarity, patch)
            )
            cards.append(
                f'<div class="grid" style="grid-template-columns:1fr 1fr;gap:8px">{pair}</div>'
                f'<div class="caption">patch in row {patch[0] + 1}, column {patch[1] + 1}; '
                f"cosine from {similarity.min():.2f} (dark) to {similarity.max():.2f} (bright)</div>"
            )
        self._grid(cards, columns)

    def save(self, path: str | Path) -> Path:
        """Write the page, making its folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        body = "\n".join(self._blocks)
        path.write_text(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>{STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
            encoding="utf-8",
        )
        return path

    def _panel(self, content: str) -> None:
        self._blocks.append(f'<div class="panel">{content}</div>')

    def _grid(self, cards: Any, columns: int) -> None:
        content = "".join(f'<div class="card">{card}</div>' for card in cards)
        style = f"grid-template-columns:repeat({columns},minmax(0,1fr));margin-bottom:16px"
        self._blocks.append(f'<div class="grid" style="{style}">{content}</div>')


def write_report(
    path: str | Path,
    *,
    title: str,
    introduction: str = "",
    metrics: Mapping[str, Any],
    stage_seconds: Mapping[str, float],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    answers: Sequence[Answered] = (),
    retrieval: Retrieval | None = None,
    retrieval_queries: Sequence[int] = (),
    patches: Sequence[tuple[PatchFeatures, tuple[int, int]]] = (),
) -> Path:
    """The page of a whole run, from contrastive training to answers; what is empty is left out."""
    report = Report(title, introduction)
    report.heading("Results")
    report.table(list(metrics.items()), header=("measure", "value"))
    report.heading("Seconds by stage")
    report.bars(stage_seconds, unit=" s")
    report.heading("Training curves")
    report.curves(curves)
    if answers:
        report.heading("Questions about pictures it has not seen")
        report.text(
            "Each answer was generated from the picture and that one question. Green is right, red is wrong."
        )
        report.answers(answers)
    if retrieval is not None:
        report.heading("From text to picture")
        report.text(
            f"The five nearest of {len(retrieval.pictures)} held-out pictures; the true one is framed."
        )
        report.text_to_pictures(retrieval, retrieval_queries)
        report.heading("From picture to text")
        report.text(f"The five nearest of {len(retrieval.texts)} held-out captions; the true one is marked.")
        report.picture_to_texts(retrieval, retrieval_queries)
    if patches:
        report.heading("What the patch features tell apart")
        report.text(
            "Cosine similarity between the features of the framed patch and those of every other patch."
        )
        report.patch_similarity(patches)
    return report.save(path)


def heat_map(picture: Image.Image, values: NDArray[np.floating[Any]], patch: tuple[int, int]) -> Image.Image:
    """Values [rows, columns] as colours over the greyed picture, smallest dark, largest bright."""
    require("train", "matplotlib")
    from matplotlib import colormaps

    spread = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    heat = Image.fromarray((colormaps["inferno"](spread)[..., :3] * 255).astype(np.uint8))
    base = _enlarged(picture).convert("L").convert("RGB")
    blended = Image.blend(base, heat.resize(base.size, Image.Resampling.NEAREST), 0.72)
    return _mark_patch(blended, (values.shape[0], values.shape[1]), patch)


def _mark_patch(picture: Image.Image, grid: tuple[int, int], patch: tuple[int, int]) -> Image.Image:
    marked = _enlarged(picture)
    height, width = marked.height / grid[0], marked.width / grid[1]
    box = [patch[1] * width, patch[0] * height, (patch[1] + 1) * width - 1, (patch[0] + 1) * height - 1]
    pen = ImageDraw.Draw(marked)
    pen.rectangle(box, outline="white", width=5)
    pen.rectangle(box, outline="black", width=2)
    return marked


def _enlarged(picture: Image.Image) -> Image.Image:
    scale = HEAT_SIDE / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.convert("RGB").resize(
        size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    )


def _turn(question: str, answer: str, truth: str) -> str:
    right = answer.strip().lower() == truth.strip().lower()
    given = escape(answer.strip()) or "(nothing)"
    verdict = f"<b>{given}</b>" if right else f"<b>{given}</b> truth: {escape(truth)}"
    return f'<div class="turn {"right" if right else "wrong"}">{escape(question)}<br>{verdict}</div>'


def _cell(value: Any) -> str:
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        whole = not isinstance(value, (float, np.floating))
        text = f"{value:,}" if whole else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
        return f'<td class="number">{text}</td>'
    return f"<td>{escape(str(value))}</td>"


def _plot_curve(axis: Any, title: str, steps: NDArray[Any], values: NDArray[Any]) -> None:
    """The logged values faint, and their running mean over about a twentieth of the run on top."""
    half = len(values) // 40
    window = 2 * half + 1
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axis.plot(steps, values, color="#2f6fdb", alpha=0.3 if window > 1 else 1.0, linewidth=0.8)
    if window > 1:
        axis.plot(steps[half : len(steps) - half], smooth, color="#2f6fdb", linewidth=1.6)
    axis.set_title(title, fontsize=9, loc="left", color="#1c2430")
    style_axis(axis, "step")


def style_axis(axis: Any, x_label: str) -> None:
    """The look that all plots of reports share."""
    axis.tick_params(labelsize=8, colors="#5d6878")
    axis.grid(color="#e3e7ee", linewidth=0.7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#c5ccd8")
    axis.set_xlabel(x_label, fontsize=8, color="#5d6878")


def _thumbnail(picture: Image.Image) -> str:
    """One of many: a fifth of the bytes of `_picture`."""
    small, buffer = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(buffer, format="JPEG", quality=90)
    return f'<img class="picture" alt="" src="{_data_uri("jpeg", buffer.getvalue())}">'


def _picture(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return f'<img class="picture" alt="" src="{_data_uri("png", buffer.getvalue())}">'


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
