"""Contrastive training on real ranks (torchrun, gloo) against one process that sees the whole batch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from contrastive_worker import CASES, RUNS, gradients, run_config
from safetensors.torch import load_file
from tiny import captioned_pictures, tiny_dual_encoder
from torch import Tensor

from vlm_vision.train.contrastive import train_contrastive
from vlm_vision.train.run import read_metrics

WORKER = Path(__file__).with_name("contrastive_worker.py")


def launch(ranks: int, task: str, data: Path, output: Path) -> None:
    output.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, str(WORKER), task, str(data), str(output)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to that tensor's largest element."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in expected.items()
    )


def curve(run: Path) -> Tensor:
    columns = ("step", "loss", "grad_norm", "lr", "logit_scale")
    return torch.tensor(
        [[line[column] for column in columns] for line in read_metrics(run / "metrics.jsonl")]
    )


def check_gradients(ranks: Path) -> None:
    """Of every loss against one process that has the whole batch."""
    for name in CASES:
        worst = worst_error(load_file(ranks / f"{name}.safetensors"), gradients(name))
        assert worst < 1e-12, name  # worst measured: 2e-15


def test_four_ranks_compute_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    launch(4, "gradients", tmp_path, tmp_path / "ranks")
    check_gradients(tmp_path / "ranks")


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    data, ranks, alone = tmp_path / "data", tmp_path / "ranks", tmp_path / "alone"
    captioned_pictures(data, 20)
    tiny_dual_encoder().save_pretrained(data / "model")
    launch(2, "run", data, ranks)
    check_gradients(ranks)

    for name, changes in RUNS.items():
        train_contrastive(run_config(str(data), **changes), alone / name)
        assert len(curve(alone / name)) == 6
        assert curve(alone / name)[-1, 1] < curve(alone / name)[0, 1]
        worst = ((curve(ranks / name) - curve(alone / name)) / curve(alone / name)).abs().max()
        assert worst < 1e-4, name  # worst measured: 7e-7
        for folder in ("model", "model_ema") if "ema" in changes else ("model",):
            path = Path(folder, "model.safetensors")
            found, expected = load_file(ranks / name / path), load_file(alone / name / path)
            assert worst_error(found, expected) < 1e-3, name


def test_a_run_of_two_ranks_goes_on_as_one_process(tmp_path: Path) -> None:
    """Its checkpoints hold whole tensors, whoever wrote them."""
    data, ranks = tmp_path / "data", tmp_path / "ranks"
    captioned_pictures(data, 20)
    tiny_dual_encoder().save_pretrained(data / "model")
    launch(2, "run", data, ranks)
    for name, changes in RUNS.items():
        through = load_file(ranks / name / "model" / "model.safetensors")
        shutil.rmtree(ranks / name / "model")
        train_contrastive(run_config(str(data), **changes), ranks / name, resume=True)
        found = load_file(ranks / name / "model" / "model.safetensors")
        assert worst_error(found, through) < 1e-3, name
