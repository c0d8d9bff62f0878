"""Connectors of transformers' models against the projectors that take their weights, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vlm_vision.adapters import build_projector, list_projectors
from vlm_vision.adapters.build import load_projector, save_projector
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.transformers_files import (
    FAMILIES,
    from_transformers,
    image_newline,
    to_transformers,
)
from vlm_vision.errors import ConfigError, WeightsError

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
CLIP = {**VISION, "model_type": "clip_vision_model"}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
OPT = {**TEXT, "model_type": "opt", "word_embed_proj_dim": 48, "ffn_dim": 64}
QFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "encoder_hidden_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 20,
}
PERCEIVER = {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8}
BLIP = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": OPT, "num_query_tokens": 5}
INTERNVL = {**VISION, "image_size": (32, 48), "patch_size": (8, 8)}


def idefics(norm: bool) -> nn.Module:
    return IdeficsForVisionText2Text(
        IdeficsConfig(
            **{**TEXT, "model_type": "idefics"},
            vision_config={**VISION, "embed_dim": 32},
            perceiver_config={**PERCEIVER, "use_resampler": True, "qk_layer_norms_perceiver": norm},
            use_resampler=True,
            cross_layer_interval=1,
            additional_vocab_size=0,
        )
    )


def idefics2() -> nn.Module:
    return Idefics2ForConditionalGeneration(
        Idefics2Config(
            vision_config=VISION,
            text_config={**TEXT, "model_type": "mistral"},
            perceiver_config={**PERCEIVER, "hidden_size": 48, "num_key_value_heads": 2},
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llava": lambda: LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIP, text_config=TEXT)),
    "llava of layers": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIP,
            text_config=TEXT,
            vision_feature_layer=[1, 2],
            vision_feature_select_strategy="full",
            projector_hidden_act="silu",
        )
    ),
    "llava_next": lambda: LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config=CLIP, text_config=TEXT)
    ),
    "llava_onevision": lambda: LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(vision_config=SIGLIP, text_config=TEXT)
    ),
    "blip-2": lambda: Blip2ForConditionalGeneration(Blip2Config(**BLIP)),
    "instructblip": lambda: InstructBlipForConditionalGeneration(InstructBlipConfig(**BLIP)),
    "idefics": lambda: idefics(False),
    "idefics with norms": lambda: idefics(True),
    "idefics2": idefics2,
    "idefics3": lambda: Idefics3ForConditionalGeneration(
        Idefics3Config(vision_config=VISION, text_config=TEXT)
    ),
    "smolvlm": lambda: SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=VISION, text_config=TEXT, scale_factor=4)
    ),
    "internvl": lambda: InternVLForConditionalGeneration(
        InternVLConfig(vision_config=INTERNVL, text_config=TEXT)
    ),
}
TOKENS = {
    "llava of layers": (1, 17),
    "blip-2": (1, 17),
    "instructblip": (1, 17),
    "idefics": (1, 17),
    "idefics with norms": (1, 17),
    "internvl": (4, 6),
}
OFFERED = [
    name for name in MODELS if FAMILIES[name.partition(" ")[0]].projector in list_projectors()
]  # those whose projector is here
FILE = "model.safetensors"


def model(name: str, seed: int = 0) -> Any:
    """A model with random weights, biases and latents not left at 0 or 1."""
    torch.manual_seed(seed)
    made = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def theirs(made: Any, patches: Tensor, text: dict[str, Tensor]) -> Tensor:
    """What the model makes of patches, as its own `forward` calls the parts."""
    everything = torch.ones(patches.shape[:2], dtype=torch.long)
    kind = made.config.model_type
    if kind in ("blip-2", "instructblip"):
        queries = made.query_tokens.expand(len(patches), -1, -1)
        asked: dict[str, Tensor] = {"query_embeds": queries}
        if text:
            told = torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), text["text_mask"]], dim=1)
            asked |= {"input_ids": text["text_ids"], "attention_mask": told}
        hidden = made.qformer(**asked, encoder_hidden_states=patches, encoder_attention_mask=everything)[0]
        tokens = made.language_projection(hidden[:, : queries.shape[1]])
    elif kind == "idefics":
        tokens = made.model.perceiver_resampler(patches)
    elif kind == "idefics2":
        tokens = made.model.connector(patches, attention_mask=everything)
    elif kind in ("idefics3", "smolvlm"):
        tokens = made.model.connector(patches)
    elif kind == "internvl":
        shuffled = made.model.pixel_shuffle(patches.reshape(len(patches), 4, 6, -1))
        tokens = made.model.multi_modal_projector(shuffled.reshape(len(patches), 6, -1))
    else:
        tokens = made.model.multi_modal_projector(patches)
    assert isinstance(tokens, Tensor)
    return tokens


def inputs(projector: Projector) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    patches = torch.randn(2, projector.grid[0] * projector.grid[1], projector.in_features)
    ids, mask = torch.randint(50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    return patches, {"text_ids": ids, "text_mask": mask} if projector.reads_text else {}


@pytest.mark.filterwarnings("ignore:.*image_newline")
@pytest.mark.parametrize("name", OFFERED)
def test_a_model_s_connector_and_its_projector_are_one(name: str, tmp_path: Path) -> None:
    """Equal outputs, from the model and from its files; and back every bit, into a model and into files."""
    made, other = model(name), model(name, seed=2)
    projector = from_transformers(made)
    assert projector.grid == TOKENS.get(name, (4, 4))
    patches, text = inputs(projector)
    with torch.no_grad():
        expected, ours = theirs(made, patches, text), projector(patches, **text)
        assert ours.shape == (2, projector.tokens_out(), projector.out_features)
        error = (ours - expected).abs().max()
        assert error <= 1e-6  # worst: 8e-7, Idefics; the others are equal

        made.save_pretrained(tmp_path / "whole")
        made.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        for folder in ("whole", "shards"):
            read = from_transformers(tmp_path / folder)
            assert (read.config, read.grid) == (projector.config, projector.grid)
            assert same(read.state_dict(), projector.state_dict())

        assert not torch.equal(theirs(other, patches, text), expected)
        result = other.load_state_dict(to_transformers(projector, other), strict=False)
        assert result.unexpected_keys == []
        assert torch.equal(theirs(other, patches, text), expected)
        assert same(from_transformers(other).state_dict(), projector.state_dict())

        whole = load_file(tmp_path / "whole" / FILE)
        weights = to_transformers(projector, made.config.model_type)
        assert weights.keys() <= whole.keys()
        assert all(torch.equal(weights[key], whole[key]) for key in weights)
        left = [key for key in whole if key not in weights and FAMILIES[made.config.model_type].holds(key)]
        assert left == []


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_projector_of_ours_goes_into_files_that_from_pretrained_reads(tmp_path: Path) -> None:
    model("llava").save_pretrained(tmp_path)
    torch.manual_seed(3)
    projector = build_projector("mlp2x_gelu", 32, 48, (4, 4))
    save_file(
        {**load_file(tmp_path / FILE), **to_transformers(projector, "llava")},
        tmp_path / FILE,
        {"format": "pt"},
    )
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    patches = torch.randn(2, 16, 32)
    assert torch.equal(loaded.model.multi_modal_projector(patches), projector(patches))


def test_the_newline_is_told_of_read_and_written() -> None:
    made, other = model("llava_next"), model("llava_next", seed=2)
    with pytest.warns(UserWarning, match="image_newline, which ends a row of tiles"):
        projector = from_transformers(made)
    newline = image_newline(made)
    assert torch.equal(newline, made.model.image_newline)
    other.load_state_dict(to_transformers(projector, other, newline), strict=False)
    assert torch.equal(other.model.image_newline, newline)
    assert to_transformers(projector, "llava_next", newline).keys() >= {"image_newline"}
    with pytest.raises(WeightsError, match="has no image_newline; llava_next, llava_onevision have"):
        image_newline(model("llava"))
    with pytest.raises(ConfigError, match="llava has no image_newline"):
        to_transformers(projector, "llava", newline)


def test_only_the_connector_is_read(tmp_path: Path) -> None:
    """Shards of the rest may be missing."""
    made = model("llava")
    made.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = json.loads((tmp_path / f"{FILE}.index.json").read_text(encoding="utf-8"))["weight_map"]
    needed = {shard for name, shard in shards.items() if "multi_modal_projector" in name}
    for path in tmp_path.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    assert same(from_transformers(tmp_path).state_dict(), from_transformers(made).state_dict())


def test_weights_in_bf16_and_torch_files_and_what_is_learnt_later(tmp_path: Path) -> None:
    made = model("llava").to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    torch.save(made.state_dict(), tmp_path / "pytorch_model.bin")
    projector = from_transformers(tmp_path)
    assert projector.get_parameter("0.weight").dtype == torch.float32
    weight = made.model.multi_modal_projector.linear_1.weight
    assert torch.equal(projector.get_parameter("0.weight").bfloat16(), weight)
    with torch.no_grad():
        from_transformers(made).get_parameter("0.weight").zero_()
    assert weight.any()  # the projector's memory is its own
    save_projector(projector, tmp_path / "projector")
    assert same(load_projector(tmp_path / "projector").state_dict(), projector.state_dict())


def test_the_tokenizer_of_an_instructblip_folder_is_named(tmp_path: Path) -> None:
    model("instructblip").save_pretrained(tmp_path)
    assert from_transformers(tmp_path).config.tokenizer is None
    (tmp_path / "qformer_tokenizer").mkdir()
    assert from_transformers(tmp_path).config.tokenizer == str(tmp_path / "qformer_tokenizer")


def test_what_cannot_be_taken_is_refused_with_a_way_out(tmp_path: Path) -> None:
    def llava(**settings: Any) -> Any:
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIP, text_config=TEXT, **settings))

    with pytest.raises(ConfigError, match="that transformers knows"):
        from_transformers(tmp_path)
    with pytest.raises(
        ConfigError, match="projector_hidden_act 'quick_gelu' is not offered here, only 'gelu'"
    ):
        from_transformers(llava(projector_hidden_act="quick_gelu"))
    with pytest.raises(ConfigError, match="multimodal_projector_bias False is not offered"):
        from_transformers(llava(multimodal_projector_bias=False))
    thin = Blip2Config(**{**BLIP, "qformer_config": {**QFORMER, "intermediate_size": 40}})
    with pytest.raises(ConfigError, match="intermediate_size 40 is not offered here, only 96"):
        from_transformers(Blip2ForConditionalGeneration(thin))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no connector of model_type 'bert' is known.*take one of llava"):
        from_transformers(tmp_path)
    llava().save_pretrained(tmp_path / "llava")
    whole = load_file(tmp_path / "llava" / FILE)
    whole["multi_modal_projector.linear_3.weight"] = whole.pop("multi_modal_projector.linear_2.weight")
    save_file(whole, tmp_path / "llava" / FILE, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 missing: 2.weight\n  1 unexpected: multi_modal_projector.lin"):
        from_transformers(tmp_path / "llava")


def test_what_does_not_go_in_is_refused() -> None:
    made = model("llava")
    projector = build_projector("mlp2x_gelu", 32, 48, (4, 4))
    with pytest.raises(ConfigError, match="did you mean 'llava_next'"):
        to_transformers(projector, "llava_nxt")
    with pytest.raises(
        ConfigError, match=r"blip-2: its connector is a 'qformer'.*with a 'mlp': llava, llava_n"
    ):
        to_transformers(projector, "blip-2")
    with pytest.raises(ConfigError, match=r"of another make than this projector.*depth=3"):
        to_transformers(build_projector("mlp3x_gelu", 32, 48, (4, 4)), made)
    with pytest.raises(ConfigError, match="models with a 'linear': none, use save_projector"):
        to_transformers(build_projector("linear", 32, 48, (4, 4)), "llava")
    with pytest.raises(WeightsError, match=r"linear_1.weight: \(40, 32\), the model has \(48, 32\)"):
        to_transformers(build_projector("mlp2x_gelu", 32, 40, (4, 4)), made)
    with pytest.raises(WeightsError, match="activation 'silu', the model has 'gelu'"):
        to_transformers(build_projector({"name": "mlp", "activation": "silu"}, 32, 48, (4, 4)), made)
