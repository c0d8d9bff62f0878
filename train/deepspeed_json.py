"""A user's own DeepSpeed JSON, merged over the settings that are made of a stage; typos are refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_vision.errors import ConfigError, first_line, nearest

# What a stage says itself: DeepSpeed's key, and the stage's.
SAID_BY_THE_STAGE = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "grad_clip",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "zero_optimization.stage": "zero_stage",
}
NOT_OURS = {
    "optimizer": "lr, betas and weight_decay",
    "scheduler": "schedule and warmup",
    "amp": "precision",
    "torch_autocast": "precision",
}
AUTO = "auto"
_SCALARS = (
    "communication_data_type",
    "disable_allgather",
    "dump_state",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
_SECTIONS = {
    "activation_checkpointing": (
        "partition_activations",
        "number_checkpoints",
        "contiguous_memory_optimization",
        "synchronize_checkpoint_boundary",
        "profile",
        "cpu_checkpointing",
    ),
    "aio": ("block_size", "queue_depth", "thread_count", "single_submit", "overlap_events", "use_gds"),
    "data_types": ("grad_accum_dtype",),
    "flops_profiler": ("enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
}


def merge_deepspeed(settings: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The settings with a file's in their place. Its `auto` means the stage's value.

    Raises:
        ConfigError: as `read_deepspeed`; a value that differs from what the stage says, an `auto` that the
            stage has no value for, or what DeepSpeed does not take.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = read_deepspeed(path)
    values = dict(_leaves(settings))
    for key, value in _leaves(given):
        if value == AUTO:
            if key not in values:
                raise ConfigError(
                    f"{path}: {key} is 'auto', which the stage has no value for: write one, or take it out"
                )
        elif key in SAID_BY_THE_STAGE and value != values.get(key):
            raise ConfigError(
                f"{path}: {key} is {value!r}, but the stage makes it {values.get(key)!r}: change the stage's "
                f"{SAID_BY_THE_STAGE[key]}, or write 'auto'"
            )
    merged = _over(settings, given)
    try:
        DeepSpeedZeroConfig(**merged["zero_optimization"])
    except ValueError as error:
        raise ConfigError(
            f"{path}: DeepSpeed refuses zero_optimization: {first_line(error)}: {error}"
        ) from error
    return merged


def read_deepspeed(path: str | Path) -> dict[str, Any]:
    """A file of DeepSpeed's settings, its keys known and under the names that we write them by.

    Raises:
        ConfigError: no such file, no JSON object, a key that DeepSpeed does not know (names the nearest), or
            one that a stage says.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed {str(path)!r} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"deepspeed {str(path)!r} must hold an object, got {type(given).__name__}")
    models = _models()
    top = [key for key in SAID_BY_THE_STAGE if "." not in key]
    known = {*top, *NOT_OURS, *_SCALARS, *_SECTIONS, *models}
    read: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{path}: DeepSpeed has no {key!r}{nearest(key, known)}")
        if key in NOT_OURS:
            raise ConfigError(f"{path}: {key!r} is said by the stage's {NOT_OURS[key]}: take it out")
        if key in models:
            read[key] = _section(value, models[key], key, path)
        elif key in _SECTIONS:
            _check_keys(value, _SECTIONS[key], key, path)
            read[key] = value
        else:
            read[key] = value
    return read


def _models() -> dict[str, Any]:
    """Sections whose keys DeepSpeed itself lists."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "zero_optimization": DeepSpeedZeroConfig,
        "comms_logger": CommsLoggerConfig,
    }


def _section(value: Any, model: Any, where: str, path: str | Path) -> dict[str, Any]:
    """A section by a pydantic model, under aliases where it has them, and the sections in it."""
    names = {name: field.alias or name for name, field in model.model_fields.items()}
    _check_keys(value, {*names, *names.values()}, where, path)
    fields = {names[name]: field for name, field in model.model_fields.items()}
    read = {}
    for key, given in value.items():
        alias = names.get(key, key)
        inner = _inner_model(fields[alias])
        is_section = inner is not None and isinstance(given, dict)
        read[alias] = _section(given, inner, f"{where}.{key}", path) if is_section else given
    return read


def _inner_model(field: Any) -> Any:
    """The pydantic model that a field holds, perhaps optionally."""
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((kind for kind in kinds if hasattr(kind, "model_fields")), None)


def _check_keys(value: Any, known: Iterable[str], where: str, path: str | Path) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: {where} must be an object, got {value!r:.80}")
    for key in value:
        if key not in known:
            raise ConfigError(f"{path}: DeepSpeed's {where} has no {key!r}{nearest(key, known)}")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in given.items():
        if isinstance(value, Mapping):
            merged[key] = _over(merged.get(key) or {}, value)
        elif value != AUTO:
            merged[key] = value
    return merged
