"""`data check`: counts by hand, bad items and duplicates named, and a page that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_vision.cli import main
from vlm_vision.errors import DataError
from vlm_vision.text import OpenClipTokenizer
from vlm_vision.train.data_check import Findings, check_data, write_findings
from vlm_vision.train.pairs_config import PairsConfig


def photograph(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Picture 1 is 0's file again, 2 is 0 resized, 4 is torn, 9 is not there; a row has no caption."""
    photograph(0).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    photograph(0).resize((32, 24), Image.Resampling.BICUBIC).save(tmp_path / "2.png")
    photograph(3, (20, 30)).save(tmp_path / "3.png")
    (tmp_path / "4.png").write_bytes(b"torn")
    photograph(5, (100, 50)).save(tmp_path / "5.png")
    rows = ["image,caption", "0.png,a dog", "0.png,A dog!", "1.png,a dog", "2.png," + "cat " * 90]
    rows += ["3.png,bird", "3.png,nan", "4.png,bird", "5.png,fish", "9.png,fish"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path / "pairs.csv"


def look_at(table: Path, workers: int = 0, **options: float) -> Findings:
    return check_data(
        PairsConfig(path=str(table), **options), tokenizer=OpenClipTokenizer({}), workers=workers
    )


def test_what_is_found_by_hand(table: Path) -> None:
    found = look_at(table, max_bad_share=0.2)
    assert found.pictures["index"].tolist() == [0, 1, 2, 3, 5]
    sizes = list(zip(found.pictures["width"].tolist(), found.pictures["height"].tolist(), strict=True))
    assert sizes == [(64, 48), (64, 48), (32, 24), (20, 30), (100, 50)]
    content, look = found.pictures["content"], found.pictures["look"]
    assert (content[:, None] == content).sum(axis=1).tolist() == [2, 2, 1, 1, 1]
    assert (look[:, None] == look).sum(axis=1).tolist() == [3, 3, 3, 1, 1]
    assert found.captions["index"].tolist() == [0, 0, 1, 2, 3, 5]
    assert found.captions["characters"].tolist() == [5, 6, 5, 359, 4, 4]
    assert found.captions["tokens"].tolist() == [4, 5, 4, 92, 3, 3]
    assert (len(found.bad), found.allowed) == (3, 1)
    assert found.table == {
        "pictures": "5",
        "captions": "6",
        "captions per picture": "1 to 2, median 1",
        "bad": "3 (allowed: 1)",
        "pictures whose file came before": "1",
        "pictures that look like one before": "1",
        "captions that came before": "1",
        "captions of the same words as one before": "1",
        "characters of a caption": "4 to 359, median 5",
        "tokens of a caption": "3 to 92, median 4",
        "captions over 77 tokens": "1",
        "shorter side, pixels": "20 to 50, median 48",
        "longer side, pixels": "30 to 100, median 64",
    }


def test_workers_change_nothing(table: Path) -> None:
    alone, together = look_at(table), look_at(table, workers=2)
    assert np.array_equal(alone.pictures, together.pictures)
    assert np.array_equal(alone.captions, together.captions)
    assert alone.bad == together.bad


def test_bad_items_and_duplicates_are_listed(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # the second replaces the first
        write_findings(look_at(table), out, "A title & more")
    bad = [json.loads(line)["error"].split(".csv, ")[1] for line in (out / "bad_samples.jsonl").open()]
    assert [reason.split(":")[0] for reason in bad] == ["row 6", "row 7", "row 9"]
    assert "picture '9.png' does not exist" in bad[2]
    lines = [json.loads(line) for line in (out / "duplicates.jsonl").open(encoding="utf-8")]
    files = [[place.rpartition(": ")[2] for place in line["pictures"]] for line in lines[:2]]
    assert [line["kind"] for line in lines] == ["same file", "same look", "same words"]
    assert files == [["0.png", "1.png"], ["0.png", "1.png", "2.png"]]
    assert (lines[2]["caption"], lines[2]["times"]) == ("a dog", 3)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "A title &amp; more" in page
    assert page.count("<img") == 1 + 5 + 2  # plots, samples, two that look the same
    assert "row 9: picture &#x27;9.png&#x27; does not exist" in page


def test_the_command(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert main(["data", "check", str(table), "-o", str(out), "--workers", "0"]) == 2
    printed = capsys.readouterr()
    assert "captions over 77 tokens                    1\n" in printed.out
    assert "3 rows or samples are bad, max_bad_share allows 0" in printed.err
    assert (out / "report.html").is_file()
    assert main(["data", "check", str(table), "--workers", "0", "--max-bad-share", "0.4"]) == 0

    (tmp_path / "run.yaml").write_text(
        f"data:\n  - {{path: {table}, max_bad_share: 0.4}}\n  - {{path: {table}, max_bad_share: 0.4}}\n"
        "model:\n  backbone:\n    name: open_clip\n    weights: none\n    architecture:\n      embed_dim: 8\n"
        "      vision_cfg: {image_size: 32, patch_size: 16, width: 64, layers: 1, head_width: 64}\n"
        "      text_cfg: {context_length: 16, vocab_size: 49408, width: 64, heads: 1, layers: 1}\n"
    )
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path / "run.yaml"), "--workers", "0"]) == 0
    assert "captions over 16 tokens                    2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "run.yaml", "--caption-column", "x"], "--caption-column: .* says it in its data node"),
        (["check", "other.yaml"], "has no data node .it has: model"),
        (["check", "x.csv", "--shard-size", "3"], "--shard-size is for data pack"),
        (["pack", "x.csv"], "data pack needs a folder for the tars: -o FOLDER"),
        (["check", "x.csv", "--captoin-column", "x"], "did you mean '--caption-column'"),
        (["chekc", "x.csv"], "invalid choice: 'chekc'"),
        (["check", "x.csv"], "data file 'x.csv' does not exist"),
    ],
)
def test_what_makes_no_sense_is_told(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("data: {path: x.csv}\n")
    Path("other.yaml").write_text("model: x\n")
    assert main(["data", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_nothing_to_read(table: Path) -> None:
    table.write_text("image,caption\n4.png,torn\n")
    with pytest.raises(DataError, match=r"not one of 1 pictures can be read; the first: .*row 1: 4\.png"):
        look_at(table)
