"""Gradients of a loss over a whole batch whose activations never fit in memory at once.

GradCache (arXiv:2101.06983): embed chunk by chunk without a graph, take the loss of all embeddings and its
gradients with respect to them, then embed each chunk again, now with a graph, and send these gradients into
it. What is random in the model is drawn alike both times. The result is the full batch's gradient, the
temperature's included, for the cost of a second forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
LOCAL = "local"


def cached_backward(
    forward: Callable[..., Outputs],
    chunks: Sequence[Mapping[str, Any]],
    loss: Callable[[Outputs], Tensor],
    *,
    sync: Callable[[bool], AbstractContextManager[Any]],
    scale: float = 1.0,
) -> tuple[Tensor, Outputs]:
    """Backward through `loss(outputs of all chunks)`, chunk by chunk.

    Args:
        forward: a chunk's arguments to its outputs: embeddings, whose rows are put together over chunks;
            0-dim tensors, which are the same for every chunk (a temperature); and, under the name `local` and
            only while gradients are on, a chunk's own addition to the loss. A chunk may lack any but one.
        loss: of the outputs put together, without `local`.
        sync: the context of a chunk's forward and backward; its argument tells whether gradients are
            exchanged between ranks, which they are with the last chunk only.
        scale: factor on all gradients (of a loss scaler).

    Returns:
        The loss, `local` of all chunks included, and the outputs it was taken of, both without graph.
    """
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state())
            parts.append(forward(**chunk))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in join(parts).items()}
    value = loss(leaves)
    (value * scale).backward()  # type: ignore[no-untyped-call]
    total, counts = value.detach(), dict.fromkeys(leaves, 0)
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        is_last = number == len(chunks) - 1
        _set_random_state(state)
        with sync(is_last):
            outputs = forward(**chunk)
            surrogate = torch.zeros((), device=value.device)
            for name, tensor in outputs.items():
                if name == LOCAL:
                    surrogate = surrogate + tensor * scale
                    total = total + tensor.detach()
                    continue
                gradient = leaves[name].grad
                if tensor.ndim:
                    rows = slice(counts[name], counts[name] + len(tensor))
                    counts[name] = rows.stop
                    gradient = None if gradient is None else gradient[rows]
                elif not is_last:
                    continue  # of what all chunks share, once
                if gradient is not None and tensor.requires_grad:
                    surrogate = surrogate + (tensor * gradient).sum()
            if surrogate.requires_grad:  # not of a chunk that only frozen parts saw
                surrogate.backward()  # type: ignore[no-untyped-call]
    return total, {name: leaf.detach() for name, leaf in leaves.items()}


def join(parts: Sequence[Outputs]) -> Outputs:
    """Outputs of chunks as those of one."""
    names = dict.fromkeys(name for part in parts for name in part if name != LOCAL)
    joined = {}
    for name in names:
        tensors = [part[name] for part in parts if name in part]
        joined[name] = torch.cat(tensors) if tensors[0].ndim else tensors[-1]
    return joined


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Of the CPU and, where it is in use, of this process's GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
