"""Tokens and labels of the named chat templates against LLaVA's and LLaVA-NeXT's own `preprocess_*`.

They are compared where their checkouts are named (tests/references.py), and with recorded ones of ours
elsewhere; the code that those came from equalled both. `python tests/parity/test_chat_templates.py` records
anew.
"""

from __future__ import annotations

import copy
import inspect
import json
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pins import OLD_TRANSFORMERS
from real_tokenizers import llama_tokenizer, qwen_tokenizer
from references import LLAVA, LLAVA_NEXT, llava_training
from transformers import LlamaTokenizerFast

from vlm_vision.train.chat_format import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_ID, ChatFormat, read_template
from vlm_vision.train.conversations import parse_record

pytestmark = pytest.mark.skipif(OLD_TRANSFORMERS, reason="alignment needs transformers 5")
RECORDED = Path(__file__).parents[1] / "fixtures" / "chat_templates.json"
TOKENIZERS = {
    "llama legacy": lambda: llama_tokenizer(legacy=True),
    "llama": lambda: llama_tokenizer(legacy=False),
}
CONVERSATIONS: dict[str, list[str]] = {  # a system prompt, then questions and answers in turn
    "picture first": ["", "<image>\nWhat is in the picture?", "A cat and a dog."],
    "picture last": ["", "What colour is the cat?\n<image>", "It is red."],
    "picture within": ["", "What colour <image> is the cat?", "It is red."],
    "picture alone": ["", "<image>", "A cat."],
    "picture in a later turn": ["", "Hello", "Hi!", "<image>\nWhat is it?", "A dog.", "And?", "A cat."],
    "several turns": ["", "<image>\nWhat is it?", "A dog.", "What colour?", "It is red.", "Sure?", "Yes."],
    "no picture": ["", "What is a cat?", "A small animal.", "And a dog?", "A larger one."],
    "system": ["Be brief.", "<image>\nWhat is it?", "A dog.", "What colour?", "Red."],
    "system without picture": ["Be brief.", "What is it?", "A dog."],
    "other scripts": ["", "<image>\n这是什么？", "一只猫 🐈", "Où est-il ?", "Là-bas."],
    "spaces and lines": ["", "<image>\n  What  is it? ", " A  dog.\n\n- red\n- small\n", "So?\n", "\tYes. "],
    "numbers": ["", "<image>\nProvide [0.12, 3.45]", "[0.1, 0.20]"],
}
PLAIN = [name for name, spoken in CONVERSATIONS.items() if IMAGE_TOKEN in spoken[1] and len(spoken) == 3]


def raw(name: str, with_system: bool = True) -> dict[str, Any]:
    system, *spoken = CONVERSATIONS[name]
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(spoken)]
    if system and with_system:
        turns.insert(0, {"from": "system", "value": system})
    pictures = sum(text.count(IMAGE_TOKEN) for text in spoken)
    return {"id": name, "conversations": turns, **({"image": ["a.png"] * pictures} if pictures else {})}


