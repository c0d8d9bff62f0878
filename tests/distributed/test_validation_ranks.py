"""Held-out scores on real ranks (torchrun, gloo), which share the pictures, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import captioned_pictures, tiny_dual_encoder

from vlm_vision.config import load_config
from vlm_vision.train.validation import validate_dual_encoder
from vlm_vision.train.validation_config import ValidationConfig

WORKER = Path(__file__).with_name("validation_worker.py")


def on_ranks(ranks: int, config: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    output.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, str(WORKER), json.dumps(config), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[1])}
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Eleven pictures, which do not divide, and fewer distinct captions than ranks would like."""
    data = {"path": str(captioned_pictures(tmp_path / "data", 11)), "templates": ["a {}", "{}"]}
    probe = {"train": data, "test": data, "features": "both"}
    return {"zero_shot": data, "retrieval": data, "linear_probe": probe, "batch_size": 3}


def test_two_ranks_find_what_one_process_finds(config: dict[str, Any], tmp_path: Path) -> None:
    alone = validate_dual_encoder(tiny_dual_encoder(), load_config(ValidationConfig, config))
    first, second = on_ranks(2, config, tmp_path / "out")
    assert first == second == alone
    assert 0 < alone["text_to_image_r5"] < 1


def test_an_unreadable_picture_of_one_rank_ends_both(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "data" / "9.png").unlink()  # of the second rank's share
    found = on_ranks(2, config, tmp_path / "out")
    assert found[0] == found[1]
    assert "9.png' does not exist" in found[0]["error"]
