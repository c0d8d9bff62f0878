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
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to that tensor's largest element."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in expected.items()
    )


def curve(run: Path) -> Tensor:
    columns = ("step", "loss", "grad_norm", "lr", "logit_scale")
    lines = read_metrics(run / "metrics.jsonl")
    return torch.tensor([[line[column] for column in columns] for line in lines if "loss" in line])


def check_gradients(ranks: Path) -> None:
    """Of every loss against one process that has the whole batch."""
    for name in CASES:
        worst = worst_error(load_file(ranks / f"{name}.safetensors"), gradients(name))
        assert worst < 1e-12, name  # worst measured: 2e-15


def test_four_ranks_compute_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    launch(4, "gradients", tmp_path, tmp_path / "ranks")
    check_gradients(tmp_path / "ranks")


def test_two_ranks_train_as_one_process_does_and_one_goes_on_where_they_stopped(tmp_path: Path) -> None:
    data, ranks, alone = tmp_path / "data", tmp_path / "ranks", tmp_path / "alone"
    captioned_pictures(data, 20)
    tiny_dual_encoder().save_pretrained(data / "model")
    launch(2, "run", data, ranks)
    check_gradients(ranks)
    for name, changes in RUNS.items():
        settings = run_config(str(data), **changes)
        train_contrastive(settings, alone / name)
        assert len(curve(alone / name)) == 6
        assert curve(alone / name)[-1, 1] < curve(alone / name)[0, 1]
        assert worst_error(columns(ranks / name), columns(alone / name)) < 1e-4  # worst measured: 7e-7
        found = models(ranks / name)
        assert worst_error(found, models(alone / name)) < 1e-3  # Adam makes much of small differences

        shutil.rmtree(ranks / name / "model")  # checkpoints hold whole tensors, whoever wrote them
        train_contrastive(settings, ranks / name, resume=True)
        assert worst_error(models(ranks / name), found) < 1e-3


def columns(run: Path) -> dict[str, Tensor]:
    names = ("step", "loss", "grad_norm", "lr", "logit_scale")
    return dict(zip(names, curve(run).T, strict=True))


def models(run: Path) -> dict[str, Tensor]:
    """Tensors of the model and, where there is one, of its average."""
    return {
        f"{folder.name}.{name}": tensor
        for folder in sorted(run.glob("model*"))
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
