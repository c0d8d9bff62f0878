"""Bytes of live tensors through a stage, as torch tells them, beside what `plan` says."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOWER, colour_records, tiny_llm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vlm_vision.config import load_config
from vlm_vision.train import stage as stage_module
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.plan import plan_align

FULL, ALIGNER = [{"match": "projector.*"}, {"match": "llm.*"}], [{"match": "projector.*"}]


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that operations give, until they are freed.

    Attributes:
        now, peak: bytes.
        between_steps: bytes after the last step.
        in_steps: peaks of the steps. After the last rank 0 makes its weights whole, which is no part of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.between_steps = 0
        self.in_steps: list[int] = []
        self._sizes: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        storage: Any = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


@contextmanager
def live_memory() -> Iterator[LiveMemory]:
    """Of the stage that runs inside, from the start of its engine on."""
    with pytest.MonkeyPatch.context() as patch, LiveMemory() as memory:
        start, step = stage_module.start_engine, stage_module._optimizer_step

        def start_engine(model: Any, *others: Any) -> Any:
            gc.collect()
            for tensor in (*model.parameters(), *model.buffers()):
                memory.add(tensor.data)
            engine = start(model, *others)
            gc.collect()
            memory.peak = memory.now
            return engine

        def optimizer_step(*arguments: Any, **options: Any) -> Any:
            memory.peak = memory.now
            result = step(*arguments, **options)
            memory.in_steps.append(memory.peak)
            gc.collect()
            memory.between_steps = memory.now
            return result

        patch.setattr(stage_module, "start_engine", start_engine)
        patch.setattr(stage_module, "_optimizer_step", optimizer_step)
        yield memory


def measured_data(folder: Path) -> None:
    """A language model whose weights are more than its activations, and pictures to ask it about."""
    tiny_llm(folder / "llm", hidden_size=192, intermediate_size=512, num_hidden_layers=3)
    colour_records(folder, 4)


def planned_and_measured(
    folder: Path, output: Path, world: int = 1, **stage: Any
) -> tuple[tuple[float, int], tuple[float, int]]:
    """Of a stage: what is kept between steps, and the most in a step; each as planned and as measured.

    The first step makes Adam's states; of the others the least counts, since gloo's threads let go of what
    they summed when they come to it.
    """
    settings = {
        "name": "one",
        "data": {"file": str(folder / "train.json"), "image_folder": str(folder / "images"), "workers": 0},
        "lr": 1e-3,
        "steps": 4,
        "batch_size": 2 * world,
        "micro_batch_size": 1,
        "max_length": 30,
        **stage,
    }
    parts = {"tower": TOWER, "llm": str(folder / "llm")}
    config = load_config(AlignConfig, {"model": parts, "stages": [settings]})
    planned = plan_align(config, world=world).stages[0]
    with live_memory() as memory:
        align(config, output)
    kept = planned.memory
    if config.stages[0].zero_stage < 3:  # which alone has room for its gradients all the time
        kept -= sum(part.memory.gradients for part in planned.parts)
    return (kept, memory.between_steps), (planned.peak, min(memory.in_steps[1:]))
