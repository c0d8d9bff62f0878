"""A language model's adapters as a folder that peft reads onto the model that they learnt on."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from vlm_vision.adapters.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.adapters.save import PREFIX, peft_name
from vlm_vision.errors import require
from vlm_vision.files import whole_folder
from vlm_vision.train.vlm import VisionLanguageModel
from vlm_vision.weights import check_whole

ADAPTERS_FOLDER = "adapters"
"""Of a stage."""


def save_llm_lora(model: VisionLanguageModel, folder: str | Path, lora: LoraConfig, *, base: str) -> None:
    """Write the language model's adapters, not merged, for `peft.PeftModel.from_pretrained(llm, folder)`.

    Args:
        base: the language model, for `base_model_name_or_path`.

    Raises:
        WeightsError: as `check_whole`.
    """
    require("train", "peft")
    from peft import LoraConfig as PeftLoraConfig

    state = {
        peft_name(name): tensor.detach().contiguous()
        for name, tensor in model.llm.named_parameters()
        if ".lora_" in name
    }
    layers = sorted({name.partition(".lora_")[0] for name in state})
    check_whole(state, f"{folder} is not written")
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    with whole_folder(folder) as partial:
        text = json.dumps({**settings, "target_modules": layers}, indent=2, sort_keys=True, default=list)
        (partial / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        tensors = {f"{PREFIX}{name}": tensor for name, tensor in state.items()}
        save_file(tensors, partial / ADAPTER_WEIGHTS[0], {"format": "pt"})
