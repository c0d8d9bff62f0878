"""A language model for ZeRO-3, without the whole of it in any rank's memory before it is sharded.

DeepSpeed takes every weight from rank 0. So rank 0 maps the files, and reads a tensor when it is sent; other
ranks know shapes alone. `shard` then makes each tensor where the model computes, sends it, and keeps a share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from vlm_vision.errors import ConfigError
from vlm_vision.tower import resolve_folder
from vlm_vision.train.vlm import load_llm, make_saveable
from vlm_vision.train.vlm_import import check_loaded


def load_llm_lean(source: str | Path, dtype: torch.dtype) -> nn.Module:
    """What `load_llm` gives, with weights on rank 0 alone, and there mapped where the files have `dtype`.

    Weights in other files than safetensors are loaded whole by every rank.

    Raises:
        ConfigError, WeightsError: as `load_llm`.
    """
    try:
        folder = resolve_folder(source)
        files = _weight_files(folder)
        if not files:
            return load_llm(source, dtype=dtype)
        config = AutoConfig.from_pretrained(folder)
        kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
        tensors = _mapped(files) if dist.get_rank() == 0 else _shapes(files, dtype)
        llm: nn.Module
        llm, info = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
        if (folder / "generation_config.json").is_file():
            llm.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"language model {str(source)!r} cannot be loaded: {error}") from error
    check_loaded(info, source)
    make_saveable(llm)
    return llm


def shard(model: nn.Module, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Keep a share of each parameter on each rank, as ZeRO-3 does; one of them is whole at a time.

    Args:
        settings: DeepSpeed's.
        dtype: that floating-point parameters are to have.
    """
    import deepspeed

    first: Any = None
    for parameter in model.parameters():
        wanted = dtype if parameter.is_floating_point() else parameter.dtype
        if _is_shape(parameter):
            parameter.data = torch.empty(parameter.shape, dtype=wanted, device=device)
        else:
            parameter.data = parameter.data.to(device=device, dtype=wanted).contiguous()
        if first is None:
            first = parameter
            deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=settings)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            whole = buffer.to(device).contiguous()
            dist.broadcast(whole, 0)  # saved ones were read by rank 0 alone
            setattr(module, name, whole)


def _weight_files(folder: Path) -> list[Path]:
    """In the order in which transformers looks for them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]


def _mapped(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    return tensors


def _shapes(files: list[Path], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensors[name] = torch.zeros((), dtype=dtype).expand(weights.get_slice(name).get_shape())
    return tensors


def _is_shape(parameter: Tensor) -> bool:
    return parameter.numel() > 1 and not any(parameter.stride())
