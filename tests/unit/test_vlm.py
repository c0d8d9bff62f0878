from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import colour_records, tiny_llm, tiny_tokenizer, tiny_tower
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from vlm_vision.adapters import build_projector
from vlm_vision.errors import ConfigError, DataError, MissingExtraError, WeightsError
from vlm_vision.train.conversations import Batch, ConversationDataset, Conversations, Turn, collate
from vlm_vision.train.evaluate import (
    Answer,
    answer_questions,
    caption_loss,
    normalise,
    swapped_pictures,
    vqa_accuracy,
)
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer, token_grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    tiny_llm(folder / "llm")
    colour_records(folder, 8, text_only=2)
    return folder


@pytest.fixture
def model(folder: Path) -> VisionLanguageModel:
    return build(folder)


def build(folder: Path, projector: object = "mlp2x_gelu", **tower: object) -> VisionLanguageModel:
    eye = tiny_tower(**tower)
    torch.manual_seed(0)
    connector = build_projector(projector, eye.hidden_size, 32, token_grid(eye))  # type: ignore[arg-type]
    return VisionLanguageModel(
        eye, connector, load_llm(folder / "llm"), load_tokenizer(folder / "llm")
    ).eval()


@pytest.fixture
def conversations(folder: Path) -> Conversations:
    return Conversations(folder / "train.json", folder / "images")


def batch_of(model: VisionLanguageModel, conversations: Conversations, *indices: int) -> Batch:
    data = ConversationDataset(conversations, model.chat, model.vision_tower.image_processor, max_length=64)
    return collate([data[index] for index in indices], model.chat.pad_id)


# ---- forward


def test_splice_puts_every_picture_where_its_tokens_stand(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    batch = batch_of(model, conversations, 0, 6, 1)  # picture, text, picture
    embeddings = model.embed(batch.input_ids, batch.pixels)
    assert batch.pixels is not None
    pictures = iter(model.image_tokens(model.vision_tower(batch.pixels)))
    table = model.llm.get_input_embeddings().weight
    for row, ids in zip(embeddings, batch.input_ids.tolist(), strict=True):
        tokens = iter(next(pictures)) if -200 in ids else iter(())
        for embedding, token in zip(row, ids, strict=True):
            expected = next(tokens) if token == -200 else table[token]
            assert torch.equal(embedding, expected)
        assert next(tokens, None) is None


@pytest.mark.parametrize(
    "projector",
    [
        {"name": "pixel_shuffle", "factor": 2},
        "mlp_downsample",
        {"name": "c_abstractor", "target": [2, 2], "hidden_size": 16, "depth": 1},
        "ldp",
    ],
    ids=str,
)
def test_pictures_take_the_places_that_a_projector_says(
    projector: object, folder: Path, conversations: Conversations
) -> None:
    model = build(folder, projector)
    assert model.tokens_per_image == 4  # of 16 patches
    batch = batch_of(model, conversations, 0, 6, 1)
    output = model(batch.input_ids, batch.attention_mask, batch.labels, batch.pixels)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.projector.parameters())


def test_identity_gives_the_language_model_the_features_themselves(tmp_path: Path) -> None:
    tower, llm = tiny_tower(), load_llm(tiny_llm(tmp_path, hidden_size=64))
    model = VisionLanguageModel(
        tower, build_projector("identity", 64, 64, tower.grid), llm, tiny_tokenizer()
    ).eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.image_tokens(tower(pixels)), tower(pixels))
    model.save_pretrained(tmp_path / "vlm")
    assert VisionLanguageModel.from_pretrained(tmp_path / "vlm").projector.config.name == "identity"


def test_loss_is_transformers_own(model: VisionLanguageModel, conversations: Conversations) -> None:
    batch = batch_of(model, conversations, *range(8))
    output = model(batch.input_ids, batch.attention_mask, batch.labels, batch.pixels)
    reference = model.llm(
        inputs_embeds=model.embed(batch.input_ids, batch.pixels),
        attention_mask=batch.attention_mask,
        labels=batch.labels,
    )
    # Worst difference measured: 0.
    assert output.loss.item() == pytest.approx(reference.loss.item(), abs=1e-6)
    assert output.logits is None
    whole = model(batch.input_ids, batch.attention_mask, pixels=batch.pixels)
    assert whole.loss is None
    torch.testing.assert_close(whole.logits, reference.logits, atol=0, rtol=0)


