"""Recipes of contrastive adaptation as tables, and the one that a data set's size asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlm_vision.train.contrastive_config import Recipe
from vlm_vision.train.rules import Rule, matches

LORA_FROM, FULL_FROM = 10_000, 100_000


@dataclass(frozen=True)
class RecipeRow:
    """What learns, at what peak rate, and where that rate comes from."""

    rules: tuple[Rule, ...]
    lr: float
    source: str
    changes_patches: bool


_TEMPERATURE = Rule(match="logit_scale")

RECIPES: dict[str, RecipeRow] = {
    "scratch": RecipeRow((Rule(match="*"),), 5e-4, "open_clip's default", changes_patches=True),
    "frozen_vision": RecipeRow(
        (
            Rule(match="text.*"),
            Rule(match="tower.*.visual.proj"),  # of a ViT
            Rule(match="tower.*.visual.attnpool.c_proj.*"),  # of a ModifiedResNet
            _TEMPERATURE,
        ),
        1e-5,
        "CoCa's fine-tuning in open_clip's README",
        changes_patches=False,
    ),
    "lora": RecipeRow(
        (
            Rule(match="tower.*", learn="lora"),
            Rule(match="text.*", learn="lora"),
            Rule(match="tower.*.visual.conv1.*", learn="frozen"),  # of pixels
            # A ModifiedResNet's pooling reads its layers' weights past any adapter.
            Rule(match="tower.*.visual.attnpool.*", learn="frozen"),
            _TEMPERATURE,
        ),
        2e-4,
        "CLIP-LoRA, arXiv:2405.18541",
        changes_patches=True,
    ),
    "full": RecipeRow(
        (Rule(match="*"),), 1e-5, "between Long-CLIP's 1e-6 and WiSE-FT's 3e-5", changes_patches=True
    ),
}


def choose_recipe(asked: Recipe, pairs: int) -> tuple[str, str]:
    """The recipe of a run and the reason for it. Training from scratch is never chosen by size."""
    if asked != "auto":
        return asked, "asked for"
    if pairs < LORA_FROM:
        return "frozen_vision", f"{pairs:,} pairs are under {LORA_FROM:,}"
    if pairs < FULL_FROM:
        return "lora", f"{pairs:,} pairs are between {LORA_FROM:,} and {FULL_FROM:,}"
    return "full", f"{pairs:,} pairs are {FULL_FROM:,} or more"


def applicable_rules(rules: Iterable[Rule], names: Iterable[str]) -> tuple[Rule, ...]:
    """A recipe's rules without those that speak of parts this model does not have."""
    known = list(names)
    return tuple(rule for rule in rules if matches(rule, known))
