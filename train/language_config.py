"""Config of the small language model that stands in for a pretrained one."""

from __future__ import annotations

from pydantic import Field, model_validator

from vlm_vision.config import Config


class LanguageConfig(Config):
    """Size and training of a small causal LM of the Phi architecture.

    Attributes:
        vocab_size: most tokens of the vocabulary, the 256 bytes and the markers among them.
        max_length: most positions of a sequence, image tokens included.
        row_length: tokens of a training row, into which texts are packed one after the other.
        batch_size: rows of a step.
        lr: peak learning rate, reached by a linear warm-up and followed by a cosine to 0.
        bf16: autocast to bfloat16; slower than float32 on a CPU without bfloat16 units.
    """

    hidden_size: int = Field(default=128, ge=1)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=4, ge=1)
    mlp_size: int = Field(default=512, ge=1)
    vocab_size: int = Field(default=512, ge=280)
    max_length: int = Field(default=512, ge=8)
    row_length: int = Field(default=128, ge=8)
    steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=16, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    bf16: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _check_sizes(self) -> LanguageConfig:
        if self.hidden_size % (4 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 times heads {self.heads}: "
                "rotary positions turn half the channels of a head, in pairs"
            )
        if self.row_length > self.max_length:
            raise ValueError(f"row_length {self.row_length} must not exceed max_length {self.max_length}")
        return self
