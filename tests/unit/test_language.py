"""The warm-started LM: it learns its texts, loads through transformers, and its chats only add to the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.language import Chat, text_chats, train_tokenizer, warm_start_llm
from vlm_vision.train.language_config import LanguageConfig
from vlm_vision.train.run import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = LanguageConfig(
    hidden_size=32,
    layers=2,
    heads=2,
    mlp_size=64,
    vocab_size=300,
    row_length=32,
    steps=150,
    batch_size=8,
    lr=1e-2,
)
CHATS: list[Chat] = [
    [
        {"role": "user", "content": f"How many legs has a {animal}?"},
        {"role": "assistant", "content": legs},
        {"role": "user", "content": "Does it bark?"},
        {"role": "assistant", "content": "yes" if animal == "dog" else "no"},
    ]
    for animal, legs in (("dog", "four"), ("bird", "two"), ("fish", "none"))
] * 20
TEXTS = ["a dog barks", "a fish swims", "a bird sings"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def metrics(folder: Path) -> dict[str, float]:
    return dict(warm_start_llm(CHATS, TEXTS, TINY, folder))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([*TEXTS, *(message["content"] for chat in CHATS for message in chat)], 300)


def test_it_answers_what_it_was_told_after_loading(folder: Path, metrics: dict[str, float]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == metrics["vocab_size"] == model.config.vocab_size
    for animal, legs in (("dog", "four"), ("bird", "two"), ("fish", "none")):
        chat = [{"role": "user", "content": f"How many legs has a {animal}?"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip() == legs


def test_the_run_is_recorded_and_learns(folder: Path, metrics: dict[str, float]) -> None:
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 151))
    assert lines[0]["loss"] > 0.9 * math.log(metrics["vocab_size"])  # random weights know nothing
    assert metrics["loss"] < 0.5  # measured 0.11
    assert metrics["loss"] == pytest.approx(sum(line["loss"] for line in lines[-15:]) / 15)
    assert load_config(LanguageConfig, folder / "config.yaml") == TINY


def test_the_same_seed_gives_the_same_model(folder: Path, metrics: dict[str, float], tmp_path: Path) -> None:
    short = TINY.model_copy(update={"steps": 3})
    first, second = (warm_start_llm(CHATS, TEXTS, short, tmp_path / name) for name in "ab")
    assert first == second
    other = warm_start_llm(CHATS, TEXTS, short.model_copy(update={"seed": 1}), tmp_path / "c")
    assert other["loss"] != first["loss"]


@pytest.mark.parametrize("text", ["naïve 猫 🦜", "tab\tand\nline", "</s", "<image>", "\x00\x7f", "ZYX=±"])
def test_unknown_text_is_encoded_and_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).strip() == " ".join(text.split(" ")).replace("\t", " ").replace("\n", " ")


def test_a_word_is_one_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    def tokens(text: str) -> list[Any]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    (dog,) = tokens("dog")
    assert dog == tokens("\ndog")[0] == tokens("a dog")[-1] == tokens("<|assistant|>dog</s>")[1]


def test_the_chat_template_only_adds_to_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    for end in range(1, 5):
        for prompt in (False, True) if end % 2 else (False,):
            part = tokenizer.apply_chat_template(CHATS[0][:end], tokenize=False, add_generation_prompt=prompt)
            assert whole.startswith(part)
            part_ids = tokenizer(part, add_special_tokens=False)["input_ids"]
            assert ids[: len(part_ids)] == part_ids
    assert whole.count(tokenizer.eos_token) == 2
    assert whole.startswith(tokenizer.bos_token)


def test_chats_leave_out_the_picture() -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "dog", "type": "what"},
    ]
    (chat,) = text_chats([{"image": "a.png", "conversations": turns}])
    assert chat == [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "dog"}]


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give 4 tokens.*row of 32.*smaller row_length"):
        warm_start_llm([], ["a dog"], TINY, tmp_path)


def test_config_errors_say_what_fits() -> None:
    with pytest.raises(ConfigError, match="multiple of 4 times heads"):
        load_config(LanguageConfig, {"hidden_size": 30, "heads": 4})
    with pytest.raises(ConfigError, match="must not exceed max_length"):
        load_config(LanguageConfig, {"row_length": 64, "max_length": 32})


def test_the_shipped_config_loads() -> None:
    assert load_config(LanguageConfig, CONFIGS / "demo_language.yaml").vocab_size <= 512
