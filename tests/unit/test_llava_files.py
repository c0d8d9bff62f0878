"""Projectors out of LLaVA's files and into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm_vision.adapters import build_projector
from vlm_vision.adapters.build import save_projector
from vlm_vision.adapters.llava_files import from_llava, read_image_newline, to_llava
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.projector_keys import load_projector_weights
from vlm_vision.errors import ConfigError, WeightsError

GRID = (4, 6)
RESAMPLER = {
    "mm_resampler_type": "spatial_pool",
    "mm_spatial_pool_mode": "conv",
    "mm_spatial_pool_stride": 2,
    "mm_spatial_pool_out_channels": 8,
}
# What LLaVA has a place for, the fields of its config, and a name in its file.
THEIRS: list[tuple[Any, dict[str, Any], str]] = [
    ("linear", {"mm_projector_type": "linear"}, "mm_projector.bias"),
    ("mlp1x_gelu", {"mm_projector_type": "mlp1x_gelu"}, "mm_projector.0.bias"),
    ("mlp2x_gelu", {"mm_projector_type": "mlp2x_gelu"}, "mm_projector.2.weight"),
    ("mlp12x_gelu", {"mm_projector_type": "mlp12x_gelu"}, "mm_projector.22.weight"),
    ("mlp2x_res3x_gelu", {"mm_projector_type": "mlp2x_res3x_gelu"}, "mm_projector.5.pre_norm.weight"),
    ("pooler", {"mm_projector_type": "pooler"}, "mm_projector.conv_pool.weight"),
    (
        {"name": "spatial_pool", "width": 8},
        {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 8, **RESAMPLER},
        "vision_resampler.pool.weight",
    ),
]


def same(one: Projector, other: Projector) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def as_llava_saves(projector: Projector) -> dict[str, Tensor]:
    return {f"model.mm_projector.{name}": value for name, value in projector.state_dict().items()}


@pytest.mark.parametrize(("config", "fields", "name"), THEIRS, ids=str)
def test_what_is_written_comes_back_with_its_name(
    config: Any, fields: dict[str, Any], name: str, tmp_path: Path
) -> None:
    projector = build_projector(config, 24, 16, GRID)
    assert to_llava(projector, tmp_path) == {"mm_hidden_size": 24, **fields}
    saved = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert f"model.{name}" in saved
    for source in (tmp_path, tmp_path / "mm_projector.bin"):
        found = from_llava(source, GRID)
        if config == "mlp1x_gelu":  # one layer of a perceptron
            assert found.config.name == "mlp"
        assert found.config == projector.config
        assert (found.in_features, found.out_features, found.grid) == (24, 16, GRID)
        assert same(found, projector)


def test_identity_has_nothing_to_write_and_nothing_to_read(tmp_path: Path) -> None:
    assert to_llava(build_projector("identity", 24, 24, GRID), tmp_path / "x.bin") == {
        "mm_projector_type": "identity",
        "mm_hidden_size": 24,
    }
    with pytest.raises(WeightsError, match=r"holds no projector that LLaVA builds .no tensor."):
        from_llava(tmp_path / "x.bin", GRID)


@pytest.mark.parametrize(
    "config",
    [
        {"name": "mlp", "activation": "silu"},
        {"name": "pool", "first": "mlp"},
        "mlp_downsample",
        "ldp",
        {"name": "qformer", "layers": 1, "heads": 2, "hidden_size": 8},
    ],
    ids=str,
)
def test_what_llava_has_no_place_for_is_refused_with_the_alternative(config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)LLaVA has no projector .*`save_projector` keeps this one"):
        to_llava(build_projector(config, 24, 16, GRID), tmp_path / "mm_projector.bin")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_here_are_not_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        projector = build_projector("mlp2x_gelu", 24, 16, GRID)
    with pytest.raises(WeightsError, match="is not written"):
        to_llava(projector, tmp_path / "mm_projector.bin")
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_whole_model_gives_its_projector_and_newline(tmp_path: Path) -> None:
    """Of its shards only those that hold them are opened: the others are not even there."""
    projector = build_projector("mlp2x_gelu", 24, 16, GRID)
    newline = torch.randn(16)
    shards = {
        "a.safetensors": {name: value for name, value in as_llava_saves(projector).items() if ".0." in name},
        "b.safetensors": {name: value for name, value in as_llava_saves(projector).items() if ".2." in name},
        "c.safetensors": {"model.image_newline": newline, "lm_head.weight": torch.randn(9, 16)},
    }
    shards["b.safetensors"]["model.layers.0.mlp.up_proj.weight"] = torch.randn(4, 4)
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    weight_map["model.layers.1.mlp.up_proj.weight"] = "absent.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    for source in (tmp_path, index):
        assert same(from_llava(source, GRID), projector)
        found = read_image_newline(source)
        assert found is not None
        assert torch.equal(found, newline)


@pytest.mark.parametrize(
    "prefix", ["", "mm_projector.", "base_model.model.model.mm_projector.", "_connector."]
)
def test_names_of_lora_and_of_the_forks(prefix: str, tmp_path: Path) -> None:
    projector = build_projector("mlp2x_gelu", 24, 16, GRID)
    state = {f"{prefix}{name}": value for name, value in projector.state_dict().items()}
    if prefix:
        state["model.embed_tokens.weight"] = torch.randn(3, 16)  # of runs with marks around pictures
    torch.save(state, tmp_path / "non_lora_trainables.bin")
    assert same(from_llava(tmp_path, GRID), projector)
    assert read_image_newline(tmp_path) is None


@pytest.mark.parametrize("name", ["ldp", "ldpv2"])
def test_projectors_of_mobilevlm_are_told_by_their_names(name: str, tmp_path: Path) -> None:
    recorded = json.loads(
        (Path(__file__).parents[1] / "fixtures" / "projectors.json").read_text(encoding="utf-8")
    )
    shapes = recorded[{"ldp": "MobileVLM ldpnet", "ldpv2": "MobileVLM ldpnetv2"}[name]]["shapes"]
    tensors = {f"model.mm_projector.{key}": torch.randn(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "mm_projector.safetensors")
    found = from_llava(tmp_path / "mm_projector.safetensors", (24, 24))
    assert (found.config.name, found.in_features, found.out_features) == (name, 12, 16)


def test_weights_of_llava_fit_a_projector_that_pools(tmp_path: Path) -> None:
    llava = build_projector("mlp2x_gelu", 24, 16, GRID)
    to_llava(llava, tmp_path)
    pool = build_projector({"name": "pool", "first": "mlp"}, 24, 16, GRID)
    load_projector_weights(pool, tmp_path)
    patches = torch.randn(1, 24, 24)
    tokens = llava(patches).reshape(2, 2, 3, 2, 16).mean(dim=(1, 3)).flatten(0, 1)
    assert torch.allclose(pool(patches)[0], tokens, atol=1e-6)


def test_what_is_no_such_projector_is_refused_with_its_names(tmp_path: Path) -> None:
    save_projector(
        build_projector({"name": "pixel_shuffle", "factor": 2}, 24, 16, GRID), tmp_path / "shuffle"
    )
    with pytest.raises(WeightsError, match=r"LLaVA builds \(proj.weight\); where you know which it is"):
        from_llava(tmp_path / "shuffle", GRID)
    state = as_llava_saves(build_projector("mlp2x_gelu", 24, 16, GRID))
    torch.save({**state, "model.vision_resampler.query": torch.randn(3, 24)}, tmp_path / "perceiver.bin")
    with pytest.raises(WeightsError, match=r"unexpected vision_resampler.query"):
        from_llava(tmp_path / "perceiver.bin", GRID)
    del state["model.mm_projector.2.bias"]
    torch.save(state, tmp_path / "cut.bin")
    with pytest.raises(WeightsError, match=r"cut.bin does not fit the projector 'mlp'.*missing 2.bias"):
        from_llava(tmp_path / "cut.bin", GRID)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="no weights file"):
        from_llava(tmp_path / "empty", GRID)
    with pytest.raises(WeightsError, match="does not exist"):
        from_llava(tmp_path / "nowhere.bin", GRID)
