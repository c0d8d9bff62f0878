from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from projector_forms import ATTENDING, FORMS
from torch import nn

from vlm_vision.adapters import build_projector, list_projectors
from vlm_vision.adapters.build import load_projector, save_projector
from vlm_vision.adapters.config import ProjectorNode, parse_projector
from vlm_vision.adapters.convolution import moved_places
from vlm_vision.adapters.downsample_config import MlpDownsampleConfig
from vlm_vision.adapters.mlp_config import MlpConfig, MlpResConfig
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.projector_keys import load_projector_weights
from vlm_vision.config import Config, load_config
from vlm_vision.errors import ConfigError, WeightsError

QFORMER = {"name": "qformer", "layers": 2, "heads": 2, "hidden_size": 32, "num_queries": 5}
EVERY: list[Any] = [{"name": name, **form} for name, forms in FORMS.items() for form in forms]
EVERY += ["mlp2x_gelu", "mlp1x_res2x_gelu", "mlp_downsample_3x3_fix"]
GRID = (4, 6)
# A token shows one window of patches alone.
BY_PLACE = ("identity", "linear", "mlp", "mlp_res", "fused_gelu_mlp")
BY_PLACE += ("pixel_shuffle", "mlp_downsample", "pool", "pooler", "spatial_pool")
# Square, odd, non-square both ways, one row, one patch.
GRIDS = [(4, 4), (5, 5), (3, 6), (6, 4), (1, 8), (1, 1)]


def widths(config: Any, in_features: int = 24) -> tuple[int, int]:
    return in_features, in_features if config == {"name": "identity"} else 40


def build(config: Any, grid: tuple[int, int] = GRID, in_features: int = 24) -> Projector:
    return build_projector(config, *widths(config, in_features), grid)


def test_every_name_is_tested() -> None:
    assert set(FORMS) | set(ATTENDING) == set(list_projectors())


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_tokens_out_is_what_comes_out_on_every_grid_that_fits(config: Any) -> None:
    asked = parse_projector(config)
    fitting = 0
    for grid in GRIDS:
        try:
            asked.check(*widths(config), grid)
        except ConfigError:
            with pytest.raises(ConfigError, match=f"{grid[0]}x{grid[1]}"):
                build(config, grid)
            continue
        projector = build(config, grid).eval()
        tokens = projector(torch.randn(2, grid[0] * grid[1], 24))
        assert tokens.shape == (2, asked.tokens_out(grid), widths(config)[1])
        assert projector.tokens_out() == asked.tokens_out(grid) == math.prod(asked.grid_out(grid))
        fitting += 1
    assert fitting >= 2


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_a_call_may_have_another_grid_than_the_built_one(config: Any) -> None:
    projector = build(config).eval()
    for grid in [*GRIDS, GRID]:
        patches = torch.randn(2, grid[0] * grid[1], 24)
        try:
            expected = projector.tokens_out(grid)
        except ConfigError:
            with pytest.raises(ConfigError, match=f"{grid[0]}x{grid[1]}"):
                projector(patches, grid)
            continue
        assert projector(patches, grid).shape[1] == expected
    places = torch.randn(2, 24, 24)
    assert torch.equal(projector(places), projector(places, GRID))


@pytest.mark.parametrize(
    "config", [form for form in EVERY if parse_projector(form).name in BY_PLACE], ids=str
)
def test_tokens_show_their_own_place_row_by_row(config: Any) -> None:
    projector = build(config, (12, 6)).eval()
    rows, columns = projector.grid_out()
    patches = torch.randn(1, 12, 6, 24)
    changed = patches.clone()
    changed[:, 8:, 4:] += 1  # the last rows and columns
    difference = projector(changed.flatten(1, 2)) - projector(patches.flatten(1, 2))
    moved = difference[0].abs().amax(dim=-1).reshape(rows, columns)
    assert moved[-1, -1] > 0
    assert not moved[: rows // 2].any()
    assert not moved[:, : columns // 2].any()


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_same_seed_gives_same_weights_and_another_seed_does_not(config: Any) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build(config).state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first) or not first


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_every_parameter_learns(config: Any) -> None:
    projector = build(config).eval()
    patches = torch.randn(2, 24, 24, requires_grad=True)
    projector(patches).square().sum().backward()
    assert patches.grad is not None
    assert patches.grad.any()
    idle = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias shifts all scores of a query alike, so its gradient is 0 up to rounding.
    assert [name for name in idle if not name.endswith("key.bias")] == []


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_half_precision_and_features_of_several_layers(config: Any) -> None:
    projector = build(config, in_features=72).eval()
    patches = torch.randn(2, 24, 72)
    exact = projector(patches)
    tokens = projector.bfloat16()(patches.bfloat16())
    assert tokens.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(tokens.float(), exact, dim=-1).min() > 0.99


@pytest.mark.parametrize("config", [{"name": name, **forms[0]} for name, forms in FORMS.items()], ids=str)
def test_compiles_as_one_graph(config: Any) -> None:
    torch.compiler.reset()
    projector = build(config).eval()
    compiled = torch.compile(projector, fullgraph=True, backend="eager")
    patches = torch.randn(2, 24, 24)
    assert torch.equal(compiled(patches), projector(patches))
    assert torch.equal(compiled(patches, (6, 4)), projector(patches, (6, 4)))


def test_mlp2x_gelu_computes_what_llava_computes() -> None:
    projector = build_projector("mlp2x_gelu", 24, 40, GRID)
    llava = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 40))
    llava.load_state_dict(projector.state_dict())
    patches = torch.randn(2, 12, 24)
    assert torch.equal(projector(patches), llava(patches))


