"""Cross entropy of label tokens without all of their logits: a few thousand at a time, or in a fused kernel.

The logits of 16,000 labels in a vocabulary of 150,000 take 9.6 GB in fp32, and their gradient as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import modeling_utils

from vlm_vision.errors import ConfigError, require

CHUNK = 2048
"""Labels whose logits are held at once; more are computed anew in the backward pass, chunk by chunk."""
LossKernel = Literal["chunks", "liger"]
# Whether a mask [B,T] says which logits to keep; transformers 5.20, the last for Python 3.10, takes columns.
KEEPS_BY_ROW = hasattr(modeling_utils, "slice_logits_to_keep")
_CHANGES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def check_kernel(kernel: LossKernel, llm: Any) -> None:
    """Refuse a fused kernel where it cannot run.

    Raises:
        MissingExtraError: liger-kernel is not installed.
        ConfigError: no GPU, or a head that is more than a linear layer, or whose logits are changed.
    """
    if kernel != "liger":
        return
    require("liger", "liger_kernel")
    if not torch.cuda.is_available():
        raise ConfigError("loss_kernel 'liger' runs on a GPU, and this process has none: use 'chunks'")
    _check_plain(llm.get_output_embeddings())
    if changes_logits(llm):
        raise ConfigError(
            f"loss_kernel 'liger' takes logits as the head gives them, and {type(llm).__name__} changes them "
            "after it: use 'chunks'"
        )


def label_loss(
    llm: Any,
    inputs: dict[str, Any],
    keep: Bool[Tensor, "b t"],
    targets: Int[Tensor, " k"],
    kernel: LossKernel = "chunks",
) -> Float[Tensor, ""]:
    """Summed cross entropy of the positions to keep, row by row, in fp32.

    The language model calls its head once, as it always does, so that ZeRO-3 gathers its weights for it once;
    the head then gives the loss in place of logits. A language model that changes logits after its head
    (Gemma 2, Granite and Cohere do) has those of all labels computed at once.

    Args:
        inputs: of the language model's forward pass.
        targets: the next token of each kept position.
    """
    head = llm.get_output_embeddings()
    logits_of: Callable[[Tensor], Tensor] = head.forward
    columns = keep.any(dim=0).nonzero().flatten()
    kept = keep if KEEPS_BY_ROW else columns

    def chosen(states: Tensor) -> Tensor:
        return states.flatten(0, -2) if KEEPS_BY_ROW else states[keep[:, columns]]

    if changes_logits(llm):
        return _cross_entropy(nn.Identity(), chosen(llm(**inputs, logits_to_keep=kept).logits), targets)

    def loss_of(hidden: Tensor) -> Tensor:
        states = chosen(hidden)
        loss = _liger(head, states, targets) if kernel == "liger" else _in_chunks(logits_of, states, targets)
        return loss.reshape(1, 1, 1)

    with patch.object(head, "forward", loss_of):
        total: Tensor = llm(**inputs, logits_to_keep=kept).logits
    return total.reshape(())


def _check_plain(head: Any) -> None:
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"loss_kernel 'liger' computes a plain linear head, and this one is a {type(head).__name__}: use "
            "'chunks', or train no adapter on it"
        )


def changes_logits(llm: Any) -> bool:
    """Whether a language model scales, caps or cuts what its head gives; tried once on one token."""
    if llm not in _CHANGES:
        head = llm.get_output_embeddings()
        width, like = llm.get_input_embeddings().embedding_dim, next(llm.parameters())
        token = torch.zeros(1, 1, width, dtype=like.dtype, device=like.device)
        marks = torch.tensor([[[0.5, 2.0]]], device=like.device)
        with torch.no_grad(), torch.random.fork_rng(), patch.object(head, "forward", lambda _: marks.clone()):
            given = llm(inputs_embeds=token, use_cache=False).logits
        _CHANGES[llm] = not torch.equal(given, marks)
    return _CHANGES[llm]


def _in_chunks(
    logits_of: Callable[[Tensor], Tensor], states: Float[Tensor, "k l"], targets: Int[Tensor, " k"]
) -> Float[Tensor, ""]:
    if len(states) <= CHUNK:
        return _cross_entropy(logits_of, states, targets)
    total = states.new_zeros((), dtype=torch.float32)
    for first in range(0, len(states), CHUNK):
        chunk, wanted = states[first : first + CHUNK], targets[first : first + CHUNK]
        total = total + checkpoint(_cross_entropy, logits_of, chunk, wanted, use_reentrant=False)
    return total


def _cross_entropy(logits_of: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(states).float(), targets, reduction="sum")


def _liger(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    """arXiv:2410.10989: gradients of states and weights in the forward pass, chunk by chunk."""
    _check_plain(head)  # adapters are put on after the kernel is chosen
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(head.weight, states, targets, head.bias)
    return loss.float()
