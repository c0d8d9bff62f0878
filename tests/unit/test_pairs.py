"""Pictures with captions: every file format, bad input named, and an order that depends only on the seed."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny import captioned_pictures, tiny_dual_encoder

from vlm_vision.config import load_config
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.pairs import BadSamples, Batch, Pairs, TrainingPairs
from vlm_vision.train.pairs_config import AugmentConfig, DataNode, PairsConfig, source_nodes

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


def test_pictures_meet_their_captions_across_a_large_table(tmp_path: Path) -> None:
    """More rows than are kept in one piece; each picture is named near the start and near the end."""
    names = [f"{number:04d}.png" for number in range(1500)]
    rows = [f"{name},{place} {name}" for place in ("first", "last") for name in names]
    pairs = Pairs(csv_of(tmp_path, "image,caption", *rows))
    assert pairs._locate(0)[0]._column("image").num_chunks > 1  # type: ignore[attr-defined]
    assert [pairs.name(index) for index in range(len(pairs))] == names
    assert pairs.captions(7) == ["first 0007.png", "last 0007.png"]
    assert pairs.captions(1499) == ["first 1499.png", "last 1499.png"]


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


def test_parquet_in_several_files(tmp_path: Path) -> None:
    for part in range(3):
        table = {"image": [picture(tmp_path, part)], "caption": [f"part {part}"]}
        features = Features({"image": Value("binary"), "caption": Value("string")})
        Dataset.from_dict(table, features=features).to_parquet(tmp_path / f"{part}.parquet")
    for path in (tmp_path, tmp_path / "*.parquet", tmp_path / "{0..2}.parquet"):
        pairs = Pairs(PairsConfig(path=str(path)))
        assert [pairs.captions(index) for index in range(len(pairs))] == [["part 0"], ["part 1"], ["part 2"]]
        assert pairs.open(2).getpixel((0, 0)) == (20, 0, 0)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("image,caption\n")
    with pytest.raises(DataError, match="2 files, but only parquet files and tars can be several"):
        Pairs(PairsConfig(path=str(tmp_path / "*.csv")))


def test_a_hub_data_set_or_a_folder_like_one(tmp_path: Path) -> None:
    """A picture feature, classes with names, and splits, by the call that fetches one from the hub."""
    folder = tmp_path / "birds"
    (folder / "data").mkdir(parents=True)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["grey_heron", "robin"])})
    for split, labels in (("train", [0, 1, 0]), ("test", [1])):
        images = [{"bytes": picture(tmp_path, number), "path": None} for number in range(len(labels))]
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    found = Pairs(PairsConfig(path=f"hub:{folder}", caption_column="label"))
    captions = [found.captions(index) for index in range(len(found))]
    assert captions == [["grey heron"], ["robin"], ["grey heron"]]
    assert found.open(2).getpixel((0, 0)) == (20, 0, 0)
    assert len(Pairs(PairsConfig(path=f"hub:{folder}@test", caption_column="label"))) == 1
    with pytest.raises(DataError, match=r"birds@tset: cannot be loaded: .*tset"):
        Pairs(PairsConfig(path=f"hub:{folder}@tset", caption_column="label"))
    with pytest.raises(DataError, match=r"hub:nobody/nothing: cannot be loaded"):
        Pairs(PairsConfig(path="hub:nobody/nothing"))


def test_a_hub_folder_of_picture_files(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture(tmp_path / "train" / name, number)
    pairs = Pairs(PairsConfig(path=f"hub:{tmp_path}", caption_column="label"))
    assert [(pairs.captions(i), pairs.open(i).getpixel((0, 0))[0]) for i in range(2)] == [
        (["cat"], 0),
        (["dog"], 10),
    ]


def test_a_list_holds_the_captions_of_a_picture(tmp_path: Path) -> None:
    rows = [("0.png", ["red", "crimson"]), ("1.png", []), ("2.png", [None, "blue", " "]), ("0.png", ["dark"])]
    for number in range(3):
        picture(tmp_path, number)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"image": name, "caption": texts}) + "\n" for name, texts in rows))
    pairs = Pairs(PairsConfig(path=str(path), max_bad_share=0.5))
    assert [pairs.captions(index) for index in range(len(pairs))] == [["red", "crimson", "dark"], ["blue"]]
    assert (pairs.num_pairs, pairs.dropped) == (4, 3)
    assert [row.split("jsonl, ")[1][:5] for row in pairs.bad_rows] == ["row 2", "row 3", "row 3"]


def test_malformed_rows_are_left_out_up_to_the_bound(tmp_path: Path) -> None:
    lines = ("image,caption", "0.png,a", '1.png,"b\nc",d', "2.png,b,c,d", "", "3.png,e", ",f")
    config = csv_of(tmp_path, *lines)
    with pytest.raises(DataError, match=r"cannot be read as csv: line 4: 3 fields.*and 1 more of 5 rows"):
        Pairs(config)
    pairs = Pairs(config.model_copy(update={"max_bad_share": 0.4}))
    assert [pairs.captions(index) for index in range(len(pairs))] == [["a"], ["e"], ["f"]]
    assert [row.split("csv, ")[1] for row in pairs.bad_rows] == [
        "row 2: line 4: 3 fields, where the header has 2",
        "row 3: line 5: 4 fields, where the header has 2",
    ]
    with pytest.raises(DataError, match=r"row 5: column 'image' is empty"):
        pairs.open(2)

    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"image": "0.png", "caption": "a"}\n{"image": \n[1]\n{"image": "2.png", "caption": "b"}\n'
    )
    lenient = Pairs(PairsConfig(path=str(path), max_bad_share=0.5))
    assert [lenient.captions(index) for index in range(len(lenient))] == [["a"], ["b"]]
    assert "row 2: line 2: is not JSON" in lenient.bad_rows[0]
    assert "row 3: line 3: is no JSON object" in lenient.bad_rows[1]


def test_each_caption_has_its_own_hard_negative(tmp_path: Path, model: DualEncoder) -> None:
    lines = ("image,caption,not", "0.png,red,blue", "0.png,crimson,cyan", "1.png,green,", "2.png,black,white")
    config = csv_of(tmp_path, *lines).model_copy(
        update={"negative_column": "not", "max_bad_share": 0.3, "templates": ("a {}",)}
    )
    pairs = Pairs(config)
    assert [pairs.texts(index) for index in range(len(pairs))] == [
        (["red", "crimson"], ["blue", "cyan"]),
        (["black"], ["white"]),
    ]
    assert "'' in column 'not' is no caption" in pairs.bad_rows[0]
    data = training(pairs, model)
    for epoch in range(8):
        batch = data._batch([(epoch, 0), (epoch, 1)])
        assert batch.negatives is not None
        found = tuple(tokens[0].tolist() for tokens in (batch.tokens[batch.captions], batch.negatives))
        assert found in [
            (model.tokenizer(f"a {one}")[0].tolist(), model.tokenizer(f"a {other}")[0].tolist())
            for one, other in (("red", "blue"), ("crimson", "cyan"))
        ]
        assert batch.negatives[1].equal(model.tokenizer("a white")[0])
    with pytest.raises(DataError, match="no column 'nit'"):
        Pairs(config.model_copy(update={"negative_column": "nit"}))
    with pytest.raises(ConfigError, match="give negative_column for every source, or for none"):
        Pairs((config, config.model_copy(update={"negative_column": None})))


def test_several_sources_follow_one_another(tmp_path: Path) -> None:
    one = csv_of(tmp_path, "image,caption", "0.png,a", "1.png,b")
    (tmp_path / "cats" / "tabby").mkdir(parents=True)
    picture(tmp_path / "cats" / "tabby", 7)
    two = PairsConfig(path=str(tmp_path / "cats"), templates=("a {}", "the {}"), weight=3, max_bad_share=1.0)
    pairs = Pairs((one, two))
    assert (len(pairs), pairs.epoch_size, pairs.num_pairs, pairs.max_bad) == (3, 5, 3, 1)
    assert [pairs.captions(index) for index in range(3)] == [["a"], ["b"], ["tabby"]]
    assert pairs.open(2).getpixel((0, 0)) == (70, 0, 0)
    assert [pairs.source_config(index).templates for index in (0, 2)] == [("{}",), ("a {}", "the {}")]
    assert pairs.name(2) == "tabby/7.png"
    with pytest.raises(IndexError):
        pairs.captions(3)


def test_data_is_one_node_or_several() -> None:
    one = load_config(DataNode, {"data": {"path": "a.csv"}}, ["data.weight=2"]).data
    assert source_nodes(one) == (PairsConfig(path="a.csv", weight=2),)
    two = load_config(DataNode, {"data": [{"path": "a.csv"}, {"path": "b.csv"}]}, ["data.1.weight=0.5"]).data
    assert source_nodes(two) == (PairsConfig(path="a.csv"), PairsConfig(path="b.csv", weight=0.5))
    with pytest.raises(ConfigError, match=r"data: .* at least 1 item"):
        load_config(DataNode, {"data": []})
    wrong = [{"path": "a.csv", "weight": 0, "lanes": 0}, {"pth": "b.csv"}]
    with pytest.raises(ConfigError) as caught:
        load_config(DataNode, {"data": wrong})
    told = [line.split(" (")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert told == [
        "data.0.weight: input should be greater than 0",
        "data.0.lanes: input should be greater than 0",
        "data.1.path: missing",
        "data.1.pth: unknown key; did you mean 'path'?",
    ]


def test_pairs_travel_to_another_process(tmp_path: Path) -> None:
    pairs = Pairs(csv_of(tmp_path, "image,caption", "0.png,a", "1.png,b"))
    assert pairs.captions(1) == ["b"]
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.captions(1) == ["b"]
    assert copy.open(1).getpixel((0, 0)) == (10, 0, 0)


def test_bad_samples_are_listed_once_and_bounded(tmp_path: Path) -> None:
    lines = ("image,caption", "0.png,a", "1.png,b", "2.png,null", "3.png,d")
    pairs = Pairs(csv_of(tmp_path, *lines).model_copy(update={"max_bad_share": 0.67}))
    listed = tmp_path / "bad_samples.jsonl"
    bad = BadSamples(listed, pairs)
    bad.note(["x", "y"])
    again = BadSamples(listed, pairs)  # of a resumed run
    again.note(["y", "x", "y"])
    assert [json.loads(line)["error"] for line in listed.read_text().splitlines()] == [
        *pairs.bad_rows,
        "x",
        "y",
    ]
    assert again.replaced == 2
    other = BadSamples(listed, pairs, is_main=False)
    with pytest.raises(DataError, match="allows 2"):
        other.note(["z"])
    assert "z" not in listed.read_text()
    with pytest.raises(
        DataError, match="3 samples cannot be read, max_bad_share allows 2; they are listed in"
    ):
        again.note(["z"])
