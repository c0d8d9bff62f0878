"""The tower against open_clip's own model and, with mapped weights, against transformers.

Tolerances are absolute, fp32 on CPU; the worst difference measured stands beside each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from einops import rearrange
from open_clip import zero_shot_metadata
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm_vision import DualEncoder, VisionTower, ZeroShotClassifier, load_dual_encoder, load_tower
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.prompts import read_classes, read_templates
from vlm_vision.text_embeddings import embed_classes

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "quick_gelu": True,
}
WORDS = ["a photo of a cat.", "two red squares left of a blue circle", "x"]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def save(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def tiny() -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**TINY).eval()


@pytest.fixture(scope="module")
def tiny_file(tiny: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny, tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="module")
def real() -> open_clip.CLIP:
    """ViT-B/32 in its full size, with random weights."""
    torch.manual_seed(0)
    model: open_clip.CLIP = open_clip.create_model("ViT-B-32-quickgelu").eval()
    return model


@pytest.fixture(scope="module")
def real_model(real: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    path = save(real, tmp_path_factory.mktemp("real") / "weights.safetensors")
    return load_dual_encoder(f"open_clip:ViT-B-32-quickgelu@{path}")


def node(weights: object, **architecture: Any) -> dict[str, Any]:
    return {"name": "open_clip", "architecture": {**TINY, **architecture}, "weights": str(weights)}


def worst(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def to_transformers(visual: Any, quick_gelu: bool) -> CLIPVisionModel:
    """transformers' CLIP vision model with the weights of a native trunk of open_clip."""
    width, layers = visual.conv1.out_channels, len(visual.transformer.resblocks)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=visual.transformer.resblocks[0].mlp.c_fc.out_features,
        num_hidden_layers=layers,
        num_attention_heads=visual.transformer.resblocks[0].attn.num_heads,
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        hidden_act="quick_gelu" if quick_gelu else "gelu",
    )
    own = visual.state_dict()
    state = {
        "embeddings.class_embedding": own["class_embedding"],
        "embeddings.patch_embedding.weight": own["conv1.weight"],
        "embeddings.position_embedding.weight": own["positional_embedding"],
    }
    for theirs, ours in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        state |= {f"{theirs}.{kind}": own[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for layer in range(layers):
        theirs, ours = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for part, name in parts.items():
                state[f"{theirs}.{part}.{kind}"] = own[f"{ours}.{name}.{kind}"]
            for part, tensor in zip("qkv", own[f"{ours}.attn.in_proj_{kind}"].chunk(3), strict=True):
                state[f"{theirs}.self_attn.{part}_proj.{kind}"] = tensor
    model = CLIPVisionModel(config).eval()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    missing, unexpected = model.load_state_dict(
        {f"{prefix}{name}": tensor for name, tensor in state.items()}, strict=False
    )
    assert not unexpected
    assert all("position_ids" in name for name in missing)
    return model


@torch.no_grad()
def test_features_equal_open_clip_and_transformers_tiny(tiny: open_clip.CLIP, tiny_file: Path) -> None:
    pixels = torch.randn(3, 3, 32, 32)
    hidden = to_transformers(tiny.visual, quick_gelu=True)(pixels, output_hidden_states=True).hidden_states
    for layer in (-1, -2, 1):
        features = load_tower({"backbone": node(tiny_file)}, layer=layer)(pixels)
        index = layer if layer < 0 else layer - 4
        own = tiny.visual.forward_intermediates(
            pixels, indices=[3 + index], output_fmt="NLC", intermediates_only=True
        )
        assert worst(features, own["image_intermediates"][0]) <= 1e-5  # measured 7e-7
        assert worst(features, hidden[index][:, 1:]) <= 1e-5  # measured 6e-7


@torch.no_grad()
def test_features_equal_open_clip_and_transformers_vit_b_32(
    real: open_clip.CLIP, real_model: DualEncoder
) -> None:
    pixels = torch.randn(2, 3, 224, 224)
    features = real_model.tower(pixels)
    assert features.shape == (2, 49, 768)
    own = real.visual.forward_intermediates(pixels, indices=[10], output_fmt="NLC", intermediates_only=True)
    assert worst(features, own["image_intermediates"][0]) <= 1e-5  # measured 2e-6
    hidden = to_transformers(real.visual, quick_gelu=True)(pixels, output_hidden_states=True).hidden_states
    assert worst(features, hidden[-2][:, 1:]) <= 1e-5  # measured 2e-6
    gelu = to_transformers(real.visual, quick_gelu=False)(pixels, output_hidden_states=True).hidden_states
    assert worst(features, gelu[-2][:, 1:]) > 1e-3  # the wrong activation would be seen


@torch.no_grad()
def test_transformers_backbone_gives_the_same_features_from_mapped_weights(
    real: open_clip.CLIP, tmp_path: Path
) -> None:
    mapped = to_transformers(real.visual, quick_gelu=True)
    mapped.save_pretrained(tmp_path)
    one = load_tower(
        {"backbone": {"name": "transformers", "model": str(tmp_path), "preprocess": {"image_size": 224}}}
    )
    pixels = torch.randn(2, 3, 224, 224)
    own = real.visual.forward_intermediates(pixels, indices=[10], output_fmt="NLC", intermediates_only=True)
    assert worst(one(pixels), own["image_intermediates"][0]) <= 1e-5  # measured 2e-6


@torch.no_grad()
def test_embeddings_equal_open_clips(real: open_clip.CLIP, real_model: DualEncoder) -> None:
    pixels, tokens = torch.randn(2, 3, 224, 224), open_clip.tokenize(WORDS)
    assert torch.equal(real_model.tokenizer(WORDS), tokens)
    assert worst(real_model.tower.pooled(pixels), real.encode_image(pixels)) <= 1e-5  # measured 2e-6
    own = normalize(real.encode_image(pixels), dim=-1)
    assert worst(real_model.encode_image(pixels), own) <= 1e-6  # measured 2e-7
    assert (
        worst(real_model.encode_text(tokens), real.encode_text(tokens, normalize=True)) <= 1e-6
    )  # measured 0
    assert float(real_model.logit_scale) == pytest.approx(float(real.logit_scale), abs=1e-6)


@torch.no_grad()
def test_resnet_gives_the_stages_and_the_embedding_of_open_clip() -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("RN50-quickgelu").eval()
    visual = model.visual
    tower = load_tower("open_clip:RN50-quickgelu@none", pooled_head=True)
    tower.backbone.visual.load_state_dict(visual.state_dict())  # type: ignore[union-attr]
    pixels = torch.randn(1, 3, 224, 224)
    stage = visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels))))
    last = visual.layer4(stage)
    assert torch.equal(tower(pixels), rearrange(last, "b d h w -> b (h w) d"))
    assert torch.equal(tower.pooled(pixels), model.encode_image(pixels))
    earlier = VisionTower(tower.config.model_copy(update={"layer": -2, "pooled_head": False}), tower.backbone)
    assert torch.equal(earlier(pixels), rearrange(stage, "b d h w -> b (h w) d"))


