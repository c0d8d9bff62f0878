"""Packed rows against padded ones, and batches by length."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_align import config, losses, same, tensors
from tiny import colour_records, tiny_llm, tiny_tower
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlm_vision.adapters import build_projector
from vlm_vision.errors import ConfigError
from vlm_vision.train.align import align
from vlm_vision.train.conversations import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    ChatFormat,
    ConversationDataset,
    Conversations,
    Sample,
    collate,
)
from vlm_vision.train.length_groups import LengthGroups
from vlm_vision.train.order import EpochBatches, EpochOrder, UniformShuffle
from vlm_vision.train.packing import attention_inputs, block_diagonal, one_row, pack
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer, token_grid

SIZE = 64


def talks(folder: Path) -> Path:
    """Twelve records of many lengths, some with two pictures, some with none."""
    colour_records(folder, 4)
    words = ["what", "colour", "is", "the", "picture", "of", "the", "picture", "?"]
    records = []
    for number in range(12):
        pictures = [f"{number % 4}.png"] * (number % 3)
        asked = "<image>" * len(pictures) + " ".join(words[: 2 + number % 8])
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "red " * (1 + number % 3)}]
        turns += [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "blue"}] * (number % 2)
        records.append({"id": f"r{number}", "image": pictures, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "train.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    talks(folder)
    tiny_llm(folder / "llm")
    tiny_tower().save_pretrained(folder / "tower")
    return folder


@pytest.fixture(scope="module")
def model(data: Path) -> VisionLanguageModel:
    tower = tiny_tower()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        projector = build_projector("mlp2x_gelu", tower.hidden_size, 32, token_grid(tower))
    return VisionLanguageModel(tower, projector, load_llm(data / "llm"), load_tokenizer(data / "llm"))


@pytest.fixture(scope="module")
def samples(data: Path, model: VisionLanguageModel) -> list[Sample]:
    conversations = Conversations(data / "train.json", data / "images")
    dataset = ConversationDataset(
        conversations, model.chat, model.vision_tower.image_processor, max_length=SIZE
    )
    return [dataset[index] for index in range(len(dataset))]


def learnt(model: VisionLanguageModel, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and every gradient."""
    model.train()
    model.zero_grad()
    output = model(
        batch.input_ids,
        batch.attention_mask,
        batch.labels,
        batch.pixels,
        position_ids=batch.position_ids,
    )
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(output.loss.detach()), gradients


# ---- rows


def test_rows_take_the_longest_first_and_what_still_fits() -> None:
    assert pack([3, 9, 5, 4, 2], 10) == [[1], [2, 3], [0, 4]]
    assert pack([12, 3, 3], 10) == [[0], [1, 2]]
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    rows = pack(lengths, 64)
    assert sorted(place for row in rows for place in row) == list(range(200))
    assert max(sum(lengths[place] for place in row) for row in rows) <= 64
    room = len(rows) * max(sum(lengths[place] for place in row) for row in rows)
    assert room <= 1.1 * sum(lengths)


@pytest.mark.parametrize("seed", range(20))
def test_packing_never_takes_more_room_than_padding(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 100, int(random.integers(1, 12))).tolist()
    rows = pack(lengths, 128)
    longest = max(sum(lengths[place] for place in row) for row in rows)
    assert longest <= 128
    assert len(rows) * longest <= len(lengths) * max(lengths)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))


def test_a_packed_batch_holds_what_the_padded_one_does(samples: list[Sample]) -> None:
    padded, packed = collate(samples, 0), collate(samples, 0, SIZE)
    assert packed.position_ids is not None
    assert padded.position_ids is None
    assert packed.num_tokens == padded.num_tokens == sum(len(sample.input_ids) for sample in samples)
    assert packed.num_labels == padded.num_labels
    assert packed.padded_positions == padded.input_ids.numel()
    assert packed.input_ids.numel() < 0.75 * padded.input_ids.numel()
    found: list[list[int]] = []
    pictures = 0
    for row in range(len(packed.input_ids)):
        for number in range(1, int(packed.attention_mask[row].max()) + 1):
            mine = packed.attention_mask[row] == number
            ids = packed.input_ids[row][mine]
            assert packed.position_ids[row][mine].tolist() == list(range(len(ids)))
            sample = next(s for s in samples if s.input_ids.tolist() == ids.tolist())
            assert packed.labels[row][mine].tolist() == [IGNORE_INDEX, *sample.labels[1:].tolist()]
            count = int((ids == IMAGE_TOKEN_ID).sum()) // 16
            assert packed.pixels is not None
            if count:
                assert sample.pixels is not None
                assert torch.equal(packed.pixels[pictures : pictures + count], sample.pixels)
            pictures += count
            found.append(ids.tolist())
    assert sorted(found) == sorted(sample.input_ids.tolist() for sample in samples)