def test_a_kernel_of_the_loss_that_is_not_there_is_refused(model: VisionLanguageModel) -> None:
    model.use_loss_kernel("chunks")
    with pytest.raises(MissingExtraError, match=r"pip install 'vlm_vision\[liger\]'"):
        model.use_loss_kernel("liger")
    assert model.loss_kernel == "chunks"


def test_one_label_count_makes_pieces_add_up_to_the_whole(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    whole = batch_of(model, conversations, 0, 1, 6)
    pieces = [batch_of(model, conversations, *part) for part in ((0,), (1, 6))]
    loss = model(whole.input_ids, whole.attention_mask, whole.labels, whole.pixels).loss
    parts = [model(p.input_ids, p.attention_mask, p.labels, p.pixels, whole.num_labels).loss for p in pieces]
    assert sum(parts).item() == pytest.approx(loss.item(), abs=1e-6)


def test_padding_changes_nothing(model: VisionLanguageModel, conversations: Conversations) -> None:
    alone, padded = batch_of(model, conversations, 6), batch_of(model, conversations, 6, 0)
    short = model(alone.input_ids, alone.attention_mask).logits[0]
    long = model(padded.input_ids, padded.attention_mask, pixels=padded.pixels).logits[0, : len(short)]
    torch.testing.assert_close(long, short, atol=2e-6, rtol=0)  # worst difference measured: 2.4e-7


def test_equals_transformers_llava_with_the_same_weights(folder: Path, conversations: Conversations) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    from vlm_vision import load_tower

    llm = load_llm(folder / "llm")
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    image_token = llm.config.vocab_size
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config={**llm.config.to_dict(), "vocab_size": image_token + 1},
            image_token_index=image_token,
        )
    ).eval()
    with torch.no_grad():
        llava.get_input_embeddings().weight[:image_token] = llm.get_input_embeddings().weight
        llava.lm_head.weight[:image_token] = llm.lm_head.weight
    rest = {name: value for name, value in llm.model.state_dict().items() if "embed_tokens" not in name}
    llava.model.language_model.load_state_dict(rest, strict=False)
    llava.model.vision_tower.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    tower = load_tower(f"transformers:{folder / 'clip'}")
    projector = build_projector("mlp2x_gelu", 64, 32, tower.grid)
    theirs = llava.model.multi_modal_projector
    for ours, layer in ((projector[0], theirs.linear_1), (projector[2], theirs.linear_2)):  # type: ignore[index]
        ours.load_state_dict(layer.state_dict())
    model = VisionLanguageModel(tower, projector, llm, tiny_tokenizer()).eval()

    batch = batch_of(model, conversations, 0, 1, 2)
    ids = batch.input_ids.masked_fill(batch.input_ids == -200, image_token)
    expected = llava(input_ids=ids, attention_mask=batch.attention_mask, pixel_values=batch.pixels).logits
    logits = model(batch.input_ids, batch.attention_mask, pixels=batch.pixels).logits
    # Worst difference measured: 0.
    torch.testing.assert_close(logits, expected[..., :image_token], atol=1e-5, rtol=0)


def test_text_alone_reaches_every_module_and_changes_nothing(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    batch = batch_of(model, conversations, 6, 7)
    quiet = model(batch.input_ids, batch.attention_mask, batch.labels).loss
    model.train()
    loss = model(batch.input_ids, batch.attention_mask, batch.labels).loss
    assert torch.equal(loss, quiet)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())
    assert all(p.grad is not None and not p.grad.any() for p in model.vision_tower.parameters())


