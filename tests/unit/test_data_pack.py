"""`data pack`: tars that we, and what reads tars by webdataset's rules, read back as they were."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_vision.cli import main
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.data_pack import pack_data
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import PairsConfig

FORMATS = ("jpg", "png", "webp", "bmp", "gif")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten pictures of five formats; two have two captions, one of these with a line break."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["image,caption,not"]
    for number in range(10):
        noise = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        name = f"{number}.{FORMATS[number % 5]}"
        Image.fromarray(noise).save(folder / name)
        lines.append(f"{name},caption {number},wrong {number}")
    lines += ['0.jpg,"one\nmore",wrong too', "3.bmp,once more,never"]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "pairs.csv"


def content_of(pairs: Pairs) -> dict[str, tuple[list[str], bytes]]:
    """Captions and pixels by the first caption."""
    return {
        pairs.captions(index)[0]: (pairs.captions(index), pairs.open(index).tobytes())
        for index in range(len(pairs))
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_packed_reads_as_before(workers: int, table: Path, tmp_path: Path) -> None:
    source = PairsConfig(path=str(table))
    done = pack_data(source, tmp_path / "out", shard_size=4, workers=workers)
    assert done == (3, 10, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0.tar", "1.tar", "2.tar", "nshards.txt", "sizes.json"
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"0.tar": 4, "1.tar": 4, "2.tar": 2}
    assert (tmp_path / "out" / "nshards.txt").read_text().strip() == "3"
    expected = content_of(Pairs(source))
    expected["caption 0"][0][1] = "one more"
    assert content_of(Pairs(PairsConfig(path=str(tmp_path / "out")))) == expected
    whole = tmp_path / "again"
    pack_data(source, whole, shard_size=4)
    for name in ("0.tar", "1.tar", "2.tar"):  # the same bytes each time
        assert (whole / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_tars_keep_the_rules_of_webdataset(table: Path, tmp_path: Path) -> None:
    """Files of a sample follow one another, share a key, and are those of the source, byte by byte."""
    pack_data(PairsConfig(path=str(table)), tmp_path / "out", shard_size=100)
    with tarfile.open(tmp_path / "out" / "0.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    keys = [name.split(".")[0] for name, _ in members]
    assert keys == [f"{number:09d}" for number in range(10) for _ in range(2)]
    assert {name.split(".", 1)[1] for name, _ in members} == {"jpg", "png", "webp", "txt"}
    assert [name.endswith(".txt") for name, _ in members] == [False, True] * 10
    shown = []
    for (name, picture), (_, text) in zip(members[::2], members[1::2], strict=True):
        number = int(text.decode().splitlines()[0].removeprefix("caption "))
        shown.append(number)
        own = table.parent / f"{number}.{FORMATS[number % 5]}"
        if number % 5 < 3:
            assert picture == own.read_bytes()
            assert own.suffix == Path(name).suffix
        else:
            assert np.array_equal(Image.open(io.BytesIO(picture)), Image.open(own).convert("RGB"))
    assert sorted(shown) == list(range(10))
    assert shown != list(range(10))  # shuffled
    assert dict(members)[f"{shown.index(0):09d}.txt"] == b"caption 0\none more"


def test_hard_negatives_travel_along(table: Path, tmp_path: Path) -> None:
    source = PairsConfig(path=str(table), negative_column="not")
    pack_data(source, tmp_path / "out")
    before, after = Pairs(source), Pairs(PairsConfig(path=str(tmp_path / "out"), negative_column="not"))
    texts = {after.captions(index)[0]: after.texts(index) for index in range(10)}
    assert texts["caption 3"] == before.texts(3) == (["caption 3", "once more"], ["wrong 3", "never"])
    assert texts["caption 0"][1] == ["wrong 0", "wrong too"]


def test_bad_samples_are_left_out_listed_and_bounded(table: Path, tmp_path: Path) -> None:
    (table.parent / "4.gif").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"1 of 10 samples cannot be read, max_bad_share allows 0; .*4\.gif"):
        pack_data(PairsConfig(path=str(table)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    done = pack_data(PairsConfig(path=str(table), max_bad_share=0.1), tmp_path / "out")
    assert done == (1, 9, 1)
    (line,) = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert "row 5: 4.gif: is not a picture" in json.loads(line)["error"]
    with pytest.raises(ConfigError, match="is there already: give another folder"):
        pack_data(PairsConfig(path=str(table)), tmp_path / "out")


def test_what_was_packed_packs_again(table: Path, tmp_path: Path) -> None:
    """From tars to tars, from several sources, whatever their weights."""
    pack_data(PairsConfig(path=str(table)), tmp_path / "one", shard_size=3)
    again = (PairsConfig(path=str(tmp_path / "one"), weight=3), PairsConfig(path=str(table)))
    assert pack_data(again, tmp_path / "two", shard_size=15) == (2, 20, 0)


def test_the_command(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["data", "pack", str(table), "-o", str(out), "--shard-size", "5", "--workers", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out}: 10 samples in 2 tar(s)\n"
    assert main(["data", "check", str(out), "--workers", "0"]) == 0
    assert "captions                                   12\n" in capsys.readouterr().out


def test_open_clip_reads_the_tars(table: Path, tmp_path: Path) -> None:
    """Its own grouping and filter; its counting, too."""
    webdataset = pytest.importorskip("webdataset")
    if not webdataset.__version__.startswith("0.2.") or int(webdataset.__version__[4:]) > 86:
        pytest.skip("open_clip_train reads no tar with webdataset above 0.2.86")
    from open_clip_train.data import (
        filter_no_caption_or_no_image,
        get_dataset_size,
        tarfile_to_samples_nothrow,
    )

    pack_data(PairsConfig(path=str(table)), tmp_path / "out", shard_size=4)
    assert get_dataset_size(f"{tmp_path}/out/{{0..2}}.tar") == (10, 3)
    shards = webdataset.SimpleShardList(f"{tmp_path}/out/{{0..2}}.tar")
    found = [sample for sample in tarfile_to_samples_nothrow(shards) if filter_no_caption_or_no_image(sample)]
    assert len(found) == 10
