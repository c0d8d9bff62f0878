from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from omegaconf import OmegaConf
from pydantic import Field

from vlm_vision.config import Config, expand_shorthand, load_config, save_config
from vlm_vision.errors import ConfigError
from vlm_vision.registry import Variant
from vlm_vision.tower_config import BACKBONES, BackboneConfig, TowerConfig

CONFIGS = Path(__file__).parents[2] / "configs"


class Rule(Config):
    match: str
    learn: Literal["full", "frozen"] = "full"


class Optimizer(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)


class Run(Config):
    steps: Annotated[int, Field(gt=0)]
    backbone: Annotated[BackboneConfig, Variant(BACKBONES)]
    optimizer: Optimizer = Optimizer()
    rules: tuple[Rule, ...] = ()
    stages: Annotated[tuple[Rule, ...], Field(min_length=1)] = (Rule(match="*"),)
    backbones: tuple[Annotated[BackboneConfig, Variant(BACKBONES)], ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"
    note: str | None = None
    layer: int | tuple[int, ...] | None = None


GOOD: dict[str, Any] = {"steps": 10, "backbone": "open_clip:ViT-B-32@none"}


def errors(tree: dict[str, Any], *overrides: str) -> list[str]:
    """The lines of the error that a wrong config raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(Run, tree, overrides)
    return str(caught.value).splitlines()


def test_every_error_is_told_at_once_with_path_value_and_nearest_name() -> None:
    lines = errors(
        {
            "stepz": 10,
            "backbone": {"name": "open_clip", "modle": "ViT-B-32", "weights": 3},
            "optimizer": {"lr": "fast", "bettas": [0.9, 0.98]},
            "rules": [{"match": "a", "learn": "fulll"}, {"mach": "b"}],
            "backbones": [
                "timn:resnet18",
                {"name": "timm", "model": "resnet18", "preprocess": {"image_sise": 3}},
            ],
            "precision": "fp16",
        }
    )
    assert lines[0] == "Run: 13 wrong value(s)"
    for expected in (
        "steps: missing",
        "stepz: unknown key; did you mean 'steps'?",
        "backbone.weights: input should be a valid string (got 3)",
        "backbone.modle: unknown key; did you mean 'model'?",
        "optimizer.lr: input should be a valid number",
        "optimizer.bettas: unknown key; did you mean 'betas'?",
        "rules.0.learn: input should be 'full' or 'frozen' (got 'fulll'); did you mean 'full'?",
        "rules.1.match: missing",
        "rules.1.mach: unknown key; did you mean 'match'?",
        "backbones.0: unknown backbone 'timn'; did you mean 'timm'?",
        "backbones.1.preprocess.image_size: missing",
        "backbones.1.preprocess.image_sise: unknown key; did you mean 'image_size'?",
        "precision: input should be 'fp32' or 'bf16' (got 'fp16')",
    ):
        assert any(line.strip().startswith(expected) for line in lines), expected


def test_a_wrong_item_does_not_make_its_list_too_short() -> None:
    lines = errors({**GOOD, "stages": [{"match": "a", "learn": "fulll"}]})
    assert len(lines) == 2
    assert lines[1].startswith("  stages.0.learn: ")
    assert errors({**GOOD, "stages": []})[1].startswith("  stages: tuple should have at least 1 item")


def test_a_value_that_fits_no_arm_of_a_union_is_one_error() -> None:
    assert errors({**GOOD, "layer": "last"})[1:] == [
        "  layer: input should be a valid integer, unable to parse string as an integer, "
        "or input should be a valid tuple (got 'last')"
    ]
    assert errors({**GOOD, "layer": [1, "last"]})[1].startswith("  layer.1: input should be a valid integer")
    assert len(errors({**GOOD, "layer": {"first": 1}})) == 2


def test_a_node_that_names_no_variant_lists_them() -> None:
    for wrong in (3, {}, {"model": "x"}, {"name": 3}, None):
        assert "must name a backbone" in errors({**GOOD, "backbone": wrong})[1]
        assert "known: open_clip, transformers, timm" in errors({**GOOD, "backbone": wrong})[1]


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("timm", {"name": "timm"}),
        ("timm:resnet18.a1_in1k", {"name": "timm", "model": "resnet18.a1_in1k"}),
        ("open_clip:ViT-B-32@openai", {"name": "open_clip", "model": "ViT-B-32", "weights": "openai"}),
        ("transformers:/a/b c@none", {"name": "transformers", "model": "/a/b c", "weights": "none"}),
        ("transformers:C:\\clip@none", {"name": "transformers", "model": "C:\\clip", "weights": "none"}),
        ("open_clip:ViT-B-32@/w/a@b.pt", {"name": "open_clip", "model": "ViT-B-32@/w/a", "weights": "b.pt"}),
    ],
)
def test_the_one_line_form_of_a_node(text: str, node: dict[str, str]) -> None:
    assert expand_shorthand(text) == node


def test_the_one_line_form_is_the_node() -> None:
    written_out = {"name": "open_clip", "model": "ViT-B-32", "weights": "none"}
    assert load_config(Run, GOOD) == load_config(Run, {**GOOD, "backbone": written_out})


def test_overrides_change_nested_values_in_order() -> None:
    changed = load_config(
        Run, GOOD, ["optimizer.lr=1e-4", "steps=3", "steps=4", "note='1'", "optimizer.betas=[0.5, 0.6]"]
    )
    assert (changed.optimizer.lr, changed.steps, changed.note, changed.optimizer.betas) == (
        1e-4,
        4,
        "1",
        (0.5, 0.6),
    )
    assert load_config(Run, {**GOOD, "note": "x"}, ["note=null"]).note is None
    assert load_config(Run, GOOD, ["note=a=b"]).note == "a=b"


def test_overrides_reach_into_the_one_line_form_and_into_lists() -> None:
    assert load_config(Run, GOOD, ["backbone.weights=openai"]).backbone.weights == "openai"
    tree = {**GOOD, "rules": [{"match": "a"}, {"match": "b"}], "backbones": ["timm:resnet18@none"]}
    changed = load_config(Run, tree, ["rules.1.learn=frozen", "backbones.0.model=resnet50"])
    assert [rule.learn for rule in changed.rules] == ["full", "frozen"]
    assert changed.backbones[0].model == "resnet50"


def test_naming_another_variant_clears_what_belonged_to_the_old_one() -> None:
    tree = {
        **GOOD,
        "backbone": {
            "name": "open_clip",
            "architecture": {"embed_dim": 3, "vision_cfg": {}},
            "weights": "x.pt",
        },
    }
    changed = load_config(Run, tree, ["backbone.name=timm", "backbone.model=resnet18"])
    assert changed.backbone.model_dump() == {
        "name": "timm",
        "model": "resnet18",
        "weights": None,
        "preprocess": None,
    }
    kept = load_config(Run, tree, ["backbone.name=open_clip"])
    assert kept.backbone.weights == "x.pt"
    replaced = load_config(Run, tree, ["backbone=timm:resnet18@none"])
    assert (replaced.backbone.name, replaced.backbone.weights) == ("timm", "none")


def test_overrides_leave_the_mapping_they_are_applied_to_alone() -> None:
    tree: dict[str, Any] = {**GOOD, "optimizer": {"lr": 1.0}, "rules": [{"match": "a"}]}
    load_config(Run, tree, ["optimizer.lr=2", "rules.0.match=b", "backbone.weights=openai"])
    assert tree == {**GOOD, "optimizer": {"lr": 1.0}, "rules": [{"match": "a"}]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "must have the form a.b=value"),
        ("=3", "must have the form a.b=value"),
        ("a..b=3", "must have the form a.b=value"),
        ("steps.a=3", "steps is a single value, not a node"),
        ("rules.7.learn=full", "'7' must be an index below 1"),
        ("rules.x.learn=full", "'x' must be an index below 1"),
        ("rules.1={match: b}", "'1' must be an index below 1"),
        ("steps=[1", "is not a YAML value"),
        ("steps=${nothing}", "is not a YAML value"),
        ("stepss=3", "stepss: unknown key; did you mean 'steps'"),
    ],
)
def test_a_wrong_override_says_what_is_wrong_with_it(override: str, message: str) -> None:
    text = "\n".join(errors({**GOOD, "rules": [{"match": "a"}]}, override))
    assert message in text
    assert override.split("=")[0].split(".")[0] in text


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = load_config(
        Run,
        {**GOOD, "rules": [{"match": "a"}], "layer": [-2, 1], "backbones": ["timm:resnet18@none"]},
        ['note="ünïcode: quoted"'],
    )
    save_config(config, tmp_path / "config.yaml")
    again = load_config(Run, tmp_path / "config.yaml")
    assert again == config
    assert type(again.backbones[0]) is type(config.backbones[0])


def test_a_config_is_frozen() -> None:
    config = load_config(Run, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: [1\n", "is not valid YAML"),
        (b"- 1\n", "must hold keys and values, but holds list"),
        (b"steps: 1\nsteps: 2\n", "duplicate key steps"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"steps: ${nothing}\n", "cannot be read as YAML"),
        (b"steps: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        (b"", "steps: missing"),
    ],
)
def test_a_broken_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Run, path)
    assert "run.yaml" in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "align.yaml").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"does not exist; did you mean '.*align.yaml'"):
        load_config(Run, tmp_path / "aling.yaml")


def test_values_refer_to_each_other_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nbackbone: timm:resnet18@none\nnote: run of ${steps}\n", encoding="utf-8")
    assert load_config(Run, path).note == "run of 7"


# Shipped files ------------------------------------------------------------------------------------------


def class_of(path: Path) -> type[Config]:
    """The config class that a shipped file is for, told by the keys that only it has."""
    from vlm_vision.train.align_config import AlignConfig
    from vlm_vision.train.compare_config import CompareConfig
    from vlm_vision.train.contrastive_config import ContrastiveConfig
    from vlm_vision.train.language_config import LanguageConfig
    from vlm_vision.train.representation_config import RepresentationConfig

    classes: dict[str, type[Config]] = {
        "projectors": CompareConfig,
        "stages": AlignConfig,
        "qformer": RepresentationConfig,
        "vocab_size": LanguageConfig,
        "model": ContrastiveConfig,
        "backbone": TowerConfig,
    }
    keys = OmegaConf.load(path).keys()
    return next(config_class for key, config_class in classes.items() if key in keys)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert isinstance(load_config(class_of(path), path), Config)
