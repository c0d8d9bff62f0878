"""Functions on real ranks of this machine: what they see, what comes back, and how a failure is told."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from vlm_vision.errors import DataError, VlmVisionError
from vlm_vision.train.ranks import run_on_ranks


def sum_of_ranks(offset: int) -> tuple[int, int, int]:
    dist.init_process_group("gloo")
    rank = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(rank)
    dist.destroy_process_group()
    return int(rank), int(os.environ["WORLD_SIZE"]), torch.get_num_threads()


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise DataError("picture 7 is broken")


def test_ranks_work_together_and_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert run_on_ranks(2, sum_of_ranks, 10) == (21, 2, threads)
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_failure_is_told_with_its_rank_and_message() -> None:
    with pytest.raises(VlmVisionError, match=r"process 1 of 2: DataError: picture 7 is broken"):
        run_on_ranks(2, fail_on_rank_1)
