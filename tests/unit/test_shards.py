"""Tars as webdataset packs them: samples found by their headers, wherever they lie, none of them run."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train import shards
from vlm_vision.train.file_cache import FileCache
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.shards import Shards, find_shards


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (red, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def tar_of(members: Sequence[tuple[str, bytes]] | Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in dict(members).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def samples(first: int, count: int) -> dict[str, bytes]:
    return {
        f"{number:04d}{suffix}": content
        for number in range(first, first + count)
        for suffix, content in ((".png", png(number)), (".txt", f"picture {number}".encode()))
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tars of 3, 1 and 4 samples, without their counts."""
    for number, (first, count) in enumerate(((0, 3), (3, 1), (4, 4))):
        (tmp_path / f"{number}.tar").write_bytes(tar_of(samples(first, count)))
    return tmp_path


def read(pairs: Pairs) -> list[tuple[int, list[str]]]:
    return [(pairs.open(index).getpixel((0, 0))[0], pairs.captions(index)) for index in range(len(pairs))]


def shards_of(path: Path | str, **options: Any) -> Pairs:
    return Pairs(PairsConfig(path=str(path), **options))


@pytest.mark.parametrize("path", ["", "*.tar", "{0..2}.tar", "{0,1,2}.tar"])
def test_samples_of_several_tars(path: str, folder: Path) -> None:
    pairs = shards_of(folder / path)
    assert read(pairs) == [(number, [f"picture {number}"]) for number in range(8)]
    assert (pairs.num_pairs, pairs.dropped) == (8, 0)
    assert pairs.name(4) == "2.tar/'0004'"
    assert pairs.place(4) == f"{folder}/2.tar, sample '0004'"
    assert list(pairs.replacements(5)) == [5, 6, 7, 4]


def test_ten_comes_after_nine(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        (tmp_path / f"{number}.tar").write_bytes(tar_of(samples(number, 1)))
    assert [Path(name).stem for name in find_shards(str(tmp_path))] == ["1", "9", "10"]


def test_counts_beside_the_tars_spare_reading_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 1, "2.tar": 4}))
    opened: list[int] = []
    own = Shards._open
    monkeypatch.setattr(Shards, "_open", lambda self, shard: (opened.append(shard), own(self, shard))[1])
    pairs = shards_of(folder)
    assert (len(pairs), opened) == (8, [])
    assert pairs.captions(3) == ["picture 3"]
    assert set(opened) == {1}

    (folder / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 2}))  # one wrong, one not there
    pairs = shards_of(folder)
    assert len(pairs) == 9
    with pytest.raises(DataError, match=r"1\.tar: has 1 samples, but sizes\.json beside it says 2"):
        pairs.open(3)
    (folder / "sizes.json").write_text("[3]")
    with pytest.raises(DataError, match=r"sizes\.json: must hold the samples of each tar"):
        shards_of(folder)


def test_headers_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(shards_of(folder)) == 8
    monkeypatch.setattr(shards, "members_of_tar", None)
    assert len(read(shards_of(folder))) == 8
    monkeypatch.undo()
    (folder / "1.tar").write_bytes(tar_of(samples(3, 2)))  # another tar in its place
    assert len(shards_of(folder)) == 9


def test_a_sample_is_what_shares_a_name_up_to_the_first_dot(tmp_path: Path) -> None:
    record = {"caption": "from json", "alt": ["one", " ", "two"], "not": ["a", "b", "c"], "number": 7}
    members = {
        "./cats/1.seg.png": png(99),
        "./cats/1.jpg": png(1),  # whatever its name says, it is a picture
        "./dogs/1.PNG": png(2),
        "./cats/1.txt": b"a cat\nanother cat\n\n",
        "./dogs/1.json": json.dumps(record).encode(),
        "./dogs/1.pickle": pickle.dumps(print),
        "./.hidden.png": png(3),
    }
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    pairs = shards_of(tmp_path / "a.tar")
    assert read(pairs) == [(1, ["a cat", "another cat"]), (2, ["from json"])]
    other = shards_of(tmp_path / "a.tar", caption_column="alt", negative_column="not")
    assert other.texts(1) == (["one", "two"], ["a", "c"])
    with pytest.raises(DataError, match=r"sample 'cats/1': has neither \.txt nor \.json with captions"):
        other.captions(0)
    assert shards_of(tmp_path / "a.tar", caption_column="number").captions(1) == ["7"]
    with pytest.raises(DataError, match=r"'dogs/1': its \.json has no 'atl'; did you mean 'alt'"):
        shards_of(tmp_path / "a.tar", caption_column="atl").captions(1)
    uneven = shards_of(tmp_path / "a.tar", caption_column="caption", negative_column="not")
    with pytest.raises(DataError, match="has 1 captions, but 3 negatives"):
        uneven.texts(1)


def test_bad_samples_are_named(tmp_path: Path) -> None:
    members = {
        "a.png": b"<html>",
        "a.txt": b"fine",
        "b.txt": b"no picture",
        "c.png": png(3),
        "d.png": png(4),
        "d.txt": b"\xff\xfe",
        "e.png": png(5),
        "e.json": b"{",
        "f.png": png(6),
        "f.txt": b"NaN\n",
    }
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    pairs = shards_of(tmp_path)
    for index, message in enumerate(("is not a picture", "has no picture")):
        with pytest.raises(DataError, match=rf"0\.tar, sample '{'ab'[index]}': {message}"):
            pairs.open(index)
    for index, message in enumerate(
        ("has neither", "is not UTF-8", "cannot be read", "has no caption"), start=2
    ):
        with pytest.raises(DataError, match=rf"0\.tar, sample '{'abcdef'[index]}': .*{message}"):
            pairs.captions(index)


