from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny import CLIP_VISION, half_runs_on_cpu
from torch import Tensor, nn

from vlm_vision import VisionTower, list_backbones, load_dual_encoder, load_tower
from vlm_vision.errors import ConfigError, VlmVisionError, WeightsError
from vlm_vision.testing import CLAUSES, ContractError, check_tower

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
    "text_cfg": TEXT,
}
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "text_cfg": TEXT,
}
COCA = {**VIT, "vision_cfg": {**VIT["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 4}}  # type: ignore[dict-item]
HF_CLIP = {"model_type": "clip_vision_model", **CLIP_VISION}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "open_clip ViT": {"name": "open_clip", "architecture": VIT},
    "open_clip QuickGELU": {"name": "open_clip", "architecture": {**VIT, "quick_gelu": True}},
    "open_clip CoCa": {"name": "open_clip", "architecture": COCA},
    "open_clip ModifiedResNet": {"name": "open_clip", "architecture": RESNET},
    "transformers CLIP": {"name": "transformers", "architecture": HF_CLIP},
    "transformers DINOv2": {"name": "transformers", "architecture": DINOV2},
    "transformers DINOv2 SwiGLU": {
        "name": "transformers",
        "architecture": {**DINOV2, "use_swiglu_ffn": True},
    },
    "timm ViT": {"name": "timm", "model": "test_vit"},
    "timm ViT with a register alone": {"name": "timm", "model": "test_vit4"},
    "timm ResNet, odd size": {"name": "timm", "model": "resnet10t.c3_in1k"},
    "timm ConvNeXt": {"name": "timm", "model": "test_convnext"},
}


def tower_of(family: str, **overrides: Any) -> VisionTower:
    torch.manual_seed(0)
    return load_tower({"backbone": {**FAMILIES[family], "weights": "none"}}, **overrides)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_contract(family: str) -> None:
    check_tower(tower_of(family))
    check_tower(tower_of(family, pooled_head=True, layer=-1))


@pytest.mark.parametrize(
    "overrides",
    [
        {"layer": [-1, 1]},
        {"layer": 1},
        {"select": "cls_patch"},
        {"select": "cls", "layer": -1},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["open_clip ViT", "transformers CLIP", "transformers DINOv2", "timm ViT"])
def test_every_option_keeps_the_contract(family: str, overrides: dict[str, Any]) -> None:
    if overrides.get("dtype") == "float16" and not half_runs_on_cpu():
        pytest.skip("this torch has no half-precision convolution on a CPU")
    check_tower(tower_of(family, **overrides))


def test_the_check_leaves_the_tower_as_it_was() -> None:
    tower = tower_of("open_clip ViT")
    tower.train()
    frozen = tower.backbone.visual.conv1.weight.requires_grad_(False)  # type: ignore[union-attr]
    learnt = next(parameter for parameter in tower.parameters() if parameter.requires_grad)
    learnt.grad = torch.ones_like(learnt)
    check_tower(tower)
    assert tower.training
    assert not frozen.requires_grad
    assert torch.equal(learnt.grad, torch.ones_like(learnt))


class Noisy(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + torch.randn_like(tokens)


class MixesPictures(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens - tokens.mean(dim=0, keepdim=True)


class CutsGradient(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.detach()


class DropsToken(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, :-1]


@pytest.mark.parametrize(
    ("wrong", "clause"),
    [
        (Noisy, "evaluation is deterministic"),
        (MixesPictures, "pictures do not mix"),
        (CutsGradient, "gradients reach pixels and parameters"),
        (DropsToken, "every selection has its shape"),
    ],
)
def test_the_check_finds_a_wrong_forward(wrong: type[nn.Module], clause: str) -> None:
    tower = tower_of("open_clip ViT")
    inner, change = tower.backbone.forward_layers, wrong()

    def forward_layers(pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        return [change(output) for output in inner(pixels, layers)]

    tower.backbone.forward_layers = forward_layers  # type: ignore[method-assign]
    with pytest.raises(ContractError, match=clause):
        check_tower(tower)


def test_the_check_finds_a_dead_parameter_and_a_lost_one() -> None:
    tower = tower_of("open_clip ViT")
    tower.backbone.unused = nn.Parameter(torch.zeros(3))
    with pytest.raises(ContractError) as caught:
        check_tower(tower)
    assert "1 parameter(s) get no gradient: backbone.unused" in str(caught.value)
    assert "saving and loading gives the same tower" in str(caught.value)


def test_the_check_finds_wrong_facts_and_names_every_clause() -> None:
    tower = tower_of("open_clip ViT")
    tower.hidden_size, tower.grid = 63, (5, 5)
    with pytest.raises(ContractError) as caught:
        check_tower(tower)
    assert "facts say (2, 25, 63)" in str(caught.value)
    assert "breaks 2 clause(s)" in str(caught.value)  # other sizes count their patches too


def test_the_check_finds_pixels_that_are_not_refused_and_a_hidden_no_grad() -> None:
    tower = tower_of("open_clip ModifiedResNet")
    tower.check_pixels = lambda batch, interpolate: batch[:, :3] * 1.0  # type: ignore[method-assign]
    tower.forward = torch.no_grad()(tower.forward)  # type: ignore[method-assign]
    with pytest.raises(ContractError) as caught:
        check_tower(tower)
    for clause in ("wrong pixels are refused", "gradients reach pixels"):
        assert clause in str(caught.value)


def test_every_clause_is_in_the_table() -> None:
    import vlm_vision.testing as testing

    helpers = {"_expect", "_as_found", "_native", "_pixels", "_with", "_same_tensors"}
    functions = {
        name for name, value in vars(testing).items() if name.startswith("_") and hasattr(value, "__code__")
    }
    assert functions - helpers == {clause.__name__ for clause in CLAUSES}


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_known_without_memory_for_weights(family: str) -> None:
    with torch.device("meta"):
        tower = tower_of(family)
    assert tower.device.type == "meta"
    real = tower_of(family)
    for fact in ("hidden_size", "grid", "num_patches", "image_size", "patch_size", "num_tokens"):
        assert getattr(tower, fact) == getattr(real, fact)


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_model_of_open_clip_builds_and_gives_the_shapes_it_tells(name: str) -> None:
    with torch.device("meta"):
        tower = load_tower(f"open_clip:{name}@none", pooled_head=True)
        settings = tower.image_processor.config
        pixels = torch.empty(1, 3, settings.height, settings.width)
        assert tower.pooled(pixels).shape == (1, tower.embed_dim)
        tower = VisionTower(tower.config.model_copy(update={"pooled_head": False}), tower.backbone)
        assert tower(pixels).shape == (1, tower.num_patches, tower.hidden_size)


def test_native_text_towers_build_beside_their_trunks() -> None:
    for name in ("ViT-L-14-336-quickgelu", "RN50", "coca_ViT-B-32", "ViT-S-32-alt"):
        with torch.device("meta"):
            model = load_dual_encoder(f"open_clip:{name}@none")
            tokens = torch.zeros(2, model.tokenizer.context_length, dtype=torch.long)
            assert model.encode_text(tokens).shape == (2, model.tower.embed_dim), name


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        ("open_clip:ViT-L-14-336-quickgelu@none", (1024, (24, 24), 336, 14)),
        ("open_clip:ViT-B-32@none", (768, (7, 7), 224, 32)),
        ("open_clip:RN50@none", (2048, (7, 7), 224, 32)),
        ("timm:vit_small_patch14_reg4_dinov2@none", (384, (37, 37), 518, 14)),
    ],
)
def test_facts_of_known_models(source: str, facts: tuple[Any, ...]) -> None:
    with torch.device("meta"):
        tower = load_tower(source)
    assert (tower.hidden_size, tower.grid, tower.image_size, tower.patch_size) == facts


@pytest.mark.parametrize(
    ("family", "blocks"), [("open_clip ViT", "visual.transformer.resblocks"), ("timm ViT", "model.blocks")]
)
def test_layers_after_the_selected_one_are_freed(family: str, blocks: str) -> None:
    whole, tower = tower_of(family, pooled_head=True), tower_of(family, layer=2)
    total = len(whole.backbone.get_submodule(blocks))  # type: ignore[arg-type]
    assert total > 2
    assert len(tower.backbone.get_submodule(blocks)) == 2  # type: ignore[arg-type]
    assert not any(
        "head" in name or "ln_post" in name or name == "proj" for name, _ in tower.named_parameters()
    )


def test_a_list_of_layers_is_joined_along_the_channels_in_the_order_asked_for() -> None:
    joined = tower_of("open_clip ViT", layer=[-1, 1])
    pixels = torch.randn(2, 3, 32, 32)
    one, last = tower_of("open_clip ViT", layer=1), tower_of("open_clip ViT", layer=3)
    with torch.no_grad():
        assert torch.equal(joined(pixels), torch.cat([last(pixels), one(pixels)], dim=-1))


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("open_clip ViT", {"layer": 4}, "layer 4 is out of range: this backbone has 3 layers"),
        ("open_clip ViT", {"layer": -4}, "layer -4 is out of range"),
        ("open_clip ViT", {"layer": 0}, "layer 0 is out of range"),
        ("open_clip ViT", {"layer": [3, -1]}, "it must name layers, none twice"),
        ("open_clip ModifiedResNet", {"layer": [-1, -2]}, "its grids differ"),
        ("open_clip ModifiedResNet", {"select": "cls"}, "no class token"),
        ("timm ViT with a register alone", {"select": "cls"}, "no class token"),
        ("timm ViT with a register alone", {"select": "cls_patch"}, "no class token"),
    ],
)
def test_a_config_that_the_backbone_cannot_give_is_refused(
    family: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tower_of(family, **overrides)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("open_clip:ViT-B-23@none", ConfigError, "did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32", WeightsError, "no weights named"),
        ("open_clip:ViT-B-32@opneai", WeightsError, "did you mean 'openai'"),
        ("timm:vit_tiny_patch16_242@none", ConfigError, "did you mean 'vit_tiny_patch16_224'"),
        ("transformers:no/such/folder@none", ConfigError, "no config at this hub id or folder"),
        ("no/such/folder", ConfigError, "sources: open_clip, transformers, timm"),
        ("ViT-B-32@openai", ConfigError, "with its source, such as 'open_clip:ViT-B-32@openai'"),
        ("openai/clip-vit-base-patch32", ConfigError, "such as 'transformers:openai/clip-vit-base-patch32'"),
    ],
)
def test_an_unknown_source_says_what_to_type(source: str, error: type[VlmVisionError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_tower(source)


def test_pixels_of_another_rank_or_size_are_refused() -> None:
    tower = tower_of("open_clip ViT")
    for wrong in (torch.zeros(3, 32, 32), torch.zeros(1, 3, 31, 32), torch.zeros(1, 32, 32, 3)):
        with pytest.raises(ConfigError, match=r"this tower takes \[B, 3, 32, 32\]"):
            tower(wrong)
    with pytest.raises(ConfigError, match="pixels of shape"):
        tower([torch.zeros(1, 3, 32, 32)])
    with pytest.raises(ConfigError, match="no pixels were given"):
        tower([])


def test_a_preprocessing_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"preprocess.image_size is 48, the model's is 32"):
        load_tower(
            {
                "backbone": {
                    "name": "open_clip",
                    "architecture": VIT,
                    "weights": "none",
                    "preprocess": {"image_size": 48},
                }
            }
        )
    with pytest.raises(ConfigError, match="does not take pictures of 100x100"):
        load_tower(
            {
                "backbone": {
                    "name": "timm",
                    "model": "test_vit",
                    "weights": "none",
                    "preprocess": {"image_size": 100},
                }
            }
        )


def test_loaded_towers_are_in_evaluation_mode_and_learn(tmp_path: Path) -> None:
    tower = tower_of("open_clip ModifiedResNet")
    assert not tower.training
    assert all(parameter.requires_grad for parameter in tower.parameters())
    tower.save_pretrained(tmp_path / "tower")
    assert not load_tower(tmp_path / "tower").training


def test_a_saved_tower_takes_other_layers_as_far_as_it_reaches(tmp_path: Path) -> None:
    tower_of("open_clip ViT").save_pretrained(tmp_path / "tower")
    assert load_tower(tmp_path / "tower", layer=1, select="cls_patch", dtype="bfloat16").num_tokens == 17
    with pytest.raises(ConfigError, match="was saved up to layer 2, layer -1 is not in it"):
        load_tower(tmp_path / "tower", layer=-1)
    with pytest.raises(ConfigError, match="saved without its pooled head"):
        load_tower(tmp_path / "tower", pooled_head=True)
    with pytest.raises(ConfigError, match="did you mean 'layer'"):
        load_tower(tmp_path / "tower", layr=1)


TOWER_FILES = {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_saving_replaces_a_tower_and_refuses_gathered_shards(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    tower = tower_of("open_clip ViT")
    tower.save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    conv1 = tower.backbone.visual.conv1  # type: ignore[union-attr]
    conv1.weight = nn.Parameter(conv1.weight + 1)  # type: ignore[union-attr,operator]
    tower.save_pretrained(folder)
    after = (folder / "model.safetensors").read_bytes()
    assert after != before
    conv1.weight = nn.Parameter(torch.empty(0))  # type: ignore[union-attr]
    with pytest.raises(WeightsError, match=r"tower is not written: the values of 1 tensor.* gather ZeRO"):
        tower.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == after
    assert {path.name for path in folder.iterdir()} == TOWER_FILES
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_saving_keeps_what_else_lies_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own files, also where the folder is the current one or a link."""
    folder = tmp_path / "work"
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "1.jpg").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    tower = tower_of("open_clip ViT")
    for place in (Path("."), folder, tmp_path / "link"):
        tower.save_pretrained(place)
        assert {path.name for path in folder.iterdir()} == {*TOWER_FILES, "photos"}
        assert (folder / "photos" / "1.jpg").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(ConfigError, match=r"1.jpg' cannot be written \(it is a file\)"):
        tower.save_pretrained(folder / "photos" / "1.jpg")
    assert torch.equal(
        load_tower(".").state_dict()["backbone.visual.conv1.weight"],
        tower.state_dict()["backbone.visual.conv1.weight"],
    )


def test_saving_leaves_no_shards_of_the_weights_before(tmp_path: Path) -> None:
    shards = ["model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    kept = ["adapter_model.safetensors", "mine.safetensors"]
    for name in (*shards, *kept):
        (tmp_path / name).write_text("left over", encoding="utf-8")
    tower_of("open_clip ViT").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*TOWER_FILES, *kept}


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "model_type is None"), ('{"model_type": "clip"}', "use 'transformers:")],
)
def test_a_folder_that_is_not_a_tower_says_so(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        VisionTower.from_pretrained(tmp_path)


def test_the_tower_of_a_saved_dual_encoder_is_the_same_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_dual_encoder({"backbone": {"name": "open_clip", "architecture": VIT, "weights": "none"}})
    model.save_pretrained(tmp_path / "clip")
    tower = VisionTower.from_pretrained(tmp_path / "clip", pooled_head=False)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(tower(pixels), model.tower(pixels))
    check_tower(tower)
    assert not any(name.startswith("text") for name in tower.state_dict())


def test_a_dual_encoder_in_half_precision_compares_pictures_with_text() -> None:
    model = load_dual_encoder(
        {"backbone": {"name": "open_clip", "architecture": VIT, "weights": "none"}}, dtype="bfloat16"
    )
    images, texts, factor = model(torch.randn(2, 3, 32, 32), model.tokenizer(["a red square", "two circles"]))
    assert images.dtype == texts.dtype == torch.bfloat16
    assert (images @ texts.T).shape == (2, 2)
    assert factor.dtype == torch.float32


def test_backbones_are_listed_as_load_tower_takes_them() -> None:
    listed = list_backbones()
    assert "transformers:openai/clip-vit-large-patch14-336" in listed
    assert "timm:vit_tiny_patch16_224" in listed
    assert set(open_clip.list_models()) == {
        name.split(":")[1] for name in listed if name.startswith("open_clip:")
    }
