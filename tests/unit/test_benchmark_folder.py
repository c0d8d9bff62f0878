"""CLIP_benchmark's folder layout, written here as its exporter writes it."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_layout import NAMES, picture, sample, write_shard
from tiny import tiny_dual_encoder

from vlm_vision.errors import DataError
from vlm_vision.train.benchmark_folder import BenchmarkFolder, is_benchmark_folder
from vlm_vision.train.held_out import open_captioned, open_labelled
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.validation import validate_dual_encoder
from vlm_vision.train.validation_config import ValidationConfig, ZeroShotConfig


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two splits of two shards, seven pictures each."""
    root = tmp_path / "classes"
    for split, first in (("train", 100), ("test", 0)):
        samples = [
            sample(first + number, str(number % 3), "cls", ("webp", "png", "jpg")[number % 3])
            for number in range(7)
        ]
        write_shard(root / split / "0.tar", samples[:5])
        write_shard(root / split / "1.tar", samples[5:])
        (root / split / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}.\n")
    return root


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    root = tmp_path / "captions"
    texts = [f"caption {number}\nanother of {number}" for number in range(4)]
    write_shard(root / "test" / "0.tar", [sample(n, text, "txt", "webp") for n, text in enumerate(texts)])
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


def test_classes_are_read_by_number(classes: Path) -> None:
    folder = BenchmarkFolder(classes)
    assert (len(folder), folder.is_retrieval, folder.classes) == (7, False, NAMES)
    assert folder.labels == [0, 1, 2, 0, 1, 2, 0]
    assert [folder.captions(index) for index in (1, 2)] == [["traffic light"], ["10"]]
    assert folder.name(5) == "1.tar/s0000005.jpg"
    for index in range(7):
        error = np.asarray(folder.open(index)).astype(int) - np.asarray(picture(index))
        assert index % 3 == 2 or not error.any()  # webp and png are lossless
    assert np.array_equal(BenchmarkFolder(classes / "train").open(0), np.asarray(picture(100)))
    data = open_labelled(ZeroShotConfig(path=str(classes)))
    assert data.classes == NAMES
    assert data.templates == ["a photo of a {}.", "the {}."]
    assert data.targets.tolist() == folder.labels


def test_classes_without_names_and_other_names(classes: Path) -> None:
    config = ZeroShotConfig(path=str(classes), classes=("a", "b", "c", "d"), templates="openai_7")
    data = open_labelled(config)
    assert (data.classes, len(data.templates)) == (["a", "b", "c", "d"], 7)
    with pytest.raises(DataError, match="class 2, but 2 are named"):
        open_labelled(config.model_copy(update={"classes": ("a", "b")}))
    (classes / "classnames.txt").unlink()
    (classes / "zeroshot_classification_templates.txt").unlink()
    data = open_labelled(ZeroShotConfig(path=str(classes)))
    assert (data.classes, data.templates) == (["0", "1", "2"], ["{}"])


def test_captions_are_lines(captions: Path) -> None:
    pictures = open_captioned(PairsConfig(path=str(captions)))
    assert len(pictures) == 4
    assert pictures.captions(2) == ["caption 2", "another of 2"]
    assert np.array_equal(pictures.open(3), np.asarray(picture(3)))


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_scores_are_those_of_the_same_pictures_in_a_table(
    kind: str, classes: Path, captions: Path, tmp_path: Path
) -> None:
    model = tiny_dual_encoder().eval()
    paths = {"train": str(classes / "train"), "test": str(classes), "retrieval": str(captions)}
    names: dict[str, object] = {"templates": ("a photo of a {}.", "the {}.")}
    if kind == "csv":
        names["classes"] = tuple(NAMES)
        for part, folder in (
            ("train", BenchmarkFolder(classes / "train")),
            ("test", BenchmarkFolder(classes)),
            ("retrieval", BenchmarkFolder(captions)),
        ):
            (tmp_path / part).mkdir()
            lines = ["image,caption"]
            for index in range(len(folder)):
                folder.open(index).save(tmp_path / part / f"{index}.png")
                lines += [f"{index}.png,{caption}" for caption in folder.captions(index)]
            paths[part] = str(tmp_path / part / "t.csv")
            Path(paths[part]).write_text("\n".join(lines) + "\n")
    train, test = ({"path": paths[part], **names} for part in ("train", "test"))
    config = ValidationConfig(
        zero_shot=test, retrieval={"path": paths["retrieval"]}, linear_probe={"train": train, "test": test}
    )
    scores = validate_dual_encoder(model, config)
    assert len(scores) == 10
    if kind == "csv":
        folders = config.model_copy(
            update={
                "zero_shot": ZeroShotConfig(path=str(classes)),
                "retrieval": PairsConfig(path=str(captions)),
            }
        )
        assert scores == validate_dual_encoder(model, folders)


def test_what_is_damaged_is_named(classes: Path, captions: Path) -> None:
    assert is_benchmark_folder(classes)
    assert is_benchmark_folder(classes / "test")
    assert not is_benchmark_folder(classes.parent)
    with pytest.raises(DataError, match="captions there, and no classes"):
        open_labelled(ZeroShotConfig(path=str(captions)))
    with pytest.raises(DataError, match="classes there, and no captions"):
        open_captioned(PairsConfig(path=str(classes)))
    (classes / "test" / "nshards.txt").write_text("3")
    with pytest.raises(DataError, match=r"2.tar is missing: .*nshards.txt counts it"):
        BenchmarkFolder(classes)
    (classes / "test" / "nshards.txt").write_text("many")
    with pytest.raises(DataError, match="'many' is no number of shards"):
        BenchmarkFolder(classes)
    shard = classes / "train" / "1.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        between = tar.getmembers()[2].offset  # after the first picture and its class
    for cut in (700, between, between + 100):
        shard.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"1.tar: is (damaged|cut off)"):
            BenchmarkFolder(classes / "train")
    for text, message in (("2.5", "'2.5' is no number"), ("3", "class 3, but classnames.txt names 3")):
        write_shard(shard, [sample(0, text, "cls")])
        with pytest.raises(DataError, match=message):
            BenchmarkFolder(classes / "train")
    key, files = sample(0, "1", "cls")
    write_shard(shard, [(key, {"png": files["png"]})])
    with pytest.raises(DataError, match="s0000000 has not both"):
        BenchmarkFolder(classes / "train")
    write_shard(shard, [(key, {**files, "png": b"no picture"})])
    with pytest.raises(DataError, match=r"1.tar: s0000000.png: .*not a picture"):
        BenchmarkFolder(classes / "train").open(5)
    (classes / "dataset_type.txt").write_text("multilabel")
    with pytest.raises(DataError, match="'multilabel' data are not scored here"):
        BenchmarkFolder(classes / "train")


def test_the_model_sees_what_the_shard_holds(classes: Path) -> None:
    model = tiny_dual_encoder().eval()
    pixels = [model.image_processor(BenchmarkFolder(classes).open(index)) for index in (0, 1)]
    expected = [model.image_processor(picture(index)) for index in (0, 1)]
    assert torch.equal(torch.cat(pixels), torch.cat(expected))