# ---- the same loss and gradients


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_and_gradients_are_those_of_padded_rows(
    model: VisionLanguageModel, samples: list[Sample], attention: str
) -> None:
    model.llm.set_attn_implementation(attention)
    loss, gradients = learnt(model, collate(samples, 0))
    packed_loss, packed_gradients = learnt(model, collate(samples, 0, SIZE))
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    assert gradients.keys() == packed_gradients.keys()
    assert {name.split(".")[0] for name in gradients} == {"vision_tower", "projector", "llm"}
    worst = max(float((gradients[name] - packed_gradients[name]).abs().max()) for name in gradients)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    print(f"{attention}: loss {abs(packed_loss - loss):.1e}, gradients {worst:.1e} of {largest:.1e}")
    assert worst < 1e-5 * max(1.0, largest)


WINDOWED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 8, "sliding_window_pattern": 2}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2 without": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False}),
}


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, way) for kind in WINDOWED for way in ("eager", "sdpa") if (kind, way) != ("gemma2", "sdpa")],
)
def test_a_window_stays_what_it_is(
    model: VisionLanguageModel, samples: list[Sample], kind: str, attention: str
) -> None:
    make, build, settings = WINDOWED[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {
        "sliding_window": 5,
        "num_key_value_heads": 2,
        "vocab_size": len(model.tokenizer),
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llm = build(make(**sizes, **settings, attn_implementation=attention))
    llm.generation_config.pad_token_id = 0
    windowed = VisionLanguageModel(model.vision_tower, model.projector, llm, model.tokenizer)
    # Every conversation is longer than the window, rows much more.
    assert min(len(sample.input_ids) for sample in samples) > 5
    loss, gradients = learnt(windowed, collate(samples, 0))
    packed_loss, packed_gradients = learnt(windowed, collate(samples, 0, SIZE))
    worst = max(float((gradients[name] - packed_gradients[name]).abs().max()) for name in gradients)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    print(f"{kind}, {attention}: loss {abs(packed_loss - loss):.1e}, gradients {worst:.1e} of {largest:.1e}")
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    assert worst < 1e-5 * max(1.0, largest)
    if "without" not in kind:
        # Which it would not be with a mask that knows of no window.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vlm_vision.train.packing._windows", lambda config: {"full_attention": None})
            assert abs(learnt(windowed, collate(samples, 0, SIZE))[0] - loss) > 1e-5


def test_layers_of_another_kind_are_refused() -> None:
    config = SimpleNamespace(_attn_implementation="sdpa", layer_types=["full_attention", "chunked_attention"])
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ConfigError, match="layers of 'chunked_attention' are not known"):
        attention_inputs(SimpleNamespace(config=config), torch.zeros(1, 2, 3), ids, ids)


def test_one_row_for_flash_attention_is_found_by_its_positions(
    model: VisionLanguageModel, samples: list[Sample]
) -> None:
    pytest.importorskip("transformers.masking_utils")
    model.llm.set_attn_implementation("sdpa")  # which then masks by the positions, as flash attention cuts
    batch = collate(samples, 0, SIZE)
    assert batch.position_ids is not None
    model.eval()
    with torch.no_grad():
        embeddings = model.embed(batch.input_ids, batch.pixels)
        inputs = attention_inputs(model.llm, embeddings, batch.attention_mask, batch.position_ids)
        rows = model.llm(**inputs, use_cache=False)
        single = model.llm(**one_row(embeddings, batch.position_ids), use_cache=False)
    kept = batch.attention_mask.flatten() > 0
    difference = rows.logits.flatten(0, 1)[kept] - single.logits[0][kept]
    assert float(difference.abs().max()) < 1e-5


def test_what_one_conversation_says_no_other_sees() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 0]])
    seen = block_diagonal(segments, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_an_attention_that_is_not_known_is_refused() -> None:
    llm = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flex_attention"))
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ConfigError, match="'flex_attention' is not known to keep conversations apart"):
        attention_inputs(llm, torch.zeros(1, 2, 3), ids, ids)


