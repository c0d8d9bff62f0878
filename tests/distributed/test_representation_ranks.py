"""The representation stage on two real ranks (torchrun, gloo) against one process with the whole batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from representation_worker import OBJECTIVES, gradients, run_config
from safetensors.torch import load_file
from tiny import captioned_pictures, tiny_llm, tiny_tower
from torch import Tensor

from vlm_vision.train.representation_stage import train_representation
from vlm_vision.train.run import read_metrics

WORKER = Path(__file__).with_name("representation_worker.py")
CURVE = ("step", "loss", "itc", "itm", "itg", "itc_accuracy", "itm_accuracy", "grad_norm", "lr")


def curve(run: Path) -> Tensor:
    lines = read_metrics(run / "metrics.jsonl")
    return torch.tensor([[line[column] for column in CURVE] for line in lines if "loss" in line])


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "representation" / "model.safetensors")


def test_two_ranks_do_what_one_process_does_and_one_goes_on_where_they_stopped(tmp_path: Path) -> None:
    data, ranks = tmp_path / "data", tmp_path / "ranks"
    captioned_pictures(data, 18)
    tiny_tower().save_pretrained(data / "tower")
    tiny_llm(data / "llm")
    ranks.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(WORKER), str(data), str(ranks)]
    path = os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-4000:]

    worst = 0.0
    for name in OBJECTIVES:
        found, expected = load_file(ranks / f"{name}.safetensors"), gradients(name, tmp_path)
        for tensor in expected:
            if tensor.endswith("key.bias"):  # 0 but for rounding: all scores of a query shift alike
                continue
            if tensor not in found:
                assert not expected[tensor].any(), tensor
                continue
            error = (found[tensor] - expected[tensor]).abs().max()
            worst = max(worst, float(error / expected[tensor].abs().max().clamp(min=1e-4)))
    assert worst < 3e-5  # worst measured: 1.6e-6, of a tensor's largest

    settings = run_config(str(data))
    scores = train_representation(settings, tmp_path / "alone")
    alone = curve(tmp_path / "alone")
    assert alone.shape == (6, len(CURVE))
    assert torch.allclose(curve(ranks / "run"), alone, rtol=2e-4)
    found, expected = weights(ranks / "run"), weights(tmp_path / "alone")
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-3
    by_step = {
        line["step"]: line for line in read_metrics(ranks / "run" / "metrics.jsonl") if "itm_accuracy" in line
    }
    assert by_step[6].keys() >= scores.keys()

    for part in ("projector", "representation"):
        shutil.rmtree(ranks / "run" / part)
    train_representation(settings, ranks / "run", resume=True)
    assert torch.allclose(curve(ranks / "run"), alone, rtol=2e-4)
