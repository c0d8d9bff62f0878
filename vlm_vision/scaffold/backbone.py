"""A plain ViT (arXiv:2010.11929) with all that a tower asks of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from vlm_vision.backbone import Backbone, BackboneInfo, at_size
from vlm_vision.backbones.encoder import resample_positions
from vlm_vision.errors import WeightsError
from vlm_vision.scaffold.config import WIDTH_DEPTH_HEADS, ViTConfig
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import load_strict, read_state_dict

PATCH = 16
PREPROCESS = PreprocessConfig(image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
RESAMPLING = {"mode": "bicubic", "antialias": True, "align_corners": False}


def build(config: ViTConfig, *, load_weights: bool = True) -> Backbone:
    """The backbone of a config.

    Raises:
        WeightsError: no weights named, or tensors that do not fit.
    """
    backbone = ViT(config)
    if load_weights and config.weights != "none":
        origin = f"scaffold:{config.model}"
        if config.weights is None:
            raise WeightsError(f"{origin}: no weights named; give a file, or 'none' for random weights")
        load_strict(backbone, read_state_dict(config.weights), f"{origin}@{config.weights}")
    return backbone


class ViT(Backbone):
    """Layers are blocks; one class token stands before the patches."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, depth, heads = WIDTH_DEPTH_HEADS[config.model]
        side = PREPROCESS.height // PATCH
        self.info = BackboneInfo(
            widths=(width,) * depth,
            grids=((side, side),) * depth,
            prefix_tokens=1,
            default_layer=-2,
            embed_dim=width,
            preprocess=PREPROCESS,
            size_step=PATCH,
        )
        self.patches = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH)
        self.cls = nn.Parameter(0.02 * torch.randn(1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + side * side, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head: nn.Module = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self._config, self._checkpointing = config, False

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        maps = self.patches(pixels)
        cls = self.cls.expand(maps.shape[0], 1, -1)
        tokens = torch.cat([cls, rearrange(maps, "b d h w -> b (h w) d")], dim=1)
        tokens, outputs = tokens + self._positions((maps.shape[2], maps.shape[3])), []
        learns = self._checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks[: layers[-1]], start=1):
            tokens = checkpoint(block, tokens, use_reentrant=False) if learns else block(tokens)
            if number in layers:
                outputs.append(tokens)
        return outputs

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        embedding: Tensor = self.head(self.forward_layers(pixels, [self.info.num_layers])[0][:, 0])
        return embedding

    def truncate(self, layer: int) -> None:
        self.blocks, self.head = self.blocks[:layer], nn.Identity()

    def portable_config(self) -> ViTConfig:
        return self._config

    def layer_modules(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def resize(self, image_size: int | tuple[int, int]) -> None:
        preprocess = at_size(self.info.preprocess, image_size, PATCH)
        grid = (preprocess.height // PATCH, preprocess.width // PATCH)
        with torch.no_grad():
            positions = self._positions(grid)
        self.positions = nn.Parameter(positions, requires_grad=self.positions.requires_grad)
        self.info = replace(self.info, grids=(grid,) * self.info.num_layers, preprocess=preprocess)

    def checkpoint_activations(self, enabled: bool) -> None:
        self._checkpointing = enabled

    def _positions(self, grid: tuple[int, int]) -> Float[Tensor, "tokens d"]:
        return resample_positions(self.positions, 1, self.info.grids[0], grid, RESAMPLING)


class Block(nn.Module):
    """Attention and MLP, each on normalised tokens and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        qkv = rearrange(self.qkv(self.norm_1(tokens)), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        mixed = scaled_dot_product_attention(*qkv)
        tokens = tokens + self.out(rearrange(mixed, "b h n d -> b n (h d)"))
        following: Tensor = tokens + self.mlp(self.norm_2(tokens))
        return following
