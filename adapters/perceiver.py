"""Flamingo's perceiver resampler as a projector."""

from __future__ import annotations

from itertools import chain

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.perceiver_config import PerceiverResamplerConfig
from vlm_vision.adapters.projector import Projector

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class PerceiverResampler(Projector):
    """[B,N,D] -> [B,num_latents,L].

    Keys `perceiver.*` as in LLaVA-NeXT's `vision_resampler`, `projection.*` as in its `mm_projector`. Starts
    as there: latents N(0, 1), the rest as torch does.
    """

    def __init__(
        self, config: PerceiverResamplerConfig, in_features: int, out_features: int, grid: Grid
    ) -> None:
        super().__init__(config, in_features, out_features, grid)
        self.projects = config.project
        self.perceiver = Perceiver(config, out_features if config.project == "before" else in_features)
        if config.project != "none":
            self.projection = _projection(in_features, out_features, config.project_depth)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        tokens: Tensor
        if self.projects == "before":
            tokens = self.perceiver(self.projection(patches))
        elif self.projects == "after":
            tokens = self.projection(self.perceiver(patches))
        else:
            tokens = self.perceiver(patches)
        return tokens


class Perceiver(nn.Module):
    """[B,N,W] -> [B,M,W]: M latents look at patches and at each other, layer by layer."""

    def __init__(self, config: PerceiverResamplerConfig, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.num_latents, width))
        self.layers = nn.ModuleList(PerceiverLayer(config, width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Float[Tensor, "b n w"]) -> Float[Tensor, "b m w"]:
        latents = repeat(self.latents, "m w -> b m w", b=len(patches))
        for layer in self.layers:
            latents = layer(patches, latents)
        tokens: Tensor = self.norm(latents)
        return tokens


class PerceiverLayer(nn.ModuleList):
    """Attention, then a perceptron; a list, as in the reference, for the sake of the keys."""

    def __init__(self, config: PerceiverResamplerConfig, width: int) -> None:
        super().__init__([PerceiverAttention(config, width), _perceptron(config, width)])

    def forward(
        self, patches: Float[Tensor, "b n w"], latents: Float[Tensor, "b m w"]
    ) -> Float[Tensor, "b m w"]:
        attend, perceptron = self
        latents = latents + attend(patches, latents)
        out: Tensor = latents + perceptron(latents)
        return out


class PerceiverAttention(nn.Module):
    """Latents as queries; patches and latents as keys and values."""

    def __init__(self, config: PerceiverResamplerConfig, width: int) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_width
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        norm = nn.LayerNorm if config.query_key_norm else nn.Identity
        self.q_norm, self.k_norm = norm(config.head_width), norm(config.head_width)

    def forward(
        self, patches: Float[Tensor, "b n w"], latents: Float[Tensor, "b m w"]
    ) -> Float[Tensor, "b m w"]:
        latents = self.norm_latents(latents)
        seen = torch.cat([self.norm_media(patches), latents], dim=1)
        keys, values = self.to_kv(seen).chunk(2, dim=-1)
        q, k, v = (
            rearrange(each, "b n (h d) -> b h n d", h=self.heads)
            for each in (self.to_q(latents), keys, values)
        )
        found = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        out: Tensor = self.to_out(rearrange(found, "b h m d -> b m (h d)"))
        return out


def _perceptron(config: PerceiverResamplerConfig, width: int) -> nn.Sequential:
    hidden = config.ff_mult * width
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, hidden, bias=False),
        _ACTIVATIONS[config.activation](),
        nn.Linear(hidden, width, bias=False),
    )


def _projection(in_features: int, out_features: int, depth: int) -> nn.Module:
    first = nn.Linear(in_features, out_features)
    deeper = ((nn.GELU(), nn.Linear(out_features, out_features)) for _ in range(depth - 1))
    return first if depth == 1 else nn.Sequential(first, *chain.from_iterable(deeper))
