"""Features of a data set: what is written is what the tower gives, whole, and of these pictures alone."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_tower

from vlm_vision import VisionTower
from vlm_vision.cli import main
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.extract import Extraction, _default_shard_size, extract_features, extract_file
from vlm_vision.feature_shards import FeatureShards
from vlm_vision.preprocess import find_pictures

FORMATS = [
    "safetensors",
    pytest.param("parquet", marks=pytest.mark.skipif(find_spec("pyarrow") is None, reason="needs pyarrow")),
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eleven pictures of noise, one of them in a subfolder."""
    random = np.random.default_rng(0)
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for number in range(11):
        name = f"more/{number:02}.png" if number == 3 else f"{number:02}.png"
        noise = random.integers(0, 256, (24, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def extract(source: Path, output: Path, tower: VisionTower | None = None, **options: object) -> Extraction:
    settings = {"batch_size": 2, "workers": 0, "shard_size": 4, **options}
    done = extract_features(tower or tiny_tower(), [source], output, **settings)  # type: ignore[arg-type]
    assert done is not None
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["patch", "cls_patch", "cls", "pooled"])
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_features_are_the_towers_by_name(pictures: Path, tmp_path: Path, select: str, format: str) -> None:
    pooled = select == "pooled"
    tower = tiny_tower(pooled_head=True) if pooled else tiny_tower(select=select)
    done = extract(pictures, tmp_path / "out", tower, pooled=pooled, format=format)
    assert (done.pictures, done.bad, done.new, done.manifest.shards) == (11, 0, 11, 3)
    features = FeatureShards(tmp_path / "out")
    files = find_pictures(pictures)
    assert list(features) == [file.relative_to(pictures).as_posix() for file in files]
    run, worst = tower.pooled if pooled else tower, 0.0
    for file, found in zip(files, features.values(), strict=True):
        expected = run(tower.image_processor(file))[0]
        assert found.shape == expected.shape == torch.Size(features.manifest.shape)
        worst = max(worst, float((found - expected).abs().max()))
    assert worst <= 1e-6  # measured 8.4e-7, pooled, against batches of one
    assert torch.equal(features["more/03.png"], dict(features)["more/03.png"])


def test_several_layers_in_half_precision(pictures: Path, tmp_path: Path) -> None:
    tower = tiny_tower(layer=[-2, 1], dtype="bfloat16")
    extract(pictures, tmp_path / "out", tower, batch_size=4)
    found = torch.stack(list(FeatureShards(tmp_path / "out").values()))
    assert (found.dtype, found.shape) == (torch.bfloat16, (11, 16, 128))
    with torch.no_grad():
        expected = tower(tower.image_processor(find_pictures(pictures)[:4]))
    assert torch.equal(found[:4], expected)


def test_shards_can_be_read_without_us(pictures: Path, tmp_path: Path) -> None:
    extract(pictures, tmp_path / "st")
    ours = FeatureShards(tmp_path / "st")
    lines = [json.loads(line) for line in (tmp_path / "st" / "index.jsonl").read_text().splitlines()]
    assert lines[5] == {"picture": "06.png", "shard": "shard-00001.safetensors", "row": 1}
    assert torch.equal(load_file(tmp_path / "st" / lines[5]["shard"])["features"][1], ours["06.png"])


def test_parquet_can_be_read_without_us(pictures: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    extract(pictures, tmp_path / "pq", format="parquet")
    ours = FeatureShards(tmp_path / "pq")
    table = parquet.read_table(sorted((tmp_path / "pq").glob("*.parquet")))
    assert table["picture"].to_pylist() == list(ours)
    flat = table["features"].combine_chunks().storage.to_pylist()
    assert torch.equal(torch.tensor(flat).view(11, 16, 64), torch.stack(list(ours.values())))


def test_workers_change_nothing(pictures: Path, tmp_path: Path) -> None:
    extract(pictures, tmp_path / "alone", workers=0)
    extract(pictures, tmp_path / "two", workers=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "two")


def test_tars_give_what_their_pictures_give(pictures: Path, tmp_path: Path) -> None:
    files = find_pictures(pictures)
    for number, part in enumerate((files[:6], files[6:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for file in part:
                tar.add(file, file.relative_to(pictures).as_posix())
                text = tarfile.TarInfo(f"{file.stem}.txt")
                tar.addfile(text, io.BytesIO())
    extract(pictures, tmp_path / "folder")
    extract(tmp_path / "{0..1}.tar", tmp_path / "tars")
    for shard in range(3):
        name = f"shard-{shard:05}.safetensors"
        assert contents(tmp_path / "folder")[name] == contents(tmp_path / "tars")[name]


def test_the_reader_goes_to_other_processes(pictures: Path, tmp_path: Path) -> None:
    extract(pictures, tmp_path / "out")
    features = FeatureShards(tmp_path / "out")
    first = features["00.png"]
    assert torch.equal(pickle.loads(pickle.dumps(features))["00.png"], first)
    assert "00.png" in features
    assert "11.png" not in features
    with pytest.raises(KeyError, match=r"11.png: no such picture in"):
        features["11.png"]


def test_one_file_holds_the_rows_of_the_pictures_given(pictures: Path, tmp_path: Path) -> None:
    tower, output = tiny_tower(), tmp_path / "new" / "f.safetensors"
    given = [pictures / "05.png", pictures / "more", pictures / "05.png"]
    found = extract_file(tower, given, output, batch_size=2, workers=0)
    assert torch.equal(load_file(output)["features"], found)
    with torch.no_grad():
        expected = tower(tower.image_processor([given[0], pictures / "more" / "03.png", given[2]]))
    assert torch.allclose(found, expected, atol=1e-6)
    assert [path.name for path in output.parent.iterdir()] == ["f.safetensors"]


# Going on ---------------------------------------------------------------------------------------------------


def test_an_absent_shard_is_made_again_and_the_others_are_left(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    extract(pictures, output)
    whole, shard = contents(output), output / "shard-00001.safetensors"
    shard.unlink()
    (output / ".shard-00001.safetensors.abc.partial").write_bytes(b"left by a kill")
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("shard-*")}
    done = extract(pictures, output, shard_size=None, format=None)
    assert (done.new, done.pictures) == (4, 11)
    assert contents(output) == whole
    assert all((output / name).stat().st_mtime_ns == written for name, written in times.items())
    assert extract(pictures, output).new == 0


def test_an_unfinished_folder_is_no_data_set(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, tower = tmp_path / "out", tiny_tower()
    forward, calls = tower.backbone.forward_layers, iter(range(100))

    def fail_in_the_third_batch(*arguments: object) -> list[torch.Tensor]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tower.backbone, "forward_layers", fail_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        extract(pictures, output, tower)
    assert sorted(contents(output)) == ["features.json", "shard-00000.safetensors"]
    with pytest.raises(DataError, match="is not finished: run the command that made it again"):
        FeatureShards(output)
    monkeypatch.undo()
    assert extract(pictures, output).new == 7
    extract(pictures, tmp_path / "at once")
    assert contents(output) == contents(tmp_path / "at once")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tower": tiny_tower(layer=-1)}, r"was begun with layers \[2\], now \[3\]"),
        ({"tower": tiny_tower(select="cls")}, "select 'patch', now 'cls'"),
        ({"tower": tiny_tower(dtype="float16")}, "dtype 'float32', now 'float16'"),
        ({"format": "parquet"}, "format 'safetensors', now 'parquet'"),
        ({"shard_size": 5}, "shard_size 4, now 5"),
    ],
)
def test_other_options_in_the_same_folder_are_refused(
    pictures: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    extract(pictures, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        extract(pictures, tmp_path / "out", **change)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == before


def test_other_pictures_or_weights_in_the_same_folder_are_refused(pictures: Path, tmp_path: Path) -> None:
    output, tower = tmp_path / "out", tiny_tower()
    extract(pictures, output)
    with torch.no_grad():
        next(tower.parameters())[0] += 1
    with pytest.raises(ConfigError, match="a tower of other weights or preprocessing"):
        extract(pictures, output, tower)
    (pictures / "00.png").rename(pictures / "zz.png")
    with pytest.raises(ConfigError, match="pictures of other names, or in another order"):
        extract(pictures, output)
    (pictures / "zz.png").unlink()
    with pytest.raises(ConfigError, match="pictures 11, now 10"):
        extract(pictures, output)


def test_a_data_set_that_moved_goes_on(pictures: Path, tmp_path: Path) -> None:
    extract(pictures, tmp_path / "out")
    (tmp_path / "out" / "shard-00000.safetensors").unlink()
    pictures.rename(tmp_path / "moved")
    assert extract(tmp_path / "moved", tmp_path / "out").new == 4


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_shard_is_refused(pictures: Path, tmp_path: Path, format: str) -> None:
    output = tmp_path / "out"
    extract(pictures, output, format=format)
    shard = output / f"shard-00001.{format}"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"shard-00001.{format} is damaged .*: delete it and run"):
        extract(pictures, output)
    with pytest.raises(DataError, match=rf"shard-00001.{format} is damaged"):
        FeatureShards(output)["05.png"]
    shutil.copy(output / f"shard-00002.{format}", shard)
    with pytest.raises(DataError, match=rf"shard-00001.{format} is of other pictures"):
        extract(pictures, output)


def test_folders_of_something_else_are_left_alone(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty and holds no features"):
        extract(pictures, pictures)
    (tmp_path / "file").write_text("words")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        extract(pictures, tmp_path / "file")
    with pytest.raises(ConfigError, match="is no folder of features"):
        FeatureShards(pictures)


# What goes wrong --------------------------------------------------------------------------------------------


def test_bad_pictures_are_left_out_and_listed_up_to_a_share(pictures: Path, tmp_path: Path) -> None:
    extract(pictures, tmp_path / "all")
    for name in ("00.png", "05.png"):
        (pictures / name).write_bytes(b"<html>")
    with pytest.raises(
        DataError, match=r"1 of 11 pictures cannot be read, more than max_bad_share 0.05; .*00"
    ):
        extract(pictures, tmp_path / "out")
    done = extract(pictures, tmp_path / "out", max_bad_share=0.2)
    assert (done.pictures, done.bad) == (9, 2)
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_pictures.jsonl").read_text().splitlines()]
    assert [(line["picture"], line["shard"]) for line in listed] == [
        ("00.png", "shard-00000.safetensors"),
        ("05.png", "shard-00001.safetensors"),
    ]
    features, every = FeatureShards(tmp_path / "out"), FeatureShards(tmp_path / "all")
    assert list(features) == [name for name in every if name not in ("00.png", "05.png")]
    for name, found in features.items():
        assert torch.allclose(found, every[name], atol=1e-6)
    with pytest.raises(KeyError, match=r"00.png: .*00.png: is not a picture"):
        features["00.png"]


def test_bad_pictures_of_shards_that_are_there_count_too(pictures: Path, tmp_path: Path) -> None:
    (pictures / "00.png").write_bytes(b"<html>")
    extract(pictures, tmp_path / "out", max_bad_share=0.1)
    (pictures / "05.png").write_bytes(b"<html>")
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"2 of 11 pictures cannot be read, more than max_bad_share 0.1"):
        extract(pictures, tmp_path / "out", max_bad_share=0.1)


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_may_have_no_picture_that_can_be_read(pictures: Path, tmp_path: Path, format: str) -> None:
    for file in find_pictures(pictures)[4:8]:
        file.write_bytes(b"")
    done = extract(pictures, tmp_path / "out", max_bad_share=0.5, format=format)
    assert (done.pictures, done.bad) == (7, 4)
    assert len(list(FeatureShards(tmp_path / "out").values())) == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_that_goes_away_stops_the_run(
    pictures: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(pictures / "00.png", "00.png")
    monkeypatch.setattr("vlm_vision.extract.check_names", lambda listed: (tmp_path / "x.tar").unlink())
    with pytest.raises(FileNotFoundError) as told:
        extract(tmp_path / "x.tar", tmp_path / "out", workers=workers, max_bad_share=1)
    assert "Traceback" not in str(told.value)
    assert told.value.filename == str(tmp_path / "x.tar")


def test_features_that_are_not_finite_are_refused(pictures: Path, tmp_path: Path) -> None:
    tower = tiny_tower()
    with torch.no_grad():
        next(tower.backbone.parameters()).fill_(float("inf"))
    with pytest.raises(DataError, match=r"00.png: its features are not finite in float32"):
        extract(pictures, tmp_path / "out", tower)
    assert sorted(contents(tmp_path / "out")) == ["features.json"]


def test_a_disk_that_is_too_small_is_told_before_the_model_runs(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 11 * 16 * 64 * 4 - 1))
    with pytest.raises(DataError, match=r"the features take 0.0 GB, the disk has 0.0 GB free"):
        extract(pictures, tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 11 * 16 * 64 * 4))
    assert extract(pictures, tmp_path / "out").pictures == 11


def test_what_cannot_be_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="parquet has no bfloat16"):
        extract(pictures, tmp_path / "out", tiny_tower(dtype="bfloat16"), format="parquet")
    with pytest.raises(ConfigError, match="a shard has at most 65,536 pictures, not 100,000"):
        extract(pictures, tmp_path / "out", shard_size=100_000)
    with pytest.raises(ConfigError, match="no pooled head"):
        extract(pictures, tmp_path / "out", pooled=True)
    with pytest.raises(DataError, match="no picture was given"):
        extract_features(tiny_tower(), [], tmp_path / "out")
    (pictures / "more" / "00.png").write_bytes((pictures / "00.png").read_bytes())
    with pytest.raises(DataError, match=r"two pictures are called '00.png'"):
        extract_features(tiny_tower(), [pictures, pictures / "more"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_processes_need_a_launcher_and_a_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2: start it with torchrun"):
        extract(pictures, tmp_path / "out")


# The command ------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Status, what was printed, and the error."""
    status = main(["features", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err[printed.err.find("error: ") :]


def test_the_command_writes_a_folder_and_tells_what_was_left_out(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower, output = tmp_path / "tower", tmp_path / "out"
    tiny_tower(pooled_head=True).save_pretrained(tower)
    (pictures / "05.png").write_bytes(b"<html>")
    arguments = (tower, pictures, "-o", output, "--select", "pooled", "--max-bad-share", 0.1, "--workers", 1)
    status, printed, _ = command(capsys, *arguments)
    assert status == 0
    assert printed.startswith(
        f"{output}: features [32] float32 of 10 pictures in 1 safetensors shard(s); went"
    )
    assert f"1 left out, listed in {output / 'bad_pictures.jsonl'}" in printed
    assert FeatureShards(output).manifest.tower == str(tower)
    status, printed, _ = command(capsys, *arguments)
    assert status == 0
    assert "went through" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "f.safetensors", "--shard-size", "4"), "--shard-size is for a folder"),
        (("-o", "f.parquet"), "-o FOLDER --format parquet"),
        (("-o", "f", "--select", "pooled", "--layer=-2"), "give no --layer"),
        (("-o", "f", "--max-bad-share", "5"), "must be a number from 0 to 1, not '5'"),
        (("-o", "f", "--max-bad-share", "nan"), "must be a number from 0 to 1, not 'nan'"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_read(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, told = command(capsys, "absent-tower", "absent.png", *options)
    assert status == 2
    assert message in told


def test_a_tower_that_was_cast_is_noted_as_it_is(pictures: Path, tmp_path: Path) -> None:
    extract(pictures, tmp_path / "out", tiny_tower().to(torch.bfloat16))
    assert FeatureShards(tmp_path / "out").manifest.dtype == "bfloat16"
    assert FeatureShards(tmp_path / "out")["00.png"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("row_bytes", "pictures", "size"),
    [
        (576 * 1024 * 2, 1_000_000, 512),  # ViT-L/14-336 in bfloat16: 604 MB
        (576 * 4096 * 4, 1_000_000, 64),
        (768 * 2, 1_000_000, 8_192),
        (768 * 2, 100_000_000, 16_384),
        (768 * 2, 100, 128),
        (2**31, 100, 1),
    ],
)
def test_shards_are_of_a_size_to_handle(row_bytes: int, pictures: int, size: int) -> None:
    assert _default_shard_size(row_bytes, pictures) == size
