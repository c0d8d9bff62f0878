"""The one place that knows where supported versions of the libraries differ."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from vlm_vision.tower_config import Attention


def attention_kernel(kernel: Attention) -> AbstractContextManager[object]:
    """Within it, scaled dot product attention runs on this kernel of torch only.

    torch before 2.3 chooses on CUDA alone.
    """
    if kernel == "auto":
        return nullcontext()
    if hasattr(torch.nn, "attention"):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = {
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "math": SDPBackend.MATH,
        }
        chosen: AbstractContextManager[object] = sdpa_kernel(backends[kernel])
        return chosen
    older: AbstractContextManager[object] = torch.backends.cuda.sdp_kernel(
        enable_flash=kernel == "flash",
        enable_mem_efficient=kernel == "efficient",
        enable_math=kernel == "math",
    )
    return older


def is_compiling() -> bool:
    """Whether the code is being traced by torch.compile or torch.export."""
    compiler = torch.compiler if hasattr(torch.compiler, "is_compiling") else torch._dynamo
    return bool(compiler.is_compiling())


def is_autocasting(device_type: str) -> bool:
    """Whether autocast is on for a device type; torch before 2.4 asks for CPU and CUDA apart."""
    if device_type == "cpu":
        return torch.is_autocast_cpu_enabled()
    return torch.is_autocast_enabled()
