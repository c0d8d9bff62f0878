"""The loss of labels in chunks against the loss of all logits, and what it holds in memory."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from vlm_vision.errors import ConfigError, MissingExtraError
from vlm_vision.train import label_loss as module
from vlm_vision.train.label_loss import KEEPS_BY_ROW, changes_logits, check_kernel, label_loss

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, tuple[Any, Any, bool]] = {
    "Llama": (LlamaForCausalLM, LlamaConfig(**SIZES), False),
    "Llama, tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True), False),
    "Gemma 2": (
        Gemma2ForCausalLM,
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8),
        True,
    ),
    "Granite": (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=8.0), True),
    "Cohere": (CohereForCausalLM, CohereConfig(**SIZES), True),
}


def build(kind: str) -> tuple[Any, bool]:
    model, config, changes = KINDS[kind]
    torch.manual_seed(0)
    return model(config).train(), changes


def batch(llm: Any) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Inputs, which positions are kept, and what comes next there: 23 in three rows."""
    torch.manual_seed(1)
    embeddings = torch.randn(3, 20, 16, requires_grad=True)
    keep = torch.zeros(3, 20, dtype=torch.bool)
    keep[0, 3:15], keep[1, 18], keep[2, :10] = True, True, True
    inputs = {"inputs_embeds": embeddings, "attention_mask": torch.ones(3, 20), "use_cache": False}
    return inputs, keep, torch.randint(0, 97, (23,))


def _table_alone(llm: Any) -> Any:
    table = llm.get_input_embeddings().weight
    return None if table is llm.get_output_embeddings().weight else table


def gradients(llm: Any, inputs: dict[str, Any], loss: Tensor) -> dict[str, Tensor]:
    llm.zero_grad()
    inputs["inputs_embeds"].grad = None
    loss.backward()
    # Embeddings are given, so that their table learns only where it is the head too.
    learnt = {name: p.grad for name, p in llm.named_parameters() if p is not _table_alone(llm)}
    found = {name: gradient.clone() for name, gradient in learnt.items()}
    return {**found, "inputs": inputs["inputs_embeds"].grad.clone()}


@pytest.mark.parametrize("chunk", [7, 2048])
@pytest.mark.parametrize("keeps_by_row", sorted({False, KEEPS_BY_ROW}))
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_all_logits(
    kind: str, keeps_by_row: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "KEEPS_BY_ROW", keeps_by_row)
    llm, changes = build(kind)
    assert changes_logits(llm) == changes
    inputs, keep, targets = batch(llm)
    whole = F.cross_entropy(llm(**inputs).logits[keep].float(), targets, reduction="sum")
    expected = gradients(llm, inputs, whole)
    loss = label_loss(llm, inputs, keep, targets)
    # Worst measured: of the mean loss, 4.6, 3.3e-7; of gradients up to 5, 4.8e-7.
    assert loss.item() / len(targets) == pytest.approx(whole.item() / len(targets), abs=1e-6)
    assert loss.dtype == torch.float32
    found = gradients(llm, inputs, loss)
    for name, gradient in expected.items():
        largest = float((found[name] - gradient).abs().max())
        assert largest <= 1e-6 * max(1.0, float(gradient.abs().max())), name
    assert type(llm.get_output_embeddings()).forward is nn.Linear.forward
    assert "forward" not in vars(llm.get_output_embeddings())


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that is computed with a column for each token of the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.elements = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither computed at once, nor kept between the passes."""
    llm, vocabulary, labels, chunk = build("Llama")[0], 97, 600, 50
    monkeypatch.setattr(module, "CHUNK", chunk)
    inputs = {"inputs_embeds": torch.randn(2, 300, 16), "use_cache": False}
    keep, targets = torch.ones(2, 300, dtype=torch.bool), torch.randint(0, vocabulary, (labels,))
    llm.config._attn_implementation = "sdpa"
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() if tensor.shape[-1:] == (vocabulary,) else 0)
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with saved, LargestTensor(vocabulary) as seen:
        loss = label_loss(llm.eval(), inputs, keep, targets)
        loss.backward()
    whole = labels * vocabulary
    assert seen.elements < whole
    assert max(kept) <= chunk * vocabulary
    with saved, LargestTensor(vocabulary) as seen:
        F.cross_entropy(llm(**inputs).logits.flatten(0, 1), targets).backward()
    assert seen.elements >= whole  # so it would be seen
    assert max(kept) >= whole


def test_no_label_at_all_gives_zero_and_gradients() -> None:
    llm, _ = build("Llama")
    inputs, keep, _ = batch(llm)
    loss = label_loss(llm, inputs, torch.zeros_like(keep), torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()
    gradients = [p.grad for name, p in llm.named_parameters() if not name.endswith("embed_tokens.weight")]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_an_error_in_the_head_leaves_it_as_it_was() -> None:
    llm, _ = build("Llama")
    inputs, keep, targets = batch(llm)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        label_loss(llm, inputs, keep, targets[:-1])
    assert "forward" not in vars(llm.lm_head)
    assert llm(**inputs).logits.shape == (3, 20, 97)


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = build("Llama")
    check_kernel("chunks", llm)
    with pytest.raises(MissingExtraError, match=r"liger_kernel, which the extra 'liger' brings"):
        check_kernel("liger", llm)
    monkeypatch.setattr(module, "require", lambda *_: None)
    with pytest.raises(ConfigError, match="runs on a GPU, and this process has none: use 'chunks'"):
        check_kernel("liger", llm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_kernel("liger", llm)
    with pytest.raises(ConfigError, match="and GraniteForCausalLM changes them after it"):
        check_kernel("liger", build("Granite")[0])
    llm.lm_head = nn.Sequential(llm.lm_head)
    with pytest.raises(ConfigError, match="plain linear head, and this one is a Sequential"):
        check_kernel("liger", llm)


def test_liger_is_called_as_its_class_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the arguments of liger-kernel's class; the real one needs a GPU."""

    class Fused(nn.Module):
        def __init__(self, ignore_index: int = -100, reduction: str = "mean") -> None:
            super().__init__()
            self.reduction = reduction

        def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Any = None) -> Tensor:
            return F.cross_entropy(F.linear(_input, lin_weight, bias), target, reduction=self.reduction)

    stand_in = ModuleType("liger_kernel.transformers")
    stand_in.LigerFusedLinearCrossEntropyLoss = Fused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    llm, _ = build("Llama")
    inputs, keep, targets = batch(llm)
    fused = gradients(llm, inputs, label_loss(llm, inputs, keep, targets, "liger"))
    plain = gradients(llm, inputs, label_loss(llm, inputs, keep, targets))
    assert all(torch.allclose(fused[name], plain[name], atol=1e-6) for name in plain)
    llm.lm_head = nn.Sequential(llm.lm_head)
    with pytest.raises(ConfigError, match="this one is a Sequential"):
        label_loss(llm, inputs, keep, targets, "liger")
