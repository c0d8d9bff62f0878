"""Projectors that attend: how many tokens come out, how many weights there are, and what does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pins import knows, needs_new_torch
from projector_forms import ATTENDING
from tiny import RESNET, TOWER, tiny_tower
from torch import Tensor

from vlm_vision import load_tower
from vlm_vision.adapters import build_projector
from vlm_vision.adapters.build import load_projector, save_projector
from vlm_vision.adapters.config import Grid, parse_projector
from vlm_vision.adapters.projector import Projector
from vlm_vision.errors import ConfigError

VARIANTS: list[dict[str, Any]] = [
    *({"name": name, **options} for name, options in ATTENDING.items()),
    {
        "name": "perceiver_resampler",
        **ATTENDING["perceiver_resampler"],
        "project": "before",
        "project_depth": 2,
    },
    {"name": "perceiver_resampler", **ATTENDING["perceiver_resampler"], "query_key_norm": True},
    {"name": "token_packer", "scale": 1, "levels": 1, "width": 16, "heads": 2},
    {"name": "sva", "regions": [2], "layers": 1, "width": 16, "heads": 2},
]
if not knows("idefics2"):
    VARIANTS = [node for node in VARIANTS if node["name"] != "idefics2_perceiver"]
GRIDS: list[Grid] = [(2, 2), (4, 4), (6, 6), (2, 6), (8, 4), (4, 10)]


def small(node: dict[str, Any], grid: Grid = (4, 4)) -> Projector:
    torch.manual_seed(0)
    return build_projector(node, 24, 40, grid).eval()


def text_for(projector: Projector, pictures: int) -> dict[str, Tensor]:
    """What a projector takes beside patches."""
    if not projector.reads_text:
        return {}
    ids = torch.arange(pictures * 4).reshape(pictures, 4) % 30
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    return {"text_ids": ids, "text_mask": mask}


def run(projector: Projector, patches: Tensor, grid: Grid | None = None) -> Tensor:
    tokens: Tensor = projector(patches, grid, **text_for(projector, len(patches)))
    return tokens


@pytest.mark.parametrize("node", VARIANTS, ids=str)
def test_tokens_of_every_grid_are_told_before_it_is_built(node: dict[str, Any]) -> None:
    other = small(node, (2, 4))
    for grid in GRIDS:
        projector = small(node, grid)
        patches = torch.randn(2, grid[0] * grid[1], 24)
        tokens = run(projector, patches)
        assert tokens.shape == (2, parse_projector(node).tokens_out(grid), 40)
        assert projector.tokens_out() == tokens.shape[1]
        # A picture of another grid than the projector's own: the weights do not depend on it.
        other.load_state_dict(projector.state_dict())
        assert torch.equal(run(other, patches, grid), tokens)


@pytest.mark.parametrize("node", VARIANTS, ids=str)
def test_parameter_count_is_what_is_built(node: dict[str, Any]) -> None:
    counted = parse_projector(node).parameter_count(24, 40, (4, 4))
    assert counted == sum(parameter.numel() for parameter in small(node).parameters())


@pytest.mark.parametrize("node", VARIANTS, ids=str)
def test_every_parameter_learns_and_bf16_changes_little(node: dict[str, Any]) -> None:
    projector = small(node)
    patches = torch.randn(2, 16, 24)
    tokens = run(projector, patches)
    tokens.square().sum().backward()
    idle = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias shifts all scores of a query alike, so its gradient is 0 up to rounding. What text becomes
    # in the last layer is not read by any query. Who looks at one patch alone has nothing to choose from.
    unread = ["key.bias", "encoder.layer.2.intermediate.", "encoder.layer.2.output."]
    if node.get("scale") == 1:
        unread += ["q_proj_1", "k_proj_1", "ln_q_1", "ln_k_1"]
    assert [name for name in idle if not any(part in name for part in unread)] == []
    with torch.no_grad():
        half = run(projector.to(torch.bfloat16), patches.bfloat16())
    assert half.dtype == torch.bfloat16
    error = (half.float() - tokens).abs().max() / tokens.abs().max()
    assert error < 0.05  # the worst is 0.01


@needs_new_torch
@torch.no_grad()
@pytest.mark.parametrize("node", VARIANTS, ids=str)
def test_a_compiled_projector_computes_the_same(node: dict[str, Any]) -> None:
    projector, patches = small(node), torch.randn(2, 16, 24)
    torch.compiler.reset()
    compiled = torch.compile(projector, fullgraph=True, backend="eager")
    assert torch.equal(compiled(patches, None, **text_for(projector, 2)), run(projector, patches))


@pytest.mark.parametrize("node", VARIANTS, ids=str)
def test_same_seed_gives_same_weights_and_another_seed_does_not(node: dict[str, Any]) -> None:
    first, again = small(node).state_dict(), small(node).state_dict()
    torch.manual_seed(1)
    other = build_projector(node, 24, 40, (4, 4)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("node", [node for node in VARIANTS if "num_latents" in node], ids=str)
def test_latents_start_as_the_references_start_them(node: dict[str, Any]) -> None:
    projector = small({**node, "num_latents": 2000})
    (latents,) = (latents for name, latents in projector.named_parameters() if name.endswith("latents"))
    assert latents.std().item() == pytest.approx(1, rel=0.02)


def test_queries_start_as_the_references_start_them() -> None:
    query = small({"name": "sva", "width": 4096, "heads": 2, "layers": 1}).vision_query
    assert query.std().item() == pytest.approx(4096**-0.5, rel=0.05)
    packer = small({"name": "token_packer", "width": 512, "levels": 1}).k_proj_1
    assert packer[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not packer[2].bias.any()
    words = small({**VARIANTS[1], "vocab_size": 5000}).qformer.embeddings.word_embeddings.weight
    assert words.std().item() == pytest.approx(0.02, rel=0.02)
    assert words[0].any()


@pytest.mark.parametrize(
    ("node", "in_features", "grid", "said"),
    [
        (
            {"name": "token_packer", "scale": 5},
            24,
            (24, 24),
            "token_packer.scale: a grid of 24x24 patches does not divide into regions of 5x5; "
            "sides that fit: 1, 2, 3, 4, 6, 8, 12, 24",
        ),
        ({"name": "token_packer", "scale": 2}, 24, (6, 9), "sides that fit: 1, 3"),
        ({"name": "token_packer", "scale": 2}, 24, (1, 577), "use select 'patch'"),
        ({"name": "token_packer", "levels": 5}, 24, (4, 4), "24 channels are no 5 layers of one width"),
        ({"name": "token_packer", "width": 20}, 24, (4, 4), "width 20 does not divide into 8 heads"),
        (
            {"name": "sva", "regions": [1, 3]},
            24,
            (4, 4),
            "sva.regions: a grid of 4x4 patches does not divide",
        ),
        (
            {"name": "sva", "widths": [8, 8]},
            24,
            (4, 4),
            r"widths \[8, 8\] are 16 channels, but the tower gives 24",
        ),
        ({"name": "sva", "width": 20}, 24, (4, 4), "width 20 does not divide into 16 heads"),
        ({"name": "perceiver_resampler", "project": "none"}, 24, (4, 4), "use project 'after' or 'before'"),
        ({"name": "idefics2_perceiver", "kv_heads": 3}, 24, (4, 4), "kv_heads must divide heads"),
        ({"name": "qformer_text"}, 24, (4, 4), "vocab_size is not given"),
        ({"name": "qformer_text", "heads": 5}, 24, (4, 4), "does not divide into 5 heads"),
        ("perceiver_resample", 24, (4, 4), "did you mean 'perceiver_resampler'"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(
    node: Any, in_features: int, grid: Grid, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build_projector(node, in_features, 40, grid)


@pytest.mark.parametrize("name", ["token_packer", "sva"])
def test_patches_off_the_grid_are_refused(name: str) -> None:
    projector = small({"name": name, **ATTENDING[name]})
    with pytest.raises(ConfigError, match="15 patches do not lie on a grid of 4x4"):
        projector(torch.randn(1, 15, 24))
    with pytest.raises(ConfigError, match="does not divide into regions of 2x2; sides that fit: 1"):
        projector(torch.randn(1, 20, 24), (4, 5))


def test_a_query_looks_at_its_own_region_alone() -> None:
    """For SVA two patches of a region change places: the mean, which all its queries are told, stays."""
    for node in ({"name": "token_packer", **ATTENDING["token_packer"]}, VARIANTS[-1]):
        projector = small(node)
        patches = torch.randn(1, 16, 24)
        moved = patches.clone()
        if node["name"] == "sva":
            moved[0, [10, 11]] = moved[0, [11, 10]]
        else:
            moved[0, [10, 11]] += 1
        change = (projector(patches) - projector(moved)).abs().amax(dim=-1)[0]
        assert (change > 1e-5).tolist() == [False, False, False, True]


def test_the_instruction_changes_what_is_seen_and_its_padding_does_not() -> None:
    projector = small({"name": "qformer_text", **ATTENDING["qformer_text"]})
    patches = torch.randn(1, 16, 24)
    ids = torch.tensor([[3, 4, 5]])
    tokens = projector(patches, text_ids=ids)
    assert not torch.allclose(tokens, projector(patches, text_ids=ids.flip(1)), atol=1e-4)
    padded = projector(patches, text_ids=torch.tensor([[3, 4, 5, 9]]), text_mask=torch.tensor([[1, 1, 1, 0]]))
    assert (padded - tokens).abs().max() < 1e-6  # the worst is 3e-7


def test_text_that_is_missing_or_does_not_fit_is_refused() -> None:
    projector = small({"name": "qformer_text", **ATTENDING["qformer_text"]})
    patches = torch.randn(2, 16, 24)
    assert projector.reads_text
    assert not small(VARIANTS[0]).reads_text
    with pytest.raises(ConfigError, match="qformer_text reads an instruction"):
        projector(patches)
    with pytest.raises(ConfigError, match=r"shape \[1, 3\] for 2 pictures"):
        projector(patches, text_ids=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ConfigError, match="up to 9"):
        projector(patches, text_ids=torch.zeros(2, 10, dtype=torch.long))


def test_a_transformers_without_idefics2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vlm_vision.adapters.idefics2", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.models.idefics2.modeling_idefics2", None)
    with pytest.raises(ConfigError, match=r"has no Idefics2Connector, .*: pip install -U transformers"):
        small({"name": "idefics2_perceiver", **ATTENDING["idefics2_perceiver"]})


@pytest.mark.parametrize("node", VARIANTS, ids=str)
def test_saved_projector_comes_back_whole(node: dict[str, Any], tmp_path: Path) -> None:
    projector = small(node)
    save_projector(projector, tmp_path)
    loaded = load_projector(tmp_path).eval()
    assert (loaded.config, loaded.grid) == (projector.config, projector.grid)
    patches = torch.randn(2, 16, 24)
    assert torch.equal(run(loaded, patches), run(projector, patches))


def test_layers_of_a_tower_and_towers_side_by_side() -> None:
    layers = tiny_tower(layer=[1, 2, 3])
    fused = load_tower(
        {
            "backbone": {
                "name": "fused",
                "parts": [TOWER["backbone"], {"backbone": RESNET["backbone"], "layer": 3}],
                "grid": [4, 4],
            }
        }
    )
    pixels = torch.randn(2, 3, 32, 32)
    packer = build_projector({"name": "token_packer", "levels": 3}, layers.hidden_size, 40, layers.grid)
    assert packer(layers(pixels)).shape == (2, 4, 40)
    widths = [64, fused.hidden_size - 64]
    sva = build_projector(
        {"name": "sva", "widths": widths, "regions": [2, 1], "layers": 1}, sum(widths), 40, fused.grid
    )
    assert sva(fused(pixels)).shape == (2, 4, 40)
