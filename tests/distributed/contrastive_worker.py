"""One rank of the contrastive checks; rank 0 writes what was found into a folder.

`gradients` averages the gradients of a shared batch over the ranks, by our loss and by open_clip's;
`run` trains on the pictures of a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from vlm_vision.train.losses import info_nce_loss


class TwoTowers(nn.Module):
    """The smallest dual encoder: one layer a side and the log of the scale, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 5), nn.Linear(7, 5)
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        self.double()

    def forward(self, pictures: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.image(pictures), self.text(captions)
        return normalize(image, dim=-1), normalize(text, dim=-1), self.logit_scale.exp()


def batch(pairs: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(pairs, 13, generator=generator, dtype=torch.float64)
    return numbers[:, :6], numbers[:, 6:]


def run_config(data: str) -> Any:
    """A run whose batches are whole at 1, 2 and 4 ranks."""
    from vlm_vision.config import load_config
    from vlm_vision.train.contrastive_config import ContrastiveConfig

    tree = {
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


def gradients(loss_function: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Mean loss and gradients over ranks, each of which sees its share of the batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = TwoTowers()
    parallel = DistributedDataParallel(model)
    loss = loss_function(*parallel(*(side.chunk(world)[rank] for side in batch())))
    loss.backward()
    mean_loss = loss.detach() / world
    dist.all_reduce(mean_loss)
    return {"loss": mean_loss, **{name: parameter.grad for name, parameter in model.named_parameters()}}


def main(task: str, data: str, output: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {"ours": gradients(info_nce_loss)}
    if task == "run":
        from open_clip.loss import ClipLoss

        found["open_clip"] = gradients(
            ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        )
        from vlm_vision.train.contrastive import train_contrastive

        train_contrastive(run_config(data), output / "run")
    if rank == 0:
        for name, tensors in found.items():
            save_file(tensors, output / f"{name}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
