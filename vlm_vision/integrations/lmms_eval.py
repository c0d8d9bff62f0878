"""Our vision-language models in lmms-eval: what its entry points find, once both are installed.

The interface is that of `lmms_eval/models/registry_v2.py` of EvolvingLMMs-Lab/lmms-eval 75571cf.
"""

from __future__ import annotations

from typing import Any

MODEL_CLASS = "vlm_vision.train.lmms_eval.VlmVision"


def manifest() -> Any:
    """What lmms-eval registers as `--model vlm_vision`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlm_vision", simple_class_path=MODEL_CLASS)
