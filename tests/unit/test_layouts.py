"""Layouts of weights and architectures: told apart, converted there and back exactly, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm_vision.architectures import open_clip_architecture, transformers_config
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.layouts import LAYOUTS, Layout, convert, detect_layout, read_converted
from vlm_vision.weights import find_weights_file, read_state_dict

WIDTH, LAYERS, EMBED, VOCABULARY, CONTEXT = 12, 2, 6, 20, 5


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape)


def blocks(prefix: str) -> dict[str, Tensor]:
    state = {}
    for layer in range(LAYERS):
        block = f"{prefix}.{layer}"
        state |= {
            f"{block}.attn.in_proj_weight": numbers(3 * WIDTH, WIDTH),
            f"{block}.attn.in_proj_bias": numbers(3 * WIDTH),
            f"{block}.attn.out_proj.weight": numbers(WIDTH, WIDTH),
            f"{block}.attn.out_proj.bias": numbers(WIDTH),
            f"{block}.mlp.c_fc.weight": numbers(4 * WIDTH, WIDTH),
            f"{block}.mlp.c_fc.bias": numbers(4 * WIDTH),
            f"{block}.mlp.c_proj.weight": numbers(WIDTH, 4 * WIDTH),
            f"{block}.mlp.c_proj.bias": numbers(WIDTH),
        }
        for norm in ("ln_1", "ln_2"):
            state |= {f"{block}.{norm}.{kind}": numbers(WIDTH) for kind in ("weight", "bias")}
    return state


def text() -> dict[str, Tensor]:
    return {
        "text.token_embedding.weight": numbers(VOCABULARY, WIDTH),
        "text.positional_embedding": numbers(CONTEXT, WIDTH),
        **blocks("text.transformer.resblocks"),
        "text.ln_final.weight": numbers(WIDTH),
        "text.ln_final.bias": numbers(WIDTH),
    }


def clip() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {
        "visual.class_embedding": numbers(WIDTH),
        "visual.positional_embedding": numbers(10, WIDTH),
        "visual.conv1.weight": numbers(WIDTH, 3, 4, 4),
        **blocks("visual.transformer.resblocks"),
        "visual.proj": numbers(WIDTH, EMBED),
        **text(),
        "text.text_projection": numbers(WIDTH, EMBED),
        "logit_scale": numbers(),
    }
    for norm in ("ln_pre", "ln_post"):
        state |= {f"visual.{norm}.{kind}": numbers(WIDTH) for kind in ("weight", "bias")}
    return state


def siglip() -> dict[str, Tensor]:
    torch.manual_seed(1)
    trunk = {
        "patch_embed.proj": (WIDTH, 3, 4, 4),
        "norm": (WIDTH,),
        "attn_pool.q": (WIDTH, WIDTH),
        "attn_pool.kv": (2 * WIDTH, WIDTH),
        "attn_pool.proj": (WIDTH, WIDTH),
        "attn_pool.norm": (WIDTH,),
        "attn_pool.mlp.fc1": (4 * WIDTH, WIDTH),
        "attn_pool.mlp.fc2": (WIDTH, 4 * WIDTH),
    }
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        trunk |= {f"{block}.norm1": (WIDTH,), f"{block}.norm2": (WIDTH,)}
        trunk |= {f"{block}.attn.qkv": (3 * WIDTH, WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH)}
        trunk |= {f"{block}.mlp.fc1": (4 * WIDTH, WIDTH), f"{block}.mlp.fc2": (WIDTH, 4 * WIDTH)}
    state = {
        "visual.trunk.pos_embed": numbers(1, 9, WIDTH),
        "visual.trunk.attn_pool.latent": numbers(1, 1, WIDTH),
        **text(),
        "text.text_projection.weight": numbers(EMBED, WIDTH),
        "text.text_projection.bias": numbers(EMBED),
        "logit_scale": numbers(),
        "logit_bias": numbers(),
    }
    for name, shape in trunk.items():
        state[f"visual.trunk.{name}.weight"] = numbers(*shape)
        state[f"visual.trunk.{name}.bias"] = numbers(shape[0])
    return state


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("start", LAYOUTS)
@pytest.mark.parametrize("way", LAYOUTS)
def test_clip_there_and_back_is_the_same_bit_by_bit(start: Layout, way: Layout) -> None:
    first = convert(clip(), start, quick_gelu=True)
    assert detect_layout(first) == start
    there = convert(first, way, quick_gelu=True)
    assert detect_layout(there) == way
    assert_same(convert(there, start, quick_gelu=True), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_stay_halves(dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in clip().items()}
    assert_same(convert(convert(state, "transformers"), "open_clip"), state)


def test_siglip_there_and_back_is_the_same_bit_by_bit() -> None:
    state = siglip()
    theirs = convert(state, "transformers")
    assert detect_layout(theirs) == "transformers"
    assert theirs["logit_bias"].shape == (1,)
    assert theirs["vision_model.head.attention.in_proj_weight"].shape == (3 * WIDTH, WIDTH)
    assert_same(convert(theirs, "open_clip"), state)


@pytest.mark.parametrize("make", [clip, siglip])
def test_a_vision_model_alone_with_or_without_its_level(make: Any) -> None:
    state = {name: tensor for name, tensor in make().items() if name.startswith("visual.")}
    state.pop("visual.proj", None)
    theirs = convert(state, "transformers")
    assert all(name.startswith("vision_model.") for name in theirs)
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.items()}
    assert_same(convert(bare, "transformers"), theirs)
    assert_same(convert(bare, "open_clip"), state)
    assert_same(
        convert({**theirs, "vision_model.embeddings.position_ids": torch.arange(10)}, "open_clip"), state
    )


def test_no_tensor_is_changed_or_left_not_contiguous() -> None:
    state = clip()
    before = {name: tensor.clone() for name, tensor in state.items()}
    theirs = convert(state, "transformers")
    assert all(tensor.is_contiguous() for tensor in theirs.values())
    assert_same(state, before)


def test_openais_constants_are_those_of_the_shapes() -> None:
    state = convert(clip(), "openai", quick_gelu=True)
    constants = {name: int(state[name]) for name in ("input_resolution", "context_length", "vocab_size")}
    assert constants == {"input_resolution": 12, "context_length": CONTEXT, "vocab_size": VOCABULARY}
    resnet = {
        name: tensor
        for name, tensor in clip().items()
        if not name.startswith(("visual.conv1", "visual.pos", "visual.class"))
    }
    resnet["visual.attnpool.positional_embedding"] = numbers(50, WIDTH)
    assert int(convert(resnet, "openai", quick_gelu=True)["input_resolution"]) == 224
    with pytest.raises(ConfigError, match=r"OpenAI's layout means QuickGELU"):
        convert(clip(), "openai", quick_gelu=False)
    vision = {name: tensor for name, tensor in clip().items() if name.startswith("visual.")}
    with pytest.raises(ConfigError, match=r"holds whole CLIP models only; this one has no 'positional_emb"):
        convert(vision, "openai", quick_gelu=True)


def test_mixed_and_unknown_layouts_are_refused_with_names() -> None:
    theirs = convert(clip(), "transformers")
    with pytest.raises(WeightsError, match=r"mix layouts: .*vision_model\..*visual\."):
        detect_layout([*theirs, "visual.proj"])
    with pytest.raises(WeightsError, match=r"mix layouts: text\..*positional_embedding"):
        detect_layout([*clip(), "positional_embedding"])
    with pytest.raises(WeightsError, match=r"no layout of CLIP or SigLIP .*their names: cls_token, head"):
        detect_layout(["head.weight", "cls_token"])
    with pytest.raises(WeightsError, match="their names: none"):
        detect_layout([])


def test_missing_parts_and_strange_tensors_are_refused() -> None:
    theirs = convert(clip(), "transformers")
    with pytest.raises(WeightsError, match=r"1 tensor\(s\) belong to no part .*: vision_model.gain"):
        convert({**theirs, "vision_model.gain": numbers(1)}, "open_clip")
    lost = "text_model.encoder.layers.1.self_attn.k_proj.bias"
    del theirs[lost]
    with pytest.raises(WeightsError, match=f"missing: {lost}"):
        convert(theirs, "open_clip")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("visual.layer1.0.conv1.weight", "a ModifiedResNet"),
        ("text_decoder.ln_final.bias", "CoCa's decoder"),
        ("visual.attn_pool.query", "an attentional pool"),
        ("visual.transformer.resblocks.0.ls_1.gamma", "layer scale"),
        ("text.cls_emb", "CoCa's class token of the text"),
        ("text.transformer.encoder.layer.0.output.dense.weight", "a text tower from transformers"),
        ("visual.trunk.cls_token", "this trunk from timm"),
        ("visual.head.proj.weight", "a projection after timm's trunk"),
    ],
)
def test_what_transformers_has_not_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"have nothing like {reason}, which '{name}' belongs to"):
        convert({**clip(), name: numbers(1)}, "transformers")


def test_a_text_tower_of_another_library_is_not_flattened() -> None:
    state = {"visual.proj": numbers(1), "text.proj.weight": numbers(1)}
    with pytest.raises(ConfigError, match=r"flat layout has no place for 'text.proj.weight'"):
        convert(state, "open_clip_flat")


def test_what_lies_beside_a_file_tells_its_activation(tmp_path: Path) -> None:
    def write(layout: Layout, **beside: Any) -> Path:
        folder = tmp_path / f"{layout}{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_file(convert(clip(), layout, quick_gelu=True), folder / "model.safetensors")
        for name, content in beside.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder / "model.safetensors"

    def told(path: Path) -> bool | None:
        state, quick_gelu = read_converted(path, "open_clip")
        assert_same(state, clip())
        return quick_gelu

    assert told(write("openai")) is True
    assert told(write("open_clip_flat")) is None
    assert told(write("open_clip", open_clip_config={"model_cfg": {"quick_gelu": True}})) is True
    assert told(write("open_clip_flat", open_clip_config={"model_cfg": {}})) is False
    assert told(write("transformers")) is None
    clip_vision = {"model_type": "clip_vision_model"}
    assert told(write("transformers", config={**clip_vision, "hidden_act": "gelu"})) is False
    assert (
        told(write("transformers", config=clip_vision)) is True
    )  # a default, which transformers 4 leaves out
    assert (
        told(write("transformers", config={"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}))
        is False
    )
    assert told(write("transformers", config={"model_type": "siglip_vision_model"})) is False
    assert told(write("transformers", config={"model_type": "llava", "hidden_act": "gelu"})) is None
    with pytest.raises(
        WeightsError, match=r"model.safetensors: its config.json does not tell the activation"
    ):
        told(write("transformers", config=["no keys"]))


def test_shards_are_read_as_one_file(tmp_path: Path) -> None:
    state = convert(clip(), "transformers")
    names = sorted(state)
    half = len(names) // 2
    shard_of = {
        name: f"model-0000{1 + (place >= half)}-of-00002.safetensors" for place, name in enumerate(names)
    }

    def write(index: dict[str, str]) -> None:
        for shard in set(shard_of.values()):
            save_file({name: state[name] for name in names if shard_of[name] == shard}, tmp_path / shard)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    write(shard_of)
    found = find_weights_file(tmp_path)
    assert found.name == "model.safetensors.index.json"
    assert_same(read_state_dict(found), state)
    assert_same(read_converted(found, "open_clip")[0], clip())
    write({**shard_of, "extra": next(iter(shard_of.values()))})
    with pytest.raises(WeightsError, match=r"1 tensor\(s\) are in the index or in its files only: extra"):
        read_state_dict(found)
    write({**shard_of, names[0]: "../elsewhere.safetensors"})
    with pytest.raises(WeightsError, match=r"'../elsewhere.safetensors' lies outside of its folder"):
        read_state_dict(found)
    write(shard_of)
    (tmp_path / shard_of[names[0]]).unlink()
    with pytest.raises(WeightsError, match=r"00001-of-00002.safetensors' does not exist"):
        read_state_dict(found)
    found.write_text("{}")
    with pytest.raises(WeightsError, match="has no `weight_map`"):
        read_state_dict(found)


TOKENS_ONLY = {"hf_tokenizer_name", "tokenizer_kwargs"}


def plain(architecture: dict[str, Any]) -> dict[str, Any]:
    """An architecture without tokenizers, ratios of MLPs as the widths that they give."""
    cleaned: dict[str, Any] = {}
    for key, value in architecture.items():
        if isinstance(value, dict):
            value = {inner: setting for inner, setting in value.items() if inner not in TOKENS_ONLY}
            if "mlp_ratio" in value:
                value["mlp_ratio"] = int(value["mlp_ratio"] * value["width"])
        cleaned[key] = value
    return cleaned


def test_every_architecture_of_open_clip_comes_back_or_is_refused_with_its_key() -> None:
    refused = {}
    for name in open_clip.list_models():
        architecture = open_clip.get_model_config(name)
        try:
            config = transformers_config(architecture)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        assert plain(open_clip_architecture(config)) == plain(architecture), name
        vision = {key: value for key, value in architecture.items() if key != "text_cfg"}
        alone = transformers_config(vision)
        assert alone == {"architectures": alone["architectures"], **config["vision_config"]}
    assert len(open_clip.list_models()) - len(refused) == 58
    for name, reason in {
        "coca_ViT-L-14": "multimodal_cfg: .*it is a CoCa",
        "RN50": "vision_cfg.layers: a ModifiedResNet",
        "ViT-L-14-CLIPA": "no_ln_pre: True .* no norm before its layers",
        "ViT-M-16-alt": "ls_init_value: 0.0001 .*it scales its layers",
        "roberta-ViT-B-32": "text_cfg.hf_model_name: 'roberta-base'",
        "convnext_base": "timm_model_name 'convnext_base'",
        "ViT-H-14-worldwide": "text_cfg.pool_type: 'eos'",
        "nllb-clip-base-siglip": "text_cfg.hf_model_name",
        "ViT-SO400M-16-SigLIP-i18n-256": "text_cfg.proj_type: 'none'",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            raise ConfigError(refused[name])


def test_settings_of_one_library_only_are_refused() -> None:
    tiny = {"embed_dim": 8, "vision_cfg": {"width": 64, "layers": 1}, "text_cfg": {"width": 64, "layers": 1}}

    def vision(**settings: Any) -> dict[str, Any]:
        return {**tiny, "vision_cfg": {**tiny["vision_cfg"], **settings}}  # type: ignore[dict-item]

    for architecture, message in (
        (vision(pool_type="avg"), "pool_type: 'avg' .*class token"),
        (vision(attentional_pool=True), "attentional_pool: True .*CoCa"),
        (vision(image_size=[224, 336]), "image_size: .* is not square"),
        (vision(act_kwargs={"slope": 2}), "act_kwargs: .* is no activation"),
        (vision(norm_kwargs={"bias": False}), "norm_kwargs: .* has no counterpart"),
        (vision(qk_norm=True), "vision_cfg.qk_norm: True has no counterpart"),
        ({**tiny, "new_key": 3}, "new_key: 3 has no counterpart in transformers: this setting is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            transformers_config(architecture)
    clip_config = transformers_config(tiny)
    for config, message in (
        ({"model_type": "dinov2"}, "model_type 'dinov2' has no counterpart"),
        (
            {**clip_config, "vision_config": {"hidden_act": "quick_gelu"}},
            "'quick_gelu' in pictures and 'gelu' in text",
        ),
        ({**clip_config["vision_config"], "num_channels": 4}, "num_channels is 4"),
        ({**clip_config["vision_config"], "hidden_act": "relu"}, "hidden_act 'relu'"),
        (
            {"model_type": "siglip_vision_model"},
            "'gelu_pytorch_tanh', and timm's vit_base_patch16_siglip_224",
        ),
        ({"model_type": "siglip_vision_model", "hidden_size": 9}, "no SigLIP trunk of timm is 9 wide"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_clip_architecture(config)


def test_less_common_settings_come_back() -> None:
    architecture = {
        "embed_dim": 8,
        "init_logit_scale": 1.5,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 16,
            "width": 96,
            "layers": 2,
            "head_width": 32,
            "mlp_ratio": 4.37,
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 300,
            "width": 64,
            "heads": 2,
            "layers": 1,
            "pool_type": "eos",
            "eos_id": 7,
        },
    }
    config = transformers_config(architecture)
    assert config["vision_config"]["hidden_act"] == "gelu_pytorch_tanh"
    assert (config["text_config"]["eos_token_id"], config["vision_config"]["intermediate_size"]) == (7, 419)
    assert plain(open_clip_architecture(config)) == plain(architecture)


def test_a_config_json_says_as_little_as_the_hubs_do() -> None:
    """OpenAI's own config.json of ViT-B/32 leaves out what is a default of transformers."""
    found = open_clip_architecture({"model_type": "clip", "projection_dim": 512})
    assert found == open_clip.get_model_config("ViT-B-32-quickgelu")
    pooled = open_clip_architecture({"model_type": "clip", "text_config": {"eos_token_id": 2}})
    assert "pool_type" not in pooled["text_cfg"]
