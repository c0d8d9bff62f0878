"""Folders in vLLM's engine, in a process of its own, with vLLM's own packages: `vllm_worker.py CASES.json`.

The cases are a list of `{"model": FOLDER, "adapter": FOLDER or null, "talks": [[[PICTURE, ...], QUESTION],
...], "words": N}`. The last line that it prints is JSON, for each case: parameters that no tensor of the
folder was loaded into, and for each talk ids of the prompt and of the answer, and at each step the logarithm
of each token's probability.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

MISSING: list[list[str]] = []


def note_missing(loader: Any, model: Any, loaded_weights: set[str], **_: Any) -> None:
    """In place of the loader's own check, which leaves linear layers and embeddings out."""
    MISSING.append(sorted({name for name, _ in model.named_parameters()} - loaded_weights))


def run(case: dict[str, Any]) -> dict[str, Any]:
    adapter = case["adapter"]
    options: dict[str, Any] = {} if adapter is None else {"enable_lora": True, "max_lora_rank": 8}
    llm = LLM(
        case["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_logprobs=-1,
        limit_mm_per_prompt={"image": 2},
        **options,
    )
    talks: Any = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image_pil", "image_pil": Image.open(picture)} for picture in pictures),
                    {"type": "text", "text": question},
                ],
            }
        ]
        for pictures, question in case["talks"]
    ]
    settings = SamplingParams(temperature=0, max_tokens=case["words"], logprobs=-1)
    request = None if adapter is None else LoRARequest("ours", 1, adapter)
    found = []
    for talk in talks:
        (output,) = llm.chat(talk, settings, lora_request=request, use_tqdm=False)
        answer = output.outputs[0]
        rows = [[step[token].logprob for token in range(len(step))] for step in answer.logprobs or ()]
        found.append(
            {"prompt": output.prompt_token_ids, "answer": list(answer.token_ids), "logarithms": rows}
        )
    del llm
    cleanup_dist_env_and_memory()
    return {"missing": MISSING.pop(), "answers": found}


if __name__ == "__main__":
    DefaultModelLoader.track_weights_loading = note_missing
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("\n" + json.dumps([run(case) for case in cases]))