def test_pictures_that_do_not_match_their_tokens_are_refused(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    batch = batch_of(model, conversations, 0, 1)
    assert batch.pixels is not None
    with pytest.raises(DataError, match="32 image tokens in the text, but 1 pictures of 16 tokens"):
        model(batch.input_ids, batch.attention_mask, pixels=batch.pixels[:1])
    with pytest.raises(DataError, match="but 0 pictures"):
        model(batch.input_ids, batch.attention_mask)


def test_gradients_stop_at_a_frozen_tower(model: VisionLanguageModel, conversations: Conversations) -> None:
    batch = batch_of(model, conversations, 0)
    assert batch.pixels is not None
    model.vision_tower.requires_grad_(False)
    model.train()
    assert not model.vision_tower.training
    assert model.projector.training
    seen: list[bool] = []
    model.projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    model(batch.input_ids, batch.attention_mask, batch.labels, batch.pixels).loss.backward()
    model.vision_tower.requires_grad_(True)
    model(batch.input_ids, batch.attention_mask, batch.labels, batch.pixels).loss.backward()
    assert seen == [False, True]
    assert all(p.grad is not None for p in model.vision_tower.parameters())


@pytest.mark.parametrize(
    ("projector", "tower", "tokens"),
    [
        ("linear", {}, 16),
        ("linear", {"select": "cls_patch"}, 17),
        ("mlp2x_gelu", {"layer": [1, 2]}, 16),
        ({"name": "qformer", "num_queries": 5, "layers": 2, "heads": 2, "hidden_size": 32}, {}, 5),
    ],
)
def test_every_tower_and_projector_takes_the_tokens_it_says(
    folder: Path, conversations: Conversations, projector: object, tower: dict[str, object], tokens: int
) -> None:
    model = build(folder, projector, **tower)
    assert model.tokens_per_image == tokens
    batch = batch_of(model, conversations, 0, 6)
    assert model(batch.input_ids, batch.attention_mask, batch.labels, batch.pixels).loss.isfinite()


def test_widths_that_do_not_fit_are_refused(folder: Path) -> None:
    tower = tiny_tower()
    with pytest.raises(ConfigError, match=r"maps 64 to 33 channels, but the tower gives 64 .* takes 32"):
        VisionLanguageModel(
            tower, build_projector("linear", 64, 33, tower.grid), load_llm(folder / "llm"), tiny_tokenizer()
        )


# ---- generation


def test_answers_in_a_batch_are_those_given_alone(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    pixels = model.vision_tower.image_processor(
        [picture for index in range(3) for picture in conversations.pictures(conversations[index])]
    )
    prompts = ["what ?", "what colour is it ?", "what is the picture of ?"]
    together = model.answer(pixels, prompts, 6)
    alone = [model.answer(pixels[i : i + 1], [prompts[i]], 6)[0] for i in range(3)]
    assert together == alone
    mixed = [[Turn("user", "what ?")], [Turn("user", f"<image>\n{prompts[1]}")]]
    assert model.answer(pixels[1:2], mixed, 6) == [model.answer(None, ["what ?"], 6)[0], alone[1]]
    assert model.answer(None, []) == []


def test_a_prompt_beyond_the_positions_is_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(DataError, match="no room for an answer in the 128 positions"):
        model.answer(None, ["what " * 128])


def test_generation_follows_the_forward_pass(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    """Greedy tokens with the cache are those of full forward passes without it."""
    pixels = model.vision_tower.image_processor(conversations.pictures(conversations[0]))
    ids = model.chat.prompt([Turn("user", "<image>\nwhat colour is it ?")])
    start = len(ids)
    for _ in range(5):
        inputs = torch.tensor([ids])
        token = int(model(inputs, torch.ones_like(inputs), pixels=pixels).logits[0, -1].argmax())
        if token in model.chat.stop_ids:
            break
        ids.append(token)
    expected = model.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert model.answer(pixels, ["what colour is it ?"], 5) == [expected]


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "top_k": 20, "repetition_penalty": 1.1}],
    ids=["plain", "vicuna", "qwen"],
)
def test_answers_warn_of_nothing(model: VisionLanguageModel, settings: dict[str, Any]) -> None:
    """Whatever the language model's own generation config holds, which is left as it is."""
    for name, value in settings.items():
        setattr(model.llm.generation_config, name, value)
    before = model.llm.generation_config.to_dict()
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    transformers_logging.warning_once.cache_clear()
    pixels = torch.randn(1, 3, 32, 32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            greedy = model.answer(pixels, ["what ?"], 4)
            model.answer(pixels, ["what ?"], 4, do_sample=True, temperature=0.7)
            assert "".join(model.stream(pixels, "what ?", 4)) == greedy[0]
            ids = torch.tensor([[2, 5]])
            model.generate(ids, max_new_tokens=3, num_beams=2)
            config = GenerationConfig(max_new_tokens=5, min_new_tokens=3)
            assert model.generate(ids, generation_config=config, max_new_tokens=3).shape == (1, 5)
    finally:
        logger.removeHandler(handler)
    assert told == []
    assert model.llm.generation_config.to_dict() == before


def test_training_mode_comes_back_after_generating(model: VisionLanguageModel) -> None:
    model.train()
    model.answer(None, ["what ?"], 2)
    assert model.training


# ---- projectors that read what is asked

READER = {"name": "qformer_text", "layers": 2, "heads": 2, "hidden_size": 32, "num_queries": 4}


def reader(folder: Path, **options: object) -> VisionLanguageModel:
    return build(folder, {**READER, "vocab_size": len(tiny_tokenizer()), **options})


def test_a_picture_is_seen_with_what_is_asked_about_it(folder: Path, conversations: Conversations) -> None:
    """In a batch with text alone, and for every picture of a conversation, without the marks of pictures."""
    model = reader(folder)
    processor = model.vision_tower.image_processor
    data = ConversationDataset(
        conversations, model.chat, processor, max_length=64, instructions=model.instructions
    )
    batch = collate([data[0], data[6], data[1]], model.chat.pad_id)
    assert batch.text is not None
    assert batch.text["text_ids"].shape == (2, 5)
    assert model.tokenizer.decode(batch.text["text_ids"][1]) == "what colour is it ?"
    assert collate([data[6]], model.chat.pad_id).text is None
    two = Turn("user", "<image> what ? <image>"), Turn("assistant", "red"), Turn("user", "the colour ?")
    long, short = [*two], [Turn("user", "<image>\nx")]
    text = model.asked([long, short])
    assert text is not None
    asked = [model.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*text.values(), strict=True)]
    assert asked == ["what ?"] * 2 + ["x"]
    # Each with the turn that shows it, in training as in an answer: no later question, and none before.
    later = [Turn("user", "the picture ? <image>"), Turn("assistant", "blue")]
    text = model.asked([[*two, Turn("assistant", "red"), *later], [*two]])
    assert text is not None
    asked = [model.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*text.values(), strict=True)]
    assert asked == ["what ?", "what ?", "the picture ?", "what ?", "what ?"]
    loss = model(batch.input_ids, batch.attention_mask, batch.labels, batch.pixels, text=batch.text).loss
    other = {**batch.text, "text_ids": batch.text["text_ids"].flip(1)}
    again = model(batch.input_ids, batch.attention_mask, batch.labels, batch.pixels, text=other).loss
    assert loss != again
    model.train()
    alone = collate([data[6]], model.chat.pad_id)
    model(alone.input_ids, alone.attention_mask, alone.labels).loss.backward()
    assert all(
        parameter.grad is not None for parameter in model.projector.parameters() if parameter.ndim == 3
    )


