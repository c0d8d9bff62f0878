"""The querying transformers of BLIP-2 and InstructBLIP as projectors, on the modules of transformers."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.qformer_config import QFormerConfig, QFormerTextConfig
from vlm_vision.errors import ConfigError


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


class QFormerTextProjector(Projector):
    """[B,N,D] and [B,T] -> [B,num_queries,L]. Keys as in `InstructBlipForConditionalGeneration`.

    Starts as `QFormerProjector` does; words and positions as BERT's, N(0, 0.02).
    """

    reads_text = True

    def __init__(
        self, config: QFormerTextConfig, in_features: int, out_features: int, grid: Grid, vocab_size: int
    ) -> None:
        super().__init__(config, in_features, out_features, grid)
        hidden = config.hidden_size
        self.max_text = config.max_text
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.num_queries, hidden))
        self.qformer = InstructBlipQFormerModel(
            InstructBlipQFormerConfig(
                **_shared_options(config, in_features),
                vocab_size=vocab_size,
                max_position_embeddings=config.max_text,
                pad_token_id=None,  # id 0 may be a word of the language model's tokenizer
            )
        )
        self.language_projection = nn.Linear(hidden, out_features)

    def forward(
        self,
        patches: Float[Tensor, "b n d"],
        grid: Grid | None = None,
        *,
        text_ids: Int[Tensor, "b t"] | None = None,
        text_mask: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b m l"]:
        """
        Args:
            text_ids: the instruction of each picture.
            text_mask: 1 for a token, 0 for padding; all are tokens without it.

        Raises:
            ConfigError: no text, not one for each picture, or one longer than `max_text`.
        """
        if text_ids is None:
            raise ConfigError(
                "qformer_text reads an instruction: projector(patches, text_ids=..., text_mask=...)"
            )
        if len(text_ids) != len(patches) or text_ids.shape[1] > self.max_text:
            raise ConfigError(
                f"qformer_text: text_ids of shape {list(text_ids.shape)} for {len(patches)} pictures; wanted "
                f"is [{len(patches)}, up to {self.max_text}]"
            )
        queries = self.query_tokens.expand(len(patches), -1, -1)
        text_mask = torch.ones_like(text_ids) if text_mask is None else text_mask
        hidden = self.qformer(
            input_ids=text_ids,
            attention_mask=torch.cat([text_mask.new_ones(queries.shape[:2]), text_mask], dim=1),
            query_embeds=queries,
            encoder_hidden_states=patches,
        ).last_hidden_state
        tokens: Tensor = self.language_projection(hidden[:, : queries.shape[1]])
        return tokens


def library_config(config: QFormerConfig, in_features: int, **text: Any) -> Blip2QFormerConfig:
    """The config of transformers' Q-Former for D `in_features`; `text` sets what reads text as well."""
    return Blip2QFormerConfig(**_shared_options(config, in_features), **text)


def _shared_options(config: QFormerConfig, in_features: int) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": 4 * config.hidden_size,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "cross_attention_frequency": config.cross_attention_frequency,
        "encoder_hidden_size": in_features,
    }
