"""Pictures in tiles: what LlavaNext of transformers computes is what ours compute, however they come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CLIP_VISION, TOWER, tiny_llm, tiny_tower
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    pipeline,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image

from vlm_vision import load_tower
from vlm_vision.adapters import build_projector
from vlm_vision.cli import main
from vlm_vision.errors import ConfigError, DataError, WeightsError
from vlm_vision.tiling import count_tokens, most_tokens
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.train.conversations import (
    IMAGE_TOKEN_ID,
    ConversationDataset,
    Conversations,
    Turn,
    collate,
)
from vlm_vision.train.evaluate import answer_questions, caption_loss
from vlm_vision.train.examine import examine
from vlm_vision.train.questions import Questions
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer, token_grid
from vlm_vision.train.vlm_export import export_llava, export_llava_for_transformers

TOLERANCE = 1e-5  # of logits around 1; worst measured: 1.9e-7
PINPOINTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
TILING = TilingConfig(mode="anyres", merge="spatial_unpad", grid_pinpoints=PINPOINTS)
ANYRES = {"mode": "anyres", "merge": "spatial_unpad", "grid_pinpoints": [list(size) for size in PINPOINTS]}
SIZES = [(50, 41), (20, 90), (131, 30), (64, 64), (7, 5), (200, 199), (33, 99)]
QUESTION = "what colour is it ?"
QFORMER = {"name": "qformer", "layers": 2, "heads": 2, "hidden_size": 32, "num_queries": 5}


def picture(width: int, height: int) -> Image.Image:
    """One of a kind for its size."""
    levels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def pictures() -> list[Image.Image]:
    return [picture(*size) for size in SIZES]


def build(
    folder: Path, tower: Any = None, projector: Any = "mlp2x_gelu", tiling: TilingConfig = TILING
) -> VisionLanguageModel:
    tiny_llm(folder / "llm", max_position_embeddings=1024)
    eye = tiny_tower() if tower is None else tower
    torch.manual_seed(0)
    connector = build_projector(projector, eye.hidden_size, 32, token_grid(eye))
    torch.nn.init.normal_(next(connector.parameters()), std=0.5)
    return VisionLanguageModel(
        eye, connector, load_llm(folder / "llm"), load_tokenizer(folder / "llm"), tiling=tiling
    ).eval()


def write_records(folder: Path) -> Path:
    """One record for each odd size, one of two pictures, and two of text alone."""
    (folder / "images").mkdir(parents=True)
    shown = [[size] for size in SIZES] + [[SIZES[0], SIZES[2]], [], []]
    for size in SIZES:
        picture(*size).save(folder / "images" / f"{size[0]}x{size[1]}.png")
    records = [
        {
            "id": f"r{number}",
            "image": [f"{width}x{height}.png" for width, height in sizes],
            "conversations": [
                {"from": "human", "value": "<image>\n" * len(sizes) + "what colour is it ?"},
                {"from": "gpt", "value": ["red", "green", "blue"][number % 3]},
            ],
        }
        for number, sizes in enumerate(shown)
    ]
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "train.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    build(folder).save_pretrained(folder / "model")
    write_records(folder / "data")
    tiny_tower().save_pretrained(folder / "tower")
    return folder


@pytest.fixture
def model(folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel.from_pretrained(folder / "model")


@pytest.fixture
def conversations(folder: Path) -> Conversations:
    return Conversations(folder / "data" / "train.json", folder / "data" / "images")


def dataset(model: VisionLanguageModel, conversations: Conversations, **options: Any) -> ConversationDataset:
    assert model.tiles is not None
    return ConversationDataset(
        conversations,
        model.chat,
        model.vision_tower.image_processor,
        tiles=model.tiles.form,
        **{"max_length": 400, **options},
    )


# ---- transformers


@torch.no_grad()
def worst_error(model: VisionLanguageModel, theirs: Any, processor: Any, shown: list[list[int]]) -> float:
    """Of the logits of a padded batch whose rows show these pictures; pixels and tokens must be equal."""
    rows = [[pictures()[place] for place in places] for places in shown]
    texts = ["<image>\n" * len(row) + QUESTION for row in rows]
    flat = [image for row in rows for image in row]
    inputs = processor(images=flat, text=texts, padding=True, return_tensors="pt", padding_side="right")
    pixels, sizes = model.prepare_pictures(flat)
    assert pixels is not None
    assert model.tiles is not None
    assert sizes is not None
    assert torch.equal(sizes, inputs["image_sizes"])
    counts = [model.tiles.form.num_tiles((width, height)) for height, width in sizes.tolist()]
    given = torch.cat([tiles[:count] for tiles, count in zip(inputs["pixel_values"], counts, strict=True)])
    assert (given - pixels).abs().max() <= 1e-6  # measured 0
    logits = theirs(**inputs).logits
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == theirs.config.image_token_id, IMAGE_TOKEN_ID)
    ours = model(ids, inputs["attention_mask"], pixels=pixels, image_sizes=sizes).logits
    assert ours.abs().max() > 0.1
    mask = inputs["attention_mask"].bool()
    return float((logits[..., : ours.shape[-1]] - ours)[mask].abs().max())


def llava_next(folder: Path) -> tuple[Any, Any]:
    """A model that transformers made and saved, with its processor."""
    tiny_llm(folder / "llm", max_position_embeddings=1024)
    tokenizer = load_tokenizer(folder / "llm")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **CLIP_VISION},
        text_config={**load_llm(folder / "llm").config.to_dict(), "vocab_size": 32},
        image_token_index=23,
        image_seq_length=16,
        image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
    )
    theirs = LlavaNextForConditionalGeneration(config).eval()
    torch.nn.init.normal_(theirs.model.multi_modal_projector.linear_1.weight, std=0.5)
    theirs.save_pretrained(folder / "hf")
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder / "hf")
    return theirs, processor


def test_a_llava_next_of_transformers_comes_in_and_computes_the_same(tmp_path: Path) -> None:
    theirs, processor = llava_next(tmp_path)
    model = VisionLanguageModel.from_pretrained(tmp_path / "hf")
    every = [[place] for place in range(len(SIZES))]
    batches = [*([one] for one in every), every, [[0, 2], [1], [3, 4, 5]]]
    worst = max(worst_error(model, theirs, processor, shown) for shown in batches)
    print(f"LlavaNext: worst error of logits {worst:.1e}")
    assert worst <= TOLERANCE
    assert model.tiles is not None
    assert model.tiles.image_newline is not None
    assert torch.equal(model.tiles.image_newline, theirs.model.image_newline)
    assert model.tiles.form.config.margins == "transformers"
    export_llava_for_transformers(model, tmp_path / "back")
    back = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    for name, tensor in theirs.state_dict().items():
        is_freed = (".layers.2." in name and "vision_tower" in name) or "post_layernorm" in name
        assert torch.equal(back[name], torch.zeros_like(tensor) if is_freed else tensor), name
    half = VisionLanguageModel.from_pretrained(tmp_path / "hf", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_margins_of_sizes_where_llava_and_transformers_part() -> None:
    """A float just under an odd number: transformers leaves a row more at each side."""
    config = TilingConfig(mode="anyres", merge="spatial_unpad", grid_pinpoints=((1008, 672),))
    theirs = config.model_copy(update={"margins": "transformers"})
    parted = []
    for width in range(200, 500):
        for height in range(200, 500):
            size = width, height
            ours = count_tokens(size, theirs, grid=(24, 24), tile_size=336)
            if ours != count_tokens(size, config, grid=(24, 24), tile_size=336):
                kept = unpad_image(torch.empty(1, 48, 72), (height, width))
                assert ours == 576 + kept.shape[1] * (kept.shape[2] + 1)
                parted.append(size)
    assert parted


def test_an_export_is_a_llava_next_with_our_logits_and_text(
    model: VisionLanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    command = ["export", str(folder / "model"), "--to", "transformers", "-o", str(tmp_path / "hf")]
    assert main(command) == 0
    assert "LlavaNextForConditionalGeneration" in capsys.readouterr().out
    theirs, report = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    assert type(processor) is LlavaNextProcessor
    every = [[place] for place in range(len(SIZES))]
    assert worst_error(model, theirs.eval(), processor, [*every, [0, 2]]) <= TOLERANCE

    talks = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
        for image in pictures()
    ]
    processor.tokenizer.padding_side = "left"
    inputs = processor.apply_chat_template(
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )
    output = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pixels, sizes = model.prepare_pictures(pictures())
    ours = model.answer(pixels, [QUESTION] * len(SIZES), 6, image_sizes=sizes)
    assert [text.strip() for text in said] == ours
    assert len(set(ours)) > 1

    state = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name for name in state if "." not in name} == {"image_newline"}
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llava_next"
    assert config["image_grid_pinpoints"] == [[height, width] for width, height in PINPOINTS]
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "up to 5 tiles of 32 pixels takes up to 88 tokens" in card
    again = VisionLanguageModel.from_pretrained(tmp_path / "hf")
    assert again.answer(pixels, [QUESTION] * len(SIZES), 6, image_sizes=sizes) == ours
    export_llava_for_transformers(again, tmp_path / "hf2")
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "hf2" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [("siglip_vision_model", {}), ("clip_vision_model", {"layer": [1, 2]})],
    ids=["SigLIP", "CLIP, two layers"],
)
def test_other_towers_become_a_llava_next(
    architecture: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    node = {"name": "transformers", "architecture": {"model_type": architecture, **CLIP_VISION}}
    torch.manual_seed(0)
    tower = load_tower({"backbone": {**node, "weights": "none"}}, **overrides)
    model = build(tmp_path, tower)
    export_llava_for_transformers(model, tmp_path / "hf")
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    assert worst_error(model, theirs, processor, [[0, 1], [2], [4]]) <= TOLERANCE
    path = tmp_path / "hf" / "preprocessor_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["vlm_vision"]  # as llava-hf's own files are
    path.write_text(json.dumps(content), encoding="utf-8")
    again = VisionLanguageModel.from_pretrained(tmp_path / "hf")
    assert worst_error(again, theirs, processor, [[0, 1], [2], [4]]) <= TOLERANCE


def test_the_pipeline_of_transformers_takes_it(model: VisionLanguageModel, folder: Path) -> None:
    processor: Any = AutoProcessor.from_pretrained(folder / "model")
    ask: Any = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    parts = [{"type": "image", "image": picture(50, 41)}, {"type": "text", "text": QUESTION}]
    options = {"max_new_tokens": 6, "do_sample": False}
    found = ask(text=[{"role": "user", "content": parts}], generate_kwargs=options, return_full_text=False)
    pixels, sizes = model.prepare_pictures([picture(50, 41)])
    assert found[0]["generated_text"].strip() == model.answer(pixels, [QUESTION], 6, image_sizes=sizes)[0]


def test_what_llava_next_has_no_place_for_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"merge": "spatial"}, "merge 'spatial_unpad', with base and without max_tiles alone"),
        ({"base": False}, "with base"),
        ({"max_tiles": 2}, "without max_tiles"),
    ]
    for number, (fields, message) in enumerate(cases):
        model = build(tmp_path, tiling=TILING.model_copy(update=fields))
        with pytest.raises(ConfigError, match=message):
            export_llava_for_transformers(model, tmp_path / str(number))
        assert not (tmp_path / str(number)).exists()
    squashed = json.loads(json.dumps(TOWER))
    squashed["backbone"]["preprocess"] = {"image_size": 32, "resize": "longest"}
    with pytest.raises(ConfigError, match="LlavaNext's image processor makes no such pixels"):
        export_llava_for_transformers(build(tmp_path, load_tower(squashed)), tmp_path / "longest")


# ---- LLaVA


@pytest.mark.parametrize(
    "tiling",
    [
        TILING,
        TilingConfig(mode="anyres", merge="spatial_unpad", grid_pinpoints="(1x1),...,(2x3)", max_tiles=2),
        TilingConfig(mode="anyres", merge="spatial", grid_pinpoints=PINPOINTS, base=False),
    ],
    ids=["anyres", "anyres_max_2 of a range", "spatial_nobase"],
)
def test_llavas_own_files_go_out_and_come_back(tiling: TilingConfig, tmp_path: Path) -> None:
    model = build(tmp_path, tiling=tiling)
    export_llava(model, tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text(encoding="utf-8"))
    assert config["image_aspect_ratio"] == ("anyres_max_2" if tiling.max_tiles else "anyres")
    assert config["mm_patch_merge_type"] == ("spatial_unpad" if tiling.base else "spatial_nobase")
    assert config["image_grid_pinpoints"] == [list(size) for size in tiling.resolutions(32, 32)]
    state = load_file(tmp_path / "llava" / "model.safetensors")
    assert ("model.image_newline" in state) == (tiling.merge == "spatial_unpad")
    again = VisionLanguageModel.from_pretrained(tmp_path / "llava")
    assert again.tiles is not None
    assert again.tiles.form.config.to_llava(32, 32) == tiling.to_llava(32, 32)
    pixels, sizes = model.prepare_pictures(pictures())
    asked = [QUESTION] * len(SIZES)
    assert again.answer(pixels, asked, 6, image_sizes=sizes) == model.answer(
        pixels, asked, 6, image_sizes=sizes
    )
    if "model.image_newline" in state:
        assert torch.equal(again.state_dict()["tiles.image_newline"], state["model.image_newline"])
        del state["model.image_newline"]
        save_file(state, tmp_path / "llava" / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsError, match=r"image_newline of \[32\] is wanted, found none"):
            VisionLanguageModel.from_pretrained(tmp_path / "llava")


# ---- the model itself


def test_a_model_is_saved_with_its_tiling_and_newline(
    folder: Path, model: VisionLanguageModel, tmp_path: Path
) -> None:
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["parts"] == ["tower", "projector", "llm", "tiles"]
    assert TilingConfig(**config["tiling"]) == TILING
    assert load_file(folder / "model" / "tiles" / "model.safetensors").keys() == {"image_newline"}
    fresh = build(tmp_path).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
    assert "tiles.image_newline" in fresh
    half = VisionLanguageModel.from_pretrained(folder / "model", dtype="bfloat16")
    assert half.state_dict()["tiles.image_newline"].dtype == torch.bfloat16
    flat = build(tmp_path, tiling=TilingConfig(mode="anyres", grid_pinpoints=PINPOINTS))
    flat.save_pretrained(tmp_path / "flat")
    assert not (tmp_path / "flat" / "tiles").exists()
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "flat")
    assert loaded.parts == ("tower", "projector", "llm")
    assert loaded.tiles is not None
    (tmp_path / "flat" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(WeightsError, match="image_newline of a model with tiles"):
        VisionLanguageModel.from_pretrained(tmp_path / "flat")


@pytest.mark.parametrize(
    ("projector", "fields"),
    [
        ({"name": "pixel_shuffle", "factor": 2}, {}),
        ("mlp_downsample", {}),
        ({"name": "pool", "stride": 2}, {"merge": "spatial"}),
        ({"name": "c_abstractor", "target": [2, 2], "hidden_size": 16, "depth": 1}, {}),
        (QFORMER, {"merge": "flat"}),
        ("mlp2x_gelu", {"merge": "spatial_maxpool2x2"}),
        ("mlp2x_gelu", {"max_tiles": 2}),
    ],
    ids=str,
)
def test_projectors_with_another_grid_give_as_many_tokens_as_they_say(
    projector: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = build(tmp_path, projector=projector, tiling=TILING.model_copy(update=fields))
    assert model.tiles is not None
    pixels, sizes = model.prepare_pictures(pictures())
    assert pixels is not None
    whole = model.image_tokens(model.vision_tower(pixels))
    merged = model.tiles(whole, SIZES)
    counts = [model.tiles.form.num_tokens(size) for size in SIZES]
    assert len(merged) == sum(counts)
    assert max(counts) <= model.tokens_per_image
    assert model.answer(pixels, [QUESTION] * len(SIZES), 2, image_sizes=sizes)


def test_the_most_tokens_are_those_of_the_largest_picture() -> None:
    sizes = [(width, height) for width in range(8, 300, 7) for height in range(8, 300, 3)]
    for fields in ({}, {"max_tiles": 2}, {"merge": "spatial_maxpool2x2"}, {"merge": "flat"}, {"base": False}):
        config = TILING.model_copy(update=fields)
        most = most_tokens(config, grid=(4, 4), tile_size=32)
        assert most == max(count_tokens(size, config, grid=(4, 4), tile_size=32) for size in sizes), fields
    for single in (TilingConfig(), TilingConfig(mode="pad", merge="spatial_unpad")):
        assert most_tokens(single, grid=(4, 4), tile_size=32) == 16 + (single.mode == "pad")


@pytest.mark.parametrize(
    "projector",
    [{"name": "pixel_shuffle", "factor": 2}, "mlp_downsample", {"name": "pool", "stride": 2}],
    ids=str,
)
def test_tokens_of_a_coarser_grid_are_laid_where_their_patches_are(projector: Any, tmp_path: Path) -> None:
    tiling = TilingConfig(mode="anyres", merge="spatial", grid_pinpoints=((64, 64),), base=False)
    model = build(tmp_path, projector=projector, tiling=tiling)
    assert model.tiles is not None
    assert model.tiles.form.grid == (2, 2)
    patches = torch.zeros(5, 4, 4, 64)  # of the whole and of four tiles, two above two

    def tokens(patches: Tensor) -> Tensor:
        assert model.tiles is not None
        return model.tiles(model.image_tokens(patches.reshape(5, 16, 64)), [(64, 64)])

    before = tokens(patches)
    assert before.shape == (16, 32)
    for row in range(4):
        for column in range(4):
            lit = patches.clone()
            tile = 1 + 2 * (row // 2) + column // 2
            top, left = row % 2 * 2, column % 2 * 2
            lit[tile, top : top + 2, left : left + 2] = torch.linspace(-1, 1, 64)
            changed = (tokens(lit) - before).abs().amax(dim=1) > 0
            assert changed.nonzero().flatten().tolist() == [4 * row + column]


def test_answers_in_a_batch_are_those_given_alone_and_in_pieces(model: VisionLanguageModel) -> None:
    pixels, sizes = model.prepare_pictures(pictures())
    together = model.answer(pixels, [QUESTION] * len(SIZES), 6, image_sizes=sizes)
    assert len(set(together)) > 1
    for image, answer in zip(pictures(), together, strict=True):
        own, size = model.prepare_pictures([image])
        assert model.answer(own, [QUESTION], 6, image_sizes=size) == [answer]
        assert "".join(model.stream(own, QUESTION, 6, image_sizes=size)) == answer
    assert model.prepare_pictures([]) == (None, None)
    assert model.answer(None, ["what ?"], 2)


def test_pictures_and_sizes_that_do_not_match_are_refused(model: VisionLanguageModel) -> None:
    pixels, sizes = model.prepare_pictures(pictures()[:2])
    assert sizes is not None
    with pytest.raises(DataError, match="2 <image> in the prompts, but 0 image_sizes"):
        model.answer(pixels, [[Turn("user", "<image> <image> x")]])
    with pytest.raises(DataError, match="1 <image> in the prompts, but 2 image_sizes"):
        model.answer(pixels, [[Turn("user", "<image> x")]], image_sizes=sizes)
    ids = torch.tensor([model.chat.prompt([Turn("user", "<image> <image> x")], [88, 61])])
    with pytest.raises(DataError, match="whose tokens depend on their size: give image_sizes"):
        model(ids, torch.ones_like(ids), pixels=pixels)
    with pytest.raises(DataError, match=r"149 image tokens in the text and .* but pictures of image_sizes"):
        model(ids, torch.ones_like(ids), pixels=pixels, image_sizes=sizes)


def test_tiling_that_parts_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the 5 tokens of the projector 'qformer' lie on no grid: set merge"
    ):
        build(tmp_path, projector=QFORMER)
    with pytest.raises(ConfigError, match="which class tokens would part: set the tower's select: patch"):
        build(tmp_path, tower=tiny_tower(select="cls_patch"))
    with pytest.raises(ConfigError, match="48x32: not multiples of the tower's tile, 32x32"):
        build(tmp_path, tiling=TILING.model_copy(update={"grid_pinpoints": ((48, 32),)}))


def test_the_processor_of_a_model_gives_what_it_wants(
    model: VisionLanguageModel, folder: Path, tmp_path: Path
) -> None:
    processor: Any = AutoProcessor.from_pretrained(folder / "model")
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
        for image in pictures()
    ]
    options = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "processor_kwargs": {"return_tensors": "pt", "padding": True},
    }
    inputs = processor.apply_chat_template(talks, **options)
    pixels, sizes = model.prepare_pictures(pictures())
    assert torch.equal(inputs["pixel_values"], pixels)
    assert torch.equal(inputs["image_sizes"], sizes)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in said] == model.answer(
        pixels, [QUESTION] * len(SIZES), 6, image_sizes=sizes
    )
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(talks, **options)
    assert again.keys() == inputs.keys()
    assert all(torch.equal(again[name], inputs[name]) for name in inputs)


# ---- data


def test_samples_know_their_pictures_and_packing_changes_no_loss(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    data = dataset(model, conversations)
    samples = [data[index] for index in range(len(data))]
    assert [sample.num_pictures for sample in samples] == [1] * len(SIZES) + [2, 0, 0]

    def loss(pack_to: int | None) -> Tensor:
        batch = collate(samples, model.chat.pad_id, pack_to)
        assert batch.image_sizes is not None
        assert len(batch.image_sizes) == len(SIZES) + 2
        return model(
            batch.input_ids,
            batch.attention_mask,
            batch.labels,
            batch.pixels,
            position_ids=batch.position_ids,
            image_sizes=batch.image_sizes,
        ).loss

    whole = loss(None)
    assert loss(400).item() == pytest.approx(whole.item(), abs=1e-5)
    whole.backward()
    for name in ("tiles.image_newline", "vision_tower.backbone.visual.conv1.weight"):
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None
        assert gradient.abs().max() > 0


def test_text_alone_reaches_every_weight_while_training(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    batch = collate([dataset(model, conversations)[len(SIZES) + 1]], model.chat.pad_id)
    model.train()
    model(batch.input_ids, batch.attention_mask, batch.labels).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("llm")}
    assert all(grad is not None and not grad.any() for grad in gradients.values())


def test_a_picture_that_takes_too_many_tokens_is_named(
    model: VisionLanguageModel, conversations: Conversations
) -> None:
    with pytest.raises(DataError, match=r"record 'r5': max_length 60 would cut off a picture"):
        dataset(model, conversations, max_length=60)[5]


def test_evaluation_shows_other_pictures_with_their_own_tokens(
    model: VisionLanguageModel, conversations: Conversations, folder: Path, tmp_path: Path
) -> None:
    assert len(answer_questions(model, conversations, max_new_tokens=2)) == len(conversations)
    right, swapped = (caption_loss(model, conversations, swap_seed=seed) for seed in (None, 0))
    assert right != swapped
    records = [{"image": f"{w}x{h}.png", "caption": "red"} for w, h in SIZES]
    (tmp_path / "captions.json").write_text(json.dumps(records), encoding="utf-8")
    questions = Questions(tmp_path / "captions.json", folder / "data" / "images", kind="captions")
    assert len(examine(model, questions, batch_size=4).results) == len(SIZES)


def test_the_commands_know_of_tiles(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = folder / "data" / "images" / "131x30.png"
    assert main(["chat", str(folder / "model"), "--image", str(image), "--question", "what ?"]) == 0
    config = align_tree(folder)
    path = tmp_path / "align.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    capsys.readouterr()
    assert main(["plan", str(path)]) == 0
    told = capsys.readouterr().out
    assert "tokens per image: up to 88, by its shape, in up to 5 tiles of 16" in told
    assert "tokens per step: up to 1,600; of a picture in each conversation up to 352" in told
    assert main(["data", "check", str(path)]) == 0
    assert "records over 400 tokens" in capsys.readouterr().out


# ---- training


def align_tree(folder: Path, **stage: Any) -> dict[str, Any]:
    settings = {
        "name": "all",
        "data": {
            "file": str(folder / "data" / "train.json"),
            "image_folder": str(folder / "data" / "images"),
            "workers": 0,
        },
        "learn": [{"match": "projector.*"}, {"match": "tiles.*", "lr": 0.05}],
        "lr": 1e-2,
        "steps": 4,
        "batch_size": 4,
        "max_length": 400,
        "log_every": 1,
        **stage,
    }
    model = {
        "tower": str(folder / "tower"),
        "llm": str(folder / "llm"),
        "projector": "mlp2x_gelu",
        "tiling": ANYRES,
    }
    return {"model": model, "stages": [settings]}


def test_the_newline_learns_is_handed_on_and_saved(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from vlm_vision.config import load_config
    from vlm_vision.train.align import align, build_model
    from vlm_vision.train.align_config import AlignConfig
    from vlm_vision.train.run import prepare_process, read_metrics

    stage = align_tree(folder, group_by_length=True, packing=True, save_every=2)
    tree = {**stage, "stages": [{**stage["stages"][0], "name": "first"}, *stage["stages"]]}
    tree["stages"][1] = {**tree["stages"][1], "learn": [{"match": "projector.*"}]}
    one = {
        **align_tree(folder)["stages"][0],
        "name": "zero",
        "tiles": False,
        "learn": [{"match": "projector.*"}],
    }
    tree["stages"] = [one, *tree["stages"]]
    config = load_config(AlignConfig, tree)
    align(config, tmp_path / "run")
    assert not (tmp_path / "run" / "zero" / "model" / "tiles").exists()
    first, last = (
        load_file(tmp_path / "run" / place / "tiles" / "model.safetensors")["image_newline"]
        for place in ("first/model", "model")
    )
    assert torch.equal(first, last)  # frozen in the last stage
    prepare_process(config.seed)
    began = build_model(config.model, config.stages[0], {}).state_dict()["tiles.image_newline"]
    assert (first - began).abs().max() > 0.01
    (tmp_path / "run" / "first" / "done.json").unlink()
    before = [line["loss"] for line in read_metrics(tmp_path / "run" / "first" / "metrics.jsonl")]
    align(config, tmp_path / "run", resume=True)  # from step 2
    after = [line["loss"] for line in read_metrics(tmp_path / "run" / "first" / "metrics.jsonl")]
    assert after == pytest.approx(before, abs=1e-6)
    again = load_file(tmp_path / "run" / "first" / "model" / "tiles" / "model.safetensors")["image_newline"]
    torch.testing.assert_close(again, first, atol=1e-6, rtol=0)
    saved = VisionLanguageModel.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(saved.state_dict()["tiles.image_newline"], last)


def test_a_newline_that_does_not_learn_is_handed_on_too(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from vlm_vision.config import load_config
    from vlm_vision.train.align import align
    from vlm_vision.train.align_config import AlignConfig

    tree = align_tree(folder, steps=1, learn=[{"match": "projector.*"}])
    tree["stages"] = [{**tree["stages"][0], "name": name} for name in ("first", "second")]
    align(load_config(AlignConfig, tree), tmp_path)
    first, last = (
        load_file(tmp_path / place / "tiles" / "model.safetensors")["image_newline"]
        for place in ("first/model", "model")
    )
    assert torch.equal(first, last)


def test_a_run_goes_on_from_the_parts_of_another(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from vlm_vision.config import load_config
    from vlm_vision.train.align import align
    from vlm_vision.train.align_config import AlignConfig

    align(load_config(AlignConfig, align_tree(folder, steps=1)), tmp_path / "one")
    parts = tmp_path / "one" / "model"
    tree = align_tree(folder, steps=1, learn=[{"match": "projector.*"}])
    tree["model"]["tiles_weights"] = str(parts / "tiles")
    # Another seed draws another end of rows.
    align(load_config(AlignConfig, {**tree, "seed": 1}), tmp_path / "two")
    first, last = (
        load_file(tmp_path / run / "model" / "tiles" / "model.safetensors")["image_newline"]
        for run in ("one", "two")
    )
    assert torch.equal(first, last)
    for tiling in (None, {**ANYRES, "merge": "spatial"}):
        tree["model"]["tiling"] = tiling
        with pytest.raises(ConfigError, match="tiles_weights are of `tiling` with merge: spatial_unpad"):
            load_config(AlignConfig, tree)


def test_stages_without_tiles_are_checked(folder: Path) -> None:
    from vlm_vision.config import load_config
    from vlm_vision.train.align_config import AlignConfig

    with pytest.raises(ConfigError, match="tiles: false in the last stage"):
        load_config(AlignConfig, align_tree(folder, tiles=False))
    tree = align_tree(folder, tiles=False)
    del tree["model"]["tiling"]
    with pytest.raises(ConfigError, match="is of a stage of a model with `tiling`, and this one has none"):
        load_config(AlignConfig, tree)
