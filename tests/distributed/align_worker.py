"""Alignment under one rank or several: every ZeRO stage, then resumes. Writes losses and weights as JSON.

`stop` leaves runs that end by SIGTERM, one for each ZeRO stage, and one that ends by SIGKILL; `resume` goes
on with copies of them, those that the output folder holds; `all` does so too, before runs of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from live_memory import ALIGNER, FULL, planned_and_measured
from safetensors.torch import load_file
from tiny import TOWER

from vlm_vision.adapters.lora import add_lora
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.config import load_config
from vlm_vision.train import stage as stage_module
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.deepspeed_engine import join_ranks, make_whole
from vlm_vision.train.lean_loading import load_llm_lean, shard
from vlm_vision.train.rules import base_name
from vlm_vision.train.run import read_metrics
from vlm_vision.train.vlm import load_llm

STEPS, BATCH_SIZE, STOP_AT = 6, 4, 3
ATTENDING: dict[str, dict[str, Any]] = {
    "qformer_text": {"layers": 2, "heads": 2, "hidden_size": 32, "num_queries": 4, "dropout": 0.0},
    "perceiver_resampler": {"layers": 1, "heads": 2, "head_width": 8, "num_latents": 4},
    "token_packer": {"levels": 1, "width": 16, "heads": 2},
    "sva": {"regions": [2], "layers": 1, "width": 16, "heads": 2},
}


TILING = {
    "mode": "anyres",
    "merge": "spatial_unpad",
    "grid_pinpoints": [[32, 64], [64, 32]],
}


def config(
    folder: Path, zero_stage: int, projector: Any = "mlp2x_gelu", tiling: Any = None, **stage: Any
) -> AlignConfig:
    """Every part learns, one conversation at a time, so that ranks accumulate gradients."""
    settings = {
        "name": "all",
        "data": {"file": str(folder / "train.json"), "image_folder": str(folder / "images"), "workers": 0},
        "learn": [{"match": "*"}],
        "lr": 3e-3,
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "micro_batch_size": 1,
        "max_length": 64,
        "zero_stage": zero_stage,
        "log_every": 1,
        **stage,
    }
    return load_config(
        AlignConfig,
        {
            "model": {"tower": TOWER, "llm": str(folder / "llm"), "projector": projector, "tiling": tiling},
            "stages": [settings],
        },
    )


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def weights(model: Path) -> dict[str, list[Any]]:
    """Per part: number of tensors and elements, and the sum of magnitudes of all of them."""
    found = {}
    for part in json.loads((model / "config.json").read_text(encoding="utf-8"))["parts"]:
        state = load_file(model / part / "model.safetensors")
        magnitude = sum(float(tensor.double().abs().sum()) for tensor in state.values())
        found[part] = [len(state), sum(tensor.numel() for tensor in state.values()), magnitude]
    return found


def adapted(folder: Path, zero_stage: int, **stage: Any) -> AlignConfig:
    """A frozen tower, a projector with a rate of its own, adapters on the language model: four groups."""
    rules = [
        {"match": "projector.*", "lr": 1e-2, "weight_decay": 0.1},
        {"match": "llm.*_proj.weight", "learn": "lora"},
        {"match": "llm.*norm.weight"},
    ]
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0}
    return config(folder, zero_stage, learn=rules, lora=lora, weight_decay=0.05, **stage)


def stop(folder: Path, output: Path) -> None:
    """The signals come to the last rank alone, in the middle of step STOP_AT, before the optimizer's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sent, codes = signal.SIGTERM, []
    take = stage_module.gradient_norm

    def send(engine: Any) -> float | None:
        if rank == world - 1 and engine.global_steps == STOP_AT - 1:
            os.kill(os.getpid(), sent)
        return take(engine)

    stage_module.gradient_norm = send
    for zero_stage in (3, 2, 1, 0):  # ZeRO-3 shards before DeepSpeed's engine has set anything up
        try:
            align(adapted(folder, zero_stage), output / f"stopped{zero_stage}")
        except SystemExit as stopped:
            codes.append(stopped.code)
    if rank == 0:
        (output / "results.json").write_text(json.dumps(codes), encoding="utf-8")
    dist.barrier()
    sent = signal.SIGKILL
    align(adapted(folder, 2, save_every=STOP_AT - 1), output / "killed")


