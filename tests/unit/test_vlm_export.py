"""Models as folders of transformers' Llava and of LLaVA: what those compute is what ours compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import CLIP_VISION, RESNET, colour_records, tiny_llm, tiny_tower
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    GraniteConfig,
    GraniteForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
    PhiForCausalLM,
)

from vlm_vision import VisionTower, load_tower
from vlm_vision.adapters import build_projector
from vlm_vision.adapters.projector_keys import load_projector_weights
from vlm_vision.cli import main
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.train.chat_parts import FROM_TEXT
from vlm_vision.train.conversations import IMAGE_TOKEN_ID, Turn
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer, token_grid
from vlm_vision.train.vlm_export import export_llava, export_llava_for_transformers

TOLERANCE = 1e-5  # of logits around 1; worst measured: 2.7e-7
QUESTION = "what colour is it ?"
SIGLIP = {
    "backbone": {
        "name": "transformers",
        "architecture": {"model_type": "siglip_vision_model", **CLIP_VISION},
        "weights": "none",
    }
}
CLIP = {
    "backbone": {
        "name": "transformers",
        "architecture": {"model_type": "clip_vision_model", **CLIP_VISION},
        "weights": "none",
    }
}


def seeded_tower(source: Any, **overrides: Any) -> VisionTower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_tower(source, **overrides)


def build(folder: Path, tower: VisionTower, projector: Any = "mlp2x_gelu", **llm: Any) -> VisionLanguageModel:
    tiny_llm(folder / "llm", **llm)
    torch.manual_seed(0)
    connector = build_projector(projector, tower.hidden_size, 32, token_grid(tower))
    torch.nn.init.normal_(next(connector.parameters()), std=0.5)
    return VisionLanguageModel(
        tower, connector, load_llm(folder / "llm"), load_tokenizer(folder / "llm")
    ).eval()


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((50, 41)).convert("RGB")


@torch.no_grad()
def worst_logit_error(model: VisionLanguageModel, theirs: Any, image_token: int) -> float:
    """Of a batch of two pictures with and one text without, padded, on the vocabulary of ours."""
    rows = [
        model.chat.prompt([Turn("user", f"<image>\n{QUESTION}")]),
        model.chat.prompt([Turn("user", "<image> x")]),
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    ours = model(ids, mask, pixels=pixels()).logits
    given = ids.masked_fill(ids == IMAGE_TOKEN_ID, image_token)
    logits = theirs(input_ids=given, attention_mask=mask, pixel_values=pixels()).logits
    assert ours.abs().max() > 0.1
    return float((logits[..., : ours.shape[-1]] - ours)[mask.bool()].abs().max())


@torch.no_grad()
def their_answers(folder: Path, images: list[Image.Image], questions: list[str], tokens: int) -> list[str]:
    """By transformers alone: its model, its processor, its chat template."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    processor.tokenizer.padding_side = "left"
    talks = [
        [{"role": "user", "content": [{"type": "text", "text": question}, {"type": "image", "image": image}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    inputs = processor.apply_chat_template(
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


TOWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CLIP of open_clip": ("tiny", {}),
    "CLIP of transformers, last layer, whole": (CLIP, {"layer": -1, "pooled_head": True}),
    "CLIP, class token, two layers": (CLIP, {"layer": [1, 2], "select": "cls_patch"}),
    "SigLIP": (SIGLIP, {}),
}


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_our_logits_and_text(kind: str, tied: bool, tmp_path: Path) -> None:
    source, overrides = TOWERS[kind]
    tower = tiny_tower(**overrides) if source == "tiny" else seeded_tower(source, **overrides)
    model = build(tmp_path, tower, tie_word_embeddings=tied)
    export_llava_for_transformers(model, tmp_path / "hf")
    theirs, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    assert len(theirs.get_input_embeddings().weight) == 64  # 23, and <image>, to a multiple of 64
    assert worst_logit_error(model, theirs.eval(), theirs.config.image_token_id) <= TOLERANCE
    questions = [QUESTION, "what is the picture of ?"]
    image = picture().crop((0, 0, 41, 41))  # square: no rounding of margins
    prepared = model.vision_tower.image_processor([image, image])
    assert their_answers(tmp_path / "hf", [image, image], questions, 6) == model.answer(
        prepared, questions, 6
    )

    again = VisionLanguageModel.from_pretrained(tmp_path / "hf")
    assert again.answer(prepared, questions, 6) == model.answer(prepared, questions, 6)
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert worst_logit_error(again, theirs, theirs.config.image_token_id) <= TOLERANCE
    export_llava_for_transformers(again, tmp_path / "hf2")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf2"))
    assert first.keys() == second.keys()
    for name in first:  # the norm after the last layer, which no feature passes, is freed
        assert torch.equal(first[name], second[name]) or "post_layernorm" in name, name
    for name in (
        "chat_template.jinja",
        "tokenizer.json",
        "processor_config.json",
        "preprocessor_config.json",
    ):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "hf2" / name).read_bytes(), name


def test_names_and_files_are_those_of_llava_hf(tmp_path: Path) -> None:
    """As `llava-hf/llava-1.5-7b-hf` has them, which vLLM's loader reads with the level `vision_model.`."""
    export_llava_for_transformers(build(tmp_path, tiny_tower()), tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    beginnings = {
        "language_model.model.embed_tokens.",
        "language_model.model.layers.",
        "language_model.model.norm.",
        "language_model.lm_head.",
        "vision_tower.vision_model.embeddings.",
        "vision_tower.vision_model.pre_layrnorm.",
        "vision_tower.vision_model.encoder.layers.",
        "vision_tower.vision_model.post_layernorm.",
        "multi_modal_projector.linear_1.",
        "multi_modal_projector.linear_2.",
    }
    assert {next(start for start in beginnings if name.startswith(start)) for name in state} == beginnings
    assert sum("vision_model.encoder.layers." in name for name in state) == 3 * 16
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files >= {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "README.md",
    }
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    assert (config["image_seq_length"], config["image_token_index"]) == (16, 23)
    assert (config["vision_config"]["num_hidden_layers"], config["text_config"]["vocab_size"]) == (3, 64)
    processor = json.loads((tmp_path / "hf" / "processor_config.json").read_text(encoding="utf-8"))
    assert processor["num_additional_image_tokens"] == 1
    assert processor["patch_size"] == 8


def test_a_vocabulary_with_room_does_not_grow_and_new_rows_are_never_the_greatest(tmp_path: Path) -> None:
    model = build(tmp_path, tiny_tower(), vocab_size=40)
    export_llava_for_transformers(model, tmp_path / "room")
    state = load_file(tmp_path / "room" / "model.safetensors")
    assert len(state["language_model.lm_head.weight"]) == 40
    small = build(tmp_path / "small", tiny_tower())
    export_llava_for_transformers(small, tmp_path / "grown")
    table = load_file(tmp_path / "grown" / "model.safetensors")["language_model.lm_head.weight"]
    assert torch.equal(table[:23], small.llm.lm_head.weight)
    logits = torch.randn(50, 32) @ table.T
    assert (logits.argmax(dim=1) < 23).all()


def test_a_processor_of_transformers_makes_our_prompts(tmp_path: Path) -> None:
    model = build(tmp_path, tiny_tower())
    export_llava_for_transformers(model, tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    assert type(processor) is LlavaProcessor
    image, text = {"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}
    cases: list[tuple[list[dict[str, Any]], list[Turn]]] = [
        ([{"role": "user", "content": [image, text]}], [Turn("user", f"<image>\n{QUESTION}")]),
        ([{"role": "user", "content": [text, image]}], [Turn("user", f"<image>\n{QUESTION}")]),
        (
            [{"role": "user", "content": [image, image, text]}],
            [Turn("user", f"<image>\n<image>\n{QUESTION}")],
        ),
        ([{"role": "user", "content": QUESTION}], [Turn("user", QUESTION)]),
        (
            [
                {"role": "system", "content": [{"type": "text", "text": "x"}]},
                {"role": "user", "content": [image, text]},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
                {"role": "user", "content": [text]},
            ],
            [
                Turn("system", "x"),
                Turn("user", f"<image>\n{QUESTION}"),
                Turn("assistant", "red"),
                Turn("user", QUESTION),
            ],
        ),
    ]
    for messages, turns in cases:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = [23 if token == IMAGE_TOKEN_ID else token for token in model.chat.prompt(turns)]
        assert inputs["input_ids"][0].tolist() == expected
        if "pixel_values" in inputs:
            ours = model.vision_tower.image_processor([picture()])
            # The centre of an odd margin is a pixel beside ours: open_clip rounds to even.
            assert inputs["pixel_values"][:1].shape == ours.shape


def test_a_model_of_llava_hf_comes_in_as_it_is(tmp_path: Path) -> None:
    """One that transformers itself made and saved, with a template of parts alone, as llava-hf's is."""
    tiny_llm(tmp_path / "llm")
    tokenizer = load_tokenizer(tmp_path / "llm")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
        "{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}"
        "{% endfor %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'answer:' }}{% endif %}"
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **CLIP_VISION},
        text_config={**load_llm(tmp_path / "llm").config.to_dict(), "vocab_size": 32},
        image_token_index=23,
        image_seq_length=16,
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(tmp_path / "hf")
    model = VisionLanguageModel.from_pretrained(tmp_path / "hf")
    assert worst_logit_error(model, theirs, 23) <= TOLERANCE
    assert model.tokenizer.chat_template == FROM_TEXT + template
    asked = model.chat.prompt([Turn("user", f"<image>\n{QUESTION}")])
    expected = tokenizer(f"<s>user: <image>\n{QUESTION}\nanswer:", add_special_tokens=False)["input_ids"]
    assert [token for token in asked if token != IMAGE_TOKEN_ID] == [
        token for token in expected if token != 23
    ]
    assert asked.count(IMAGE_TOKEN_ID) == 16
    model.save_pretrained(tmp_path / "ours")
    kept = VisionLanguageModel.from_pretrained(tmp_path / "ours")
    assert worst_logit_error(kept, theirs, 23) <= TOLERANCE
    export_llava_for_transformers(kept, tmp_path / "back")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    for name, tensor in theirs.state_dict().items():
        is_freed = (".layers.2." in name and "vision_tower" in name) or "post_layernorm" in name
        assert torch.equal(back[name], torch.zeros_like(tensor) if is_freed else tensor), name
    assert (tmp_path / "back" / "chat_template.jinja").read_text(encoding="utf-8") == template


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", {"name": "mlp", "depth": 3}], ids=str)
def test_llavas_own_files_go_out_and_come_back(projector: Any, tmp_path: Path) -> None:
    model = build(tmp_path, seeded_tower(CLIP), projector)
    export_llava(model, tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])
    assert config["mm_vision_tower"] == str(tmp_path / "llava" / "vision_tower")
    assert (config["mm_vision_select_layer"], config["mm_vision_select_feature"]) == (-2, "patch")
    state = load_file(tmp_path / "llava" / "model.safetensors")
    held = {name for name in state if "mm_projector" in name}
    assert held == {f"model.mm_projector.{name}" for name in model.projector.state_dict()}
    assert state.keys() - held == model.llm.state_dict().keys()
    again = VisionLanguageModel.from_pretrained(tmp_path / "llava")
    before, after = model.state_dict(), again.state_dict()
    for name in before.keys() - {name for name in before if name.startswith("vision_tower")}:
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(again.vision_tower(pixels()), model.vision_tower(pixels()))
    other = build_projector(projector, 32, 32, (4, 4))
    load_projector_weights(other, tmp_path / "llava" / "mm_projector.bin")
    assert all(
        torch.equal(value, model.projector.state_dict()[name]) for name, value in other.state_dict().items()
    )
    (tmp_path / "llava").rename(tmp_path / "moved")  # the tower is found beside the config
    assert torch.equal(
        VisionLanguageModel.from_pretrained(tmp_path / "moved").vision_tower(pixels()),
        again.vision_tower(pixels()),
    )


def test_what_llavas_files_say_beside_the_weights(tmp_path: Path) -> None:
    model = build(tmp_path, seeded_tower(CLIP))
    export_llava(model, tmp_path / "llava")
    path = tmp_path / "llava" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))

    def with_fields(**fields: Any) -> VisionLanguageModel:
        path.write_text(json.dumps({**config, **fields}), encoding="utf-8")
        return VisionLanguageModel.from_pretrained(tmp_path / "llava")

    padded = with_fields(image_aspect_ratio="pad").vision_tower.image_processor.config
    assert (padded.resize, padded.fill) == ("longest", (122, 116, 104))
    for fields, message in (
        ({"image_aspect_ratio": "anyres"}, "mode 'anyres' needs grid_pinpoints"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "LLaVA ends a picture of one tile with image_newline, or"),
        ({"mm_use_im_start_end": True}, r"are not offered in a model; adapters\.from_llava"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_fields(**fields)
    settings = json.loads((tmp_path / "llava" / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (tmp_path / "llava" / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "llava" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "A chat between a curious user" in str(with_fields().tokenizer.chat_template)


def test_what_has_no_slot_is_refused_with_the_way_out(tmp_path: Path) -> None:
    way_out = r"AutoModelForImageTextToText loads it after `import vlm_vision\.train\.vlm`"
    for tower, projector, message in (
        (tiny_tower(), "linear", "another make than this projector"),
        (tiny_tower(), {"name": "mlp", "depth": 3}, "another make than this projector"),
        (tiny_tower(), {"name": "pixel_shuffle", "factor": 2}, "another make|not 'mlp'|pixel_shuffle"),
        (load_tower(RESNET, layer=-1), "mlp2x_gelu", "a ModifiedResNet"),
        (tiny_tower(select="cls"), "mlp2x_gelu", "select 'cls'"),
    ):
        model = build(tmp_path, tower, projector)
        with pytest.raises(ConfigError, match=f"(?s)no slot for this model: .*({message}).*{way_out}"):
            export_llava_for_transformers(model, tmp_path / "hf")
    model = build(tmp_path, tiny_tower(), "pixel_shuffle")
    with pytest.raises(ConfigError, match="LLaVA has no slot for this model: LLaVA has no projector"):
        export_llava(model, tmp_path / "llava")
    with pytest.raises(ConfigError, match=r"LLaVA has no slot for this model: .*no CLIPVisionModel"):
        export_llava(build(tmp_path, seeded_tower(SIGLIP)), tmp_path / "llava")
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "llava").exists()


def test_a_head_that_llava_does_not_have_is_refused_unless_it_adds_nothing(tmp_path: Path) -> None:
    model = build(tmp_path, tiny_tower())
    size = {
        "vocab_size": len(model.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    phi, granite = (
        PhiForCausalLM(PhiConfig(**size)),
        GraniteForCausalLM(GraniteConfig(**size, num_key_value_heads=2, logits_scaling=3.0)),
    )
    torch.nn.init.ones_(phi.lm_head.bias)
    for llm, message in ((phi, "adds a bias to its logits"), (granite, "adds a scale or cap")):
        other = VisionLanguageModel(model.vision_tower, model.projector, llm, model.tokenizer).eval()
        with pytest.raises(ConfigError, match=message):
            export_llava_for_transformers(other, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
    torch.nn.init.zeros_(phi.lm_head.bias)
    plain = VisionLanguageModel(model.vision_tower, model.projector, phi, model.tokenizer).eval()
    export_llava_for_transformers(plain, tmp_path / "hf")
    _, found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("layer", [-2, [1, 2]])
def test_the_command_tells_what_vllm_does_not_load(
    layer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, tiny_tower(layer=layer)).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "transformers", "-o", str(tmp_path / "hf")]) == 0
    told = "vLLM does not load it: its Llava reads one layer of the tower, not 2" in capsys.readouterr().out
    assert told == (layer == [1, 2])


def test_a_whole_model_is_no_language_model(tmp_path: Path) -> None:
    model = build(tmp_path, tiny_tower())
    export_llava_for_transformers(model, tmp_path / "hf")
    model.save_pretrained(tmp_path / "ours")
    for name in ("hf", "ours"):
        with pytest.raises(ConfigError, match=r"a whole vision-language model.*save_pretrained"):
            load_llm(tmp_path / name)
    VisionLanguageModel.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "parts")
    load_llm(tmp_path / "parts" / "llm")


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    export_llava_for_transformers(build(tmp_path, tiny_tower()), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    whole = load_file(file)
    for name in (
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
    ):
        save_file({key: value for key, value in whole.items() if key != name}, file, {"format": "pt"})
        with pytest.raises(WeightsError, match="missing"):
            VisionLanguageModel.from_pretrained(tmp_path / "hf")
    model = build(tmp_path, tiny_tower())
    model.llm.lm_head.weight.data = torch.empty(0)
    with pytest.raises(WeightsError, match="not here"):
        export_llava_for_transformers(model, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_the_command_exports_a_run_and_its_card_tells_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colour_records(tmp_path / "data", 4)
    run = tmp_path / "run"
    build(tmp_path, tiny_tower()).save_pretrained(run / "model")
    stage = run / "stage1"
    stage.mkdir()
    (stage / "config.yaml").write_text(
        "name: stage1\ndata: {file: train.json, image_folder: images}\nlearn: [{match: projector.*}]\n"
        "lr: 0.002\nbatch_size: 4\nprecision: bf16\nzero_stage: 2\n",
        encoding="utf-8",
    )
    mixed = run / "stage2"
    mixed.mkdir()
    (mixed / "config.yaml").write_text(
        "name: stage2\ndata: [{file: a.json, weight: 2.0}, {file: b.parquet}]\nlearn: [{match: llm.*}]\n"
        "lr: 0.001\nbatch_size: 4\nprecision: bf16\nzero_stage: 2\n",
        encoding="utf-8",
    )
    for folder in (stage, mixed):
        (folder / "done.json").write_text(
            json.dumps({"parts": ["projector"], "figures": {"loss": 1.25}}), encoding="utf-8"
        )
    assert main(["export", str(run / "model"), "--to", "transformers", "-o", str(tmp_path / "hf")]) == 0
    assert "LlavaForConditionalGeneration" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    for words in (
        "pipeline_tag: image-text-to-text",
        "### stage1",
        "file train.json",
        "match projector.*",
        "loss 1.25",
        "- data: file a.json, weight 2.0\n- data: file b.parquet",
        "takes 16 tokens",
    ):
        assert words in card, words
    assert main(["export", str(run / "model"), "--to", "llava", "-o", str(tmp_path / "llava")]) == 0
    assert "load_pretrained_model" in capsys.readouterr().out
    assert "from llava.model.builder" in (tmp_path / "llava" / "README.md").read_text(encoding="utf-8")
    assert main(["export", str(run / "model"), "--to", "llava", "-o", str(tmp_path / "llava")]) == 2
    assert (
        main(["export", str(run / "model"), "--to", "llava", "-o", str(tmp_path / "x"), "--adapter", "y"])
        == 2
    )
