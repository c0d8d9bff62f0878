from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from real_tokenizers import llama_tokenizer, qwen_tokenizer
from tiny import colour_records, tiny_tokenizer, tiny_tower

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.chat_format import TEMPLATES
from vlm_vision.train.conversations import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    ChatFormat,
    ConversationDataset,
    Conversations,
    Encoded,
    Turn,
    collate,
    read_template,
)
from vlm_vision.train.record_files import holds_conversations

TURNS = [
    Turn("user", "what colour is it ?\n<image>"),
    Turn("assistant", "red"),
    Turn("user", "a picture ?"),
    Turn("assistant", "the blue x"),
]


def learnt_words(chat: ChatFormat, encoded: Encoded) -> list[str]:
    return [chat.tokenizer.decode([token]) for token in encoded.labels if token != IGNORE_INDEX]


def record(**changes: Any) -> dict[str, Any]:
    talk = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    return {"id": "r0", "image": "0.png", "conversations": talk, **changes}


def write(folder: Path, records: Any, name: str = "data.json") -> Path:
    colour_records(folder, 4)
    path = folder / name
    path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
    return path


# ---- tokens and labels


def test_labels_are_the_answers_with_their_end_of_turn() -> None:
    chat = ChatFormat(tiny_tokenizer(), 3)
    encoded = chat.encode(TURNS, 100)
    assert learnt_words(chat, encoded) == ["red", "</s>", "the", "blue", "x", "</s>"]
    agree = [
        token == label for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label >= 0
    ]
    assert all(agree)


def test_a_picture_takes_its_tokens_and_goes_first_in_its_turn() -> None:
    chat = ChatFormat(tiny_tokenizer(), 3)
    ids = chat.encode(TURNS, 100).input_ids
    assert [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_ID] == [3, 4, 5]
    assert chat.tokenizer.decode(ids[:3] + ids[6:12]) == "<s> user : \n what colour is it ?"


def test_several_pictures_stay_where_the_text_has_them() -> None:
    chat = ChatFormat(tiny_tokenizer(), 2)
    ids = chat.prompt([Turn("user", "what is <image> of <image> ?")])
    shape = ["image" if token == IMAGE_TOKEN_ID else chat.tokenizer.decode([token]) for token in ids]
    picture = ["image", "image"]
    assert shape == ["<s>", "user", ":", "what", "is", *picture, "of", *picture, "?", "\n", "answer", ":"]


def test_a_prompt_is_the_beginning_of_what_was_trained() -> None:
    chat = ChatFormat(tiny_tokenizer(), 3)
    prompt = chat.prompt(TURNS[:1])
    assert chat.encode(TURNS[:2], 100).input_ids[: len(prompt)] == prompt


def test_the_users_tokenizer_is_left_as_it_is() -> None:
    tokenizer = tiny_tokenizer()
    before = len(tokenizer), tokenizer.chat_template
    ChatFormat(tokenizer, 3, chat_template="{{ messages }}")
    assert (len(tokenizer), tokenizer.chat_template) == before


def test_shipped_vicuna_template_writes_llavas_v1() -> None:
    chat = ChatFormat(tiny_tokenizer(), 2, read_template("v1"))
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    rendered = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Ho"}] * 2,
        tokenize=False,
    )
    turn = "USER: <image>\nHi ASSISTANT: Ho</s>"
    assert rendered == f"<s>{system} {turn}{turn}"
    assert learnt_words(chat, chat.encode(TURNS, 100)) == ["red", "</s>", "the", "blue", "x", "</s>"]
    assert chat.stop_ids == [chat.tokenizer.eos_token_id]


def test_shipped_plain_template_writes_picture_caption_newline() -> None:
    chat = ChatFormat(tiny_tokenizer(), 2, read_template("plain"))
    encoded = chat.encode(TURNS[:2], 100)
    assert encoded.input_ids[1:3] == [IMAGE_TOKEN_ID] * 2
    assert learnt_words(chat, encoded) == ["red", "\n"]
    assert len(encoded.input_ids) == 5
    assert chat.tokenizer.convert_tokens_to_ids("\n") in chat.stop_ids


def test_a_template_that_rewrites_earlier_turns_is_named() -> None:
    template = "{% for m in messages %}{{ m.content if loop.last else 'x' }}{% endfor %}"
    chat = ChatFormat(tiny_tokenizer(), 1, template)
    with pytest.raises(ConfigError, match="writes turn 1 differently once more turns follow"):
        chat.encode(TURNS, 100)


def test_a_tokenizer_without_template_is_told_what_to_give() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template: name one by `chat_template`"):
        ChatFormat(tokenizer, 1)


