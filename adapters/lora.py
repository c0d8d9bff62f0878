"""LoRA that reaches every linear layer, the fused q, k, v of attention among them.

peft wraps `nn.MultiheadAttention` as a whole, ignores dropout there, and merges and unmerges the base weights
at every forward, which drifts in low precision. So fused projections, of torch's attention and timm's alike,
are first split into linear layers, which peft adapts like any other, and joined again after merging: the
saved model has its original layout. Adapters of a model in half precision are kept, trained and merged in
fp32; the base weights are not touched until they are merged, and are rounded once then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.adapters.low_rank import merged, update
from vlm_vision.errors import ConfigError, nearest, require

ADAPTER = "default"
# Linear layers that give several projections at once, by the last part of their names.
FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "kv": ("k_proj", "v_proj")}
# Names of layers by what they do: open_clip's, timm's, transformers'.
KINDS = {
    "q": re.compile(r"(.*\.)?(q|q_proj|query)"),
    "k": re.compile(r"(.*\.)?(k|k_proj|key)"),
    "v": re.compile(r"(.*\.)?(v|v_proj|value)"),
    "out": re.compile(r"(.*\.)?(out_proj|o_proj|attn\.proj|attn_pool\.proj|attention\.output\.dense)"),
    "mlp": re.compile(r"(.*\.)?(mlp\..+|intermediate\.dense|(?<!attention\.)output\.dense)"),
}


# Tensors within `SplitAttention` and `SplitLinear`.
_PART = re.compile(
    r"(?P<owner>.+)\.(?P<home>in_proj|apart|qkv|kv)\.(?P<part>[qkv])_proj\.(?P<kind>weight|bias)"
)


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` (batch first) with q, k and v projections that are layers of their own.

    `rules.base_name` reads the names of their tensors back as those of the fused attention: layers lie in
    `in_proj` where that has one `in_proj_weight`, in `apart` where keys and values have widths of their own
    (CoCa's pooling), and so weights of their own.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        if not fused.batch_first or fused.bias_k is not None or fused.add_zero_attn:
            raise ConfigError(
                "LoRA: this attention is not batch first, or adds keys of its own; adapt another part"
            )
        self.num_heads = fused.num_heads
        self.dropout = fused.dropout
        self.is_one = bool(fused._qkv_same_embed_dim)
        biases = fused.in_proj_bias.chunk(3) if fused.in_proj_bias is not None else (None, None, None)
        weights = (
            fused.in_proj_weight.chunk(3)
            if self.is_one
            else (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        )
        layers = nn.ModuleDict(
            {
                name: _linear(weight, bias)
                for name, weight, bias in zip(FUSED["qkv"], weights, biases, strict=True)
            }
        )
        if self.is_one:
            self.in_proj = layers
        else:
            self.apart = layers
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)

    @property
    def projections(self) -> nn.ModuleDict:
        return self.in_proj if self.is_one else self.apart

    def forward(
        self,
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m dk"],
        value: Float[Tensor, "b m dv"],
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "b n d"], None]:
        """As `nn.MultiheadAttention.forward` without attention weights, masks in its conventions."""
        q, k, v = (
            rearrange(project(tokens), "b n (heads d) -> b heads n d", heads=self.num_heads)
            for project, tokens in zip(self.projections.values(), (query, key, value), strict=True)
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
        weight, parts = self.out_proj.weight, cast("list[nn.Linear]", list(self.projections.values()))
        fused = nn.MultiheadAttention(
            self.out_proj.in_features,
            self.num_heads,
            dropout=self.dropout,
            bias=self.out_proj.bias is not None,
            kdim=None if self.is_one else parts[1].in_features,
            vdim=None if self.is_one else parts[2].in_features,
            batch_first=True,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            if self.is_one:
                fused.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            else:
                for name, part in self.projections.items():
                    getattr(fused, f"{name}_weight").copy_(part.weight)
            fused.out_proj.weight.copy_(weight)
            if self.out_proj.bias is not None:
                fused.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
                fused.out_proj.bias.copy_(self.out_proj.bias)
        return fused


class SplitLinear(nn.ModuleDict):
    """A linear layer that gives several projections side by side, each a layer of its own."""

    def __init__(self, fused: nn.Linear, names: Sequence[str]) -> None:
        biases = fused.bias.chunk(len(names)) if fused.bias is not None else [None] * len(names)
        weights = fused.weight.chunk(len(names))
        super().__init__(
            {name: _linear(weight, bias) for name, weight, bias in zip(names, weights, biases, strict=True)}
        )

    def forward(self, tokens: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        return torch.cat([project(tokens) for project in self.values()], dim=-1)

    @property
    def weight(self) -> Tensor:
        """What is read past the call; adapters then get no gradient, which `check_lora_gradients` tells."""
        return torch.cat([cast("nn.Linear", project).weight for project in self.values()])

    def fuse(self) -> nn.Linear:
        """The same projections as one linear layer, exactly."""
        parts = cast("list[nn.Linear]", list(self.values()))
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return _linear(torch.cat([part.weight for part in parts]), bias)


def add_lora(model: nn.Module, targets: Sequence[str], config: LoraConfig) -> list[str]:
    """Put adapters onto linear layers and convolutions, in place; base weights are frozen, adapters learn.

    Args:
        targets: parameter names (`tower.backbone...c_fc.weight`); layers whose weight is named are adapted,
            as far as `config.targets` wants them. A fused projection counts as the layers that it holds. Not
            convolutions in groups (depthwise ones), whose adapters peft cannot merge, and not the linear
            projection of text that some models of open_clip have: it is used by its type, which an adapter
            has not.

    Returns:
        Names of the adapted layers.

    Raises:
        ConfigError: the targets hold no such layer, or `config.targets` names what is not there.
        MissingExtraError: peft is not installed.
    """
    require("train", "peft")
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    wanted = set(targets)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            wanted |= _split_attention(model, name, module, wanted)
        names = FUSED.get(name.rpartition(".")[2])
        if names and isinstance(module, nn.Linear) and f"{name}.weight" in wanted:
            _replace(model, name, SplitLinear(module, names))
            wanted |= {f"{name}.{part}.weight" for part in names}
    named = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and getattr(module, "groups", 1) == 1
        and f"{name}.weight" in wanted
        and not _is_asked_for_its_type(model, name)
    ]
    if not named:
        raise ConfigError(
            "LoRA: the rules name no linear layer or convolution; use `learn: full` for this part"
        )
    layers = named if config.targets is None else _chosen(named, config.targets)
    _join_what_has_no_adapter(model, layers)
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=layers,
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
    )
    inject_adapter_in_model(peft_config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # steps smaller than its precision would be lost
    return layers


def kind_of(layer: str) -> str | None:
    """What a layer is by its name, a key of `KINDS`; None where its name does not tell."""
    return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(layer)), None)


@dataclass(frozen=True)
class Slot:
    """A tensor of a model in its original layout, or one of equal parts of it, one below the other."""

    name: str
    number: int = 0
    parts: int = 1


def slot_of(name: str) -> Slot:
    """Where a tensor of a layer that was split lies when it is joined again; others lie where they are."""
    found = _PART.fullmatch(name)
    if found is None:
        return Slot(name)
    owner, home, part, kind = found["owner"], found["home"], found["part"], found["kind"]
    if home == "apart" and kind == "weight":
        return Slot(f"{owner}.{part}_proj_weight")
    if home in ("in_proj", "apart"):
        return Slot(f"{owner}.in_proj_{kind}", "qkv".index(part), 3)
    return Slot(f"{owner}.{home}.{kind}", home.index(part), len(home))


def has_lora(model: nn.Module) -> bool:
    """Whether adapters are on it."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold adapters into the weights and restore the model's original layers, in place."""
    if not has_lora(model):
        return model  # peft takes seconds to import
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base = cast("nn.Linear", module.get_base_layer())
            with torch.no_grad():
                base.weight.copy_(_merged_weight(module, base.weight))
            _replace(model, name, base)
    for name, module in list(model.named_modules()):
        if isinstance(module, (SplitAttention, SplitLinear)):
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


