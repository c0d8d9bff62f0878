"""Our models run by lmms-eval itself; runs where that is installed.

Its tests of the interface, with a stand-in, are in tests/unit/test_lmms_eval.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_llm, tiny_tower

from vlm_vision.adapters.build import build_projector
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)
QUESTION = "what colour is it ?"
TASK = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {table}}}}}
task: colours
test_split: test
output_type: generate_until
doc_to_visual: !function seen.pictures
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_lmms_eval_writes_the_answers_that_the_model_gives(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    torch.manual_seed(0)
    tower, llm = tiny_tower(), tiny_llm(tmp_path / "llm")
    projector = build_projector("mlp2x_gelu", tower.hidden_size, 32, tower.grid)
    model = VisionLanguageModel(tower, projector, load_llm(llm), load_tokenizer(llm)).eval()
    model.save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8) // (1 + number))
        for number in range(5)
    ]
    answers = model.answer(tower.image_processor(pictures), [QUESTION] * 5, max_new_tokens=6)

    rows = [{"image": image, "question": QUESTION, "answer": answers[0]} for image in pictures]
    task = tmp_path / "task"
    task.mkdir()
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(task / "test.parquet"))
    (task / "colours.yaml").write_text(TASK.format(table=task / "test.parquet"))
    (task / "seen.py").write_text("def pictures(doc):\n    return [doc['image'].convert('RGB')]\n")
    command = [sys.executable, "-m", "lmms_eval", "--model", "vlm_vision", "--tasks", "colours"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'}", "--include_path", str(task)]
    command += [
        "--batch_size",
        "2",
        "--device",
        "cpu",
        "--log_samples",
        "--output_path",
        str(tmp_path / "out"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]

    samples = next((tmp_path / "out").rglob("*samples_colours.jsonl")).read_text().splitlines()
    assert [json.loads(sample)["filtered_resps"] for sample in samples] == answers
    results = json.loads(next((tmp_path / "out").rglob("*results.json")).read_text())
    share = sum(answer == answers[0] for answer in answers) / len(answers)
    assert results["results"]["colours"]["exact_match,none"] == pytest.approx(share)
