"""The querying transformers of BLIP-2 and InstructBLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from vlm_vision.adapters.config import Grid, ProjectorConfig
from vlm_vision.errors import ConfigError

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector


class QFormerConfig(ProjectorConfig):
    """BLIP-2's querying transformer and the linear layer behind it.

    Paper: arXiv 2301.12597, section 3.1.
    Reference: LAVIS, lavis/models/blip2_models/Qformer.py.
    Shape: the queries, 32 by default.
    Parameters: of width W with Q queries, layers (12 W + 13) W, and (2 W + 2 D + 6) W for each that looks at
        patches; 2 W + Q W of norm and queries; (W + 1) L.

    Attributes:
        num_queries: learnt queries, which are the tokens that come out, however many patches go in.
        layers, heads, hidden_size: BERT-base by default.
        cross_attention_frequency: every how many layers the queries look at the patches.
        dropout: on hidden states and attention while training.
    """

    name: Literal["qformer"] = "qformer"
    num_queries: int = Field(32, gt=0)
    layers: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)
    hidden_size: int = Field(768, gt=0)
    cross_attention_frequency: int = Field(2, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> QFormerConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.heads} heads")
        return self

    def grid_out(self, grid: Grid) -> Grid:
        return 1, self.num_queries

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width, looks = self.hidden_size, -(-self.layers // self.cross_attention_frequency)
        attention = 4 * (width + 1) * width + 2 * width
        cross_attention = 2 * (width + 1) * width + 2 * (in_features + 1) * width + 2 * width
        perceptron = (width + 1) * 4 * width + (4 * width + 1) * width + 2 * width
        blocks = self.layers * (attention + perceptron) + looks * cross_attention
        return blocks + 2 * width + self.num_queries * width + (width + 1) * out_features

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.qformer import QFormerProjector

        return QFormerProjector(self, in_features, out_features, grid)


class QFormerTextConfig(QFormerConfig):
    """InstructBLIP's Q-Former, whose queries also read the instruction (arXiv 2305.06500, section 2.3).

    The module is transformers' `InstructBlipQFormerModel`; the figures are LAVIS' `blip2_vicuna_instruct.py`.

    [B,N,D] and [B,T] token ids -> [B,num_queries,L]. Beyond the weights of `qformer`: (vocab_size + max_text)
    word and position vectors of hidden_size, and a second perceptron in each layer, for the text.

    Attributes:
        tokenizer: folder or hub id of the tokenizer that instructions are cut by, `bert-base-uncased` in
            InstructBLIP; None takes the language model's.
        vocab_size: token ids that it knows; None where a vision-language model is built, which knows.
        max_text: tokens of an instruction, at most.
    """

    name: Literal["qformer_text"] = "qformer_text"  # type: ignore[assignment]
    tokenizer: str | None = None
    vocab_size: int | None = Field(None, gt=0)
    max_text: int = Field(512, gt=0)

    def check(self, in_features: int, out_features: int, grid: Grid) -> None:
        self._words()

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width = self.hidden_size
        perceptron = (width + 1) * 4 * width + (4 * width + 1) * width + 2 * width
        text = (self._words() + self.max_text) * width + self.layers * perceptron
        return super().parameter_count(in_features, out_features, grid) + text

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.qformer import QFormerTextProjector

        return QFormerTextProjector(self, in_features, out_features, grid, self._words())

    def _words(self) -> int:
        if self.vocab_size is None:
            raise ConfigError(
                "qformer_text: vocab_size is not given; it is the number of token ids of the tokenizer that "
                "instructions are cut by, such as len(tokenizer)"
            )
        return self.vocab_size
