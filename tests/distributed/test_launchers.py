"""The launches that docs show, without GPUs: torchrun, and deepspeed with a hostfile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import colour_records, tiny_llm, tiny_tower

pytest.importorskip("deepspeed")
CONFIG = """
model: {{tower: {folder}/tower, projector: mlp2x_gelu, llm: {folder}/llm}}
stages:
  - name: one
    data: {{file: {folder}/train.json, image_folder: {folder}/images, workers: 0}}
    learn: [{{match: "projector.*"}}]
    lr: 1.0e-2
    steps: 2
    batch_size: 8
    micro_batch_size: 2
    max_length: 64
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tiny_llm(folder / "llm")
    tiny_tower().save_pretrained(folder / "tower")
    colour_records(folder, 8)
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder), encoding="utf-8")
    (folder / "hostfile").write_text("localhost slots=2\n", encoding="utf-8")
    return folder


def launch(folder: Path, output: Path, *command: Any) -> str:
    """Run a launcher on `align`, and give what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder), "DS_ACCELERATOR": "cpu"}
    tail = ["align", folder / "config.yaml", "-o", output]
    done = subprocess.run(
        [*map(str, command), *map(str, tail)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


PORT = ("--master_port", str(29000 + os.getpid() % 1000))


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_align(folder: Path, tmp_path: Path, launcher: str) -> None:
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m"]
    else:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", folder / "hostfile"]
        # As each node of several runs it where they cannot reach one another by ssh.
        command += ["--no_ssh", "--node_rank", 0, "--master_addr", "127.0.0.1", *PORT, "--module"]
    printed = launch(folder, tmp_path / "run", *command, "vlm_vision.cli")
    assert printed.count("stage 'one': 2 steps, batch 8, ZeRO-2") == 1
    assert json.loads((tmp_path / "run" / "one" / "done.json").read_text(encoding="utf-8"))["parts"] == [
        "projector"
    ]
    assert (tmp_path / "run" / "model" / "config.json").is_file()
