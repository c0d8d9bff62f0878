"""A training function on several processes of this machine, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vlm_vision.errors import VlmVisionError


def run_on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)` on each of `ranks` new processes, which share the cores evenly.

    Args:
        ranks: processes; with one, it is still a process of its own.
        function: importable by its module's name, as its arguments are pickled.

    Returns:
        What rank 0 returned.

    Raises:
        VlmVisionError: a rank failed; holds the message of the first that did.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="vlm_vision",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        start_method="spawn",
    )
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        results: dict[int, Any] = elastic_launch(config, function)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message  # typed as text, but a mapping where the rank wrote its exception down
        text = message["message"] if isinstance(message, dict) else message
        raise VlmVisionError(f"process {rank} of {ranks}: {text}") from error
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return results[0]


def default_ranks() -> int:
    """One per GPU, or two on a CPU of two cores or more: small models leave a second thread idle."""
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)
