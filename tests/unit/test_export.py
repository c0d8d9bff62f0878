"""Towers as folders of other libraries: what those compute from them is what the tower computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import RESNET, TOWER, captioned_pictures, tiny_dual_encoder, tiny_llm, tiny_tokenizer, tiny_tower
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModel

from vlm_vision import VisionTower, load_dual_encoder, load_tower
from vlm_vision.adapters import build_projector
from vlm_vision.cli import main
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.export import export_clip, export_open_clip, load_whole_tower

# Largest difference between features of size 4: modules of another library, the same sums.
TOLERANCE = 2e-6  # 0


def pixels(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def hidden_states(folder: Path, side: int = 32) -> Any:
    """What transformers computes from a folder that it loads without a word."""
    model, report = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return model.float().eval()(pixels(side), output_hidden_states=True)


def architecture(**vision: Any) -> dict[str, Any]:
    node: Any = TOWER["backbone"]
    whole = node["architecture"]
    changed = {**whole, "vision_cfg": {**whole["vision_cfg"], **vision}}
    return {"backbone": {**node, "architecture": changed}}


@pytest.mark.parametrize(
    ("overrides", "placeholders", "select"),
    [
        ({"pooled_head": True}, (), -2),
        ({}, (3,), -2),
        ({"layer": 1}, (2, 3), -3),
        ({"layer": -1}, (), -1),
    ],
)
@torch.no_grad()
def test_transformers_computes_the_towers_features(
    overrides: dict[str, Any], placeholders: tuple[int, ...], select: int, tmp_path: Path
) -> None:
    tower = tiny_tower(**overrides)
    features = tower(pixels())
    written = export_clip(tower, tmp_path / "clip")
    assert (written.layers, written.placeholders, written.select_layers) == (3, placeholders, (select,))
    output = hidden_states(tmp_path / "clip")
    from_its_own_layer_on = [number for number in range(select, 0) if number == select or placeholders]
    for number in from_its_own_layer_on:  # LLaVA reads -2, wherever the tower was cut before it
        assert torch.allclose(output.hidden_states[number][:, 1:], features, rtol=0, atol=TOLERANCE)
    if written.has_pooled:
        expected = tower.backbone.visual.ln_post(tower.backbone.forward_layers(pixels(), [3])[0][:, 0])  # type: ignore[union-attr,operator]
        assert torch.allclose(output.pooler_output, expected, rtol=0, atol=TOLERANCE)
    else:
        assert not output.pooler_output.any()


def test_names_and_config_are_those_that_every_transformers_reads(tmp_path: Path) -> None:
    export_clip(tiny_tower(), tmp_path / "clip")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in state)
    assert len(state) == 2 + 3 + 2 + 3 * 16
    config = json.loads((tmp_path / "clip" / "config.json").read_text(encoding="utf-8"))
    assert (config["architectures"], config["model_type"]) == (["CLIPVisionModel"], "clip_vision_model")
    assert (config["hidden_act"], config["num_attention_heads"]) == ("gelu", 4)
    assert config["vlm_vision"] == {
        "select_layers": [-2],
        "select_feature": "patch",
        "placeholder_layers": [3],
        "has_pooled_output": False,
    }
    processor = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert processor["image_processor_type"] == "CLIPImageProcessor"
    assert processor["size"] == {"shortest_edge": 32}
    assert processor["crop_size"] == {"height": 32, "width": 32}


def test_the_image_processor_gives_the_towers_pixels(tmp_path: Path) -> None:
    tower = tiny_tower()
    export_clip(tower, tmp_path / "clip")
    captioned_pictures(tmp_path / "pictures", 1)
    picture = Image.open(tmp_path / "pictures" / "0.png")
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "clip")
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    difference = float((theirs - tower.image_processor([picture])).abs().max())
    assert difference < 2e-2  # 1 of 255 where the two round a resize differently


def test_activation_and_precision_go_along(tmp_path: Path) -> None:
    source = architecture()
    source["backbone"]["architecture"]["quick_gelu"] = True
    tower = load_tower(source, dtype="bfloat16", pooled_head=True)
    export_clip(tower, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text(encoding="utf-8"))
    assert (config["hidden_act"], config["torch_dtype"]) == ("quick_gelu", "bfloat16")
    assert all(
        value.dtype == torch.bfloat16 for value in load_file(tmp_path / "clip/model.safetensors").values()
    )


@torch.no_grad()
def test_a_tower_of_another_image_size_or_of_several_layers(tmp_path: Path) -> None:
    tower = tiny_tower(image_size=48, layer=[-2, -3])
    written = export_clip(tower, tmp_path / "clip")
    assert written.select_layers == (-2, -3)
    states = hidden_states(tmp_path / "clip", 48).hidden_states
    joined = torch.cat([states[number][:, 1:] for number in written.select_layers], dim=-1)
    assert torch.allclose(joined, tower(pixels(48)), rtol=0, atol=TOLERANCE)
    model = load_dual_encoder(TOWER, image_size=48)
    export_open_clip(model, tmp_path / "open_clip")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    expected = model.tower.pooled(pixels(48))
    assert torch.allclose(theirs.eval().encode_image(pixels(48)), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_an_export_comes_back_as_a_tower_and_is_exported_the_same(tmp_path: Path) -> None:
    tower = tiny_tower(pooled_head=True)
    export_clip(tower, tmp_path / "clip")
    again = load_tower(f"transformers:{tmp_path / 'clip'}", pooled_head=True)
    assert torch.allclose(again(pixels()), tower(pixels()), rtol=0, atol=TOLERANCE)
    assert again.image_processor.config == tower.image_processor.config
    export_clip(again, tmp_path / "twice")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("clip", "twice"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_sources_give_every_layer_that_they_have(tmp_path: Path) -> None:
    model = tiny_dual_encoder()
    model.save_pretrained(tmp_path / "dual")
    cut = VisionTower.from_pretrained(tmp_path / "dual", pooled_head=False)
    cut.save_pretrained(tmp_path / "cut")
    for source, has_pooled in (("dual", True), ("cut", False)):
        written = export_clip(load_whole_tower(tmp_path / source), tmp_path / f"{source}-clip")
        assert written.has_pooled == has_pooled
    assert load_whole_tower(TOWER).embed_dim == 32


def test_a_vision_language_model_gives_its_tower(tmp_path: Path) -> None:
    pytest.importorskip("transformers", "5")
    from vlm_vision.train.vlm import VisionLanguageModel, load_llm

    cut = tiny_tower()
    llm = load_llm(tiny_llm(tmp_path / "llm"))
    projector = build_projector("mlp2x_gelu", cut.hidden_size, 32, cut.grid)
    VisionLanguageModel(cut, projector, llm, tiny_tokenizer()).save_pretrained(tmp_path / "vlm")
    written = export_clip(load_whole_tower(tmp_path / "vlm"), tmp_path / "clip")
    assert written.placeholders == (3,)


@torch.no_grad()
def test_open_clip_loads_a_dual_encoder_and_computes_the_same(tmp_path: Path) -> None:
    model = tiny_dual_encoder()
    export_open_clip(model, tmp_path / "open_clip")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    theirs.eval()
    tokens = model.tokenizer(["a red square", "two cats"])
    image = model.tower.pooled(pixels())
    assert torch.allclose(theirs.encode_image(pixels()), image, rtol=0, atol=TOLERANCE)
    assert torch.allclose(theirs.encode_text(tokens), model.text(tokens), rtol=0, atol=TOLERANCE)
    assert torch.equal(theirs.logit_scale, model.logit_scale)
    captioned_pictures(tmp_path / "pictures", 1)
    picture = Image.open(tmp_path / "pictures" / "0.png")
    assert torch.equal(transform(picture), model.image_processor([picture])[0])
    again = load_dual_encoder(
        {
            "backbone": {
                **TOWER["backbone"],  # type: ignore[dict-item]
                "weights": str(tmp_path / "open_clip"),
            }
        }
    )
    assert again.fingerprint() == model.fingerprint()


def test_a_resnet_and_custom_text_go_to_open_clip_too(tmp_path: Path) -> None:
    custom: Any = architecture()
    custom["backbone"]["architecture"]["custom_text"] = True
    for name, source, kind in (
        ("resnet", RESNET, open_clip.CLIP),
        ("custom", custom, open_clip.CustomTextCLIP),
    ):
        model = load_dual_encoder(source)
        export_open_clip(model, tmp_path / name)
        theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / name}")
        assert type(theirs) is kind
        with torch.no_grad():
            expected = model.tower.pooled(pixels())
            assert torch.allclose(theirs.eval().encode_image(pixels()), expected, rtol=0, atol=TOLERANCE)


def test_what_is_no_clip_vit_is_refused_with_the_reason(tmp_path: Path) -> None:
    for source, message in (
        (RESNET, "no CLIPVisionModel: vision_cfg.layers: a ModifiedResNet"),
        ("timm:vit_tiny_patch16_224@none", "its backbone is timm:vit_tiny_patch16_224"),
        (architecture(pool_type="avg"), "vision_cfg.pool_type: 'avg'"),
        (architecture(ls_init_value=1e-4), "it scales its layers"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_clip(load_tower(source), tmp_path / "clip")
    padded = tiny_tower().image_processor.config.model_copy(update={"resize": "longest"})
    source = architecture()
    source["backbone"]["preprocess"] = padded.model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"'longest', which a CLIPImageProcessor cannot do"):
        export_clip(load_tower(source), tmp_path / "clip")
    margin = tiny_tower().image_processor.config.model_copy(update={"resize_to": 36})
    source["backbone"]["preprocess"] = margin.model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"resize_to is 36, and open_clip resizes to its image size, 32"):
        export_open_clip(load_dual_encoder(source), tmp_path / "clip")
    assert not (tmp_path / "clip").exists()


def test_empty_shards_are_not_written(tmp_path: Path) -> None:
    tower = tiny_tower()
    tower.backbone.visual.conv1.weight = torch.nn.Parameter(torch.empty(0))  # type: ignore[union-attr]
    with pytest.raises(WeightsError, match=r"values of 1 tensor.* not here .*patch_embedding.weight"):
        export_clip(tower, tmp_path / "clip")
    assert not (tmp_path / "clip").exists()


def test_the_command_says_what_it_wrote_and_how_to_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        status = main(["export", *map(str, arguments)])
        output = capsys.readouterr()
        return status, output.out + output.err

    tiny_dual_encoder().save_pretrained(tmp_path / "dual")
    tiny_tower().save_pretrained(tmp_path / "tower")
    clip = tmp_path / "clip"
    status, told = run(tmp_path / "dual", "--to", "clip", "-o", clip)
    assert status == 0
    assert told == (
        f"{clip}: CLIPVisionModel of 3 layers\n  LLaVA: --vision_tower {clip} --mm_vision_select_layer -2\n"
    )
    status, told = run(tmp_path / "tower", "--to", "clip", "-o", tmp_path / "cut")
    assert status == 0
    assert "had freed its last 1 layer(s): they are zeros" in told
    assert "its pooled output is zeros" in told
    status, told = run(tmp_path / "dual", "--to", "open_clip", "-o", tmp_path / "open_clip")
    assert told.startswith(f"{tmp_path / 'open_clip'}: open_clip.create_model_and_transforms('local-dir:")
    assert status == 0
    for arguments, message in (
        ((tmp_path / "dual", "--to", "clip", "-o", clip), "is there already: give another folder"),
        ((tmp_path / "tower", "--to", "open_clip", "-o", tmp_path / "x"), "expected vlm_vision_dual_encoder"),
        ((tmp_path / "dual", "--to", "onnx", "-o", tmp_path / "x"), "invalid choice: 'onnx'"),
        (
            (tmp_path / "dual", "--to", "clip", "-o", tmp_path / "x", "--adapter", tmp_path / "tower"),
            "holds neither adapter_config.json",
        ),
    ):
        status, told = run(*arguments)
        assert status == 2
        assert message in told
