"""Formats that conversations come in, and several sources in one stage."""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import COLOURS, colour_records, tiny_tokenizer, tiny_tower

from vlm_vision.config import validate
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.conversations import (
    ChatFormat,
    ConversationDataset,
    Conversations,
    MixedConversations,
    Turn,
    open_conversations,
)
from vlm_vision.train.conversations_config import ConversationConfig, ConversationNode
from vlm_vision.train.order import EpochBatches

datasets = pytest.importorskip("datasets")

TALK = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
TEXT_TALK = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
TURNS = (Turn("user", "<image>\nwhat ?"), Turn("assistant", "red"))


def write(folder: Path, records: list[Any], name: str = "data.json") -> Path:
    (folder / name).write_text(json.dumps(records), encoding="utf-8")
    return folder / name


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), COLOURS[colour]).save(stream, "png")
    return stream.getvalue()


def colours(conversations: Any, index: int) -> list[tuple[int, ...]]:
    pictures = conversations.pictures(conversations[index])
    return [picture.convert("RGB").getpixel((0, 0)) for picture in pictures]


# ---- LLaVA's layouts


def test_llavas_layouts_are_read_as_they_are(tmp_path: Path) -> None:
    for name in ("00453/004539375.jpg", "coco/train2017/000000033471.jpg", "ocr_vqa/images/1.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    records = [
        {"id": "004539375", "image": "00453/004539375.jpg", "conversations": TALK},  # of the 558k
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": TALK},
        {"id": "wgByO4Y_0", "model": "", "conversations": TEXT_TALK},  # of the 665k, without a picture
        {"id": 7, "image": ["ocr_vqa/images/1.jpg", "00453/004539375.jpg"], "conversations": [
            {"from": "human", "value": "<image> or <image> ?"}, {"from": "gpt", "value": "red"}]},
    ]  # fmt: skip
    conversations = Conversations(write(tmp_path, records), tmp_path / "images")
    assert [len(conversations.pictures(record)) for record in conversations] == [1, 1, 0, 2]
    assert [record.id for record in conversations] == ["004539375", "000000033471", "wgByO4Y_0", "7"]


# ---- messages


