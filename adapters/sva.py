"""Cambrian's spatial vision aggregator as a projector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.sva_config import SvaConfig


class SpatialVisionAggregator(Projector):
    """[B,N,D] -> [B,N/regions[0]²,L]. Keys as in Cambrian's model, with `projection` for its `mm_projector`.

    Starts as there: queries N(0, 1/width), positions in a region N(0, 1), the rest as torch does.
    """

    def __init__(self, config: SvaConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        width, groups = config.width, len(config.regions)
        self.regions, self.towers = config.regions, list(config.towers(in_features))
        for number, tower in enumerate(self.towers):
            self.add_module(
                f"mm_projector_aux_{number}",
                nn.Sequential(
                    nn.Linear(tower, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
                ),
            )
        for number, side in enumerate(config.regions):
            self.add_module(f"vision_sampler_{number}", Sampler(config, len(self.towers), side))
        self.vision_query = nn.Parameter(torch.randn(groups, width) * width**-0.5)
        self.projection = nn.Sequential(
            nn.Linear(groups * width, out_features), nn.GELU(), nn.Linear(out_features, out_features)
        )

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        """
        Raises:
            ConfigError: patches that do not lie on the grid, or a grid that the regions do not divide.
        """
        rows, columns = self.grid_of(patches, grid)
        final = self.grid_out((rows, columns))
        seen = [
            self.get_submodule(f"mm_projector_aux_{number}")(part)
            for number, part in enumerate(torch.split(patches, self.towers, dim=-1))
        ]
        context = seen[0].mean(dim=1)
        groups = []
        for number, side in enumerate(self.regions):
            coarse = rows // side, columns // side
            in_regions = [
                rearrange(tower, "b (h p w q) d -> (b h w) (p q) d", h=coarse[0], w=coarse[1], p=side, q=side)
                for tower in seen
            ]
            count = coarse[0] * coarse[1]
            queries = self.vision_query[number].expand(len(patches) * count, 1, -1)
            found = self.get_submodule(f"vision_sampler_{number}")(
                queries, context.repeat_interleave(count, dim=0)[:, None], in_regions
            )
            plane = rearrange(found, "(b h w) 1 d -> b d h w", h=coarse[0], w=coarse[1])
            if coarse != final:
                plane = interpolate(plane.float(), size=final, mode="bilinear").to(plane.dtype)
            groups.append(rearrange(plane, "b d h w -> b (h w) d"))
        tokens: Tensor = self.projection(torch.cat(groups, dim=-1))
        return tokens


class Sampler(nn.Module):
    """The layers of one group of queries; Cambrian's `VisionTokenSampler`."""

    def __init__(self, config: SvaConfig, towers: int, side: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SamplerLayer(config, towers, side) for _ in range(config.layers))

    def forward(
        self,
        queries: Float[Tensor, "r 1 w"],
        context: Float[Tensor, "r 1 w"],
        regions: Sequence[Float[Tensor, "r p w"]],
    ) -> Float[Tensor, "r 1 w"]:
        for layer in self.layers:
            queries = layer(queries, context, regions)
        return queries


class SamplerLayer(nn.Module):
    """A query, told of the whole picture, looks at its region in every tower at once."""

    def __init__(self, config: SvaConfig, towers: int, side: int) -> None:
        super().__init__()
        width, self.towers, self.has_positions = config.width, towers, side > 1
        self.proj_context = nn.Linear(width, width, bias=False)
        self.proj_in = nn.Linear(2 * width, width, bias=False)
        self.proj_out = Perceptron(width)
        self.norm = nn.LayerNorm(width)
        self.cross_attn = JointAttention(config, towers)
        if self.has_positions:
            for number in range(towers):
                self.register_parameter(f"pos_embed_{number}", nn.Parameter(torch.randn(side**2, width)))

    def forward(
        self,
        queries: Float[Tensor, "r 1 w"],
        context: Float[Tensor, "r 1 w"],
        regions: Sequence[Float[Tensor, "r p w"]],
    ) -> Float[Tensor, "r 1 w"]:
        if self.has_positions:
            regions = [
                region + self.get_parameter(f"pos_embed_{number}") for number, region in enumerate(regions)
            ]
        told = self.proj_in(torch.cat([queries, self.proj_context(context)], dim=-1))
        out: Tensor = queries + self.proj_out(self.norm(told + self.cross_attn(told, regions)))
        return out


class JointAttention(nn.Module):
    """Queries against the patches of all towers; Cambrian's `MultiKVCrossAttention`."""

    def __init__(self, config: SvaConfig, towers: int) -> None:
        super().__init__()
        self.heads, self.towers = config.heads, towers
        self.q_proj = _normed_linear(config.width)
        for number in range(towers):
            self.add_module(f"k_proj_{number}", _normed_linear(config.width))
            self.add_module(f"v_proj_{number}", _normed_linear(config.width))
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, queries: Float[Tensor, "r 1 w"], regions: Sequence[Float[Tensor, "r p w"]]
    ) -> Float[Tensor, "r 1 w"]:
        keys, values = (
            torch.cat(
                [self.get_submodule(f"{kind}_proj_{i}")(region) for i, region in enumerate(regions)], dim=1
            )
            for kind in ("k", "v")
        )
        q, k, v = (
            rearrange(each, "r n (h d) -> r h n d", h=self.heads)
            for each in (self.q_proj(queries), keys, values)
        )
        found = scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o_proj(rearrange(found, "r h n d -> r n (h d)"))
        return out


class Perceptron(nn.Module):
    """Two linear layers without bias; Cambrian's `MLP`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Float[Tensor, "r n w"]) -> Float[Tensor, "r n w"]:
        out: Tensor = self.linear_2(nn.functional.gelu(self.linear_1(tokens)))
        return out


def _normed_linear(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
