from __future__ import annotations

from pathlib import Path

import pytest
from open_clip import zero_shot_metadata

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.prompts import class_numbers, read_classes, read_templates


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("openai_80", zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES),
        ("openai_7", zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES),
    ],
)
def test_named_templates_say_what_open_clips_functions_say(name: str, theirs: tuple) -> None:
    ours = read_templates(name)
    assert len(ours) == len(theirs) == int(name.split("_")[1])
    for word in ("cat", "{}", "traffic light"):
        assert [text.replace("{}", word) for text in ours] == [function(word) for function in theirs]


def test_files_hold_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a {c}.\n\n the {} \n", encoding="utf-8")
    assert read_templates(str(tmp_path / "t.txt")) == ["a {}.", "the {}"]
    (tmp_path / "c.txt").write_text("cat\nbig dog\n", encoding="utf-8")
    assert read_classes(str(tmp_path / "c.txt")) == ["cat", "big dog"]
    assert read_classes("imagenet") == list(zero_shot_metadata.IMAGENET_CLASSNAMES)


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a cat\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"t.txt must each hold one {}, but \['a cat'\]"):
        read_templates(str(tmp_path / "t.txt"))
    with pytest.raises(ConfigError, match="did you mean 'openai_7'"):
        read_templates("openai7")
    with pytest.raises(ConfigError, match="not one of imagenet"):
        read_classes("absent.txt")
    with pytest.raises(ConfigError, match="there is no class"):
        read_classes([])


def test_labels_are_names_numbers_or_synsets() -> None:
    classes = ["tench", "missile", "missile", "1"]
    assert class_numbers(["tench", "1", "tench"], classes, "x.csv") == [0, 3, 0]
    assert class_numbers(["2", "0"], classes, "x.csv") == [2, 0]
    synsets = ["n01440764", "n02102040", "n03000684", "n03028079"]
    assert class_numbers([synsets[2], *synsets], classes, "x.csv") == [2, 0, 1, 2, 3]
    with pytest.raises(DataError, match="several classes are called 'missile'; give labels as numbers"):
        class_numbers(["missile"], classes, "x.csv")
    with pytest.raises(DataError, match=r"x.csv: label 'tensh' is no class; did you mean 'tench'"):
        class_numbers(["tench", "tensh"], classes, "x.csv")
    with pytest.raises(DataError, match="label '4' is no class"):
        class_numbers(["4"], classes, "x.csv")
    with pytest.raises(DataError, match="label 'n01440764' is no class"):
        class_numbers(synsets[:2], classes, "x.csv")