def test_a_template_is_read_from_a_file_or_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert read_template(tmp_path / "own.jinja") == "{{ messages }}"
    assert read_template("vicuna") == read_template("v1")
    assert read_template("qwen") == read_template("chatml")
    with pytest.raises(ConfigError, match=r"'no_such\.jinja' is no file"):
        read_template("no_such.jinja")
    with pytest.raises(ConfigError, match="did you mean 'llama_2'"):
        read_template("llama2")


def test_an_answer_ends_where_its_template_ends_it() -> None:
    llama, qwen = llama_tokenizer(legacy=True), qwen_tokenizer()
    newline, end = llama.convert_tokens_to_ids("<0x0A>"), llama.eos_token_id
    assert ChatFormat(llama, 1, read_template("plain")).stop_ids == sorted([newline, end])
    assert ChatFormat(llama, 1, read_template("v1")).stop_ids == [end]
    assert ChatFormat(llama, 1, read_template("llama_2")).stop_ids == [end]
    assert ChatFormat(qwen, 1, read_template("qwen")).stop_ids == [qwen.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("template", ["plain", "v1", "llama_2", "qwen"])
def test_by_every_template_a_prompt_is_the_beginning_of_what_was_trained(template: str) -> None:
    tokenizer = qwen_tokenizer() if template == "qwen" else llama_tokenizer(legacy=False)
    chat = ChatFormat(tokenizer, 2, read_template(template))
    talk = [Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat."), Turn("user", "So?")]
    talk = talk[:1] if template == "plain" else talk
    prompt = chat.prompt(talk)
    encoded = chat.encode([*talk, Turn("assistant", "Red.")], 1000)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert chat.tokenizer.decode(encoded.input_ids[len(prompt) :]).startswith("Red.")


def test_text_beyond_max_length_is_cut_and_pictures_never() -> None:
    chat = ChatFormat(tiny_tokenizer(), 3)
    whole = chat.encode(TURNS, 100)
    assert not whole.truncated
    cut = chat.encode(TURNS, 20)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:20]
    with pytest.raises(DataError, match="31 tokens, max_length is 20"):
        chat.encode(TURNS, 20, "refuse")
    with pytest.raises(DataError, match="would cut off a picture"):
        chat.encode(TURNS, 5)
    with pytest.raises(DataError, match="no token to learn from"):
        chat.encode(TURNS, 10)


# ---- files


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "pretty.json"])
def test_lists_and_lines_read_alike(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_vision.train.record_files._CHUNK", 7)  # records and characters span many pieces
    records = [record(id=f"é{n}", image=f"{n}.png") for n in range(4)]
    text = {
        "data.json": json.dumps(records, ensure_ascii=False),
        "data.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n",
        "pretty.json": json.dumps(records, indent=2),
    }[name]
    conversations = Conversations(write(tmp_path, text, name), tmp_path / "images")
    assert [(r.id, r.images) for r in conversations] == [(f"é{n}", (f"{n}.png",)) for n in range(4)]
    assert conversations[-1].id == "é3"
    assert [r.id for r in conversations[1:3]] == ["é1", "é2"]


@pytest.mark.parametrize("separator", [",", "\r\n"])
def test_files_as_windows_writes_them(tmp_path: Path, separator: str) -> None:
    text = separator.join(json.dumps(record(id=f"é{n}"), ensure_ascii=False) for n in range(3))
    path = write(tmp_path, f"[{text}]\r\n" if separator == "," else text)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    conversations = Conversations(path, tmp_path / "images")
    assert [one.id for one in conversations] == ["é0", "é1", "é2"]
    assert holds_conversations(str(path))
    path.write_text(text, encoding="utf-16")
    for read in (Conversations, holds_conversations):
        with pytest.raises(DataError, match="is UTF-16: save it as UTF-8"):
            read(str(path))


def test_leading_answers_and_closing_questions_are_left_out(tmp_path: Path) -> None:
    talk = [
        {"from": "gpt", "value": "hello"},
        {"from": "human", "value": "<image>\nwhat ?"},
        {"from": "gpt", "value": "red", "type": "colour"},
        {"from": "human", "value": "and ?"},
    ]
    conversations = Conversations(write(tmp_path, [record(conversations=talk)]), tmp_path / "images")
    assert conversations[0].turns == (Turn("user", "<image>\nwhat ?"), Turn("assistant", "red", "colour"))


def turns(*spoken: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": what} for who, what in spoken]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["x"], "record '0': must be an object"),
        (record(conversations="hello"), "record 'r0': `conversations` must be a list"),
        (record(conversations=turns(("humann", "x"))), "turn 0 is from 'humann'"),
        (record(conversations=[{"from": "human"}]), "turn 0 must hold `from` and `value`"),
        (record(conversations=[]), "must alternate between human and gpt, got none"),
        (record(conversations=turns(("human", "<image>"), ("human", "x"))), "got user"),
        (record(conversations=turns(("human", "x"), ("gpt", "y"))), "0 <image> in the text, but 1 picture"),
        (record(image=["0.png", "1.png"]), "1 <image> in the text, but 2 picture"),
        (record(conversations=turns(("human", "x"), ("gpt", "<image>"))), "<image> stands in an answer"),
        (
            record(conversations=turns(("human", "<image>"), ("gpt", "a \ud83d"))),
            r"turn 1: '\ud83d' is a part",
        ),
        (record(image=3), "`image` must be a file name"),
        (record(image="nine.png"), "picture 'nine.png' is not in"),
        (record(image="../data.json"), "lies outside the image folder"),
        (record(image="/etc/passwd"), "lies outside the image folder"),
        (record(image="file:///etc/passwd"), "lies outside the image folder"),
    ],
)
def test_a_wrong_record_is_named_with_its_file(tmp_path: Path, wrong: Any, said: str) -> None:
    path = write(tmp_path, [wrong])
    with pytest.raises(DataError) as error:
        Conversations(path, tmp_path / "images")
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no record"),
        ("[]", "holds no record"),
        ('[{"id": 1}, {"id"', "no JSON list after 1 records"),
        ('[{"id": 1}]\n[{"id": 2}]', "more follows the end of the list, after 1 records"),
        ('[{"id": 1}]        x', "more follows the end of the list, after 1 records"),
        ('{"id": 1}\nnot json\n', "line 2 is not JSON"),
        ('{\n"data": []}', "line 1 is not JSON: .*give a list, or a record on each line"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_vision.train.record_files._CHUNK", 7)
    with pytest.raises(DataError, match=said):
        Conversations(write(tmp_path, text), tmp_path / "images")


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.json"):
        Conversations(tmp_path / "nothing.json")
    path = write(tmp_path, [record()])
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        Conversations(path, tmp_path / "nowhere")
    with pytest.raises(DataError, match="no image_folder is given"):
        Conversations(path)


def test_a_link_out_of_the_image_folder_is_refused_unless_trusted(tmp_path: Path) -> None:
    path = write(tmp_path, [record(image="link.png")])
    outside = tmp_path / "outside.png"
    os.replace(tmp_path / "images" / "0.png", outside)
    (tmp_path / "images" / "link.png").symlink_to(outside)
    conversations = Conversations(path, tmp_path / "images")
    with pytest.raises(DataError, match=r"'r0': picture 'link.png' is a link that leads out"):
        conversations.pictures(conversations[0])
    trusting = Conversations(path, tmp_path / "images", follow_links=True)
    assert len(trusting.pictures(trusting[0])) == 1


def test_questions_apart(tmp_path: Path) -> None:
    talk = turns(("human", "what ?\n<image>"), ("gpt", "red"), ("human", "and ?"), ("gpt", "blue"))
    talk = [{"from": "system", "value": "be brief"}, *talk]
    records = [record(id="two", conversations=talk), record(id="one"), {"id": "bad"}, record(id="last")]
    whole = Conversations(write(tmp_path, records), tmp_path / "images", max_bad_share=0.5)
    apart = Conversations(whole.path, tmp_path / "images", max_bad_share=0.5, separate=True)
    assert len(whole) == 4
    assert len(apart) == 5
    assert whole.bad.keys() == {2}
    assert apart.bad.keys() == {3}
    assert [apart[index].id for index in (0, 1, 2, 4)] == ["two#0", "two#1", "one#0", "last#0"]
    assert apart[1].images == ("0.png",)
    brief = Turn("system", "be brief")
    assert apart[0].turns == (brief, Turn("user", "<image>\nwhat ?"), Turn("assistant", "red"))
    assert apart[1].turns == (brief, Turn("user", "<image>\nand ?"), Turn("assistant", "blue"))
    assert apart[2].turns == whole[1].turns


# ---- samples


def dataset(folder: Path, records: Any, **options: Any) -> ConversationDataset:
    tower = tiny_tower()
    conversations = Conversations(write(folder, records), folder / "images", **options)
    chat = ChatFormat(tiny_tokenizer(), tower.num_patches)
    return ConversationDataset(conversations, chat, tower.image_processor, max_length=64)


MACROS = """
{#- Llama 3's way: macros, a namespace, white space that tags trim. -#}
{% set state = namespace(count=0) %}
{% macro head(role) %}
<|{{ role }}|{{ state.count }}>
{% endmacro %}
    {% for message in messages %}
        {% set state.count = state.count + 1 %}
    {{ head(message.role) }}  {{ message.content | trim }}{{ eos_token if loop.index0 % 2 }}
  {% endfor %}
{% if add_generation_prompt %}
  {{ head('assistant') }}{% endif %}

"""


@pytest.mark.parametrize(
    "template", ["v1", "llama_2", "chatml", "plain", MACROS, "  x\n{%- if messages %} y{% endif %}"]
)
def test_beginnings_are_rendered_as_one_by_one(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = read_template(template) if template in TEMPLATES else template
    turns = [Turn(("user", "assistant")[n % 2], f' say "{n}" <b>\n\u2028é ') for n in range(5)]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    beginnings = [(count, asked) for count in range(1, 6) for asked in (False, True)]
    assert ChatFormat(tokenizer, 1)._render(turns, beginnings) == [
        tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asked)
        for count, asked in beginnings
    ]


def test_counts_are_those_of_the_tokens_and_a_tokenizer_cuts_nothing() -> None:
    tokenizer = tiny_tokenizer()
    talk = [
        Turn("user", "<image> what is it ?"),
        Turn("assistant", "red"),
        Turn("user", "?"),
        Turn("assistant", "x"),
    ]
    whole = ChatFormat(tokenizer, 3).encode(talk, 64)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    chat = ChatFormat(tokenizer, 3)
    assert chat.encode(talk, 64) == whole
    for max_length in (64, 20):
        encoded, counts = chat.encode(talk, max_length), chat.count(talk, max_length)
        assert (counts.length, counts.kept) == (encoded.length, len(encoded.input_ids))
        assert counts.labels == encoded.num_labels


def test_bad_records_are_replaced_by_the_next_good_one_and_told(tmp_path: Path) -> None:
    records = [record(id=f"r{n}", image=f"{n}.png") for n in range(4)]
    records[1]["image"] = "missing.png"
    data = dataset(tmp_path, records, max_bad_share=0.5)
    (tmp_path / "images" / "2.png").write_bytes(b"no picture")
    sample = data[1]
    assert [index for index, _ in sample.replaced] == [1, 2]
    assert "'r1'" in sample.replaced[0][1]
    assert "'r2'" in sample.replaced[1][1]
    assert sample.pixels is not None
    assert torch.equal(sample.pixels, data[3].pixels)
    assert data[1].replaced == sample.replaced
    (tmp_path / "images" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"(?s)'r3'.*max_bad_share"):
        data[1]


def test_what_is_asked_about_many_pictures_is_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_vision.train.conversations._KEPT", 1)
    other = turns(("human", "<image>\nwhat colour is it ?"), ("gpt", "blue"))
    data = dataset(tmp_path, [record(), record(), record(conversations=other), record()])
    encode, encoded = data.chat.encode, []
    monkeypatch.setattr(data.chat, "encode", lambda *given: encoded.append(given[0]) or encode(*given))
    samples = [data[index] for index in range(4)]
    assert len(encoded) == 3  # the second is the first's; one is kept at a time, so the last is new again
    assert [sample.input_ids.tolist() for sample in samples] == [
        encode(data.conversations[index].turns, 64).input_ids for index in range(4)
    ]


def test_without_leave_one_bad_picture_stops(tmp_path: Path) -> None:
    data = dataset(tmp_path, [record()])
    (tmp_path / "images" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="record 'r0'"):
        data[0]


def test_batches_are_padded_on_the_right_and_mix_text_with_pictures(tmp_path: Path) -> None:
    text_only = {"id": "t", "conversations": turns(("human", "what is it ?"), ("gpt", "blue"))}
    data = dataset(tmp_path, [record(), text_only])
    batch = collate([data[0], data[1]], data.chat.pad_id)
    assert batch.pixels is not None
    assert batch.pixels.shape == (1, 3, 32, 32)
    lengths = batch.attention_mask.sum(dim=1).tolist()
    assert lengths == [len(data[0].input_ids), len(data[1].input_ids)]
    assert lengths[1] < lengths[0]
    assert (batch.input_ids[1, lengths[1] :] == data.chat.pad_id).all()
    assert (batch.labels[1, lengths[1] :] == IGNORE_INDEX).all()
    assert batch.num_labels == 4
    assert collate([data[1]], data.chat.pad_id).pixels is None