def test_qformer_queries_start_as_blip2_starts_them() -> None:
    projector = build_projector({**QFORMER, "num_queries": 4000}, 24, 40, GRID)
    queries = projector.query_tokens
    assert queries.std().item() == pytest.approx(0.02, rel=0.02)
    assert queries.mean().item() == pytest.approx(0.0, abs=1e-3)


def test_first_weights_follow_the_references() -> None:
    """nanoVLM and Honeybee draw theirs; the others leave torch's."""
    shuffle = build_projector({"name": "pixel_shuffle", "factor": 2}, 64, 512, GRID)
    (weight,) = shuffle.parameters()
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    torch.manual_seed(0)
    abstractor = build_projector(
        {"name": "c_abstractor", "target": [2, 2], "hidden_size": 256}, 64, 128, (24, 24)
    )
    for name, parameter in abstractor.named_parameters():
        if ".bn." in name or name.endswith("bias"):
            assert (parameter == float(name.endswith("bn.weight"))).all(), name
        else:
            assert parameter.std().item() == pytest.approx(
                0.02, rel=0.1 if parameter.numel() < 5000 else 0.03
            ), name
            assert parameter.mean().item() == pytest.approx(0.0, abs=2e-3), name


def test_queries_start_where_they_lie_on_the_grid() -> None:
    config = {"name": "d_abstractor", "target": [2, 3], "layers": 1, "heads": 2, "hidden_size": 8}
    points = build_projector(config, 24, 40, (4, 6)).reference_points
    across, down = [1 / 12, 0.5, 11 / 12], [1 / 8, 7 / 8]
    assert torch.allclose(points[0], torch.tensor([[x, y] for y in down for x in across]))


def test_embedding_of_places_is_itself_at_its_own_grid_and_smooth_at_others() -> None:
    projector = build({"name": "c_abstractor", "target": [2, 2], "hidden_size": 32})
    places = projector.pos_emb
    assert moved_places(places, GRID, GRID) is places
    level, steps = torch.full((1, 24, 2), 3.0), torch.arange(24.0).reshape(1, 24, 1) // 6
    assert torch.allclose(moved_places(level, GRID, (7, 5)), torch.full((1, 35, 2), 3.0))
    moved = moved_places(steps, GRID, (8, 6)).reshape(8, 6)
    assert (moved.diff(dim=0) > 0).all()
    assert torch.allclose(moved, moved[:, :1].expand(8, 6), atol=1e-6)


def test_a_grid_that_does_not_shuffle_is_refused_before_anything_is_built() -> None:
    config = parse_projector({"name": "pixel_shuffle", "factor": 5})
    said = "24x24 patches does not divide into squares of 5x5 .factors that fit: 2, 3, 4, 6, 8, 12, 24."
    with pytest.raises(ConfigError, match=said):
        config.check(1024, 4096, (24, 24))
    with pytest.raises(ConfigError, match=said):
        build_projector(config, 1024, 4096, (24, 24))
    with pytest.raises(ConfigError, match="no factor does; 'mlp_downsample' fills such grids up with zeros"):
        config.tokens_out((24, 23))


class Model(Config):
    projector: ProjectorNode = MlpConfig()


@pytest.mark.parametrize("node", ["mlp3x_gelu", {"name": "mlp3x_gelu"}, {"name": "mlp", "depth": 3}])
def test_llava_names_are_accepted_wherever_a_projector_is_named(node: Any) -> None:
    assert load_config(Model, {"projector": node}).projector == MlpConfig(depth=3)
    assert build_projector(node, 24, 40, GRID).config == MlpConfig(depth=3)


