"""Where the libraries of today and those that LLaVA pins differ, and nothing else: no other module asks.

LLaVA pins torch 2.1.2, torchvision 0.16.2, transformers 4.37.2 and tokenizers 0.15.1. A difference is found
by its feature, never by a version number. `make test-pinned` runs the core's tests in that world.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vlm_vision.errors import ConfigError
from vlm_vision.tower_config import Attention

# Names in the blocks of DINOv2 and ViT-MAE: those of transformers 4, and those it renames them to today.
_OLD_AND_NEW_NAMES = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("mlp.weights_out.", "mlp.down_proj."),
)
_OLD_GATED, _NEW_GATED = "mlp.weights_in.", ("mlp.gate_proj.", "mlp.up_proj.")  # the one holds both


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


def clip_vision_trunk(model: Any) -> Any:
    """The module that holds CLIP's embeddings, encoder and norms: transformers 5 dropped its inner level."""
    return getattr(model, "vision_model", model)


def clip_text_trunk(model: Any) -> Any:
    """The module that holds the embeddings, encoder and norm of CLIP's or SigLIP's text: as for pictures."""
    return getattr(model, "text_model", model)


def config_fields(config: Any) -> dict[str, Any]:
    """A transformers config as plain fields, in one order: 4.37 lists them in the order they were set in."""
    return dict(sorted(config.to_dict().items()))


def before_load_state_dict(module: Any, hook: Callable[[dict[str, Tensor], str], None]) -> None:
    """Call `hook(state, prefix)` before a module loads a state dict: in torch 2.1 its register is private."""
    register = getattr(module, "register_load_state_dict_pre_hook", None)
    if register is not None:
        register(lambda _module, state, prefix, *_rest: hook(state, prefix))
    else:
        module._register_load_state_dict_pre_hook(lambda state, prefix, *_rest: hook(state, prefix))


def under_names(state: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Tensors that another version of transformers saved, by this one's names; those it does not know stay.

    Matches the renaming of `Dinov2Model` and `ViTMAEForPreTraining` in transformers' conversion_mapping.py.

    Args:
        wanted: this version's names.
    """
    named = dict(state)
    for name in [name for name in state if name not in wanted]:
        for old, new in _OLD_AND_NEW_NAMES:
            for other in (name.replace(old, new), name.replace(new, old)):
                if other in wanted and other not in named:
                    named[other] = named.pop(name)
        gate, up = (name.replace(_OLD_GATED, new) for new in _NEW_GATED)
        if gate in wanted and gate not in named:
            named[gate], named[up] = (half.clone() for half in named.pop(name).chunk(2))
        both, beside = name.replace(_NEW_GATED[0], _OLD_GATED), name.replace(*_NEW_GATED)
        if both in wanted and both not in named and beside in named:
            named[both] = torch.cat([named.pop(name), named.pop(beside)])
    return named
