"""Which parameters learn, as data: name patterns, each with its way of learning. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import product
from typing import Literal

from vlm_vision.config import Config
from vlm_vision.errors import ConfigError, nearest


class Rule(Config):
    """Parameters whose dotted name matches `match` learn in the way `learn` says. The last such rule wins.

    Attributes:
        match: shell pattern over parameter names, `*` crossing dots: `tower.*`, `*.ln_*`. Numbers between
            dots may be a range, both ends in it: `vision_tower.*blocks.20-23.*`.
        learn: `full` trains the weights, `frozen` does not, `lora` trains low-rank adapters put onto the
            linear layers and convolutions whose weight matches.
        lr: peak learning rate; None takes the run's.
        weight_decay: None takes the run's.
    """

    match: str
    learn: Literal["full", "frozen", "lora"] = "full"
    lr: float | None = None
    weight_decay: float | None = None


def matching_rule(name: str, rules: Sequence[Rule]) -> Rule | None:
    """The last rule whose pattern matches a parameter's name, or None: what no rule names stays frozen."""
    return next((rule for rule in reversed(rules) if _fits(name, rule.match)), None)


def matches(rule: Rule, names: Iterable[str]) -> bool:
    """Whether a rule names at least one parameter."""
    return any(_fits(name, rule.match) for name in names)


def check_rules(names: Iterable[str], rules: Sequence[Rule]) -> None:
    """Refuse a rule that names no parameter: a typo there would silently train nothing.

    Raises:
        ConfigError: names the pattern and the nearest parameter.
    """
    known = list(names)
    for rule in rules:
        if not matches(rule, known):
            stem = rule.match.strip("*.")
            prefixes = sorted({name.rsplit(".", n)[0] for name in known for n in range(name.count(".") + 1)})
            raise ConfigError(f"rule {rule.match!r} matches no parameter{nearest(stem, prefixes)}")
        for pattern in _patterns(rule.match):
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ConfigError(f"rule {rule.match!r}: nothing is there for {pattern!r} of its range")


def base_name(name: str) -> str:
    """A parameter's name before LoRA changed its layer: rules read the same with adapters in place."""
    name = re.sub(r"\.lora_\w+\.\w+\.", ".", name).replace(".base_layer.", ".")
    name = re.sub(r"\.apart\.([qkv]_proj)\.weight", r".\1_weight", name)
    name = re.sub(r"\.(in_proj|apart)\.[qkv]_proj\.", ".in_proj_", name)
    return re.sub(r"\.(qkv|kv)\.[qkv]_proj\.", r".\1.", name)


def _fits(name: str, match: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _patterns(match))


@lru_cache(maxsize=256)
def _patterns(match: str) -> tuple[str, ...]:
    """A shell pattern for each number in the ranges of a rule's pattern.

    Raises:
        ConfigError: a range that goes down.
    """
    choices = []
    for part in match.split("."):
        found = re.fullmatch(r"(\d+)-(\d+)", part)
        numbers = [part] if found is None else [str(n) for n in range(int(found[1]), int(found[2]) + 1)]
        if not numbers:
            raise ConfigError(f"rule {match!r}: the range {part} goes down; write the smaller number first")
        choices.append(numbers)
    return tuple(".".join(parts) for parts in product(*choices))