@torch.no_grad()
def test_coca_embeddings_equal_open_clips(tmp_path: Path) -> None:
    vision = {**TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}  # type: ignore[dict-item]
    text = {**TINY["text_cfg"], "context_length": 15, "embed_cls": True, "output_tokens": True}  # type: ignore[dict-item]
    decoder = {**TINY["text_cfg"], "mlp_ratio": 4, "ls_init_value": None}  # type: ignore[dict-item]
    torch.manual_seed(0)
    model = open_clip.CoCa(32, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision).eval()
    ours = load_dual_encoder(
        {
            "backbone": node(
                save(model, tmp_path / "coca.safetensors"), vision_cfg=vision, text_cfg=text, quick_gelu=False
            )
        }
    )
    pixels, tokens = torch.randn(2, 3, 32, 32), ours.tokenizer(WORDS)
    assert worst(ours.encode_image(pixels), model.encode_image(pixels)) <= 1e-6  # measured 0
    assert worst(ours.encode_text(tokens), model.encode_text(tokens)) <= 1e-6  # measured 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("openai_80", zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES),
        ("openai_7", zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES),
    ],
)
def test_class_embeddings_of_named_templates_equal_open_clips(
    ours: str, theirs: Any, tiny: open_clip.CLIP, tiny_file: Path
) -> None:
    model = load_dual_encoder({"backbone": node(tiny_file)})
    classes = read_classes("imagenet")[::25]
    expected = open_clip.build_zero_shot_classifier(tiny, model.tokenizer, classes, theirs, 10)  # [E,C]
    found = embed_classes(model, classes, read_templates(ours))
    assert worst(found.T, expected) <= 1e-6  # measured 0
    doubled = embed_classes(model, [*classes, *classes[:2]], read_templates(ours))
    assert torch.equal(doubled, torch.cat([found, found[:2]]))
    classifier = ZeroShotClassifier(model, "imagenet", "openai_7").class_embeddings
    assert classifier.shape == (998, 32)  # two names stand twice