def test_nothing_is_run_or_written_elsewhere(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/owned",)

    evil = pickle.dumps(Payload())
    members = {
        "../x.png": png(1),
        "../x.txt": b"outside",
        "y.pyd": evil,
        "y.pickle": evil,
        "y.pth": evil,
        "y.npy": evil,
    }
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(tar_of(members))
    assert read(shards_of(tmp_path / "in")) == [(1, ["outside"])]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "in"]
    with pytest.raises(DataError, match="commands are not run"):
        shards_of(f"pipe:touch {tmp_path}/owned")
    assert not (tmp_path / "owned").exists()


def test_a_damaged_tar(folder: Path) -> None:
    whole = (folder / "2.tar").read_bytes()
    (folder / "2.tar").write_bytes(whole[: len(samples(4, 2)) * 1024 + 100])
    with pytest.raises(DataError, match=r"2\.tar: is (no tar, or is )?cut off"):
        shards_of(folder)
    # With counts, which spare looking, the samples that are whole are read, and the others are bad.
    (folder / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 1, "2.tar": 4}))
    pairs = shards_of(folder)
    assert [pairs.captions(index) for index in (4, 5)] == [["picture 4"], ["picture 5"]]
    for index in (6, 7):
        with pytest.raises(DataError, match=r"2\.tar: is (no tar, or is )?cut off"):
            pairs.open(index)


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"3\.tar' does not exist; did you mean"):
        shards_of(folder / "{0..3}.tar")
    with pytest.raises(DataError, match=r"x-\*\.tar' does not exist"):
        shards_of(folder / "x-*.tar")
    with pytest.raises(DataError, match=r"unpack it to a \.tar first"):
        shards_of(folder / "a.tar.gz")
    with pytest.raises(DataError, match="only tars are read from elsewhere"):
        shards_of("s3://bucket/table.parquet")
    with pytest.raises(DataError, match="nowhere"):
        shards_of("nowhere://bucket/0.tar")
    (folder / "0.tar").write_bytes(tar_of({"a.cls": b"1"}))
    with pytest.raises(DataError, match="no sample in 1 tar"):
        shards_of(folder / "0.tar")


@pytest.fixture
def bucket(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("VLM_VISION_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield memory
    memory.rm("/bucket", recursive=True)


def test_tars_elsewhere_are_copied_once(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    own = shards._fetch
    monkeypatch.setattr(shards, "_fetch", lambda url, path: (fetched.append(url), own(url, path))[1])
    bucket.pipe_file("/bucket/sizes.json", json.dumps({"0.tar": 3, "1.tar": 1, "2.tar": 4}).encode())
    for path in ("memory://bucket/*.tar", "memory://bucket/{0..2}.tar"):
        pairs = shards_of(path)
        assert len(pairs) == 8
    assert fetched == []
    assert pairs.captions(0) == ["picture 0"]
    assert fetched == ["memory:///bucket/0.tar"]
    assert read(pairs) == [(number, [f"picture {number}"]) for number in range(8)]
    assert read(shards_of("memory://bucket/*.tar")) == read(pairs)
    assert sorted(fetched) == [f"memory:///bucket/{number}.tar" for number in range(3)]


def test_a_tar_that_goes_missing_elsewhere_ends_the_run(bucket: Any) -> None:
    pairs = shards_of("memory://bucket/*.tar")
    bucket.rm("/bucket/1.tar")
    fresh = pickle.loads(pickle.dumps(pairs))
    with pytest.raises(DataError, match=r"bucket/1\.tar: cannot be read"):
        fresh.open(3)


def test_copies_are_bounded(bucket: Any, tmp_path: Path) -> None:
    size = len(bucket.cat_file("/bucket/2.tar"))
    pairs = shards_of("memory://bucket/*.tar", cache_gb=2.5 * size / 1e9)
    for _ in range(2):
        assert read(pairs) == [(number, [f"picture {number}"]) for number in range(8)]
    held = [path.stat().st_size for path in (tmp_path / "cache" / "files").iterdir()]
    assert 0 < sum(held) <= 2.5 * size
    (source,) = pairs.sources
    assert isinstance(source, Shards)
    source.check_room(2)
    with pytest.raises(ConfigError, match=r"3 tars of .* are read at once, which cache_gb .* does not hold"):
        source.check_room(64)


def test_the_longest_unused_copies_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_VISION_CACHE", str(tmp_path))
    cache, made = FileCache(250), []

    def make(name: str) -> bytes:
        def write(path: Path) -> None:
            made.append(name)
            path.write_bytes(name.encode() * 100)

        path = cache.path(name, write)
        os.utime(path, (len(made), len(made)))
        with cache.open(name, write) as file:
            return file.read()

    for name in "abac":  # a was used after b
        assert make(name) == name.encode() * 100
    assert made == ["a", "b", "c"]
    assert sorted(path.name for path in cache.folder.iterdir()) == ["a", "c"]
    make("b")
    assert made == ["a", "b", "c", "b"]


def test_offsets_are_those_of_the_tar(folder: Path) -> None:
    whole = (folder / "2.tar").read_bytes()
    index = shards._Index.of_tar(str(folder / "2.tar"), "2.tar")
    png_column, txt_column = (shards.SUFFIXES.index(suffix) for suffix in (".png", ".txt"))
    for number in range(4):
        start, size = index.offsets[number, png_column], index.sizes[number, png_column]
        assert whole[start : start + size] == png(4 + number)
    assert index.sizes[:, txt_column].tolist() == [len("picture 4")] * 4
    assert np.all(index.sizes[:, shards.SUFFIXES.index(".json")] == -1)