class Results(dict[str, Any]):
    """Losses and weights of runs, by name."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def run(self, config: AlignConfig, name: str, *, resume: bool = False, suffix: str = "") -> None:
        run = self.output / name
        align(config, run, resume=resume)
        self[name + suffix] = {"losses": losses(run / "all"), "weights": weights(run / "model")}
        dist.barrier()


def go_on(folder: Path, results: Results) -> None:
    names = {f"stopped{zero_stage}": zero_stage for zero_stage in (0, 1, 2, 3)} | {"other_stage": 3}
    for name, zero_stage in names.items():
        if (results.output / name).exists():
            results.run(adapted(folder, zero_stage), name, resume=True)
    if (results.output / "killed").exists():
        results.run(adapted(folder, 2, save_every=STOP_AT - 1), "killed", resume=True)


def lean_loading(folder: Path) -> dict[str, Any]:
    """A language model loaded for ZeRO-3 beside the same loaded whole: bytes before sharding, differences."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        whole, lean = load_llm(folder / "llm", dtype=dtype), load_llm_lean(folder / "llm", dtype)
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in lean.parameters()}
        add_lora(lean, ["model.layers.0.mlp.up_proj.weight"], LoraConfig(rank=2))
        precision = {"bf16": {"enabled": dtype == torch.bfloat16}}
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **precision}
        shard(lean, settings, dtype, torch.device("cpu"))
        local = sum(parameter.ds_tensor.numel() for parameter in lean.parameters())
        make_whole(lean)
        expected = dict(whole.named_parameters())
        loaded = {base_name(name): p for name, p in lean.named_parameters() if ".lora_" not in name}
        same = [
            torch.equal(loaded[name], p) and loaded[name].dtype == p.dtype for name, p in expected.items()
        ]
        found[str(dtype)] = [
            sum(storages.values()) / sum(p.nbytes for p in expected.values()),
            local / sum(p.numel() for p in lean.parameters()) if dist.get_rank() == 0 else None,
            loaded.keys() == expected.keys() and all(same),
        ]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, found)
    return {"first": everyones[0], "other": everyones[-1]}


def run_all(folder: Path, results: Results) -> None:
    for zero_stage in (0, 1, 2, 3):
        results.run(config(folder, zero_stage), f"zero{zero_stage}")
    results.run(adapted(folder, 2), "through")
    for name, options in ATTENDING.items():
        for zero_stage in (0, 3) if dist.get_world_size() == 1 else (3,):
            settings = config(folder, zero_stage, projector={"name": name, **options})
            results.run(settings, f"{name}{zero_stage}")
    for zero_stage in (0, 3) if dist.get_world_size() == 1 else (2, 3):
        settings = config(folder, zero_stage, tiling=TILING, max_length=128)
        results.run(settings, f"tiles{zero_stage}")
    files = config(folder, 3).stages[0].data.model_dump() | {"feature_cache": str(results.output / "kept")}
    frozen_tower = [{"match": "projector.*"}, {"match": "llm.*"}]
    for name, tiles in (("", {}), ("_tiles", {"tiling": TILING, "max_length": 128})):
        results.run(config(folder, 3, data=files, learn=frozen_tower, **tiles), f"kept{name}3")
        results.run(config(folder, 3, learn=frozen_tower, **tiles), f"frozen{name}3")
    if dist.get_world_size() == 2:
        results["loading"] = lean_loading(folder / "measured")
        results["memory"] = {}
        for zero_stage, learn in ((1, FULL), (2, FULL), (3, FULL), (3, ALIGNER)):
            name = f"memory{zero_stage}_{len(learn)}"
            run, settings = results.output / name, {"zero_stage": zero_stage, "precision": "bf16"}
            found = planned_and_measured(folder / "measured", run, 2, learn=learn, **settings)
            results["memory"][name] = found
    for zero_stage in (2, 3):
        name, settings = f"saved{zero_stage}", config(folder, zero_stage, save_every=STEPS // 2)
        results.run(settings, name)
        if dist.get_rank() == 0:  # as if killed some time after the checkpoint
            shutil.rmtree(results.output / name / "model")
            (results.output / name / "all" / "done.json").unlink()
        dist.barrier()
        results.run(settings, name, resume=True, suffix="_resumed")


def main(what: str, folder: Path, output: Path) -> None:
    join_ranks()
    if what == "stop":
        stop(folder, output)
        return
    results = Results(output)
    go_on(folder, results)
    if what == "all":
        run_all(folder, results)
    if dist.get_rank() == 0:
        (output / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