@torch.no_grad()
@pytest.mark.parametrize(
    "templates", [["a photo of a {}."], ["a photo of a {}.", "a {} in a video game", "{}"]]
)
def test_class_embeddings_equal_open_clips(
    templates: list[str], tiny: open_clip.CLIP, tiny_file: Path
) -> None:
    classes = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("cat", "dog", "car")]
    model = load_dual_encoder({"backbone": node(tiny_file)})
    formats = [template.format for template in templates]
    theirs = open_clip.build_zero_shot_classifier(tiny, model.tokenizer, classes, formats, 4)  # [E,C]
    ours = ZeroShotClassifier(model, classes, templates).class_embeddings
    assert worst(ours.T, theirs) <= 1e-6  # measured 6e-8


# Loading ---------------------------------------------------------------------------------------------------


def checkpoint(model: nn.Module, path: Path) -> Path:
    """What open_clip's training writes: tensors under `state_dict` with DDP's prefix, beside other state."""
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path
    )
    return path


def folder(model: nn.Module, path: Path, **model_cfg: Any) -> Path:
    """What open_clip pushes to the hub."""
    path.mkdir()
    save(model, path / "open_clip_model.safetensors")
    content = {
        "model_cfg": {**TINY, **model_cfg},
        "preprocess_cfg": {
            "size": 32,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }
    (path / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    return path


@torch.no_grad()
@pytest.mark.parametrize("kind", ["safetensors", "checkpoint", "bare", "half", "custom text", "folder"])
def test_weights_load_from_every_format(
    kind: str, tiny: open_clip.CLIP, tiny_file: Path, tmp_path: Path
) -> None:
    if kind == "safetensors":
        source = tiny_file
    elif kind == "checkpoint":
        source = checkpoint(tiny, tmp_path / "epoch_3.pt")
    elif kind == "folder":
        source = folder(tiny, tmp_path / "hub")
    else:
        source, state = tmp_path / "weights.bin", tiny.state_dict()
        if kind == "half":
            state = {name: tensor.half() for name, tensor in state.items()}
        if kind == "custom text":
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        torch.save(state, source)
    ours = load_dual_encoder({"backbone": node(source)})
    pixels, tokens = torch.randn(2, 3, 32, 32), ours.tokenizer(WORDS)
    tolerance = 2e-3 if kind == "half" else 1e-6  # measured 2.4e-4 and 1.5e-7
    assert worst(ours.encode_image(pixels), tiny.encode_image(pixels, normalize=True)) <= tolerance
    assert worst(ours.encode_text(tokens), tiny.encode_text(tokens, normalize=True)) <= tolerance
    assert ours.tower.dtype == torch.float32
    assert float(ours.logit_scale) == pytest.approx(float(tiny.logit_scale), abs=1e-3)


def test_a_folder_tells_its_preprocessing(tiny: open_clip.CLIP, tmp_path: Path) -> None:
    settings = load_tower({"backbone": node(folder(tiny, tmp_path / "hub"))}).image_processor.config
    assert (settings.resize, settings.interpolation, settings.mean) == ("squash", "bilinear", (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (32, {"resize_mode": "longest", "fill_color": 127}),
        ((24, 40), {"resize_mode": "shortest", "interpolation": "bilinear"}),
    ],
)
def test_pictures_become_what_open_clip_makes_of_them(
    size: Any, settings: dict[str, Any], tiny: open_clip.CLIP, tmp_path: Path
) -> None:
    """Its `shortest` is bicubic where sides differ, whatever the settings say."""
    vision = {**TINY["vision_cfg"], "image_size": size}
    path = folder(open_clip.model.CLIP(**{**TINY, "vision_cfg": vision}), tmp_path / "hub", vision_cfg=vision)
    content = json.loads((path / "open_clip_config.json").read_text(encoding="utf-8"))
    content["preprocess_cfg"] |= {"size": size, **settings}
    (path / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    architecture = {"name": "open_clip", "architecture": content["model_cfg"], "weights": str(path)}
    ours = load_tower({"backbone": architecture}).image_processor
    theirs = image_transform_v2(PreprocessCfg(**content["preprocess_cfg"]), is_train=False)
    noise = np.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    for picture in (Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2))):
        assert torch.equal(ours(picture)[0], theirs(picture))


def test_a_saved_model_loads_without_the_weights_it_came_from(tiny: open_clip.CLIP, tmp_path: Path) -> None:
    source = folder(tiny, tmp_path / "hub")
    model = load_dual_encoder({"backbone": node(source)})
    model.save_pretrained(tmp_path / "saved")
    for path in source.iterdir():
        path.unlink()
    again = DualEncoder.from_pretrained(tmp_path / "saved")
    assert again.image_processor.config == model.image_processor.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not again.training


@pytest.mark.parametrize(
    ("source", "way_out"),
    [
        ("open_clip:ViT-B-32@openai", "QuickGELU.*use open_clip:ViT-B-32-quickgelu@openai"),
        ("open_clip:ViT-L-14-336@openai", "use open_clip:ViT-L-14-336-quickgelu@openai"),
        ("open_clip:RN50@openai", "use open_clip:RN50-quickgelu@openai"),
        ("open_clip:ViT-H-14@dfn5b", "use open_clip:ViT-H-14-quickgelu@dfn5b"),
    ],
)
def test_another_activation_than_the_tags_is_refused_before_any_download(source: str, way_out: str) -> None:
    with pytest.raises(WeightsError, match=way_out):
        load_tower(source)


def test_another_activation_than_the_folders_or_openais_is_refused(
    tiny: open_clip.CLIP, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=r"trained with QuickGELU.*set architecture.quick_gelu to true"):
        load_tower({"backbone": node(folder(tiny, tmp_path / "hub"), quick_gelu=False)})
    with pytest.raises(WeightsError, match=r"trained with GELU.*set architecture.quick_gelu to false"):
        load_tower({"backbone": node(folder(tiny, tmp_path / "other", quick_gelu=False))})
    constants = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**tiny.state_dict(), **constants}, tmp_path / "openai.pt")
    with pytest.raises(WeightsError, match="trained with QuickGELU"):
        load_tower({"backbone": node(tmp_path / "openai.pt", quick_gelu=False)})
    load_tower({"backbone": node(tmp_path / "openai.pt")})


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    torch.save({"state_dict": {"visual.conv1.weight": Payload(proof)}}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="a pickle can run code"):
        load_tower({"backbone": node(tmp_path / "model.pt")})
    assert not proof.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert proof.exists()  # so the payload does what it says