def test_answers_follow_what_training_saw(folder: Path, conversations: Conversations, tmp_path: Path) -> None:
    model = reader(folder)
    pixels = model.vision_tower.image_processor(conversations.pictures(conversations[0]))
    question = [Turn("user", "<image>\nwhat colour is it ?")]
    inputs = torch.tensor([model.chat.prompt(question)])
    text = model.asked([question])
    logits = model(inputs, torch.ones_like(inputs), pixels=pixels, text=text).logits[0, -1]
    expected = model.tokenizer.decode(logits.argmax(), skip_special_tokens=True).strip()
    assert model.answer(pixels, [question], 1) == [expected]
    model.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.from_pretrained(tmp_path)
    assert loaded.answer(pixels, [question], 4) == model.answer(pixels, [question], 4)
    three = torch.cat([pixels, pixels, pixels])
    prompts = ["what ?", "what colour is it ?", ""]
    together = model.answer(three, prompts, 4)
    assert together == [model.answer(pixels, [prompt], 4)[0] for prompt in prompts]


def test_text_where_none_is_read_and_none_where_it_is(folder: Path, model: VisionLanguageModel) -> None:
    patches = torch.randn(1, 16, 64)
    text = {"text_ids": torch.ones(1, 2, dtype=torch.long)}
    with pytest.raises(ConfigError, match="'mlp' reads no text"):
        model.image_tokens(patches, text)
    with pytest.raises(ConfigError, match="'qformer_text' reads what is asked: give `text`"):
        reader(folder).image_tokens(patches)
    with pytest.raises(ConfigError, match=r"knows 5 token ids, but the tokenizer of instructions has 23"):
        reader(folder, vocab_size=5)


