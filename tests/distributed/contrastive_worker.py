"""One rank of the contrastive checks: gradients of a shared batch, then a whole run. Rank 0 writes them down."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from tiny import tiny_dual_encoder
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlm_vision.config import load_config
from vlm_vision.train.contrastive import train_contrastive
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.losses import info_nce_loss


def batch(pairs: int = 8) -> tuple[Tensor, Tensor]:
    """Random pixels and token ids for the tiny dual encoder, in double precision."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(pairs, 3, 32, 32, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(1, 1000, (pairs, 16), generator=generator)


def run_config(data: str) -> ContrastiveConfig:
    tree: dict[str, Any] = {
        "model": f"{data}/model",
        "data": {"path": f"{data}/train.csv"},
        "recipe": "scratch",
        "augment": {"crop_area": [0.5, 1.0], "brightness": 0.3},
        "batch_size": 8,
        "steps": 6,
        "lr": 1e-3,
        "log_every": 1,
        "save_every": 4,
        "workers": 0,
    }
    return load_config(ContrastiveConfig, tree)


def gradients(model: torch.nn.Module, loss_function: Any) -> dict[str, Tensor]:
    """Of this rank's share of the batch, averaged over ranks by data-parallel training; and the mean loss."""
    pixels, tokens = batch()
    rank, world = dist.get_rank(), dist.get_world_size()
    model.zero_grad()
    loss = loss_function(*DistributedDataParallel(model)(pixels.chunk(world)[rank], tokens.chunk(world)[rank]))
    loss.backward()
    mean_loss = loss.detach() / world
    dist.all_reduce(mean_loss)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": mean_loss, **found}


def main(data: str, output: Path) -> None:
    dist.init_process_group("gloo")
    model = tiny_dual_encoder().double()
    rank, world = dist.get_rank(), dist.get_world_size()
    theirs = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    for name, loss_function in (("ours", info_nce_loss), ("open_clip", theirs)):
        found = gradients(model, loss_function)
        if rank == 0:
            save_file(found, output / f"{name}.safetensors")
    train_contrastive(run_config(data), output / "run")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