def message(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


TEXT = {"type": "text", "text": "what ?"}
ANSWER = {"role": "assistant", "content": "red"}
PIXELS = "data:image/png;base64," + base64.b64encode(png("red")).decode()


@pytest.mark.parametrize(
    ("question", "beside", "turn", "pictures"),
    [
        (message("user", {"type": "image", "image": "0.png"}, TEXT), {}, "<image>what ?", ["red"]),
        (message("user", TEXT, {"type": "image", "path": "1.png"}), {}, "what ?<image>", ["green"]),
        (message("user", {"type": "image_url", "image_url": {"url": "2.png"}}, TEXT), {}, None, ["blue"]),
        (message("user", {"type": "image_url", "image_url": PIXELS}, TEXT), {}, None, ["red"]),
        (message("user", {"type": "image"}, TEXT), {"images": ["1.png"]}, "<image>what ?", ["green"]),
        (
            message("user", {"type": "image"}, TEXT, {"type": "image"}),
            {"images": ["1.png", "0.png"]},
            "<image>what ?<image>",
            ["green", "red"],
        ),
        ({"role": "user", "content": "<image>\nwhat ?"}, {"image": "0.png"}, "<image>\nwhat ?", ["red"]),
        (message("user", TEXT), {}, "what ?", []),
    ],
)
def test_messages_with_parts(
    tmp_path: Path, question: Any, beside: dict[str, Any], turn: str | None, pictures: list[str]
) -> None:
    colour_records(tmp_path, 4)
    record = {"id": "m", "messages": [message("system", TEXT), question, ANSWER], **beside}
    conversations = Conversations(write(tmp_path, [record]), tmp_path / "images")
    system, asked, answer = conversations[0].turns
    assert (system, answer) == (Turn("system", "what ?"), Turn("assistant", "red"))
    assert asked.text == (turn or "<image>what ?")
    assert colours(conversations, 0) == [COLOURS[colour] for colour in pictures]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [message("tool", TEXT), ANSWER]}, "message 0 is by 'tool'"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 0: `content` must be text or a list"),
        ({"messages": [message("user", {"type": "video"}), ANSWER]}, "must be of type text or image"),
        ({"messages": [message("user", TEXT), message("assistant", {"type": "image"})]}, "stands in an ans"),
        ({"messages": [message("user", {"type": "image"}), ANSWER]}, "1 <image> in the text, but 0 picture"),
        (
            {"messages": [message("user", {"type": "image", "image": "0.png"}), ANSWER], "image": "1.png"},
            "`messages` name 1 picture(s), and 'image' names others",
        ),
        (
            {"messages": [message("user", {"type": "image", "image": "https://x/0.png"}), ANSWER]},
            "lies outside the image folder",
        ),
        ({"messages": [ANSWER], "conversations": TALK}, "`conversations` must be a list of turns"),
        ({"conversations": TALK, "image": "0.png", "images": ["0.png"]}, "names pictures twice"),
    ],
)
def test_wrong_messages_are_named(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    colour_records(tmp_path, 4)
    with pytest.raises(DataError) as error:
        Conversations(write(tmp_path, [{"id": "m7", **record}]), tmp_path / "images")
    assert said in str(error.value)
    assert "'m7'" in str(error.value)


def test_a_broken_data_url_is_named(tmp_path: Path) -> None:
    question = message("user", {"type": "image", "image": "data:image/png;base64,!!"}, TEXT)
    conversations = Conversations(write(tmp_path, [{"id": "m7", "messages": [question, ANSWER]}]))
    with pytest.raises(DataError, match=r"'m7': picture data:image/png;base64,!! is no base64 data URL"):
        conversations.pictures(conversations[0])


# ---- tables


def table(kind: str) -> dict[str, list[Any]]:
    """Four records: a picture, two pictures, none, a picture."""
    asked = ["<image>\nwhat ?", "<image> or <image> ?", "what ?", "<image>\nwhat ?"]
    shown = [["red"], ["green", "blue"], [], ["white"]]
    columns: dict[str, list[Any]] = {"id": ["a", "b", "c", "d"]}
    if "messages" in kind:
        columns["messages"] = [[{"role": "user", "content": text}, ANSWER] for text in asked]
    else:
        columns["conversations"] = [[{"from": "human", "value": text}, TALK[1]] for text in asked]
    if "paths" in kind:
        columns["images"] = [[f"{colour}.png" for colour in some] for some in shown]
    elif "raw" in kind:
        columns["images"] = [[png(colour) for colour in some] for some in shown]
    else:
        columns["images"] = [[{"bytes": png(colour), "path": None} for colour in some] for some in shown]
    return columns


KINDS = ["messages with bytes", "conversations with bytes", "conversations with paths", "messages, raw"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["file", "folder", "hub"])
def test_parquet_and_hub_data_sets(tmp_path: Path, kind: str, place: str) -> None:
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    rows = datasets.Dataset.from_dict(table(kind))
    (tmp_path / "set").mkdir()
    if kind.endswith("bytes"):  # as `datasets` itself saves pictures
        rows = rows.cast_column("images", datasets.features.Sequence(datasets.Image(decode=False)))
    rows.to_parquet(tmp_path / "set" / "train-00000.parquet")
    where = {"file": "set/train-*.parquet", "folder": "set", "hub": "set"}[place]
    path = f"hub:{tmp_path / where}@train" if place == "hub" else str(tmp_path / where)
    conversations = Conversations(path, tmp_path if "paths" in kind else None)
    assert [record.id for record in conversations] == ["a", "b", "c", "d"]
    assert conversations[0].turns == TURNS
    copy = pickle.loads(pickle.dumps(conversations))  # as workers get it
    shown = [["red"], ["green", "blue"], [], ["white"]]
    for index in range(4):
        assert colours(copy, index) == [COLOURS[colour] for colour in shown[index]]


def test_one_picture_in_a_column_and_rows_that_are_wrong(tmp_path: Path) -> None:
    rows = {"conversations": [TALK, TALK, TEXT_TALK], "image": [png("red"), None, None]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    conversations = Conversations(tmp_path / "data.parquet", max_bad_share=0.5)
    assert conversations.bad.keys() == {1}
    assert "record '1': 1 <image> in the text, but 0 picture(s)" in conversations.bad[1]
    assert colours(conversations, 0) == [COLOURS["red"]]
    assert conversations.content(conversations[0], 0) == png("red")


def test_questions_apart_and_a_table_over_many_batches_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_vision.train.record_files._ROWS", 2)
    datasets.Dataset.from_dict(table("messages, raw")).to_parquet(tmp_path / "data.parquet")
    conversations = Conversations(tmp_path / "data.parquet", separate=True)
    assert [record.id for record in conversations] == ["a#0", "b#0", "c#0", "d#0"]
    assert colours(conversations, 3) == [COLOURS["white"]]


def test_a_file_that_takes_long_shows_how_far_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = colour_records(tmp_path, 8)
    assert len(Conversations(file, tmp_path / "images")) == 8
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("vlm_vision.train.record_files._PATIENCE", 0.0)
    assert len(Conversations(file, tmp_path / "images")) == 8
    told = capsys.readouterr().err
    assert "read train.json: 100%" in told
    assert "B/s" in told


def test_missing_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no parquet file"):
        Conversations(tmp_path / "nothing.parquet")
    with pytest.raises(DataError, match=r"hub:.*nothing.*cannot be loaded"):
        Conversations(f"hub:{tmp_path / 'nothing'}")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        Conversations(tmp_path / "broken.parquet")


# ---- several sources


def sources(folder: Path, **first: Any) -> tuple[ConversationConfig, ConversationConfig]:
    for name, count in (("one", 6), ("two", 4)):
        colour_records(folder / name, count)
    one, two = (
        {"file": str(folder / name / "train.json"), "image_folder": str(folder / name / "images")}
        for name in ("one", "two")
    )
    return ConversationConfig(**one, **first), ConversationConfig(**two, weight=0.5)


def test_several_sources_are_one_after_another_each_with_its_folder(tmp_path: Path) -> None:
    mixed = open_conversations(sources(tmp_path))
    assert isinstance(mixed, MixedConversations)
    assert len(mixed) == 10
    assert [mixed[index].images for index in (0, 5, 6, -1)] == [
        ("0:0.png",), ("0:5.png",), ("1:0.png",), ("1:3.png",)
    ]  # fmt: skip
    (tmp_path / "two" / "images" / "0.png").write_bytes(png("white"))
    assert colours(mixed, 0) == [COLOURS["red"]]
    assert colours(mixed, 6) == [COLOURS["white"]]
    assert mixed.content(mixed[6], 0) == png("white")
    (tmp_path / "two" / "images" / "0.png").unlink()
    with pytest.raises(DataError, match=r"two.*record 'r0'.*0\.png"):
        mixed.content(mixed[6], 0)


def test_weights_say_how_often_an_epoch_shows_a_record(tmp_path: Path) -> None:
    mixed = open_conversations(sources(tmp_path, weight=2))
    order = mixed.order(seed=3)
    assert order.size == mixed.epoch_size == 2 * 6 + 2
    seen = [np.sort(order.draws(epoch, np.arange(14)) % 10) for epoch in range(2)]
    for epoch in seen:
        assert epoch[:12].tolist() == sorted([*range(6)] * 2)
    assert sorted([*seen[0][12:], *seen[1][12:]]) == [6, 7, 8, 9]  # a half each
    again = open_conversations(sources(tmp_path, weight=2)).order(seed=3)
    assert (again.draws(1, np.arange(14)) == order.draws(1, np.arange(14))).all()
    assert (mixed.order(seed=4).draws(1, np.arange(14)) != order.draws(1, np.arange(14))).any()


def test_a_step_holds_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    mixed = open_conversations(sources(tmp_path))
    (alone,) = ([*EpochBatches(mixed.order(1), 4, 1, 0, 5, rank, 1)] for rank in range(1))
    shared = zip(*(EpochBatches(mixed.order(1), 4, 1, 0, 5, rank, 2) for rank in range(2)), strict=True)
    assert [sorted(batch) for batch in alone] == [sorted(one + two) for one, two in shared]


def test_samples_of_repeats_and_bad_records_of_each_source(tmp_path: Path) -> None:
    nodes = sources(tmp_path)
    lenient = nodes[1].model_copy(update={"max_bad_share": 0.5})
    (tmp_path / "two" / "images" / "1.png").unlink()
    mixed = open_conversations((nodes[0], lenient))
    assert mixed.bad.keys() == {7}
    assert mixed.max_bad == 2
    tower = tiny_tower()
    chat = ChatFormat(tiny_tokenizer(), tower.num_patches)
    data = ConversationDataset(mixed, chat, tower.image_processor, max_length=64)
    first, again, replaced = data.__getitems__([(0, 3), (0, 13), (0, 7)])
    assert first.input_ids.tolist() == again.input_ids.tolist()
    assert [index for index, _ in replaced.replaced] == [7]
    (tmp_path / "two" / "images" / "2.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"two.*'r2'"):
        mixed.pictures(mixed[8])


def test_what_is_of_all_sources_is_given_with_the_first(tmp_path: Path) -> None:
    one = {"file": "a.json", "workers": 3}
    node = validate(ConversationNode, {"data": [one, {"file": "b.json"}]}, "test")
    assert isinstance(node.data, tuple)
    with pytest.raises(ConfigError, match="workers is of all sources: give it with the first"):
        validate(ConversationNode, {"data": [one, {"file": "b.json", "workers": 2}]}, "test")
    with pytest.raises(ConfigError):
        validate(ConversationNode, {"data": []}, "test")