# ---- saving


def test_saved_model_comes_back_whole(model: VisionLanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "model")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    assert not loaded.training
    half = VisionLanguageModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_tied_weights_are_saved_once_and_come_back_tied(tmp_path: Path) -> None:
    tiny_llm(tmp_path / "llm", tie_word_embeddings=True)
    model = build(tmp_path)
    model.save_pretrained(tmp_path / "model")
    llm = VisionLanguageModel.from_pretrained(tmp_path / "model").llm
    assert llm.lm_head.weight.data_ptr() == llm.get_input_embeddings().weight.data_ptr()
    assert torch.equal(llm.lm_head.weight, model.llm.lm_head.weight)


@pytest.mark.parametrize("part", ["projector", "llm", "tower"])
def test_a_missing_tensor_is_an_error(model: VisionLanguageModel, tmp_path: Path, part: str) -> None:
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / part / "model.safetensors"
    state = load_file(file)
    dropped = next(name for name in state if name.endswith("weight"))
    del state[dropped]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=dropped.replace(".", r"\.")):
        VisionLanguageModel.from_pretrained(tmp_path / "model")


def test_an_empty_tensor_is_never_saved(model: VisionLanguageModel, tmp_path: Path) -> None:
    model.llm.lm_head.weight.data = torch.empty(0)
    with pytest.raises(WeightsError):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_some_parts_is_no_whole_model(model: VisionLanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model", parts=["projector"])
    with pytest.raises(ConfigError, match="holds only projector: tower, llm is not in it"):
        VisionLanguageModel.from_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        VisionLanguageModel.from_pretrained(tmp_path / "nowhere")


def test_a_language_model_that_cannot_be_found_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_llm(tmp_path / "nowhere")


# ---- evaluation


def test_answers_are_compared_by_their_words() -> None:
    assert normalise("  The RED circle. ") == "red circle"
    answers = [
        Answer("1", (), "?", "red", "Red.", "colour"),
        Answer("2", (), "?", "blue", "red", "colour"),
        Answer("3", (), "?", "two", "a two", "count"),
        Answer("4", (), "?", "yes", "no"),
    ]
    assert vqa_accuracy(answers) == {"all": 0.5, "colour": 0.5, "count": 1.0}
    with pytest.raises(DataError, match="no question"):
        vqa_accuracy([])


def test_every_question_is_asked_alone_with_its_pictures(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    answers = answer_questions(model, conversations, batch_size=3, max_new_tokens=4)
    assert [answer.id for answer in answers] == [f"r{n}" for n in range(8)]
    assert answers[0].question == "what colour is it ?"
    assert (answers[0].truth, answers[0].kind, answers[0].images) == ("red", "colour", ("0.png",))
    pixels = model.vision_tower.image_processor(conversations.pictures(conversations[0]))
    assert answers[0].answer == model.answer(pixels, ["what colour is it ?"], 4)[0]
    assert answers[6].images == ()


def test_swapping_leaves_no_picture_in_its_place(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    swap = swapped_pictures(conversations, 0)
    assert all(name != other for name, other in swap.items())
    assert sorted(swap) == sorted(swap.values())
    assert swap == swapped_pictures(conversations, 0)
    assert swap != swapped_pictures(conversations, 1)
    answers = answer_questions(model, conversations, max_new_tokens=2, swap_seed=0)
    assert [answer.images for answer in answers[:6]] == [(swap[f"{n}.png"],) for n in range(6)]


def test_caption_loss_is_the_mean_over_all_label_tokens(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    whole = batch_of(model, conversations, *range(8))
    expected = model(whole.input_ids, whole.attention_mask, whole.labels, whole.pixels).loss.item()
    assert caption_loss(model, conversations, batch_size=3, max_length=64) == pytest.approx(
        expected, abs=1e-5
    )
    assert caption_loss(model, conversations, max_length=64, swap_seed=0) != pytest.approx(expected, abs=1e-5)