def test_a_packed_stage_learns_what_a_padded_one_does(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    stage = {"learn": [{"match": "*"}], "lr": 1e-3, "steps": 4, "micro_batch_size": 4, "max_length": SIZE}
    padded = align(config(data, stage), tmp_path / "padded")["stage1"]
    packed = align(config(data, {**stage, "packing": True}), tmp_path / "packed")["stage1"]
    pairs = zip(losses(tmp_path / "padded" / "stage1"), losses(tmp_path / "packed" / "stage1"), strict=True)
    assert max(abs(one - two) for one, two in pairs) < 1e-5
    assert padded["padding_saved"] == 0
    assert packed["padding_saved"] > 0.1
    assert packed["padding"] < padded["padding"]


# ---- by length


def order(count: int, seed: int = 0) -> EpochOrder:
    return EpochOrder([UniformShuffle(count, seed)], seed)


def groups(seed: int = 0, count: int = 1003, batch: int = 8) -> tuple[LengthGroups, Any, Any]:
    random = np.random.default_rng(7)
    lengths, pictured = random.integers(10, 500, count), random.random(count) < 0.6
    return LengthGroups(order(count, seed), lengths, pictured, batch, seed), lengths, pictured


def test_an_epoch_shows_each_record_once_in_batches_of_one_kind_and_length() -> None:
    grouped, lengths, pictured = groups()
    draws = grouped.draws(0, np.arange(1003))
    assert sorted(draws.tolist()) == list(range(1003))
    batches = draws[:1000].reshape(-1, 8)
    kinds = pictured[batches]
    mixed = (kinds.any(axis=1) & ~kinds.all(axis=1)).sum()
    assert mixed <= 4  # what fills no batch of its kind
    longest = lengths[batches].max(axis=1)
    padding = 1 - lengths[batches].sum() / (8 * longest.sum())
    plain = order(1003).draws(0, np.arange(1000)).reshape(-1, 8)
    as_drawn = 1 - lengths[plain].sum() / (8 * lengths[plain].max(axis=1).sum())
    assert padding < 0.1 < 0.3 < as_drawn
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.3  # no long ones first


def test_an_order_by_length_depends_on_seed_and_epoch_alone() -> None:
    slots = np.arange(1003)
    one, two = groups(), groups()
    assert (one[0].draws(1, slots) == two[0].draws(1, slots)).all()
    assert (one[0].draws(1, slots) != one[0].draws(0, slots)).any()
    assert (groups(seed=5)[0].draws(1, slots) != one[0].draws(1, slots)).any()
    alone = list(EpochBatches(one[0], 8, 0, 120, 130, 0, 1))
    shared = zip(*(EpochBatches(two[0], 8, 0, 120, 130, rank, 2) for rank in range(2)), strict=True)
    assert [sorted(batch) for batch in alone] == [sorted(left + right) for left, right in shared]


def test_records_shown_twice_are_grouped_as_well() -> None:
    twice = EpochOrder([UniformShuffle(10, 0)], 0, weights=[2.0])
    lengths = np.arange(10)
    draws = LengthGroups(twice, lengths, np.ones(10), 4, 0).draws(0, np.arange(20))
    assert sorted(draws.tolist()) == list(range(20))
    spans = [np.ptp(lengths[batch % 10]) for batch in draws.reshape(-1, 4)]
    assert max(spans) <= 1


def test_a_stage_grouped_by_length_resumes_where_it_was(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    stage = {"learn": [{"match": "projector.*"}], "steps": 6, "batch_size": 4, "max_length": SIZE}
    settings = config(data, {**stage, "group_by_length": True, "packing": True, "save_every": 4})
    align(settings, tmp_path)
    through, weights = losses(tmp_path / "stage1"), tensors(tmp_path / "model", "projector")
    (tmp_path / "stage1" / "done.json").unlink()
    (tmp_path / "model").rename(tmp_path / "before")
    align(settings, tmp_path, resume=True)
    assert losses(tmp_path / "stage1") == through
    assert same(tensors(tmp_path / "model", "projector"), weights)


def test_grouping_by_kind_is_by_pictures(data: Path) -> None:
    chat = ChatFormat(load_tokenizer(data / "llm"), 16)
    lengths = np.array(
        [
            len(chat.encode(r.turns, 500).input_ids)
            for r in Conversations(data / "train.json", data / "images")
        ]
    )
    pictured = np.array([number % 3 > 0 for number in range(12)])
    draws = LengthGroups(order(12), lengths, pictured, 4, 0).draws(0, np.arange(12)).reshape(-1, 4)
    assert sorted(pictured[draws].sum(axis=1).tolist()) == [0, 4, 4]
