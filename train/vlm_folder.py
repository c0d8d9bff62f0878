"""Which folders hold a vision-language model; told by their `config.json`, so that nothing heavy loads."""

from __future__ import annotations

import json
from pathlib import Path

MODEL_TYPE = "vlm_vision_language_model"
LLAVA_HF = "llava"
LLAVA_NEXT_HF = "llava_next"
LLAVA = {
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mixtral": "mixtral",
    "llava_qwen": "qwen2",
}
"""`model_type` of LLaVA's own models, and of the language model within."""
FOREIGN = (LLAVA_HF, LLAVA_NEXT_HF, *LLAVA)


def is_vlm_folder(source: str | Path) -> bool:
    """Whether `VisionLanguageModel.from_pretrained` takes a folder."""
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in (MODEL_TYPE, *FOREIGN)
