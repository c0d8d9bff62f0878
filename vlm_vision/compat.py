"""The one place that knows where supported versions of the libraries differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from vlm_vision.errors import ConfigError
from vlm_vision.tower_config import Attention


def attention_kernel(kernel: Attention) -> AbstractContextManager[object]:
    """Within it, scaled dot product attention runs on this kernel of torch only.

    torch before 2.3 chooses on CUDA alone.

    Raises:
        ConfigError: the kernel is not there for this device and dtype.
    """
    return nullcontext() if kernel == "auto" else _only(kernel)


@contextmanager
def _only(kernel: Attention) -> Iterator[None]:
    try:
        with _sdpa_kernel(kernel):
            yield
    except RuntimeError as error:
        if "backend" in str(error) or "kernel" in str(error):
            raise ConfigError(
                f"attention {kernel!r}: torch has no such kernel for this device, dtype and shape; use 'auto'"
            ) from error
        raise


def _sdpa_kernel(kernel: Attention) -> AbstractContextManager[object]:
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
    if hasattr(torch.compiler, "is_compiling"):
        return bool(torch.compiler.is_compiling())
    import torch._dynamo as dynamo

    return bool(dynamo.is_compiling())


def is_autocasting(device_type: str) -> bool:
    """Whether autocast is on for a device type; torch before 2.4 asks for CPU and CUDA apart."""
    if device_type == "cpu":
        return torch.is_autocast_cpu_enabled()
    return torch.is_autocast_enabled()
