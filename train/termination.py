"""SIGTERM: the step that runs is finished and saved, and the process ends with the shell's status for it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from vlm_vision.train.run import Run

TERMINATED = 128 + signal.SIGTERM  # the shell's status of a command ended by this signal


class Terminated:
    """Notes SIGTERM, by which schedulers announce that a job's time is over, instead of dying of it.

    Attributes:
        is_set: whether it came.
    """

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> Terminated:
        self._listens = threading.current_thread() is threading.main_thread()  # others get no signals
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


def end_saved(run: Run, step: int, leave: Callable[[], object]) -> NoReturn:
    """End this process after the step that was saved because of SIGTERM.

    Args:
        leave: the other ranks.

    Raises:
        SystemExit: always.
    """
    run.close()
    leave()
    if run.is_main:
        print(f"stopped by SIGTERM after step {step}: continue with --resume", file=sys.stderr)
    raise SystemExit(TERMINATED)


def outlive_sigterm(worker: int) -> None:
    """What a data loader's worker runs first: schedulers signal every process of a job, and the step that is
    finished after SIGTERM needs its data. A worker ends with its loader, or with the process that it is of.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
