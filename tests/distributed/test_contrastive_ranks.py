"""Contrastive training on real ranks (torchrun, gloo) against one process that sees the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contrastive_worker import batch, run_config
from safetensors.torch import load_file
from tiny import captioned_pictures, tiny_dual_encoder
from torch import Tensor

from vlm_vision.train.contrastive import train_contrastive
from vlm_vision.train.losses import info_nce_loss
from vlm_vision.train.run import read_metrics

WORKER = Path(__file__).with_name("contrastive_worker.py")


def launch(ranks: int, data: Path, output: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, str(WORKER), str(data), str(output)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]


def one_process() -> dict[str, Tensor]:
    model = tiny_dual_encoder().double()
    loss = info_nce_loss(*model(*batch()))
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {"loss": loss.detach(), **found}


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to that tensor's largest element."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_process_computes(ranks: int, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "ranks"
    output.mkdir()
    captioned_pictures(data, 20)
    tiny_dual_encoder().save_pretrained(data / "model")
    launch(ranks, data, output)

    expected = one_process()
    for name in ("ours", "open_clip"):
        found = load_file(output / f"{name}.safetensors")
        assert worst_error(found, expected) < 1e-10, name  # worst measured: see below

    train_contrastive(run_config(str(data)), tmp_path / "alone")
    alone, together = (
        [(line["step"], line["loss"], line["grad_norm"], line["logit_scale"]) for line in read_metrics(run / "metrics.jsonl")]
        for run in (tmp_path / "alone", output / "run")
    )
    assert len(together) == 6
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), rtol=1e-4)
    weights_alone, weights_together = (
        load_file(run / "model" / "model.safetensors") for run in (tmp_path / "alone", output / "run")
    )
    assert worst_error(weights_together, weights_alone) < 1e-3
    print(worst_error(weights_together, weights_alone), (torch.tensor(together)/torch.tensor(alone)-1).abs().max(), [worst_error(load_file(output / f"{n}.safetensors"), expected) for n in ("ours", "open_clip")])
