"""Recipes of contrastive adaptation as tables, and the one that a data set's size asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlm_vision.errors import ConfigError
from vlm_vision.train.contrastive_config import ContrastiveConfig, Recipe
from vlm_vision.train.rules import Rule, matches

LORA_FROM, FULL_FROM = 10_000, 100_000


@dataclass(frozen=True)
class RecipeRow:
    """What learns, at what peak rate, and where that rate comes from."""

    rules: tuple[Rule, ...]
    lr: float
    source: str


_TEMPERATURE = Rule(match="logit_*")
_TEXT = (Rule(match="text.*"), Rule(match="text_decoder.*"))  # CoCa has a decoder
# What turns the last layer into the image embedding, which no VLM reads.
_IMAGE_PROJECTIONS = (
    Rule(match="tower.*.visual.proj"),  # of open_clip's ViT
    Rule(match="tower.*.visual.attnpool.c_proj.*"),  # of a ModifiedResNet
    Rule(match="tower.*.visual.head.*"),  # of timm's trunks
    Rule(match="image_projection.*"),  # of transformers
)
_FULL = (1e-5, "between Long-CLIP's 1e-6 and WiSE-FT's 3e-5")

RECIPES: dict[str, RecipeRow] = {
    "scratch": RecipeRow((Rule(match="*"),), 5e-4, "open_clip's default"),
    "frozen_vision": RecipeRow(
        (*_TEXT, *_IMAGE_PROJECTIONS, _TEMPERATURE),
        1e-5,
        "CoCa's fine-tuning in open_clip's README",
    ),
    "lit": RecipeRow(
        (*_TEXT, _TEMPERATURE),
        1e-3,
        "big_vision's siglip_lit_coco; LiT is arXiv:2111.07991",
    ),
    "lora": RecipeRow(
        (
            Rule(match="tower.*", learn="lora"),
            Rule(match="text.*", learn="lora"),
            # Of pixels.
            Rule(match="tower.*.visual.conv1.*", learn="frozen"),
            Rule(match="tower.*.patch_embed.*", learn="frozen"),
            Rule(match="tower.*.patch_embedding.*", learn="frozen"),
            # A ModifiedResNet's pooling reads its layers' weights past any adapter.
            Rule(match="tower.*.visual.attnpool.*", learn="frozen"),
            _TEMPERATURE,
        ),
        2e-4,
        "CLIP-LoRA, arXiv:2405.18541",
    ),
    # Completed by the rules of the last blocks, whose names are the model's own.
    "last_n": RecipeRow((*_IMAGE_PROJECTIONS, _TEMPERATURE), *_FULL),
    "full": RecipeRow((Rule(match="*"),), *_FULL),
}
KEEP_PATCHES = ("frozen_vision", "lit")


def choose_recipe(asked: Recipe, pairs: int, *, for_vlm: bool = False) -> tuple[str, str]:
    """The recipe of a run and the reason for it. Training from scratch is never chosen by size.

    Raises:
        ConfigError: a recipe that leaves patch features as they are, for a VLM that reads nothing else.
    """
    if asked in KEEP_PATCHES and for_vlm:
        raise ConfigError(
            f"for_vlm: the recipe {asked!r} leaves the patch features that a VLM reads as they are; "
            "use lora, last_n (with last_n of 2 or more) or full"
        )
    if asked != "auto":
        return asked, "asked for"
    if pairs < LORA_FROM and for_vlm:
        return "lora", f"{pairs:,} pairs are under {LORA_FROM:,}, and patch features are to change"
    if pairs < LORA_FROM:
        return "frozen_vision", f"{pairs:,} pairs are under {LORA_FROM:,}"
    if pairs < FULL_FROM:
        return "lora", f"{pairs:,} pairs are between {LORA_FROM:,} and {FULL_FROM:,}"
    return "full", f"{pairs:,} pairs are {FULL_FROM:,} or more"


def recipe_rules(
    recipe: str, config: ContrastiveConfig, names: Iterable[str], last_blocks: Iterable[str]
) -> tuple[Rule, ...]:
    """A recipe's rules for a model, without those that speak of parts it does not have.

    Args:
        names: of the model's parameters.
        last_blocks: names of the modules that the recipe `last_n` trains.
    """
    rules = RECIPES[recipe].rules
    if recipe == "last_n":
        rules = (*(Rule(match=f"{block}.*") for block in last_blocks), *rules)
    if recipe == "lora" and config.loss.caption_weight:
        rules = (*rules, Rule(match="text_decoder.*", learn="lora"))
    temperature = Rule(
        match="logit_*",
        learn="full" if config.temperature.learns else "frozen",
        lr=config.temperature.lr,
    )
    return applicable_rules((*rules, temperature), names)


def applicable_rules(rules: Iterable[Rule], names: Iterable[str]) -> tuple[Rule, ...]:
    """Rules without those that speak of parts this model does not have."""
    known = list(names)
    return tuple(rule for rule in rules if matches(rule, known))