def _split_attention(
    model: nn.Module, name: str, module: nn.MultiheadAttention, wanted: set[str]
) -> set[str]:
    """Split an attention of which anything is wanted; names of the weights that are wanted in its place."""
    fused = {
        f"{name}.{weight}" for weight in ("in_proj_weight", *(f"{part}_weight" for part in FUSED["qkv"]))
    }
    # Split for the output projection alone too: the fused forward reads its weight past any adapter.
    if not wanted & {*fused, f"{name}.out_proj.weight"}:
        return set()
    split = SplitAttention(module)
    _replace(model, name, split)
    home = "in_proj" if split.is_one else "apart"
    return {
        f"{name}.{home}.{part}.weight"
        for part in FUSED["qkv"]
        if f"{name}.{'in_proj' if split.is_one else part}_weight" in wanted
    }


def _chosen(layers: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The layers of the wanted kinds and patterns.

    Raises:
        ConfigError: a target that is no kind and matches none of them, or a kind that none of them is.
    """
    chosen: set[str] = set()
    for target in targets:
        found = {
            layer
            for layer in layers
            if (kind_of(layer) == target if target in KINDS else fnmatchcase(layer, target))
        }
        if not found:
            raise ConfigError(
                f"LoRA: target {target!r} is none of the {len(layers)} layers that the rules name"
                f"{nearest(target, KINDS)} (kinds: {', '.join(KINDS)}; or a pattern over names such as "
                f"{layers[0]!r})"
            )
        chosen |= found
    return [layer for layer in layers if layer in chosen]


def _join_what_has_no_adapter(model: nn.Module, layers: Sequence[str]) -> None:
    """What was split, and of which nothing is adapted, is as it was."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (SplitAttention, SplitLinear)) and not any(
            layer.startswith(f"{name}.") for layer in layers
        ):
            _replace(model, name, module.fuse())


def _is_asked_for_its_type(model: nn.Module, layer: str) -> bool:
    """`TextTransformer.forward` multiplies by its projection as a matrix, unless it is an `nn.Linear`."""
    owner, _, child = layer.rpartition(".")
    of_open_clip = type(model.get_submodule(owner)).__module__.startswith("open_clip.")
    return child == "text_projection" and of_open_clip


def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    magnitudes = layer.lora_magnitude_vector
    magnitude = magnitudes[ADAPTER].weight if ADAPTER in magnitudes else None
    return merged(weight, layer.scaling[ADAPTER] * update(a, b), magnitude)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
