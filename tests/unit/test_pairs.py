"""Pictures with captions: every file format, bad input named, and an order that depends only on the seed."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny import captioned_pictures, tiny_dual_encoder

from vlm_vision.config import load_config
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.pairs import Batch, Pairs, TrainingPairs
from vlm_vision.train.pairs_config import AugmentConfig, PairsConfig

ROWS = [("0.png", "a red thing"), ("1.png", 'green, "very" green'), ("2.png", "none of it"), ("3.png", "007")]


def picture(folder: Path, number: int) -> bytes:
    """A picture of 8x6 pixels whose red channel tells its number, as file `number.png` and as bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (10 * number, 0, 0)).save(buffer, "png")
    (folder / f"{number}.png").write_bytes(buffer.getvalue())
    return buffer.getvalue()


def write_csv(folder: Path, separator: str = ",", suffix: str = ".csv") -> Path:
    quoted = [[f'"{field.replace(chr(34), 2 * chr(34))}"' for field in row] for row in ROWS]
    lines = [separator.join(row) for row in [["image", "caption"], *quoted]]
    path = folder / f"pairs{suffix}"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_jsonl(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"image": name, "caption": text}) + "\n" for name, text in ROWS))
    return path


def write_parquet(folder: Path, *, as_feature: bool) -> Path:
    """Encoded bytes in a binary column, or in the column of dicts that Hugging Face writes for pictures."""
    images: list[Any] = [picture(folder, number) for number in range(len(ROWS))]
    features = Features({"image": Value("binary"), "caption": Value("string")})
    if as_feature:
        images = [{"bytes": image, "path": None} for image in images]
        features["image"] = ImageFeature()
    path = folder / "pairs.parquet"
    Dataset.from_dict({"image": images, "caption": [text for _, text in ROWS]}, features=features).to_parquet(
        path
    )
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "comma": write_csv,
    "tab": lambda folder: write_csv(folder, "\t"),
    "semicolon": lambda folder: write_csv(folder, ";"),
    "tsv": lambda folder: write_csv(folder, "\t", ".tsv"),
    "upper case": lambda folder: write_csv(folder, ",", ".CSV"),
    "jsonl": write_jsonl,
    "parquet with bytes": lambda folder: write_parquet(folder, as_feature=False),
    "parquet with pictures": lambda folder: write_parquet(folder, as_feature=True),
}


def csv_of(folder: Path, *lines: str, name: str = "pairs.csv") -> PairsConfig:
    for number in range(4):
        picture(folder, number)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return PairsConfig(path=str(folder / name))


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return tiny_dual_encoder()


def training(pairs: Pairs, model: DualEncoder, seed: int = 0) -> TrainingPairs:
    return TrainingPairs(pairs, model.image_processor, model.tokenizer, AugmentConfig(), seed)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_give_the_same_pairs(kind: str, tmp_path: Path) -> None:
    for number in range(len(ROWS)):
        picture(tmp_path, number)
    pairs = Pairs(PairsConfig(path=str(FORMATS[kind](tmp_path))))
    assert [pairs.captions(index) for index in range(len(pairs))] == [[text] for _, text in ROWS]
    assert [pairs.open(index).getpixel((0, 0)) for index in range(4)] == [(10 * n, 0, 0) for n in range(4)]
    assert (pairs.num_pairs, pairs.dropped) == (4, 0)


def test_folder_of_class_folders(tmp_path: Path) -> None:
    for number, name in enumerate(("tabby_cat", "dog")):
        (tmp_path / name).mkdir()
        picture(tmp_path / name, number)
        (tmp_path / name / "notes.txt").write_text("not a picture")
    pairs = Pairs(PairsConfig(path=str(tmp_path)))
    assert [pairs.captions(index) for index in range(2)] == [["dog"], ["tabby cat"]]
    assert pairs.open(0).getpixel((0, 0)) == (10, 0, 0)
    with pytest.raises(DataError, match="no pictures in class folders"):
        Pairs(PairsConfig(path=str(tmp_path / "dog")))


def test_rows_of_one_picture_are_its_captions(tmp_path: Path, model: DualEncoder) -> None:
    config = csv_of(tmp_path, "image,caption", "0.png,red", "1.png,black", "0.png,crimson")
    pairs = Pairs(config)
    assert [pairs.captions(index) for index in range(len(pairs))] == [["red", "crimson"], ["black"]]
    assert pairs.num_pairs == 3
    drawn = {training(pairs, model)._batch([(epoch, 0)]).tokens[0, 1].item() for epoch in range(20)}
    assert drawn == {model.tokenizer(text)[0, 1].item() for text in ("red", "crimson")}


