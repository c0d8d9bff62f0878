"""DeepSpeed under an alignment stage: ranks, settings, and whole weights out of sharded ones."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm_vision.errors import ConfigError, WeightsError, require
from vlm_vision.train.align_config import Stage
from vlm_vision.train.deepspeed_json import merge_deepspeed


def join_ranks() -> tuple[int, int, torch.device]:
    """(rank, world size, device); joins the group that torchrun or deepspeed describe, or makes one of one.

    Raises:
        MissingExtraError: DeepSpeed is not installed.
    """
    require("align", "deepspeed", "jinja2")
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        # DeepSpeed keeps the group for as long as the process lives.
        atexit.register(_leave)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls it at every step, and torch 2.14 says so each time.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated")
    # Only makes CPU collectives a little faster, and would need a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist.get_backend())  # takes the group for its own; before, it sees one process
    return dist.get_rank(), dist.get_world_size(), device


def current_device() -> torch.device:
    """This rank's, once it has joined."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def engine_settings(
    stage: Stage, world: int, micro_batch_size: int, width: int, learning: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, with every value given, and the stage's own JSON merged over it.

    Args:
        micro_batch_size: conversations that a rank runs at once.
        width: channels of the language model, by which ZeRO-3's buckets scale (as Hugging Face sets them).
        learning: parameters that learn; no bucket need hold more.

    Raises:
        ConfigError: as `merge_deepspeed`; what goes to NVMe, in a stage that saves within.
    """
    bucket = min(learning + learning % 2, 500_000_000)  # DeepSpeed asserts that it is even
    zero: dict[str, Any] = {
        "stage": stage.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": world > 1 and torch.cuda.is_available(),
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage.zero_stage == 3:
        zero |= {
            "reduce_bucket_size": width * width,
            "stage3_prefetch_bucket_size": width * width * 9 // 10,
            "stage3_param_persistence_threshold": 10 * width,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage.offload != "none":
        zero["offload_optimizer"] = host
    if stage.offload == "parameters":
        zero["offload_param"] = host
    settings: dict[str, Any] = {
        "train_batch_size": stage.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": stage.batch_size // (world * micro_batch_size),
        "gradient_clipping": stage.grad_clip or 0.0,
        "bf16": {"enabled": stage.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on the CPU as well, and needs no compiler, as DeepSpeed's own does.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }
    if stage.deepspeed is None:
        return settings
    settings = merge_deepspeed(settings, stage.deepspeed)
    for part in ("offload_optimizer", "offload_param"):
        place = (settings["zero_optimization"].get(part) or {}).get("device")
        if place == "nvme" and stage.save_every is not None:
            raise ConfigError(
                f"{stage.deepspeed}: zero_optimization.{part}.device is 'nvme', and what is there cannot be "
                f"saved: write 'cpu', or leave save_every of stage {stage.name!r} out"
            )
    return settings


def start_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, settings: dict[str, Any]
) -> Any:
    """The engine that runs a stage; it moves the model to the rank's device and shards it."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings
    )
    return engine


def gradient_norm(engine: Any) -> float | None:
    """Norm of the whole gradient before the step, where every rank has it (ZeRO-0 in fp32)."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def make_whole(model: nn.Module) -> None:
    """Turn ZeRO-3's shards back into whole tensors on the CPU of rank 0. Every rank must call it.

    Raises:
        WeightsError: a tensor came out in another shape than it has.
    """
    import deepspeed

    parameter: Any
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_id"):
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().cpu().clone() if dist.get_rank() == 0 else None
        if whole is not None:
            shape = tuple(parameter.ds_shape)
            if whole.shape != shape:
                raise WeightsError(f"{name} was gathered as {tuple(whole.shape)}, not {shape}")
            parameter.data = whole


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a value over ranks, in place."""
    dist.all_reduce(value)
    return value.div_(dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
