"""Projectors that learn under ZeRO-3, every weight of them in shards, and are saved whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm_vision.adapters import build_projector
from vlm_vision.adapters.build import save_projector
from vlm_vision.adapters.projector import Projector
from vlm_vision.train.deepspeed_engine import join_ranks, make_whole, start_engine

# One of each family; a row here is all that another needs.
CONFIGS: dict[str, Any] = {
    "linear": "linear",
    "mlp_res": "mlp2x_res1x_gelu",
    "pixel_shuffle": {"name": "pixel_shuffle", "factor": 2},
    "mlp_downsample": "mlp_downsample_3x3_fix",
    "pool": {"name": "pool", "mode": "bilinear", "first": "mlp"},
    "spatial_pool": "spatial_pool",
    "c_abstractor": {"name": "c_abstractor", "target": [2, 2], "depth": 1, "hidden_size": 32},
    "ldp": "ldp",
    "ldpv2": {"name": "ldpv2", "target": [2, 2]},
    "qformer": {"name": "qformer", "layers": 2, "heads": 2, "hidden_size": 32, "num_queries": 5},
}
D, L, BATCH = 24, 16, 4
GRIDS = [(4, 6), (6, 4), (4, 6)]  # of each step; built for the first


class Reader(nn.Module):
    """A projector within a model, and what its tokens learn to get smaller."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projector = build_projector(config, D, L, GRIDS[0]).eval()  # dropout would differ by rank

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens: Tensor = self.projector(patches, grid)
        return tokens.square().mean()


def batch(step: int, part: int = 0, parts: int = 1) -> Tensor:
    """A rank's part of a step's patches."""
    patches = torch.randn(BATCH, 24, D, generator=torch.Generator().manual_seed(step))
    return patches.chunk(parts)[part]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def alone(config: Any) -> tuple[Projector, list[float]]:
    """What one process makes of the whole batches, without DeepSpeed."""
    model, losses = Reader(config), []
    optimizer = optimizer_of(model)
    for step, grid in enumerate(GRIDS):
        loss = model(batch(step), grid)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.projector, losses


def main(output: Path) -> None:
    rank, world, _ = join_ranks()
    found = {}
    for name, config in CONFIGS.items():
        model, losses = Reader(config), []
        settings = {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // world,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # 1 where nothing is said
        }
        engine = start_engine(model, optimizer_of(model), None, settings)
        assert not any(parameter.numel() for parameter in model.parameters()), "a weight is not in shards"
        for step, grid in enumerate(GRIDS):
            loss = engine(batch(step, rank, world), grid)
            engine.backward(loss)
            engine.step()
            dist.all_reduce(loss := loss.detach())
            losses.append(float(loss) / world)
        make_whole(model)
        if rank == 0:
            save_projector(model.projector, output / name)
        found[name] = losses
        dist.barrier()
    if rank == 0:
        (output / "losses.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
