"""Projectors that mix neighbouring patches by convolutions on their way to fewer tokens."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.convolution_config import CAbstractorConfig, LdpConfig, LdpV2Config
from vlm_vision.adapters.mlp import perceptron
from vlm_vision.adapters.projector import Projector


class CAbstractorProjector(Projector):
    """[B,N,D] -> [B,M,L]. Keys as in Honeybee: `pos_emb`, `net.0.b1.conv1.conv.weight`, `readout.0.weight`.

    Starts by Honeybee's rule (`HoneybeePreTrainedModel`): weights N(0, 0.02), biases 0, the embedding of
    places N(0, 0.02), truncated.
    """

    def __init__(self, config: CAbstractorConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        stage = partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        hidden = config.hidden_size
        self.net = nn.Sequential(
            stage(config.depth, in_features, hidden),
            nn.AdaptiveAvgPool2d(config.target),
            stage(config.depth, hidden, hidden),
        )
        self.readout = perceptron(config.mlp_depth, hidden, out_features, "silu")
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.pos_emb: nn.Parameter | None = None
        if config.pos_emb:
            self.pos_emb = nn.Parameter(torch.empty(1, grid[0] * grid[1], in_features))
            nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        rows, columns = self.grid_of(patches, grid)
        if self.pos_emb is not None:
            patches = patches + moved_places(self.pos_emb, self.grid, (rows, columns))
        plane = self.net(rearrange(patches, "b (h w) d -> b d h w", h=rows))
        tokens: Tensor = self.readout(rearrange(plane, "b d h w -> b (h w) d"))
        return tokens


class LdpProjector(Projector):
    """[B,N,D] -> [B,M,L]. Starts as torch initialises its layers, which MobileVLM leaves alone."""

    def __init__(self, config: LdpConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        self.mlp = perceptron(2, in_features, out_features)
        width, norm = out_features, partial(LayerNorm2d, eps=1e-5)
        self.blocks = nn.Sequential(
            *(
                InvertedResidual(
                    InvertedResidualConfig(width, 3, width, width, True, "HS", stride, 1, 1), norm
                )
                for stride in (1, 2)
            )
        )

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        rows, _ = self.grid_of(patches, grid)
        plane = self.blocks(rearrange(self.mlp(patches), "b (h w) d -> b d h w", h=rows))
        tokens: Tensor = rearrange(plane, "b d h w -> b (h w) d")
        return tokens


class LdpV2Projector(Projector):
    """[B,N,D] -> [B,M,L]. Starts as torch initialises its layers, which MobileVLM leaves alone."""

    config: LdpV2Config

    def __init__(self, config: LdpV2Config, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        self.mlp = perceptron(2, in_features, out_features)
        self.peg = nn.Conv2d(out_features, out_features, 3, padding=1, groups=out_features)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        rows, _ = self.grid_of(patches, grid)
        plane = rearrange(self.mlp(patches), "b (h w) d -> b d h w", h=rows)
        pooled = F.adaptive_avg_pool2d(plane, self.config.target)
        tokens: Tensor = rearrange(self.peg(pooled) + pooled, "b d h w -> b (h w) d")
        return tokens


def moved_places(places: Float[Tensor, "1 n d"], grid: Grid, wanted: Grid) -> Float[Tensor, "1 m d"]:
    """An embedding of the places of one grid for those of another, between which it is interpolated."""
    if grid == wanted:
        return places
    plane = rearrange(places.float(), "1 (h w) d -> 1 d h w", h=grid[0])
    moved = F.interpolate(plane, size=wanted, mode="bicubic", antialias=True)
    result: Tensor = rearrange(moved, "1 d h w -> 1 (h w) d").to(places.dtype)
    return result
