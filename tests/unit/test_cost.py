from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOWER, tiny_llm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_vision.cli import main
from vlm_vision.config import load_config
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.cost import Decoder, attention_flops, decoder_activations, part_flops
from vlm_vision.train.plan import NF4_BYTES, _decoder, plan_align

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ({"hidden_size": 64, "intermediate_size": 160}, {"hidden_size": 128, "intermediate_size": 384})


def llama(key_value_heads: int, dtype: torch.dtype, **config: Any) -> Any:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": key_value_heads}
    settings = LlamaConfig(
        **{"vocab_size": 50, "num_hidden_layers": 6, "attn_implementation": "sdpa", **heads, **config}
    )
    return LlamaForCausalLM(settings).to(dtype).train()


def kept(model: nn.Module, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of all that autograd saves for the backward pass through the blocks, as torch tells it."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    decoder: Any = model
    inputs = torch.randn(rows, length, decoder.config.hidden_size, dtype=dtype, requires_grad=True)
    fused = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True)
    with fused, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        decoder.model(inputs_embeds=inputs, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.fixture(autouse=True)
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own, and its fused attention: a stage that a test has run leaves others in their place."""
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key_value_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [True, False])
def test_activations_are_what_torch_keeps(
    size: dict[str, int], key_value_heads: int, dtype: torch.dtype, learns: bool
) -> None:
    model = llama(key_value_heads, dtype, **size).requires_grad_(learns)
    rows, length = 2, 48
    measured = kept(model, rows, length, dtype)
    expected = decoder_activations(
        _decoder(model), rows * length, size=dtype.itemsize, learns=learns, checkpointing=False
    )
    # Worst measured: 2.5 %, which is the last norm and the positions: they do not grow with depth.
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("learns", [True, False])
def test_zero3_keeps_the_inputs_of_frozen_layers(monkeypatch: pytest.MonkeyPatch, learns: bool) -> None:
    wrap = pytest.importorskip("deepspeed.runtime.zero.linear").zero3_linear_wrap
    monkeypatch.setattr(nn.functional, "linear", wrap)
    model = llama(2, torch.float32, **SIZES[1]).requires_grad_(learns)
    expected = decoder_activations(
        _decoder(model), 96, size=4, learns=learns, checkpointing=False, zero3=True
    )
    # Worst measured: 1.8 %.
    assert expected == pytest.approx(kept(model, 2, 48, torch.float32), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_blocks_keep_their_inputs(dtype: torch.dtype) -> None:
    """Between two depths, so that what does not grow with depth drops out."""
    found = []
    for layers in (6, 12):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=layers,
            num_attention_heads=4,
            attn_implementation="sdpa",
        )
        model: Any = LlamaForCausalLM(config).to(dtype).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        size = {"size": dtype.itemsize, "learns": True, "checkpointing": True}
        found.append((kept(model, 2, 48, dtype), decoder_activations(_decoder(model), 96, **size)))
    (shallow, expected_shallow), (deep, expected_deep) = found
    assert deep - shallow == pytest.approx(expected_deep - expected_shallow, rel=0.02)


@pytest.mark.parametrize("learns", [True, False])
def test_operations_are_what_torch_counts(learns: bool) -> None:
    """torch counts products of matrices, and attention by its full square where it is written out."""
    model = llama(4, torch.float32, **SIZES[0], attn_implementation="eager").requires_grad_(learns)
    decoder, rows, length = _decoder(model), 2, 48
    inputs = torch.randn(rows, length, decoder.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    matrices -= decoder.vocabulary * decoder.width  # embeddings are looked up
    expected = part_flops(matrices, rows * length, backward=True, learns=learns, recompute=False)
    expected += attention_flops(decoder.width, decoder.layers, rows, length, backward=True, recompute=False)
    # Measured equal.
    assert expected == pytest.approx(counter.get_total_flops(), rel=1e-6)


VICUNA = Decoder(4096, 11008, 32, 32, 4096, 32000)


def test_the_size_of_llavas_activations() -> None:
    """16 rows of 2,048 tokens fit no card without checkpointing."""
    options = {"size": 2, "learns": True}
    whole = decoder_activations(VICUNA, 16 * 2048, checkpointing=False, **options)  # type: ignore[arg-type]
    checkpointed = decoder_activations(VICUNA, 16 * 2048, checkpointing=True, **options)  # type: ignore[arg-type]
    # By hand: 32,768 tokens; a block keeps 8h + 8 + 8h + 128 + 6f + 8h + 2f bytes, all others 2h.
    block = 24 * 4096 + 8 * 11008 + 136
    assert whole == 32768 * 32 * block
    assert checkpointed == 32768 * (32 * 8192 + block)
    assert whole > 160e9 > 80e9 > checkpointed


STAGE = {
    "name": "one",
    "data": {"file": "absent.json"},
    "learn": [{"match": "llm.*_proj.weight", "learn": "lora"}],
    "lr": 1e-3,
    "steps": 100,
    "batch_size": 4,
    "max_length": 64,
    "precision": "bf16",
}


def plan(llm: Any, tokens: int | None = None, **stage: Any) -> Any:
    parts = {"tower": TOWER, "llm": str(llm)}
    config = load_config(AlignConfig, {"model": parts, "stages": [{**STAGE, **stage}]})
    return plan_align(config, tokens=tokens).stages[0]


def test_offloading_and_four_bits_are_planned(tmp_path: Any) -> None:
    llm = tiny_llm(tmp_path / "llm")
    whole, four = plan(llm), plan(llm, quantise="nf4")
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert pytest.approx(0.5159, abs=1e-4) == NF4_BYTES
    assert whole.memory - four.memory == pytest.approx((2 - NF4_BYTES) * linear)
    moved = plan(llm, offload="optimizer")
    states = sum(part.memory.optimizer for part in whole.parts)
    assert states > 0
    assert whole.memory - moved.memory == states
    gradients = sum(part.memory.gradients for part in whole.parts)
    assert plan(llm, zero_stage=3, offload="parameters").memory == gradients


def test_hours_follow_tokens_and_gpus(tmp_path: Any) -> None:
    llm = tiny_llm(tmp_path / "llm")
    most, half = plan(llm).arithmetic, plan(llm, tokens=32).arithmetic
    assert (most.tokens, half.tokens) == (256, 128)
    assert most.total > half.total
    assert most.hours(100, 2, "A100") == pytest.approx(most.hours(100, 1, "A100") / 2)
    assert most.hours(100, 1, "A100") / most.hours(100, 1, "H100") == pytest.approx(989 / 312)


@pytest.mark.parametrize(
    ("stage", "records", "tokens", "published"), [(1, 558_128, 620, 3.5), (2, 665_298, 900, 10.0)]
)
def test_llavas_published_hours(
    stage: int, records: int, tokens: int, published: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaVA's README, on 8 A100; the mean lengths, 576 tokens of a picture in them, are assumed."""
    options = ["--processes", "8", "--records", str(records), "--tokens", str(tokens)]
    assert main(["plan", str(CONFIGS / f"llava15_7b_stage{stage}.yaml"), *options]) == 0
    printed = capsys.readouterr().out
    hours = float(printed.split("bf16 peak: ")[1].split(" on A100")[0])
    # Measured: 4.0 and 9.2.
    assert hours == pytest.approx(published, rel=0.2)
    assert "memory on each of 8 process(es)" in printed
