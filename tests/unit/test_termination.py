from __future__ import annotations

import os
import signal

from torch.utils.data import DataLoader

from vlm_vision.train.termination import Terminated, outlive_sigterm


def test_sigterm_is_noted_and_the_handler_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Terminated() as terminated:
        assert not terminated.is_set
        signal.raise_signal(signal.SIGTERM)
        assert terminated.is_set
    assert signal.getsignal(signal.SIGTERM) is before


def test_workers_outlive_it() -> None:
    """Slurm signals all processes of a job."""
    batches = iter(DataLoader(range(40), batch_size=4, num_workers=1, worker_init_fn=outlive_sigterm))
    found = next(batches).tolist()
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGTERM)
    for batch in batches:
        found += batch.tolist()
    assert found == list(range(40))
