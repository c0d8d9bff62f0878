"""TokenPacker as a projector."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.token_packer_config import TokenPackerConfig


class TokenPacker(Projector):
    """[B,N,D] -> [B,N/scale²,L]. Keys as in TokenPacker's `mm_projector`.

    Starts as there: weights of linear layers from N(0, 0.02), cut off at -2 and 2, their biases 0; what
    enters the attention as in torch's `MultiheadAttention`.
    """

    def __init__(self, config: TokenPackerConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        width = config.width
        self.scale, self.query_width = config.scale, in_features // config.levels
        self.q_proj_1 = nn.Linear(self.query_width, width, bias=False)
        self.k_proj_1 = _perceptron(in_features, width)
        self.v_proj_1 = _perceptron(in_features, width)
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.mlp = _perceptron(width, out_features)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        """
        Raises:
            ConfigError: patches that do not lie on the grid, or a grid that `scale` does not divide.
        """
        rows, columns = self.grid_of(patches, grid)
        coarse = self.grid_out((rows, columns))
        plane = rearrange(patches[..., -self.query_width :], "b (h w) d -> b d h w", h=rows)
        shrunk = interpolate(plane.float(), size=coarse, mode="bilinear").to(patches.dtype)
        queries = self.ln_q_1(self.q_proj_1(rearrange(shrunk, "b d h w -> (b h w) 1 d")))
        keys, values = (
            rearrange(
                fine, "b (h p w q) d -> (b h w) (p q) d", h=coarse[0], w=coarse[1], p=self.scale, q=self.scale
            )
            for fine in (self.ln_k_1(self.k_proj_1(patches)), self.ln_v_1(self.v_proj_1(patches)))
        )
        found = self.clip_attn(queries, keys, values, need_weights=False)[0]
        tokens: Tensor = self.mlp(rearrange(found, "(b m) 1 d -> b m d", b=len(patches)))
        return tokens


def _perceptron(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features)
    )