def test_a_numeric_column_stays_as_it_is_written(tmp_path: Path) -> None:
    """Class 0 is a caption, and 01 is not 1."""
    pairs = Pairs(csv_of(tmp_path, "image,caption", "0.png,0", "1.png,01", "2.png,1e3"))
    assert [pairs.captions(index) for index in range(len(pairs))] == [["0"], ["01"], ["1e3"]]
    (tmp_path / "pairs.jsonl").write_text('{"image": "0.png", "caption": 0}\n')
    assert Pairs(PairsConfig(path=str(tmp_path / "pairs.jsonl"))).captions(0) == ["0"]


def test_rows_without_a_caption_are_left_out_listed_and_bounded(tmp_path: Path) -> None:
    config = csv_of(
        tmp_path, "image,caption", "0.png,", "1.png,   ", "2.png,NaN", "3.png", "0.png,None", "1.png,nanny"
    )
    with pytest.raises(DataError, match=r"5 of 6 rows cannot be used, max_bad_share allows 0.*\n.*row 1: ''"):
        Pairs(config)
    pairs = Pairs(config.model_copy(update={"max_bad_share": 5 / 6}))
    assert (pairs.num_pairs, pairs.dropped, pairs.captions(0)) == (1, 5, ["nanny"])
    assert [row.split(".csv, ")[1] for row in pairs.bad_rows] == [
        "row 1: '' in column 'caption' is no caption",
        "row 2: '' in column 'caption' is no caption",
        "row 3: 'NaN' in column 'caption' is no caption",
        "row 4: '' in column 'caption' is no caption",
        "row 5: 'None' in column 'caption' is no caption",
    ]
    kept = Pairs(config.model_copy(update={"max_bad_share": 0.5, "missing_captions": ()}))
    assert (kept.num_pairs, kept.dropped) == (3, 3)


def test_a_null_of_json_is_no_caption(tmp_path: Path) -> None:
    picture(tmp_path, 0)
    (tmp_path / "pairs.jsonl").write_text(
        '{"image": "0.png", "caption": null}\n{"image": "0.png", "caption": "b"}\n'
    )
    pairs = Pairs(PairsConfig(path=str(tmp_path / "pairs.jsonl"), max_bad_share=0.5))
    assert (pairs.dropped, pairs.captions(0)) == (1, ["b"])


def test_no_caption_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row has a caption in column 'caption'"):
        Pairs(csv_of(tmp_path, "image,caption", "0.png,", "1.png,"))


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    config = csv_of(tmp_path, "image,captions", "0.png,a")
    with pytest.raises(
        DataError, match=r"no column 'caption'; did you mean 'captions'\? \(columns: image, captions\)"
    ):
        Pairs(config)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    csv_of(tmp_path, "image,caption", "0.png,a")
    with pytest.raises(DataError, match=r"pair\.csv' does not exist; did you mean '.*pairs\.csv'"):
        Pairs(PairsConfig(path=str(tmp_path / "pair.csv")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image,caption\n0.png,a\n1.png,b,c\n", "a.csv: cannot be read as csv: .*line 3"),
        ("a.csv", "", "a.csv: cannot be read as csv"),
        ("a.jsonl", '{"image": "0.png", "caption": "a"}\n{"image": \n', "a.jsonl: cannot be read as json"),
        ("a.parquet", "no parquet", "a.parquet: cannot be read as parquet"),
        ("a.xml", "<a/>", "a.xml: data must be a folder or one of .csv"),
    ],
)
def test_a_malformed_file_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        Pairs(PairsConfig(path=str(tmp_path / name)))


def test_pictures_outside_the_folder_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    picture(tmp_path, 9)
    (data / "link.png").symlink_to(tmp_path / "9.png")
    names = ("../9.png", str(tmp_path / "9.png"), "link.png")
    pairs = Pairs(csv_of(data, "image,caption", *(f"{name},a" for name in names)))
    for index in range(len(names)):
        with pytest.raises(DataError, match=f"row {index + 1}: picture .* lies outside the image folder"):
            pairs.open(index)
    inside = pairs.config.model_copy(update={"image_folder": str(tmp_path)})
    assert Pairs(inside).open(1).size == (8, 6)


def test_a_row_without_a_picture_is_named(tmp_path: Path) -> None:
    pairs = Pairs(csv_of(tmp_path, "image,caption", "0.png,a", ",b"))
    with pytest.raises(DataError, match="row 2: column 'image' is empty"):
        pairs.open(1)