def test_what_does_not_fit_is_listed(tiny: open_clip.CLIP, tmp_path: Path) -> None:
    state = dict(tiny.state_dict())
    del state["visual.ln_pre.bias"]
    state["visual.extra"] = torch.zeros(2)
    state["visual.proj"] = torch.zeros(3, 4)
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_tower({"backbone": node(tmp_path / "broken.safetensors")})
    assert "1 missing: ln_pre.bias" in str(caught.value)
    assert "1 unexpected: extra" in str(caught.value)
    assert "proj: file has (3, 4), model needs (64, 32)" in str(caught.value)
    save_file({**tiny.state_dict(), "head.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(
        WeightsError, match=r"1 tensor\(s\) belong to no part of an open_clip model: head.weight"
    ):
        load_tower({"backbone": node(tmp_path / "more.safetensors")})


def test_weights_that_are_not_there_or_not_whole_say_so(
    tiny: open_clip.CLIP, tiny_file: Path, tmp_path: Path
) -> None:
    def refused(weights: object, message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            load_dual_encoder({"backbone": node(weights)})

    refused(tmp_path / "absent.pt", "neither a file nor a tag")
    refused(tmp_path, "no weights file")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_file.read_bytes()[:-100])
    refused(cut, "not a complete safetensors file")
    two = tmp_path / "two"
    two.mkdir()
    save(tiny.visual, two / "a.safetensors")
    save(tiny.visual, two / "b.safetensors")
    refused(two, "several weights files")
    list_file = tmp_path / "list.pt"
    torch.save([torch.zeros(1)], list_file)
    refused(list_file, "must hold a mapping of names to tensors")
    no_scale = {name: tensor for name, tensor in tiny.state_dict().items() if name != "logit_scale"}
    save_file(no_scale, tmp_path / "no_scale.safetensors")
    refused(tmp_path / "no_scale.safetensors", "no logit_scale")


def test_a_source_without_text_tower_is_no_dual_encoder() -> None:
    with pytest.raises(ConfigError, match="has no text tower"):
        load_dual_encoder("timm:test_vit@none")


def test_long_captions_are_cut_at_their_end_token_and_said_to_be() -> None:
    tokenizer = load_dual_encoder({"backbone": node("none")}).tokenizer
    fits, long = " ".join(["red"] * 14), " ".join(["red"] * 15)
    assert not tokenizer.is_truncated(fits)
    assert tokenizer.is_truncated(long)
    assert tokenizer(long)[0, -1] == tokenizer(fits)[0, -1] == 49407


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused() -> None:
    text = {**TINY["text_cfg"], "vocab_size": 1000}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"vocab_size is 1000.*set it to 49408"):
        load_dual_encoder({"backbone": node("none", text_cfg=text)})
