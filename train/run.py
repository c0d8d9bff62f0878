"""A run is a folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, and curves for its report."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from vlm_vision.config import Config, save_config
from vlm_vision.errors import VlmVisionError, require
from vlm_vision.progress import progress_bar


class Run:
    """Writes what a training run leaves behind; on ranks other than 0 it writes nothing.

    Args:
        folder: made if absent.
        config: saved as `config.yaml`.
        resume_step: lines of `metrics.jsonl` after this step belong to a part that was lost, and are dropped.
        wandb: a Weights & Biases project to log to as well.

    Raises:
        MissingExtraError: wandb is asked for and not installed.
    """

    def __init__(
        self, folder: str | Path, config: Config, *, resume_step: int = 0, wandb: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.checkpoints = self.folder / "checkpoints"
        self._metrics = self.folder / "metrics.jsonl"
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not self.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, self.folder / "config.yaml")
        kept = [line for line in read_metrics(self._metrics) if line["step"] <= resume_step]
        self._metrics.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resume_step + 1)
        if wandb is not None:
            require("wandb", "wandb")
            import wandb as weights_and_biases

            # Continued under the name of the folder, so that a resumed run goes on in the same curves.
            self._wandb = weights_and_biases.init(
                project=wandb,
                id=self.folder.resolve().name,
                resume="allow",
                dir=str(self.folder),
                config=config.model_dump(mode="json"),
            )

    def log(self, step: int, **values: float) -> None:
        """Append one line of metrics at an optimizer step, if there are any."""
        if not self.is_main or not values:
            return
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def progress(self, total: int, description: str, *, start: int = 0) -> Any:
        """A progress bar with time left, on rank 0 only."""
        return progress_bar(total, description, start=start, disable=not self.is_main)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; empty when there is no file. A last line torn by a kill is dropped."""
    if not Path(path).is_file():
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    parsed = []
    for number, line in enumerate(lines):
        try:
            parsed.append(json.loads(line))
        except ValueError:
            if number + 1 != len(lines):
                raise VlmVisionError(f"{path}: line {number + 1} is not JSON") from None
    return parsed


def check_finite(loss: float, grad_norm: float, step: int) -> None:
    """Stop before a non-finite step reaches the weights.

    Raises:
        VlmVisionError: names the step and the value.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise VlmVisionError(
            f"step {step}: loss {loss} with gradient norm {grad_norm} is not finite; weights are as after "
            f"step {step - 1}. Lower the learning rate, or set precision to fp32, and continue with --resume"
        )


def refuse_step(
    step: int,
    loss: float,
    grad_norm: float,
    rank: int,
    what: str,
    culprits: Sequence[str],
    names: Sequence[str],
) -> NoReturn:
    """Stop before the optimizer's step of a loss or gradient that is not finite.

    Args:
        what: of the `culprits` is not finite; where there are none, the samples of the batch are named.

    Raises:
        VlmVisionError: always.
    """
    shown = culprits or names
    which = f"{what} that are not finite come from" if culprits else "the batch held"
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    raise VlmVisionError(
        f"step {step}: loss {loss} with gradient norm {grad_norm} is not finite; weights are as after "
        f"step {step - 1}. On rank {rank} {which} {', '.join(shown[:8])}{more}. Lower the "
        "learning rate, or set precision to fp32, and continue with --resume"
    )


def prepare_process(seed: int) -> None:
    """What every training entry point does first: seeds, and denormals flushed.

    Without flushing, Adam's moments of rarely seen embeddings decay into denormals, which a CPU handles
    many times slower.
    """
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # numpy keeps them; made later, they would miss denormals and warn
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)


@contextmanager
def training_attention() -> Iterator[None]:
    """Attention that a CPU trains fast, as long as a run lasts; a decorator of every training entry point.

    On the short sequences that a CPU can train, the backward pass of torch's fused attention takes several
    times as long as plain matrix products (bf16, 17 tokens: 43 ms against 6). What else the process computes,
    before and afterwards, keeps its own kernel.
    """
    # The switch of the CPU's fused attention, too.
    fused = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    if not torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(fused)


def plain_attention(llm: Any) -> None:
    """Let a language model of transformers attend by plain matrix products, where it trains on a CPU.

    That is of this model, and no part of what is saved.
    Without the fused kernel, torch's attention computes bf16 in fp32 (96 rows of 110 tokens, forward and
    backward: 20 ms against 10).
    """
    if not torch.cuda.is_available():
        llm.set_attn_implementation("eager")


def peak_memory_mb() -> float:
    """The largest memory of this process so far in MiB: on its GPU if it uses one, else of itself."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # getrusage tells bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class PeakMemory:
    """The largest memory of this process with all its children, looked at twice a second.

    Pages that several processes share count once; where the system cannot tell (not Linux), only what a
    process has to itself counts.

    Attributes:
        mb: MiB.
    """

    def __init__(self) -> None:
        self.mb = 0.0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look_again, daemon=True)

    def __enter__(self) -> PeakMemory:
        require("train", "psutil")
        self.look()
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def look(self) -> None:
        """Measure now."""
        import psutil

        this = psutil.Process()
        taken = 0
        for process in (this, *this.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                memory = process.memory_full_info()
                taken += getattr(memory, "pss", memory.uss)
        self.mb = max(self.mb, taken / 2**20)

    def _look_again(self) -> None:
        while not self._over.wait(0.5):
            self.look()


@contextmanager
def timed(stage_seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that a block takes to `stage_seconds[name]`."""
    start = time.perf_counter()
    yield
    stage_seconds[name] = round(stage_seconds.get(name, 0.0) + time.perf_counter() - start, 2)
