"""QLoRA (arXiv:2305.14314): the language model held in 4 bits while adapters learn on it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from vlm_vision.adapters.lora import add_lora
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.errors import ConfigError, require
from vlm_vision.train.align_config import Stage, VlmConfig
from vlm_vision.train.rules import matching_rule
from vlm_vision.train.vlm import load_llm


def check_quantise(config: VlmConfig) -> None:
    """Refuse a stage with `quantise: nf4` where it cannot run.

    Raises:
        ConfigError: a language model of random weights.
        MissingExtraError: bitsandbytes is not installed.
    """
    require("align", "bitsandbytes")
    if config.llm_weights == "none":
        raise ConfigError("quantise: nf4 takes a language model with weights, but llm_weights is 'none'")


def load_llm_nf4(source: str | Path, device: torch.device) -> nn.Module:
    """A language model whose linear layers, but for the head, are NF4, quantised twice, and compute in bf16.

    On a CPU each product first makes the layer's weights whole: exact, and no faster than whole weights.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # On a CPU it asks for a package that only inference would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    try:
        llm: nn.Module = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=four_bits, device_map={"": device}, dtype=torch.bfloat16
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"language model {str(source)!r} cannot be loaded in 4 bits: {error}") from error
    return llm


def check_adapters_alone(model: nn.Module, stage: Stage) -> None:
    """Weights of 4 bits cannot learn: only adapters on them, and what bitsandbytes leaves whole.

    Raises:
        ConfigError: names the first such weight that a rule would train.
    """
    for name, parameter in model.named_parameters():
        rule = matching_rule(name, stage.learn)
        if not parameter.is_floating_point() and rule is not None and rule.learn == "full":
            raise ConfigError(
                f"stage {stage.name!r}: {name} is held in 4 bits and cannot learn; give {rule.match!r} "
                "`learn: lora`, or a rule for it after that one"
            )


def onto_whole_weights(llm: nn.Module, source: str | Path, lora: LoraConfig) -> nn.Module:
    """What learnt in a language model of 4 bits, adapters and others, on its whole weights, not merged.

    Merging into weights of 4 bits would round the sum; into whole ones it is what the adapters learnt to add.
    """
    whole = load_llm(source, dtype=torch.bfloat16)
    learnt = {name: tensor for name, tensor in llm.named_parameters() if tensor.is_floating_point()}
    layers = {name.partition(".lora_A.")[0] for name in learnt if ".lora_A." in name}
    add_lora(whole, [f"{layer}.weight" for layer in layers], lora.model_copy(update={"targets": None}))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name in learnt:
                parameter.copy_(learnt[name])
    return whole