def test_a_file_that_changed_in_place_is_read_again(tmp_path: Path) -> None:
    """Same path, same size, other words: what an earlier read left in the cache must not come back."""
    config = csv_of(tmp_path, "image,caption", "0.png,cat")
    assert Pairs(config).captions(0) == ["cat"]
    csv_of(tmp_path, "image,caption", "0.png,dog")
    assert Pairs(config).captions(0) == ["dog"]


def test_the_cache_is_the_tests_own(tmp_path: Path) -> None:
    Pairs(csv_of(tmp_path, "image,caption", "0.png,cat"))
    import datasets

    assert str(datasets.config.HF_DATASETS_CACHE).startswith(os.environ["HF_HOME"])


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{} and {}"]])
def test_templates_take_one_caption(templates: list[str]) -> None:
    with pytest.raises(ConfigError, match="templates must each hold one"):
        load_config(PairsConfig, {"path": "x.csv", "templates": templates})


def test_templates_are_drawn(tmp_path: Path, model: DualEncoder) -> None:
    config = csv_of(tmp_path, "image,caption", "0.png,{} cat").model_copy(
        update={"templates": ("a {}", "the {}")}
    )
    data = training(Pairs(config), model)
    drawn = {tuple(data._batch([(epoch, 0)]).tokens[0].tolist()) for epoch in range(20)}
    assert drawn == {tuple(model.tokenizer(f"{word} {{}} cat")[0].tolist()) for word in ("a", "the")}


def test_an_unreadable_picture_is_an_error_unless_some_are_allowed(
    tmp_path: Path, model: DualEncoder
) -> None:
    config = csv_of(tmp_path, "image,caption", "0.png,a", "1.png,b", "2.png,c", "3.png,d")
    (tmp_path / "1.png").write_bytes(b"<html>not found</html>")
    (tmp_path / "2.png").unlink()
    keys = [(0, index) for index in range(4)]

    error = training(Pairs(config), model).__getitems__(keys)
    assert isinstance(error, DataError)
    assert "row 2" in str(error)
    assert "1.png" in str(error)

    lenient = Pairs(config.model_copy(update={"max_bad_share": 0.5}))
    batch = training(lenient, model).__getitems__(keys)
    assert isinstance(batch, Batch)
    assert batch.squares[:, 0, 0, 0].tolist() == [0, 30, 30, 30]  # replaced by the next that can be read
    words = [model.tokenizer(word)[0, 1].item() for word in "addd"]
    assert batch.tokens[batch.captions, 1].tolist() == words  # with its own caption
    assert [error.split(":")[0].rpartition(", ")[2] for error in batch.bad] == ["row 2", "row 3", "row 3"]


def test_no_readable_picture_at_all(tmp_path: Path, model: DualEncoder) -> None:
    config = csv_of(tmp_path, "image,caption", "8.png,a", "9.png,b").model_copy(update={"max_bad_share": 1.0})
    error = training(Pairs(config), model).__getitems__([(0, 0)])
    assert isinstance(error, DataError)
    assert "not one picture can be read; the last says: " in str(error)


def test_captions_that_repeat_in_a_batch_are_tokenised_once(tmp_path: Path, model: DualEncoder) -> None:
    config = csv_of(tmp_path, "image,caption", "0.png,cat", "1.png,dog", "2.png,cat", "3.png,cat")
    batch = training(Pairs(config), model)._batch([(0, index) for index in (3, 1, 0, 2)])
    assert batch.captions.tolist() == [0, 1, 0, 0]
    assert batch.tokens.equal(model.tokenizer(["cat", "dog"]))


def test_captions_that_lose_their_end_are_counted(tmp_path: Path, model: DualEncoder) -> None:
    config = csv_of(tmp_path, "image,caption", "0.png," + "cat " * 14, "1.png," + "cat " * 15, "2.png,cat")
    batch = training(Pairs(config), model)._batch([(0, 0), (0, 1), (0, 2), (0, 1)])
    assert batch.truncated == 2
    end = model.tokenizer("")[0, 1]
    assert batch.tokens[1, -1] == end
    assert batch.tokens[0].equal(batch.tokens[1])


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path: Path, model: DualEncoder) -> None:
    data = Pairs(PairsConfig(path=str(captioned_pictures(tmp_path, 4))))
    config = AugmentConfig(crop_area=(0.3, 1.0), brightness=0.5)
    first, other = (
        TrainingPairs(data, model.image_processor, model.tokenizer, config, seed) for seed in (0, 1)
    )
    together = first._batch([(0, 2), (5, 1), (0, 3)])
    assert np.array_equal(together.squares[1], first._batch([(5, 1)]).squares[0])
    assert not np.array_equal(together.squares[1], first._batch([(6, 1)]).squares[0])
    assert not np.array_equal(together.squares[1], other._batch([(5, 1)]).squares[0])
