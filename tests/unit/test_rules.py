"""Rules by name pattern, the parameters they choose, their groups, and the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vlm_vision.errors import ConfigError
from vlm_vision.train.optim import (
    apply_rules,
    parameter_groups,
    trainable_summary,
    warmup_cosine,
    warmup_steps,
)
from vlm_vision.train.rules import Rule, base_name, check_rules, matching_rule

NAMES = ("tower.blocks.0.fc.weight", "tower.blocks.0.ln.bias", "text.fc.weight", "logit_scale")


def small_model() -> nn.Module:
    model = nn.Module()
    model.tower = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.text = nn.Linear(4, 2)
    model.logit_scale = nn.Parameter(torch.tensor(0.0))
    return model


def test_the_last_matching_rule_wins() -> None:
    rules = [Rule(match="*"), Rule(match="tower.*", learn="frozen"), Rule(match="*.ln.*", lr=0.5)]
    assert [matching_rule(name, rules) for name in NAMES] == [rules[1], rules[2], rules[0], rules[0]]
    assert matching_rule("text.fc.weight", rules[1:]) is None


def test_a_rule_that_names_nothing_tells_the_nearest() -> None:
    check_rules(NAMES, [Rule(match="*"), Rule(match="logit_scale")])
    with pytest.raises(ConfigError, match=r"rule 'towr\.\*' matches no parameter; did you mean 'tower'\?"):
        check_rules(NAMES, [Rule(match="*"), Rule(match="towr.*")])


def test_a_range_of_layers() -> None:
    names = [f"vision_tower.encoder.layers.{number}.fc.weight" for number in range(24)]
    rule = Rule(match="vision_tower.*.layers.9-11.*")
    assert [name for name in names if matching_rule(name, [rule])] == names[9:12]
    check_rules(names, [rule])
    with pytest.raises(
        ConfigError, match=r"nothing is there for 'vision_tower.\*.layers.24.\*' of its range"
    ):
        check_rules(names, [Rule(match="vision_tower.*.layers.22-24.*")])
    with pytest.raises(ConfigError, match="the range 11-9 goes down"):
        matching_rule(names[0], [Rule(match="*.11-9.*")])


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("tower.c_fc.base_layer.weight", "tower.c_fc.weight"),
        ("tower.c_fc.lora_A.default.weight", "tower.c_fc.weight"),
        ("tower.attn.in_proj.q_proj.base_layer.bias", "tower.attn.in_proj_bias"),
        ("tower.attn.in_proj.v_proj.lora_B.default.weight", "tower.attn.in_proj_weight"),
        ("llm.self_attn.q_proj.weight", "llm.self_attn.q_proj.weight"),
    ],
)
def test_names_before_adapters(name: str, base: str) -> None:
    assert base_name(name) == base


def test_who_learns() -> None:
    model = small_model()
    apply_rules(model, [Rule(match="tower.*"), Rule(match="tower.0.bias", learn="frozen")])
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"tower.0.weight", "tower.1.weight", "tower.1.bias"}
    assert trainable_summary(model) == {"tower": (24, 28), "text": (0, 10), "logit_scale": (0, 1)}


@pytest.mark.parametrize("learn", ["frozen", "lora"])
def test_nothing_learning_is_an_error(learn: str) -> None:
    with pytest.raises(ConfigError, match="no parameter learns"):
        apply_rules(small_model(), [Rule(match="*", learn=learn)])


def test_groups_by_rate_and_decay() -> None:
    model = small_model()
    rules = [
        Rule(match="*"),
        Rule(match="text.*", lr=0.5, weight_decay=0.3),
        Rule(match="tower.0.weight", lr=0.1),
    ]
    apply_rules(model, rules)
    groups = parameter_groups(model, rules, lr=0.01, weight_decay=0.2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        (group["lr"], group["weight_decay"]): sorted(names[id(parameter)] for parameter in group["params"])
        for group in groups
    }
    assert found == {
        (0.1, 0.2): ["tower.0.weight"],
        (0.01, 0.0): ["logit_scale", "tower.0.bias", "tower.1.bias", "tower.1.weight"],
        (0.5, 0.3): ["text.weight"],
        (0.5, 0.0): ["text.bias"],  # a bias takes none, whatever the rule
    }


def test_warmup_is_a_share_of_a_short_run() -> None:
    assert [warmup_steps(total) for total in (1, 10, 95, 1999, 2000, 100_000)] == [1, 1, 10, 200, 200, 200]
    assert warmup_steps(1000, warmup=50) == 50
    assert warmup_steps(1000, warmup=0) == 0


def test_schedule_keeps_each_groups_own_rate_and_equals_open_clips() -> None:
    from open_clip_train.scheduler import cosine_lr

    total, warmup = 20, 4
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [
        {"params": [parameter], "lr": rate}
        for parameter, rate in zip(parameters, (1.0, 0.1, 1.0), strict=True)
    ]
    ours, theirs = torch.optim.SGD(groups[:2]), torch.optim.SGD(groups[2:])
    schedule, set_rate = warmup_cosine(ours, total, warmup), cosine_lr(theirs, 1.0, warmup, total)
    for step in range(total):
        set_rate(step)
        first, second = (group["lr"] for group in ours.param_groups)
        assert first == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12)
        assert second == pytest.approx(first / 10, abs=1e-12)
        ours.step()
        schedule.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_schedule_without_warmup_starts_at_its_peak() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    warmup_cosine(optimizer, 10, 0)
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.3)
