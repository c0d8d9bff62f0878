"""Alignment under one rank or several: every ZeRO stage, then resumes. Writes losses and weights as JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from safetensors.torch import load_file
from tiny import TOWER

from vlm_vision.config import load_config
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.run import read_metrics

STEPS, BATCH_SIZE = 6, 4
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


def main(folder: Path, output: Path) -> None:
    results: dict[str, Any] = {}

    def run(name: str, zero_stage: int, *, resume: bool = False, **stage: Any) -> None:
        align(config(folder, zero_stage, **stage), output / name, resume=resume)
        key = f"{name}_resumed" if resume else name
        results[key] = {"losses": losses(output / name / "all"), "weights": weights(output / name / "model")}
        dist.barrier()

    for zero_stage in (0, 1, 2, 3):
        run(f"zero{zero_stage}", zero_stage)
    for name, options in ATTENDING.items():
        for zero_stage in (0, 3) if dist.get_world_size() == 1 else (3,):
            run(f"{name}{zero_stage}", zero_stage, projector={"name": name, **options})
    for zero_stage in (0, 3) if dist.get_world_size() == 1 else (2, 3):
        run(f"tiles{zero_stage}", zero_stage, tiling=TILING, max_length=128)
    files = config(folder, 3).stages[0].data.model_dump() | {"feature_cache": str(output / "kept")}
    run("kept3", 3, data=files, learn=[{"match": "projector.*"}, {"match": "llm.*"}])
    run("frozen3", 3, learn=[{"match": "projector.*"}, {"match": "llm.*"}])
    for zero_stage in (2, 3):
        name = f"saved{zero_stage}"
        run(name, zero_stage, save_every=STEPS // 2)
        if dist.get_rank() == 0:  # as if killed some time after the checkpoint
            shutil.rmtree(output / name / "model")
            (output / name / "all" / "done.json").unlink()
        dist.barrier()
        run(name, zero_stage, save_every=STEPS // 2, resume=True)
    if dist.get_rank() == 0:
        (output / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
