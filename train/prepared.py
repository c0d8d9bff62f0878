"""The model of a contrastive run before its first step: its recipe, its adapters, who of it learns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm_vision.dual_encoder import DualEncoder, load_dual_encoder
from vlm_vision.errors import ConfigError
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.depth import changes_patches, last_blocks
from vlm_vision.train.optim import set_learning, trainable_summary
from vlm_vision.train.pairs import BAD_FILE, Pairs
from vlm_vision.train.recipes import RECIPES, choose_recipe, recipe_rules
from vlm_vision.train.rules import Rule


@dataclass(frozen=True)
class Prepared:
    """A model with its adapters in, and who of it learns."""

    model: DualEncoder
    rules: Sequence[Rule]
    lr: float
    recipe: str
    reason: str

    def tell(self, config: ContrastiveConfig, pairs: Pairs) -> None:
        """Print what learns and why, and what that means for a VLM."""
        source = "" if config.lr else f" ({RECIPES[self.recipe].source})"
        print(f"recipe {self.recipe!r}: {self.reason}; peak learning rate {self.lr:g}{source}")
        if pairs.dropped:
            print(f"{pairs.dropped} row(s) without a caption were left out; {BAD_FILE} lists them")
        for part, (count, total) in trainable_summary(self.model).items():
            print(f"  {part}: {count:,} of {total:,} parameters learn")
        if not changes_patches(self.model):
            print(
                "  the layers behind them are frozen, so the patch features that a VLM reads stay as they "
                "are; --for-vlm changes them"
            )


def prepare_model(config: ContrastiveConfig, num_pairs: int, model: DualEncoder | None = None) -> Prepared:
    """Load the model a run starts from, choose the recipe, put adapters in and set who learns.

    The same config gives the same model each time, random weights included.

    Args:
        num_pairs: that `auto` chooses by.
        model: prepare this one instead; it may be without weights, on the meta device.

    Raises:
        ConfigError: a recipe or rules that do not fit the model, or that leave patch features for a VLM as
            they are.
    """
    if model is None:
        model = load_start(config)
    recipe, reason = choose_recipe(config.recipe, num_pairs, for_vlm=config.for_vlm)
    _set_temperature(model, config, recipe)
    names = [name for name, _ in model.named_parameters()]
    rules = config.rules or recipe_rules(recipe, config, names, last_blocks(model, config.last_n))
    set_learning(model, rules, config.lora)
    # What the loss does not reach has no gradient that ranks could wait for.
    if model.logit_bias is not None and config.loss.name != "siglip":
        model.logit_bias.requires_grad_(False)
    if model.text_decoder is not None and not config.loss.caption_weight:
        model.text_decoder.requires_grad_(False)
    if config.for_vlm and not changes_patches(model):
        raise ConfigError(
            f"for_vlm: with recipe {recipe!r} nothing learns that the patch features of layer "
            f"{model.config.layer or 'default'} depend on; raise last_n, or use lora or full"
        )
    return Prepared(model, rules, config.lr or RECIPES[recipe].lr, recipe, reason)


def load_start(config: ContrastiveConfig) -> DualEncoder:
    """The model that a run starts from, random weights included."""
    torch.manual_seed(config.seed)
    return load_dual_encoder(config.model)


def _set_temperature(model: DualEncoder, config: ContrastiveConfig, recipe: str) -> None:
    temperature = config.temperature
    with torch.no_grad():
        if temperature.init is not None:
            model.logit_scale.fill_(math.log(temperature.init))
        if config.loss.name != "siglip":
            return
        bias = temperature.bias_init
        if bias is None and (model.logit_bias is None or recipe == "scratch"):
            bias = -math.log(max(2, config.batch_size) - 1)
        if model.logit_bias is None:
            model.logit_bias = nn.Parameter(torch.zeros_like(model.logit_scale))
        if bias is not None:
            model.logit_bias.fill_(bias)


def with_learnt(model: DualEncoder, learnt: Mapping[str, Tensor]) -> DualEncoder:
    """A prepared model with what it learnt in its place."""
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in learnt.items():
            targets[name].copy_(tensor)
    return model
