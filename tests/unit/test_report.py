"""The report: one page that stands alone, escapes every text, and marks what is right, wrong and true."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_vision.errors import MissingExtraError
from vlm_vision.train import report as report_module
from vlm_vision.train.report import Answered, PatchFeatures, Report, Retrieval, heat_map, write_report

NASTY = "<script>alert('x')</script> & \"quotes\""


class Reader(HTMLParser):
    """Collects tags with their attributes and visible text; fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.shown += data

    def count(self, css_class: str) -> int:
        return sum(css_class in (attrs.get("class") or "").split() for _, attrs in self.tags)


def picture(value: int = 0) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, 100, 50))


def read(report: Report, tmp_path: Path) -> Reader:
    return Reader(report.save(tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def retrieval() -> Retrieval:
    similarity = np.eye(6) + 0.01 * np.arange(6)[None, :]
    similarity[2, 2] = -1.0  # text 2 finds every other picture first, and picture 2 every other text
    return Retrieval(similarity, [f"text {i}" for i in range(6)], [picture(i) for i in range(6)])


def test_the_whole_page_stands_alone(tmp_path: Path, retrieval: Retrieval) -> None:
    features = np.random.default_rng(0).normal(size=(16, 8))
    path = write_report(
        tmp_path / "new" / "report.html",
        title=NASTY,
        introduction=NASTY,
        metrics={"zero_shot_top1": 0.98765, NASTY: NASTY},
        stage_seconds={"draw": 12.0, NASTY: 3.0},
        curves={NASTY: [{"step": i, "time": 0.0, "loss": 1 / (i + 1)} for i in range(40)]},
        answers=[Answered(picture(), [(NASTY, NASTY, "red"), ("What colour?", " Red", "red")])],
        retrieval=retrieval,
        retrieval_queries=[0, 2],
        patches=[(PatchFeatures(picture(), features, (4, 4)), (1, 2))],
    )
    page = path.read_text(encoding="utf-8")
    reader = Reader(page)
    assert NASTY in reader.shown
    assert "0.9877" in reader.shown
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "link", "iframe"})
    sources = [attrs["src"] or "" for tag, attrs in reader.tags if tag == "img"]
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|url\(|@import", page)
    for source in sources:
        content = base64.b64decode(source.split(",", 1)[1])
        if "svg" in source[:20]:
            assert b"<svg" in content
        else:
            assert Image.open(io.BytesIO(content)).size[0] > 0


def test_empty_parts_are_left_out(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", title="t", metrics={}, stage_seconds={}, curves={"clip": []})
    reader = Reader(path.read_text(encoding="utf-8"))
    assert "logged none of loss, accuracy" in reader.shown
    assert "held-out" not in reader.shown


def test_right_answers_are_green_and_wrong_ones_show_the_truth(tmp_path: Path) -> None:
    report = Report("t")
    report.answers([Answered(picture(), [("q1", " Red\n", "red"), ("q2", "two", "3"), ("q3", "", "left")])])
    reader = read(report, tmp_path)
    assert (reader.count("right"), reader.count("wrong")) == (1, 2)
    assert "two truth: 3" in reader.shown
    assert "(nothing) truth: left" in reader.shown


def test_only_the_true_picture_and_text_are_marked(tmp_path: Path, retrieval: Retrieval) -> None:
    report = Report("t")
    report.text_to_pictures(retrieval, [0, 2])
    reader = read(report, tmp_path)
    assert sum(tag == "img" for tag, _ in reader.tags) == 10
    assert reader.count("true") == 1
    assert "rank of the true picture: 1" in reader.shown
    assert "rank of the true picture: 6" in reader.shown
    report = Report("t")
    report.picture_to_texts(retrieval, [2, 5], top=3)
    reader = read(report, tmp_path)
    assert sum(tag == "li" for tag, _ in reader.tags) == 6
    assert reader.count("true") == 1
    assert reader.shown.index("text 5") < reader.shown.index("0.05")


def test_retrieval_refuses_misshapen_similarities() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        Retrieval(np.zeros((2, 3)), ["a", "b"], [picture()] * 2)


def test_patch_similarity_is_the_cosine_on_the_grid() -> None:
    features = np.zeros((6, 3))
    features[:, 0] = 1.0
    features[4] = [0.0, 5.0, 0.0]
    features[5] = [0.0, 2.0, 0.0]
    patches = PatchFeatures(picture(), features, (2, 3))
    assert patches.similarity_to((1, 1)).tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    with pytest.raises(ValueError, match=r"\(6, 3\).*4 by 4"):
        PatchFeatures(picture(), features, (4, 4)).similarity_to((0, 0))


def test_the_heat_map_is_brightest_where_the_similarity_is_largest() -> None:
    values = np.zeros((4, 4))
    values[3, 0] = 1.0
    pixels = np.asarray(heat_map(picture(), values, (0, 3))).mean(axis=2)
    assert pixels.shape == (256, 256)
    assert pixels[224, 32] > pixels[96, 96] + 50
    assert heat_map(picture(), np.ones((4, 4)), (0, 0)).size == (256, 256)  # no spread is no division by zero


def test_photographs_are_scaled_down_and_left_as_they_are(tmp_path: Path) -> None:
    photograph = Image.effect_noise((900, 600), 50).convert("RGB")
    report = Report("t")
    report.picture_grid([photograph], ["a noise"])
    (source,) = [attrs["src"] or "" for tag, attrs in read(report, tmp_path).tags if tag == "img"]
    assert Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).size == (384, 256)
    assert photograph.size == (900, 600)


def test_tables_show_small_numbers_to_four_decimals(tmp_path: Path) -> None:
    report = Report("t")
    report.table([["a", 1234567, 0.123456, True, 2345.678]], header=["h"])
    assert read(report, tmp_path).shown.split("h", 1)[1].strip() == "a1,234,5670.1235True2,345.7"


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(extra: str, *modules: str) -> Any:
        raise MissingExtraError(f"{modules[0]} {extra}")

    monkeypatch.setattr(report_module, "require", missing)
    with pytest.raises(MissingExtraError, match="matplotlib train"):
        Report("t").curves({"clip": [{"step": 1, "loss": 1.0}]})
