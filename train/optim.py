"""Rules turned into what an optimizer takes: who learns, groups with their rates, the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from vlm_vision.adapters.lora import add_lora
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.errors import ConfigError, require
from vlm_vision.train.rules import Rule, base_name, check_rules, matching_rule

Schedule = Literal["cosine", "linear", "constant"]


def apply_rules(model: nn.Module, rules: Sequence[Rule]) -> None:
    """Set `requires_grad` from the rules; adapters already injected by LoRA always learn.

    Raises:
        ConfigError: a rule matches nothing, or nothing at all would learn.
    """
    check_rules((base_name(name) for name, _ in model.named_parameters()), rules)
    for name, parameter in model.named_parameters():
        rule = matching_rule(base_name(name), rules)
        learns = rule is not None and (rule.learn == "full" or (rule.learn == "lora" and ".lora_" in name))
        parameter.requires_grad_(learns)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no parameter learns: every rule says frozen, or lora where no layer takes it")


def set_learning(model: nn.Module, rules: Sequence[Rule], lora: LoraConfig) -> None:
    """Put adapters where the rules say, and set who learns.

    Raises:
        ConfigError: as `add_lora` and `apply_rules`.
    """
    names = [name for name, _ in model.named_parameters()]
    targets = [name for name in names if (rule := matching_rule(name, rules)) and rule.learn == "lora"]
    if targets:
        add_lora(model, targets, lora)
    apply_rules(model, rules)


def parameter_groups(
    model: nn.Module,
    rules: Sequence[Rule],
    *,
    lr: float,
    weight_decay: float,
    depths: Mapping[str, int] | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that learn, one per (learning rate, weight decay).

    Gains, biases and scalars (ndim < 2) take no decay, as open_clip does (`open_clip_train/main.py`).

    Args:
        depths: of parameters, by their name without adapters; the rate is multiplied by `layer_decay` to this
            power.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = matching_rule(base_name(name), rules)
        group_lr = lr if rule is None or rule.lr is None else rule.lr
        decay = weight_decay if rule is None or rule.weight_decay is None else rule.weight_decay
        if parameter.ndim < 2:
            decay = 0.0
        if depths is not None:
            group_lr *= layer_decay ** depths[base_name(name)]
        group = groups.setdefault((group_lr, decay), {"params": [], "lr": group_lr, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    name: str, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101): torch's fused one, or bitsandbytes' with moments of 8 bits.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if name == "adamw_8bit":
        require("align", "bitsandbytes")
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=betas, eps=eps)
        return optimizer
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def warmup_steps(total_steps: int, warmup: int = 200, share: float = 0.1) -> int:
    """Linear warm-up length: `warmup` steps, but never more than `share` of the run.

    open_clip's fixed 10,000 would outlast a small run, which then never reaches its learning rate.
    """
    return min(warmup, max(1, math.ceil(share * total_steps)))


def warmup_cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup: int, floor: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up then cosine to `floor`, as a factor on every group's own learning rate.

    Same values as open_clip's `cosine_lr` (`open_clip_train/scheduler.py`), which sets one rate for all.
    """
    return warmup_schedule(optimizer, "cosine", total_steps, warmup, floor)


def warmup_schedule(
    optimizer: torch.optim.Optimizer, shape: Schedule, total_steps: int, warmup: int, floor: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine or a line to `floor`, or no change; a factor on each group's own rate."""
    falls: dict[Schedule, Callable[[float], float]] = {
        "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": lambda progress: 1 - progress,
        "constant": lambda progress: 1.0,
    }

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        return floor + (1 - floor) * falls[shape](min(1.0, progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def continue_schedule(schedule: torch.optim.lr_scheduler.LambdaLR, steps: int) -> None:
    """Put a schedule, and its optimizer's rates, where they are after `steps` of them.

    torch's own way, `load_state_dict`, brings in rates of the groups that were saved, and FSDP has others.
    """
    rates = [
        base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.last_epoch, schedule._last_lr = steps, rates


def trainable_summary(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Per top-level part: (parameters that learn, all parameters)."""
    summary: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".", 1)[0]
        learning, total = summary.get(part, (0, 0))
        count = int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty shard locally
        summary[part] = (learning + count * parameter.requires_grad, total + count)
    return summary