@pytest.mark.parametrize(
    ("alias", "meant"),
    [
        ("mlp2x_res3x_gelu", MlpResConfig(depth=2, blocks=3)),
        ("mlp_downsample_2x2_fix", MlpDownsampleConfig()),
        ("mlp_downsample_3x3_fix", MlpDownsampleConfig(variant="3x3")),
        ("mlp_downsample_3x3_s2_new", MlpDownsampleConfig(variant="3x3_s2_new")),
    ],
)
def test_names_of_llava_next_and_vila_say_options(alias: str, meant: Config) -> None:
    assert parse_projector(alias) == meant


def test_llava_name_in_an_override_replaces_the_old_variant() -> None:
    config = load_config(Model, {"projector": dict(QFORMER)}, ["projector.name=mlp2x_gelu"])
    assert config.projector == MlpConfig(depth=2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("mpl", "unknown projector 'mpl'; did you mean 'mlp'?"),
        ("mlp2x_gelo", "unknown projector 'mlp2x_gelo'; did you mean 'mlp2x_gelu'?"),
        ({"name": "mlp", "dept": 2}, "projector.dept: unknown key; did you mean 'depth'?"),
        ({"name": "mlp2x_gelu", "dept": 2}, "projector.dept: unknown key; did you mean 'depth'?"),
        ({"name": "mlp2x_gelu", "depth": 3}, "says depth 2, but depth is given as 3"),
        ({"name": "mlp2x_res2x_gelu", "blocks": 3}, "says blocks 2, but blocks is given as 3"),
        ("mlp2x_res0x_gelu", "unknown projector 'mlp2x_res0x_gelu'"),
        ("identity", "patches have 24 channels, and tokens need 40; 'linear' maps one to the other"),
        ({"name": "pool", "stride": 2, "target": [2, 2]}, "stride and target both say how many"),
        ({"name": "pool", "target": [5, 2]}, "grid of 4x6 patches is smaller than the target of 5x2 tokens"),
        ({"name": "spatial_pool", "stride": 5}, "holds no window of 5x5 .the largest that fits: 4x4."),
        ("c_abstractor", "smaller than the target of 12x12 tokens .the largest target that fits: 4x6."),
        ({**QFORMER, "heads": 5}, "hidden_size 32 does not divide into 5 heads"),
        ({"depth": 2}, "must name a projector"),
    ],
)
def test_mistakes_are_named_with_the_way_out(config: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        build_projector(config, 24, 40, GRID)


def test_widths_that_cannot_be_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="2 wrong value") as error:
        build_projector("linear", 0, 40, (3, -4))
    assert "in_features" in str(error.value)
    assert "grid" in str(error.value)


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_saved_projector_comes_back_whole(config: Any, tmp_path: Path) -> None:
    projector = build(config).eval()
    save_projector(projector, tmp_path)
    loaded = load_projector(tmp_path).eval()
    assert (loaded.config, loaded.grid) == (projector.config, projector.grid)
    patches = torch.randn(2, 24, 24)
    assert torch.equal(loaded(patches), projector(patches))


def test_mm_projector_bin_of_llava_loads(tmp_path: Path) -> None:
    source, target = build_projector("mlp2x_gelu", 24, 40, GRID), build_projector("mlp2x_gelu", 24, 40, GRID)
    file = tmp_path / "mm_projector.bin"
    torch.save({f"model.mm_projector.{name}": value for name, value in source.state_dict().items()}, file)
    load_projector_weights(target, file)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), source.parameters(), strict=True))


def test_weights_that_do_not_fit_are_listed_and_change_nothing(tmp_path: Path) -> None:
    save_projector(build_projector("mlp3x_gelu", 24, 16, GRID), tmp_path)
    target = build_projector("mlp2x_gelu", 24, 40, GRID)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_projector_weights(target, tmp_path)
    assert "unexpected 4.weight" in str(error.value)
    assert "0.weight is (16, 24), expected (40, 24)" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    torch.save({"0.weight": Payload()}, tmp_path / "mm_projector.bin")
    with pytest.raises(WeightsError, match="refused"):
        load_projector_weights(build_projector("mlp2x_gelu", 24, 40, GRID), tmp_path / "mm_projector.bin")
    assert not (tmp_path / "run").exists()


def test_configs_and_names_need_no_torch() -> None:
    code = "import sys, vlm_vision.adapters, vlm_vision.adapters.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_parameter_count_is_what_is_built(config: Any) -> None:
    projector = build(config)
    counted = parse_projector(config).parameter_count(*widths(config), GRID)
    assert counted == sum(parameter.numel() for parameter in projector.parameters())
