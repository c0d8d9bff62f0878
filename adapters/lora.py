"""LoRA that reaches every linear layer, the fused q, k, v of open_clip's attention among them.

peft wraps `nn.MultiheadAttention` as a whole, ignores dropout there, and merges and unmerges the base weights
at every forward, which drifts in low precision. So the fused projection is first split into three linear
layers, which peft adapts like any other, and joined again after merging: the saved model has its original
layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.errors import ConfigError, require

ADAPTER = "default"


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` (self-attention, batch first) with separate q, k and v projections."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        if not fused.batch_first or not fused._qkv_same_embed_dim or fused.bias_k is not None:
            raise ConfigError(
                "LoRA: this attention has separate key and value widths; adapt another part of the model"
            )
        self.num_heads = fused.num_heads
        self.dropout = fused.dropout
        biases = fused.in_proj_bias.chunk(3) if fused.in_proj_bias is not None else (None, None, None)
        weights = fused.in_proj_weight.chunk(3)
        # `rules.base_name` reads `in_proj.q_proj.weight` back as `in_proj_weight`.
        self.in_proj = nn.ModuleDict(
            {
                name: _linear(weight, bias)
                for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True)
            }
        )
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self,
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m d"],
        value: Float[Tensor, "b m d"],
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "b n d"], None]:
        """As `nn.MultiheadAttention.forward` without attention weights, masks in its conventions."""
        q, k, v = (
            rearrange(project(tokens), "b n (heads d) -> b heads n d", heads=self.num_heads)
            for project, tokens in zip(self.in_proj.values(), (query, key, value), strict=True)
        )
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = rearrange(attn_mask, "(b heads) n m -> b heads n m", heads=self.num_heads)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # there True is hidden, here True is seen
        dropout = self.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        return self.out_proj(rearrange(attended, "b heads n d -> b n (heads d)")), None

    def fuse(self) -> nn.MultiheadAttention:
        """The same attention as one `nn.MultiheadAttention`, exactly."""
        weight, parts = self.out_proj.weight, cast("list[nn.Linear]", list(self.in_proj.values()))
        fused = nn.MultiheadAttention(
            self.out_proj.in_features,
            self.num_heads,
            dropout=self.dropout,
            bias=self.out_proj.bias is not None,
            batch_first=True,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            fused.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            fused.out_proj.weight.copy_(weight)
            if self.out_proj.bias is not None:
                fused.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
                fused.out_proj.bias.copy_(self.out_proj.bias)
        return fused


def add_lora(model: nn.Module, targets: Sequence[str], config: LoraConfig) -> list[str]:
    """Put adapters onto linear layers and convolutions, in place; base weights are frozen, adapters learn.

    Args:
        targets: parameter names (`tower.backbone...c_fc.weight`); layers whose weight is named are adapted.
            A fused attention projection counts as the q, k and v layers that it holds.

    Returns:
        Names of the adapted layers.

    Raises:
        ConfigError: the targets hold no such layer.
        MissingExtraError: peft is not installed.
    """
    require("train", "peft")
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    wanted = set(targets)
    for name, module in list(model.named_modules()):
        fused, out = f"{name}.in_proj_weight", f"{name}.out_proj.weight"
        # Split for the output projection alone too: the fused forward reads its weight past any adapter.
        if isinstance(module, nn.MultiheadAttention) and wanted & {fused, out}:
            split = SplitAttention(module)
            _replace(model, name, split)
            if fused in wanted:
                wanted |= {f"{name}.in_proj.{part}.weight" for part in split.in_proj}
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and f"{name}.weight" in wanted
    ]
    if not layers:
        raise ConfigError(
            "LoRA: the rules name no linear layer or convolution; use `learn: full` for this part"
        )
    peft_config = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=layers
    )
    inject_adapter_in_model(peft_config, model, adapter_name=ADAPTER)
    return layers


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold adapters into the weights and restore the model's original layers, in place."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return model  # peft takes seconds to import
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            _replace(model, name, module.get_base_layer())
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitAttention):
            _replace(model, name, module.fuse())
    return model


def check_lora_gradients(model: nn.Module) -> None:
    """After a backward: every adapter must have got a gradient, or it would stay as it is in silence.

    Raises:
        ConfigError: lists adapters without gradient.
    """
    dead = [
        name
        for name, parameter in model.named_parameters()
        if ".lora_" in name and parameter.requires_grad and parameter.grad is None
    ]
    if dead:
        raise ConfigError(
            f"LoRA: {len(dead)} adapter tensors get no gradient ({', '.join(dead[:3])}...): their layers "
            "are not used by the loss; leave them out of the lora rule"
        )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