def ours(tokenizer: Any, template: str, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    chat = ChatFormat(tokenizer, 1, read_template(template))
    encoded = chat.encode(parse_record(record, 0, "test").turns, 10_000)
    return encoded.input_ids, encoded.labels


def theirs(
    train: Any, tokenizer: Any, template: str, record: dict[str, Any], system: str = ""
) -> tuple[list[int], list[int]]:
    """LLaVA's `preprocess_multimodal` and `preprocess`, as its data set calls them."""
    library = train.conversation_lib
    library.default_conversation = library.conv_templates[template].copy()
    if system:
        library.default_conversation.system = system
    source, has_image = [copy.deepcopy(record["conversations"])], "image" in record
    if has_image:
        settings = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
        source = train.preprocess_multimodal(source, settings)
    made = train.preprocess(source, tokenizer, has_image=has_image)
    return made["input_ids"][0].tolist(), made["labels"][0].tolist()


CASES = [
    (kind, template, name)
    for kind in TOKENIZERS
    for template in ("plain", "v1", "llama_2")
    for name in (PLAIN if template == "plain" else CONVERSATIONS)
]


@pytest.mark.parametrize(("kind", "template", "name"), CASES)
def test_tokens_and_labels_are_llavas(kind: str, template: str, name: str) -> None:
    train, tokenizer = llava_training(LLAVA), TOKENIZERS[kind]()
    found = theirs(train, tokenizer, template, raw(name, with_system=False), CONVERSATIONS[name][0])
    assert ours(tokenizer, template, raw(name)) == found
    assert any(label != IGNORE_INDEX for label in found[1])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_are_llava_nexts_and_labels_where_it_learns_answers(name: str) -> None:
    train, tokenizer = llava_training(LLAVA_NEXT), qwen_tokenizer()
    record = raw(name, with_system=False)
    source = [copy.deepcopy(record["conversations"])]
    if "image" in record:
        settings = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
        for turn in source[0]:  # which LLaVA strips, and LLaVA-NeXT only where a picture comes later
            if turn["value"].startswith(IMAGE_TOKEN):
                turn["value"] = f"{IMAGE_TOKEN}\n{turn['value'].removeprefix(IMAGE_TOKEN).strip()}".strip()
        train.conversation_lib.default_conversation = SimpleNamespace(version="qwen")
        source = train.preprocess_multimodal(source, settings)
    system = {"system_message": CONVERSATIONS[name][0]} if CONVERSATIONS[name][0] else {}
    made = train.preprocess_qwen(source, tokenizer, has_image="image" in record, **system)
    ids, labels = ours(tokenizer, "qwen", raw(name))
    their_labels = made["labels"][0].tolist()
    assert ids == made["input_ids"][0].tolist()
    for token, label, their_label in zip(ids, labels, their_labels, strict=True):
        assert label in (IGNORE_INDEX, their_label), tokenizer.decode([token])
    # What LLaVA-NeXT learns beside: marks and newlines of every turn, and who is speaking.
    beside = {
        tokenizer.decode([token])
        for token, label, their_label in zip(ids, labels, their_labels, strict=True)
        if label != their_label
    }
    header = {tokenizer.decode([token]) for token in tokenizer("assistant")["input_ids"]}
    assert {"<|im_start|>", "<|im_end|>", "\n"} <= beside <= {"<|im_start|>", "<|im_end|>", "\n"} | header
    answers = CONVERSATIONS[name][2::2]
    learnt = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert learnt == "".join(f"{answer}<|im_end|>" for answer in answers)


@pytest.mark.parametrize(
    "spoken",
    [
        ("What does ASSISTANT: mean?", "A speaker."),  # takes the question's mark for the answer's
        ("What ends a turn?", "The token </s> does."),  # takes the answer's end for the turn's
    ],
)
def test_where_llava_masks_the_sample_the_answer_is_learnt(spoken: tuple[str, str]) -> None:
    train, tokenizer = llava_training(LLAVA), llama_tokenizer(legacy=False)
    turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), spoken, strict=True)]
    record = {"id": "r", "conversations": turns}
    their_ids, their_labels = theirs(train, tokenizer, "v1", record)
    ids, labels = ours(tokenizer, "v1", record)
    assert ids == their_ids
    assert set(their_labels) == {IGNORE_INDEX}
    assert tokenizer.decode([label for label in labels if label >= 0]) == f"{spoken[1]}</s>"


def test_a_tokenizer_that_begins_with_no_token_is_no_mismatch() -> None:
    train, tokenizer = llava_training(LLAVA), qwen_tokenizer()
    tokenizer.legacy = False
    _, their_labels = theirs(train, tokenizer, "v1", raw("several turns"))
    assert set(their_labels) == {IGNORE_INDEX}
    _, labels = ours(tokenizer, "v1", raw("several turns"))
    learnt = tokenizer.decode([label for label in labels if label >= 0])
    assert learnt == "".join(f" {answer}<|im_end|>" for answer in CONVERSATIONS["several turns"][2::2])


def test_two_pictures_of_a_turn_stay_two() -> None:
    train, tokenizer = llava_training(LLAVA), llama_tokenizer(legacy=False)
    turns = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "Yes."}]
    record = {"id": "r", "image": ["a.png", "b.png"], "conversations": turns}
    assert theirs(train, tokenizer, "v1", record)[0].count(IMAGE_TOKEN_ID) == 1
    assert ours(tokenizer, "v1", record)[0].count(IMAGE_TOKEN_ID) == 2


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.skipif(
    "vocab" not in inspect.signature(LlamaTokenizerFast).parameters, reason="reads files alone there"
)
def test_the_tokenizer_is_transformers_llama(legacy: bool) -> None:
    tokenizer = llama_tokenizer(legacy=legacy)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    reference = LlamaTokenizerFast(vocab=model["vocab"], merges=merges, legacy=legacy)
    for spoken in CONVERSATIONS.values():
        text = "</s><s>".join(part.strip() for part in spoken)  # a space before its own it does not double
        mine, its = (some(text, add_special_tokens=False)["input_ids"] for some in (tokenizer, reference))
        assert mine == its


# ---- recorded


def recorded_cases() -> dict[str, list[list[Any]]]:
    """Of every case whether each stretch is learnt, and its tokens joined: however words are cut up."""
    cases = [*CASES, *(("qwen", "qwen", name) for name in CONVERSATIONS)]
    found = {}
    for kind, template, name in cases:
        tokenizer = qwen_tokenizer() if kind == "qwen" else TOKENIZERS[kind]()
        ids, labels = ours(tokenizer, template, raw(name))
        stretches = groupby(
            zip(ids, labels, strict=True), key=lambda pair: (pair[1] >= 0, pair[0] == IMAGE_TOKEN_ID)
        )
        found[f"{kind}, {template}, {name}"] = [
            [
                learnt,
                IMAGE_TOKEN if is_picture else "".join(tokenizer.convert_ids_to_tokens([i for i, _ in some])),
            ]
            for (learnt, is_picture), some in stretches
        ]
    return found


def test_tokens_and_labels_are_as_recorded() -> None:
    assert recorded_cases() == json.loads(RECORDED.read_text(encoding="utf-8"))


if __name__ == "__main__":
    lines = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in recorded_cases().items())
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
