"""Models through transformers' auto classes, `generate` and streamers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_llm, tiny_tokenizer, tiny_tower
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    TextIteratorStreamer,
    pipeline,
)

from vlm_vision.adapters import build_projector
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.conversations import IMAGE_TOKEN_ID, Turn
from vlm_vision.train.vlm import VisionLanguageModel, _Pieces, load_llm, load_tokenizer, token_grid
from vlm_vision.train.vlm_processor import VisionLanguageConfig, VlmProcessor

QUESTIONS = ["what colour is it ?", "what ?", "what is the picture of ?"]


def build(folder: Path, projector: Any = "mlp2x_gelu") -> VisionLanguageModel:
    tiny_llm(folder / "llm")
    tower = tiny_tower()
    torch.manual_seed(0)
    connector = build_projector(projector, 64, 32, token_grid(tower))
    torch.nn.init.normal_(next(connector.parameters()), std=0.5)
    return VisionLanguageModel(
        tower, connector, load_llm(folder / "llm"), load_tokenizer(folder / "llm")
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    build(folder).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def model(folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel.from_pretrained(folder)


@pytest.fixture
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def pictures(count: int = 3) -> list[Image.Image]:
    return [
        Image.radial_gradient("L").resize((40 + number, 36)).convert("RGB").rotate(40 * number)
        for number in range(count)
    ]


def talks(count: int = 3) -> list[list[dict[str, Any]]]:
    return [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(pictures(count), QUESTIONS, strict=False)
    ]


def prepared(processor: Any, messages: Any, **options: Any) -> Any:
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True, **options},
    )


def test_auto_classes_load_a_saved_model_after_one_import(folder: Path) -> None:
    code = (
        "import sys, vlm_vision.train.vlm\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, type(processor).__name__, model.training)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "VisionLanguageModel VlmProcessor False"


def test_it_is_a_model_of_transformers_with_its_parts_names(model: VisionLanguageModel, folder: Path) -> None:
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, GenerationMixin)
    assert model.can_generate()
    assert model.config.text_config is model.llm.config
    assert {name.split(".")[0] for name in model.state_dict()} == {"vision_tower", "projector", "llm"}
    assert model.get_input_embeddings() is model.llm.get_input_embeddings()
    assert model.get_output_embeddings() is model.llm.lm_head
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, VisionLanguageConfig)
    assert config.parts == ["tower", "projector", "llm"]
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    again = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    before, after = model.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    with pytest.raises(ConfigError, match="load_in_4bit: not offered"):
        AutoModelForImageTextToText.from_pretrained(folder, load_in_4bit=True)
    with pytest.raises(ConfigError, match="dtype 'float33' is none of torch"):
        VisionLanguageModel.from_pretrained(folder, dtype="float33")


def test_generate_gives_prompts_and_answers_as_answer_does(
    model: VisionLanguageModel, processor: Any
) -> None:
    inputs = prepared(processor, talks())
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :length], inputs["input_ids"])
    answers = [text.strip() for text in processor.batch_decode(output[:, length:], skip_special_tokens=True)]
    pixels = model.vision_tower.image_processor(pictures())
    assert torch.equal(inputs["pixel_values"], pixels)
    assert answers == model.answer(pixels, QUESTIONS, 6)
    for talk, answer in zip(talks(), answers, strict=True):
        single = prepared(processor, [talk])
        new = model.generate(**single, max_new_tokens=6, do_sample=False)[0, single["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == answer


def test_several_pictures_text_alone_and_forward(model: VisionLanguageModel, processor: Any) -> None:
    first, second = pictures(2)
    two = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": first},
                {"type": "image", "image": second},
                {"type": "text", "text": "what ?"},
            ],
        }
    ]
    words = [{"role": "user", "content": "what colour is the picture ?"}]
    inputs = prepared(processor, [two, words])
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist() == [32, 0]
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    turns = [
        [Turn("user", "<image>\n<image>\nwhat ?")],
        [Turn("user", "what colour is the picture ?")],
    ]
    expected = model.answer(model.vision_tower.image_processor([first, second]), turns, 5)
    assert [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)] == expected
    logits = model(**inputs).logits
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, IMAGE_TOKEN_ID)
    ours = model(ids, inputs["attention_mask"], pixels=inputs["pixel_values"]).logits
    assert torch.equal(logits, ours)


def test_a_pipeline_of_transformers_answers(model: VisionLanguageModel, folder: Path, tmp_path: Path) -> None:
    [picture] = pictures(1)
    picture.save(tmp_path / "a.png")
    parts = [{"type": "image", "url": str(tmp_path / "a.png")}, {"type": "text", "text": QUESTIONS[0]}]
    [answer] = pipeline("image-text-to-text", model=str(folder))(
        text=[{"role": "user", "content": parts}],
        return_full_text=False,
        generate_kwargs={"max_new_tokens": 6, "do_sample": False},
    )
    pixels = model.vision_tower.image_processor([picture])
    assert [answer["generated_text"].strip()] == model.answer(pixels, QUESTIONS[:1], 6)


def test_pictures_may_be_files(processor: Any, tmp_path: Path) -> None:
    [picture] = pictures(1)
    picture.save(tmp_path / "a.png")
    for key, file in (("url", tmp_path / "a.png"), ("path", tmp_path / "a.png"), ("image", picture)):
        parts = [{"type": "image", key: file if key == "image" else str(file)}, {"type": "text", "text": "x"}]
        inputs = prepared(processor, [{"role": "user", "content": parts}])
        assert torch.equal(inputs["pixel_values"], processor.image_processor.own([picture])), key
    with pytest.raises(DataError, match=r"gone\.png"):
        processor(images=str(tmp_path / "gone.png"), text="<image> x")


def test_options_of_generate_reach_the_language_model(model: VisionLanguageModel, processor: Any) -> None:
    inputs = prepared(processor, talks(2))
    length = inputs["input_ids"].shape[1]
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, num_return_sequences=3, do_sample=False)
    assert beams.shape[0] == 6
    assert torch.equal(beams[:, :length], inputs["input_ids"].repeat_interleave(3, dim=0))
    found = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert found.sequences.shape[1] <= length + 4
    assert found.scores[0].shape[0] == 2
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model.generate(**inputs, generation_config=settings).shape == (2, length + 2)
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert model.generate(**inputs, min_new_tokens=3).shape == (2, length + 3)
    model.train()
    model.generate(**inputs, max_new_tokens=1)
    assert model.training


def test_transformers_streamer_gives_the_answer_in_pieces(model: VisionLanguageModel, processor: Any) -> None:
    inputs = prepared(processor, talks(1))
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs=options)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    pixels = model.vision_tower.image_processor(pictures(1))
    assert streamed.strip() == model.answer(pixels, QUESTIONS[:1], 6)[0]


def test_stream_gives_pieces_that_are_the_answer(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = model.vision_tower.image_processor(pictures(1))
    pieces = list(model.stream(pixels, QUESTIONS[0], 8, min_new_tokens=8))
    assert len(pieces) > 2
    assert "".join(pieces) == model.answer(pixels, QUESTIONS[:1], 8, min_new_tokens=8)[0]
    assert list(model.stream(pixels, QUESTIONS[0], 1, suppress_tokens=list(range(4, 23)))) == []
    with pytest.raises(DataError, match="1 pictures of 16 tokens"):
        list(model.stream(pixels, [Turn("user", "what ?")], 4))


def test_pieces_around_a_newline_are_those_of_the_whole() -> None:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer("the white \n ? red the", add_special_tokens=False)["input_ids"])
    pieces = _Pieces(tokenizer)
    for token in ids:
        pieces.put(token[None])
    pieces.end()
    assert "".join(pieces) == tokenizer.decode(ids)


def test_the_pipeline_of_transformers_takes_it(folder: Path, processor: Any) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    ask = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False}
    found = ask(text=talks(1)[0], generate_kwargs=options, return_full_text=False)
    pixels = model.vision_tower.image_processor(pictures(1))
    assert found[0]["generated_text"].strip() == model.answer(pixels, QUESTIONS[:1], 6)[0]


def test_a_processor_is_saved_and_comes_back(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is VlmProcessor
    one, two = (prepared(each, talks()) for each in (processor, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_wrong_input_of_a_processor_is_named(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 <image> in the text, but 1 picture\(s\)"):
        processor(text="<image> <image> x", images=pictures(1))
    with pytest.raises(DataError, match="needs `text`"):
        processor(images=pictures(1))
    reader = {"name": "qformer_text", "layers": 2, "heads": 2, "hidden_size": 32, "num_queries": 4}
    model = build(tmp_path, {**reader, "vocab_size": len(tiny_tokenizer())})
    model.save_pretrained(tmp_path / "reader")
    with pytest.raises(ConfigError, match=r"use VisionLanguageModel\.answer"):
        AutoProcessor.from_pretrained(tmp_path / "reader")
