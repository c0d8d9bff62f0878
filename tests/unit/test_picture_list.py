"""Pictures of files, folders and tars; a tar is never extracted, and never cut short in silence."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_vision.errors import DataError
from vlm_vision.picture_list import (
    ListedPicture,
    check_names,
    hash_of,
    list_files,
    list_pictures,
    open_pictures,
)
from vlm_vision.preprocess import open_image


def png(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "png")
    return buffer.getvalue()


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = {"a.png": png(0), "a.txt": b"a caption", "sub/b.PNG": png(1), "c.pickle": b"cos\nsystem\n"}
    return pack(tmp_path / "shard.tar", members)


def names(*sources: str | Path) -> list[str]:
    return [picture.name for picture in list_pictures(sources)]


def opened(picture: ListedPicture) -> np.ndarray:
    (image,) = open_pictures([picture])
    assert isinstance(image, Image.Image), image
    return np.asarray(image)


def test_pictures_of_a_folder_are_named_by_their_path_in_it(tmp_path: Path) -> None:
    (tmp_path / "data" / "b").mkdir(parents=True)
    for name in ("c.png", "b/x.png", "a.png"):
        (tmp_path / "data" / name).write_bytes(png(0))
    (tmp_path / "data" / "notes.txt").write_text("none")
    assert names(tmp_path / "data") == ["a.png", "b/x.png", "c.png"]
    assert names(tmp_path / "data" / "c.png") == [str(tmp_path / "data" / "c.png")]


def test_where_files_are_needed_a_tar_is_refused(tmp_path: Path, shard: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    assert list_files([tmp_path / "{2,1}.png"]) == [tmp_path / "2.png", tmp_path / "1.png"]
    with pytest.raises(DataError, match=r"shard.tar: pictures in a tar are not taken here"):
        list_files([tmp_path, shard])


def test_pictures_of_a_tar_are_those_packed(shard: Path) -> None:
    pictures = list_pictures([shard])
    assert [picture.name for picture in pictures] == ["a.png", "sub/b.PNG"]
    for seed, picture in enumerate(pictures):
        assert np.array_equal(opened(picture), np.asarray(open_image(png(seed))))
    assert sorted(path.name for path in shard.parent.iterdir()) == ["shard.tar"]


def test_a_name_that_climbs_is_only_a_name(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", {"../../evil.png": png(3), "/etc/evil.png": png(4), "./kind.png": png(5)})
    pictures = list_pictures([path])
    assert [picture.name for picture in pictures] == ["../../evil.png", "/etc/evil.png", "kind.png"]
    assert np.array_equal(opened(pictures[0]), np.asarray(open_image(png(3))))


def test_long_names_and_pax_headers_do_not_shift_the_bytes(tmp_path: Path) -> None:
    name = "folder/" * 40 + "é.png"
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / f"{format}.tar", "w", format=format) as tar:
            member = tarfile.TarInfo(name)
            member.size = len(png(7))
            tar.addfile(member, io.BytesIO(png(7)))
        (picture,) = list_pictures([tmp_path / f"{format}.tar"])
        assert picture.name == name
        assert np.array_equal(opened(picture), np.asarray(open_image(png(7))))


def test_braces_stand_for_several_sources(tmp_path: Path) -> None:
    for part in ("train-08", "train-09", "train-10", "val-08", "val-09", "val-10"):
        pack(tmp_path / f"{part}.tar", {f"{part}.png": png(0)})
    whole = names(f"{tmp_path}/{{train,val}}-{{08..10}}.tar")
    assert whole == [f"{split}-{number}.png" for split in ("train", "val") for number in ("08", "09", "10")]
    (tmp_path / "{1..2}.png").write_bytes(png(0))
    assert names(f"{tmp_path}/{{1..2}}.png") == [f"{tmp_path}/{{1..2}}.png"]
    with pytest.raises(DataError, match=r"train-11.tar' does not exist"):
        names(f"{tmp_path}/train-{{08..11}}.tar")
    with pytest.raises(DataError, match=r"the range \{9\.\.8\} is empty"):
        names(f"{tmp_path}/train-{{9..8}}.tar")


def test_a_tar_that_is_cut_anywhere_is_refused(shard: Path) -> None:
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + 512
    between = [place for member in members for place in (member.offset, member.offset_data)]
    for cut in (*range(100, end, 100), *between, end):
        shard.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"shard.tar: is (no tar, or is )?cut off"):
            list_pictures([shard])
    shard.write_bytes(whole[: end + 512])  # one block of the two that mark the end
    assert len(list_pictures([shard])) == 2


def test_a_damaged_header_in_the_middle_is_refused(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        start = tar.getmembers()[2].offset
    content[start : start + 512] = b"z" * 512
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"damaged at byte {start:,}, after 1 of its files"):
        list_pictures([shard])


def test_what_is_no_plain_tar_is_refused(tmp_path: Path, shard: Path) -> None:
    (tmp_path / "page.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(DataError, match=r"page.tar: is no tar"):
        list_pictures([tmp_path / "page.tar"])
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as tar:
        tar.add(shard, "a.png")
    with pytest.raises(DataError, match=r"unpack it to a \.tar first"):
        list_pictures([tmp_path / "packed.tar.gz"])
    pack(tmp_path / "texts.tar", {"a.txt": b"words"})
    with pytest.raises(DataError, match=r"texts.tar: no picture in it"):
        list_pictures([tmp_path / "texts.tar"])
    with tarfile.open(tmp_path / "linked.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"'link.png' is a link"):
        list_pictures([tmp_path / "linked.tar"])
    (tmp_path / "tars").mkdir()
    shard.rename(tmp_path / "tars" / "shard.tar")
    with pytest.raises(DataError, match=r"its tar files are given as .*tars/\*\.tar"):
        list_pictures([tmp_path / "tars"])


def test_a_picture_that_cannot_be_read_is_told_by_name(tmp_path: Path) -> None:
    pack(
        tmp_path / "x.tar",
        {"page.jpg": b"<html>", "good.png": png(0), "cut.png": png(1)[:200], "no.png": b""},
    )
    results = list(open_pictures(list_pictures([tmp_path / "x.tar"])))
    assert [isinstance(result, DataError) for result in results] == [True, False, True, True]
    assert str(results[0]) == f"{tmp_path / 'x.tar'}: page.jpg: is not a picture that can be read"
    assert "x.tar: cut.png: the picture cannot be decoded" in str(results[2])


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    first = pack(tmp_path / "1.tar", {"a.png": png(0)})
    second = pack(tmp_path / "2.tar", {"a.png": png(1)})
    with pytest.raises(
        DataError, match=r"two pictures are called 'a.png': .*1.tar: a.png and .*2.tar: a.png"
    ):
        check_names(list_pictures([first, second]))
    with pytest.raises(DataError, match=r"'b\\udcff.png' is not UTF-8"):
        check_names([ListedPicture("b\udcff.png", "b\udcff.png")])


def test_the_hash_tells_names_order_and_size() -> None:
    a, b = ListedPicture("a", "1.tar", 0, 5), ListedPicture("b", "1.tar", 512, 5)
    assert hash_of([a, b]) == hash_of([a._replace(file="moved/1.tar"), b])
    others = [[b, a], [a], [a, b._replace(size=6)], [a, b._replace(name="c")]]
    assert len({hash_of(pictures) for pictures in [[a, b], *others]}) == 5
