"""Honeybee's D-Abstractor, on torch's `grid_sample`: no kernel of its own, in any dtype, on any device."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.convolution import moved_places
from vlm_vision.adapters.deformable_config import DAbstractorConfig
from vlm_vision.adapters.projector import Projector


class DAbstractorProjector(Projector):
    """[B,N,D] -> [B,M,L]. Keys as in Honeybee: `layers.0.encoder_attn.sampling_offsets.weight`.

    Starts by Honeybee's rule (`HoneybeePreTrainedModel`): weights N(0, 0.02), biases 0, the embedding of
    places N(0, 0.02), truncated, and each token's point of reference at its place among M on the grid.
    """

    config: DAbstractorConfig

    def __init__(self, config: DAbstractorConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        width, (rows, columns) = config.hidden_size, config.target
        self.input_proj = nn.ModuleList(
            [nn.Linear(in_features, width) if in_features != width else nn.Identity()]
        )
        self.query_position_embeddings = nn.Embedding(rows * columns, width)
        self.layers = nn.ModuleList(DeformableLayer(config) for _ in range(config.layers))
        self.output_proj = nn.Linear(width, out_features) if out_features != width else nn.Identity()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
        down, right = (
            torch.linspace(0.5, side - 0.5, count) / side
            for side, count in zip(grid, config.target, strict=True)
        )
        places = torch.stack([right.expand(rows, -1), down[:, None].expand(-1, columns)], dim=-1)
        self.reference_points = nn.Parameter(rearrange(places, "h w xy -> 1 (h w) xy").contiguous())
        self.v_pos_emb: nn.Parameter | None = None
        if config.pos_emb:
            self.v_pos_emb = nn.Parameter(torch.empty(1, grid[0] * grid[1], width))
            nn.init.trunc_normal_(self.v_pos_emb, std=0.02)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        rows, columns = self.grid_of(patches, grid)
        features = self.input_proj[0](patches)
        if self.v_pos_emb is not None:
            features = features + moved_places(self.v_pos_emb, self.grid, (rows, columns))
        plane = rearrange(features, "b (h w) d -> b d h w", h=rows)
        places = rearrange(F.adaptive_avg_pool2d(plane, self.config.target), "b d h w -> b (h w) d")
        # By a lookup, not by the weight itself: under ZeRO-3 only a module that is called has its weights.
        numbers = torch.arange(places.shape[1], device=patches.device)
        tokens = self.query_position_embeddings(numbers).expand_as(places)
        for layer in self.layers:
            tokens = layer(tokens, places, features, self.reference_points, (rows, columns))
        projected: Tensor = self.output_proj(tokens)
        return projected


class DeformableLayer(nn.Module):
    """A layer of Deformable DETR's decoder (arXiv 2010.04159, section 4.1), its norms behind each sum."""

    def __init__(self, config: DAbstractorConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = SelfAttention(width, config.heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = DeformableAttention(width, config.heads, config.points)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: Float[Tensor, "b m d"],
        places: Float[Tensor, "b m d"],
        features: Float[Tensor, "b n d"],
        points: Float[Tensor, "1 m 2"],
        grid: Grid,
    ) -> Float[Tensor, "b m d"]:
        tokens = self.self_attn_layer_norm(tokens + self.dropout(self.self_attn(tokens, places)))
        seen = self.encoder_attn(tokens + places, features, points, grid)
        tokens = self.encoder_attn_layer_norm(tokens + self.dropout(seen))
        normed: Tensor = self.final_layer_norm(tokens + self.dropout(self.fc2(F.relu(self.fc1(tokens)))))
        return normed


class SelfAttention(nn.Module):
    """Tokens look at each other, places being part of queries and keys alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, tokens: Float[Tensor, "b m d"], places: Float[Tensor, "b m d"]
    ) -> Float[Tensor, "b m d"]:
        placed = tokens + places
        projected = (self.q_proj(placed), self.k_proj(placed), self.v_proj(tokens))
        heads = (rearrange(part, "b m (k d) -> b k m d", k=self.heads) for part in projected)
        attended = F.scaled_dot_product_attention(*heads)
        mixed: Tensor = self.out_proj(rearrange(attended, "b k m d -> b m (k d)"))
        return mixed


class DeformableAttention(nn.Module):
    """A few points around each token's own, between the patches, weighed by the token itself."""

    def __init__(self, width: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(width, heads * points * 2)
        self.attention_weights = nn.Linear(width, heads * points)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self,
        queries: Float[Tensor, "b m d"],
        features: Float[Tensor, "b n d"],
        points: Float[Tensor, "1 m 2"],
        grid: Grid,
    ) -> Float[Tensor, "b m d"]:
        rows, columns = grid
        heads = {"k": self.heads}
        values = rearrange(self.value_proj(features), "b (h w) (k d) -> (b k) d h w", h=rows, **heads)
        offsets = rearrange(self.sampling_offsets(queries), "b m (k p xy) -> b k m p xy", xy=2, **heads)
        weights = rearrange(self.attention_weights(queries), "b m (k p) -> (b k) m p", **heads).softmax(-1)
        # In float32: bfloat16 has not enough digits for places on a grid.
        size = torch.tensor([columns, rows], dtype=torch.float32, device=queries.device)
        places = points.float()[:, None, :, None] + offsets.float() / size
        where = rearrange(2 * places - 1, "b k m p xy -> (b k) m p xy")
        sampled = F.grid_sample(values.float(), where, mode="bilinear", align_corners=False)
        seen = einsum(sampled, weights.float(), "c d m p, c m p -> c m d").to(queries.dtype)
        mixed: Tensor = self.output_proj(rearrange(seen, "(b k) m d -> b m (k d)", **heads))
        return mixed
