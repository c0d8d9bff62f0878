"""BLIP-2's querying transformer as a projector, on the modules of transformers."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.qformer_config import QFormerConfig


class QFormerProjector(Projector):
    """[B,N,D] -> [B,num_queries,L]. Keys as in transformers' `Blip2ForConditionalGeneration`.

    Queries start as N(0, 0.02), as LAVIS initialises them (`blip2_models/blip2.py`, `init_Qformer`).
    """

    output_layer = "language_projection"

    def __init__(self, config: QFormerConfig, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__(config, in_features, out_features, grid)
        hidden = config.hidden_size
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.num_queries, hidden))
        self.qformer = Blip2QFormerModel(library_config(config, in_features))
        self.language_projection = nn.Linear(hidden, out_features)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        queries = self.query_tokens.expand(len(patches), -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
        tokens: Tensor = self.language_projection(hidden.to(self.language_projection.weight.dtype))
        return tokens


def library_config(config: QFormerConfig, in_features: int, **text: Any) -> Blip2QFormerConfig:
    """The config of transformers' Q-Former for D `in_features`; `text` sets what reads text as well."""
    return Blip2QFormerConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.hidden_size,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        cross_attention_frequency=config.cross_attention_frequency,
        encoder_hidden_size=in_features,
        **text,
    )
