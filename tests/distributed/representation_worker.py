"""One rank of the representation checks; rank 0 writes what was found into a folder.

`objective` averages loss and gradients of a shared batch over the ranks; `run` trains on the pictures of a
folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from qformers import QFORMER, tiny_batch, tiny_representation
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlm_vision.config import load_config
from vlm_vision.train.representation_config import ObjectiveConfig, RepresentationConfig
from vlm_vision.train.representation_objective import RepresentationObjective, gumbel_noise

OBJECTIVES: dict[str, dict[str, float]] = {
    name: {"itc": 0.0, "itm": 0.0, "itg": 0.0, name: 1.0} for name in ("itc", "itm", "itg")
}
OBJECTIVES["all"] = {"itc": 1.0, "itm": 0.5, "itg": 2.0}


def gradients(name: str, folder: Path) -> dict[str, Tensor]:
    """Mean loss and gradients over ranks, each of which has its share, dealt as a loader deals it."""
    is_split = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_split else (0, 1)
    model = tiny_representation(folder / f"tokenizer{rank}")
    patches, ids, _ = tiny_batch(model)
    identities = torch.tensor([0, 1, 2, 0, 3, 4])[:, None]
    noise = gumbel_noise(len(ids), 0, 1)
    objective = RepresentationObjective(model, ObjectiveConfig(**OBJECTIVES[name]))
    parallel = DistributedDataParallel(objective) if is_split else objective
    mine = slice(rank, None, world)
    loss = parallel(patches[mine], ids[mine], identities[mine], noise[:, mine]).total
    loss.backward()
    mean_loss = loss.detach() / world
    if is_split:
        dist.all_reduce(mean_loss)
    found = {other: parameter.grad for other, parameter in model.named_parameters()}
    return {"loss": mean_loss, **{other: grad for other, grad in found.items() if grad is not None}}


def run_config(data: str) -> RepresentationConfig:
    tree: dict[str, Any] = {
        "tower": f"{data}/tower",
        "tokenizer": f"{data}/llm",
        "bert": None,
        "qformer": QFORMER,
        "data": {"path": f"{data}/train.csv"},
        "augment": {"crop_area": [1.0, 1.0], "aspect": [1.0, 1.0]},
        "validation": {"retrieval": {"path": f"{data}/train.csv"}, "rerank": 3, "every": 4, "batch_size": 4},
        "max_text_tokens": 8,
        "batch_size": 8,
        "steps": 6,
        "lr": 1e-3,
        "log_every": 1,
        "save_every": 4,
        "workers": 0,
    }
    return load_config(RepresentationConfig, tree)


def main(data: str, output: Path) -> None:
    from vlm_vision.train.representation_stage import train_representation

    dist.init_process_group("gloo")
    for name in OBJECTIVES:
        found = gradients(name, output)
        if dist.get_rank() == 0:
            save_file(found, output / f"{name}.safetensors")
    train_representation(run_config(data), output / "run")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
