"""One rank of the contrastive checks; rank 0 writes what was found into a folder.

`gradients` averages the gradients of a shared batch over the ranks, by our losses and by open_clip's;
`run` trains on the pictures of a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from vlm_vision.train.losses import distill_loss, info_nce_loss, siglip_loss

Loss = Callable[[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor], Tensor]


class TwoTowers(nn.Module):
    """The smallest dual encoder: one layer a side, the log of the scale and the bias, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 5), nn.Linear(7, 5)
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        self.logit_bias = nn.Parameter(torch.tensor(-1.5))
        self.double()

    def forward(self, pictures: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, text = self.image(pictures), self.text(captions)
        scale, bias = self.logit_scale.exp(), self.logit_bias
        return normalize(image, dim=-1), normalize(text, dim=-1), scale, bias


def batch(pairs: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures, captions, what they say, and captions of no picture."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(pairs, 20, generator=generator, dtype=torch.float64)
    identities = torch.randint(0, 8, (pairs, 2), generator=generator)
    return numbers[:, :6], numbers[:, 6:13], identities, numbers[:, 13:]


def case(name: str, world: int = 1) -> Loss:
    """A loss on the outputs of the towers, with what each of `world` ranks knows beside them."""

    def loss(outputs: tuple[Tensor, Tensor, Tensor, Tensor], identities: Tensor, negatives: Tensor) -> Tensor:
        image, text, scale, bias = outputs
        options: dict[str, Any] = {}
        if "tiles" in name:
            options["tile_size"] = 2
        if "duplicates" in name:
            options |= {
                "identities": identities,
                "duplicates": "positive" if "positive" in name else "mask",
            }
        if "negatives" in name:
            options["negatives"] = negatives
        if name == "distill":
            teacher = normalize(image.detach().roll(1, 1), dim=-1), normalize(text.detach().flip(1), dim=-1)
            return distill_loss(image, text, scale, *teacher, scale.detach() / 2, tile_size=2) + 0 * bias
        if name.startswith("siglip"):
            return siglip_loss(image, text, scale, bias, **options)
        if name.startswith("open_clip"):
            theirs = (
                ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=world)
                if world > 1
                else ClipLoss()
            )
            return theirs(image, text, scale) + 0 * bias
        return info_nce_loss(image, text, scale, **options) + 0 * bias

    return loss


CASES = (
    "info_nce",
    "info_nce tiles",
    "info_nce tiles duplicates negatives",
    "info_nce positive duplicates",
    "siglip",
    "siglip tiles",
    "siglip tiles duplicates negatives",
    "siglip positive duplicates",
    "distill",
    "open_clip",
)


def run_config(data: str, **changes: Any) -> Any:
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
        "report": False,
    }
    if "validation" in changes:
        changes = {**changes, "validation": {"retrieval": {"path": f"{data}/train.csv"}, "every": 2}}
    return load_config(ContrastiveConfig, {**tree, **changes})


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cached": {"micro_batch_size": 2, "loss": {"tile_size": 3, "patch_weight": 0.5}},
    "split": {"parallel": "fsdp", "ema": 0.9, "validation": {"every": 2}},
    "split cached lora": {"parallel": "fsdp", "recipe": "lora", "micro_batch_size": 3},
}
"""Settings of the runs that several ranks do as one process does."""


def gradients(name: str) -> dict[str, Tensor]:
    """Mean loss and gradients over ranks, each of which sees its share of the batch."""
    is_split = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_split else (0, 1)
    model = TwoTowers()
    parallel = DistributedDataParallel(model) if is_split else model
    pictures, captions, identities, others = (part.chunk(world)[rank] for part in batch())
    negatives = normalize(model.text(others), dim=-1).detach()
    loss = case(name, world)(parallel(pictures, captions), identities, negatives)
    loss.backward()
    mean_loss = loss.detach() / world
    if is_split:
        dist.all_reduce(mean_loss)
    return {"loss": mean_loss, **{name: parameter.grad for name, parameter in model.named_parameters()}}


def main(task: str, data: str, output: Path) -> None:
    dist.init_process_group("gloo")
    is_main = dist.get_rank() == 0
    found = {name: gradients(name) for name in CASES}
    if task == "run":
        from vlm_vision.train.contrastive import train_contrastive

        for name, changes in RUNS.items():
            train_contrastive(run_config(data, **changes), output / name)
    if is_main:
        for name, tensors in found.items():
            save_file(tensors, output / f"{name}.safetensors")
    if dist.is_initialized():  # a thread of gloo that is left at the end aborts the process now and then
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
