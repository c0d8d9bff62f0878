from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlm_vision.adapters import build_projector, list_projectors
from vlm_vision.adapters.build import load_projector, load_projector_weights, save_projector
from vlm_vision.adapters.config import ProjectorNode, parse_projector
from vlm_vision.adapters.mlp_config import MlpConfig
from vlm_vision.config import Config, load_config
from vlm_vision.errors import ConfigError, WeightsError

QFORMER = {"name": "qformer", "layers": 2, "heads": 2, "hidden_size": 32, "num_queries": 5}
EVERY: list[Any] = ["linear", "mlp1x_gelu", "mlp2x_gelu", {"name": "mlp", "activation": "silu", "depth": 3}]
EVERY.append(QFORMER)
GRID = (3, 4)


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_tokens_out_is_what_comes_out(config: Any) -> None:
    projector = build_projector(config, 24, 40, GRID)
    tokens = projector(torch.randn(2, 12, 24))
    assert tokens.shape == (2, projector.tokens_out(), 40)
    assert parse_projector(config).tokens_out(GRID) == projector.tokens_out()


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_same_seed_gives_same_weights_and_another_seed_does_not(config: Any) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_projector(config, 24, 40, GRID).state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_every_parameter_learns(config: Any) -> None:
    projector = build_projector(config, 24, 40, GRID).eval()
    projector(torch.randn(2, 12, 24)).square().sum().backward()
    idle = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias shifts all scores of a query alike, so its gradient is 0 up to rounding.
    assert [name for name in idle if not name.endswith("key.bias")] == []


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


class Model(Config):
    projector: ProjectorNode = MlpConfig()


@pytest.mark.parametrize("node", ["mlp3x_gelu", {"name": "mlp3x_gelu"}, {"name": "mlp", "depth": 3}])
def test_llava_names_are_accepted_wherever_a_projector_is_named(node: Any) -> None:
    assert load_config(Model, {"projector": node}).projector == MlpConfig(depth=3)
    assert build_projector(node, 24, 40, GRID).config == MlpConfig(depth=3)


def test_llava_name_in_an_override_replaces_the_old_variant() -> None:
    config = load_config(Model, {"projector": dict(QFORMER)}, ["projector.name=mlp2x_gelu"])
    assert config.projector == MlpConfig(depth=2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("mpl", "unknown projector 'mpl'; did you mean 'mlp'?"),
        ({"name": "mlp", "dept": 2}, "projector.dept: unknown key; did you mean 'depth'?"),
        ({"name": "mlp2x_gelu", "dept": 2}, "projector.dept: unknown key; did you mean 'depth'?"),
        ({"name": "mlp2x_gelu", "depth": 3}, "says depth 2, but depth is given as 3"),
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
    projector = build_projector(config, 24, 40, GRID).eval()
    save_projector(projector, tmp_path)
    loaded = load_projector(tmp_path).eval()
    assert (loaded.config, loaded.grid) == (projector.config, projector.grid)
    patches = torch.randn(2, 12, 24)
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
    with pytest.raises(WeightsError, match="cannot be read"):
        load_projector_weights(build_projector("mlp2x_gelu", 24, 40, GRID), tmp_path / "mm_projector.bin")
    assert not (tmp_path / "run").exists()


def test_configs_and_names_need_no_torch() -> None:
    code = "import sys, vlm_vision.adapters, vlm_vision.adapters.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_builtin_names() -> None:
    assert {"linear", "mlp", "qformer"} <= set(list_projectors())


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_parameter_count_is_what_is_built(config: Any) -> None:
    projector = build_projector(config, 24, 40, GRID)
    counted = parse_projector(config).parameter_count(24, 40, GRID)
    assert counted == sum(parameter.numel() for parameter in projector.parameters())
