"""Activations, arithmetic and hours of an alignment step, from shapes alone. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

# Dense bf16 operations a second with fp32 sums, by NVIDIA's data sheets.
GPUS = {"A100": 312e12, "H100": 989e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
UTILISATION = 0.4  # of them; what LLaVA-1.5's published hours come to, see docs


@dataclass(frozen=True)
class Decoder:
    """Shapes of a language model of Llama's kind (Qwen, Mistral, Vicuna): gated perceptron, RMS norms.

    Attributes:
        key_width: channels of keys, those of values being as many; fewer than `width` with grouped queries.
    """

    width: int
    perceptron_width: int
    layers: int
    heads: int
    key_width: int
    vocabulary: int


@dataclass(frozen=True)
class Arithmetic:
    """Operations of a step.

    Attributes:
        tokens: of the language model, text and pictures.
        total: forward, backward and recomputation.
    """

    tokens: int
    total: float

    def hours(self, steps: int, world: int, gpu: str) -> float:
        """Of `steps` such steps at UTILISATION of a GPU's peak."""
        return steps * self.total / (world * GPUS[gpu] * UTILISATION) / 3600


def block_activations(decoder: Decoder, *, size: int, learns: bool, zero3: bool = False) -> int:
    """Bytes a token that one decoder block keeps for the backward pass, as transformers computes it on SDPA.

    With h = width, k = key_width, f = perceptron_width, a = heads and numbers of `size` s bytes: both norms
    keep their input in fp32 and its inverse size, 4h + 4 each; attention its queries, keys, values and
    output, and a sum for each head, s(2h + 2k) + 4a; the perceptron three products, 3sf. Weights that learn
    need what they are multiplied by: of both norms 2sh before and 2sh after their gain, and sf before the
    last layer. DeepSpeed's linear layer for ZeRO-3 keeps its inputs, s(2h + f), where it is frozen too.
    """
    h, k, f = decoder.width, decoder.key_width, decoder.perceptron_width
    kept = 2 * (4 * h + 4) + size * (2 * h + 2 * k) + 4 * decoder.heads + 3 * size * f
    return kept + size * (4 * h + f if learns else 2 * h + f if zero3 else 0)


def decoder_activations(
    decoder: Decoder, tokens: int, *, size: int, learns: bool, checkpointing: bool, zero3: bool = False
) -> int:
    """Bytes that all blocks keep; with checkpointing each block's input, s·h, and all of one at a time."""
    block = block_activations(decoder, size=size, learns=learns, zero3=zero3)
    if not checkpointing:
        return tokens * decoder.layers * block
    return tokens * (decoder.layers * size * decoder.width + block)


def logit_bytes(decoder: Decoder, labels: int, *, size: int) -> int:
    """Bytes of the logits of so many labels: as computed, in fp32, and their gradient in fp32."""
    return labels * decoder.vocabulary * (size + 4 + 4)


def part_flops(parameters: int, tokens: int, *, backward: bool, learns: bool, recompute: bool) -> float:
    """Operations of a part's matrices: 2 for each parameter and token in the forward pass, 2 more where it is
    recomputed, 2 where a gradient passes back through it, and 2 where its weights learn.
    """
    return 2.0 * parameters * tokens * (1 + recompute + (backward or learns) + learns)


def attention_flops(
    width: int, layers: int, rows: int, length: int, *, backward: bool, recompute: bool
) -> float:
    """Operations of scores and sums over values: 4·length·width for a token and layer, twice that backward.

    Those that a causal mask leaves out are counted, as kernels that skip them are not assumed.
    """
    return 4.0 * rows * length**2 * width * layers * (1 + recompute + 2 * backward)
