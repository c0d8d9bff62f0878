"""Projectors on real ranks (torchrun, gloo) under ZeRO-3 against one process that sees the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from projector_worker import CONFIGS, alone

from vlm_vision.adapters.build import load_projector

pytest.importorskip("deepspeed")
WORKER = Path(__file__).with_name("projector_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(WORKER), str(output)]
    # As on a machine without a compiler.
    environment = {**os.environ, "PATH": "", "HOME": str(output), "TORCH_EXTENSIONS_DIR": str(output / "jit")}
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return output


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_learn_what_one_process_learns(name: str, ranks: Path) -> None:
    expected, losses = alone(CONFIGS[name])
    found = load_projector(ranks / name)
    assert found.config == expected.config
    # Worst difference measured: 3.9e-7.
    assert json.loads((ranks / "losses.json").read_text())[name] == pytest.approx(losses, rel=1e-5)
    assert losses[0] != losses[2]
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        # Worst difference measured: 6.0e-8.
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
