"""Projectors that map every patch on its own: a linear layer, or a perceptron of any depth."""

from __future__ import annotations

from itertools import chain

from jaxtyping import Float
from torch import Tensor, nn

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.mlp_config import LinearConfig, MlpConfig
from vlm_vision.adapters.projector import Projector

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class LinearProjector(Projector, nn.Linear):
    """[B,N,D] -> [B,N,L]. Keys `weight`, `bias`, as LLaVA's `linear` (`multimodal_projector/builder.py`)."""

    def __init__(self, config: LinearConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid, in_features, out_features)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b n l"]:
        return nn.Linear.forward(self, patches)


class MlpProjector(Projector, nn.Sequential):
    """[B,N,D] -> [B,N,L]. Keys `0.weight`, `2.weight`, ..., as LLaVA's `mlp2x_gelu` (same file)."""

    def __init__(self, config: MlpConfig, in_features: int, out_features: int, grid: Grid) -> None:
        activation = _ACTIVATIONS[config.activation]
        deeper = ((activation(), nn.Linear(out_features, out_features)) for _ in range(config.depth - 1))
        layers = (nn.Linear(in_features, out_features), *chain.from_iterable(deeper))
        super().__init__(config, in_features, out_features, grid, *layers)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b n l"]:
        tokens: Tensor = nn.Sequential.forward(self, patches)  # type: ignore[no-untyped-call]
        return tokens
