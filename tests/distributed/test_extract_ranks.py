"""Extraction on real ranks (torchrun): the bytes that one process writes, whatever is killed on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from extract_worker import BATCH_SIZE, SHARD_SIZE
from PIL import Image
from tiny import tiny_tower

from vlm_vision.feature_shards import FeatureShards

WORKER = Path(__file__).with_name("extract_worker.py")
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
PICTURES = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower, pictures of which two are broken, and the features that one process makes of them."""
    folder = tmp_path_factory.mktemp("extract")
    tiny_tower().save_pretrained(folder / "tower")
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        noise = random.integers(0, 256, (24, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"{number:02}.png")
    for number in (7, 40):
        (folder / "pictures" / f"{number:02}.png").write_bytes(b"<html>")
    alone = launch(folder, folder / "alone", ranks=1)
    assert alone.returncode == 0, alone.stderr[-4000:]
    return folder


def launch(folder: Path, output: Path, *, ranks: int = 2, die: int = 0) -> subprocess.CompletedProcess[str]:
    """Fresh processes: other tests leave settings of torch's kernels behind in theirs."""
    command = [*LAUNCHER, str(ranks), str(WORKER), str(folder), str(output), str(die)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_ranks_write_the_bytes_of_one(folder: Path) -> None:
    output = folder / "two"
    finished = launch(folder, output)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert contents(output) == contents(folder / "alone")
    batches = [int((folder / f"two.rank{rank}").read_text()) for rank in (0, 1)]
    assert min(batches) > 0
    assert sum(batches) == PICTURES // BATCH_SIZE
    assert "features: 100%" in finished.stderr
    assert len(FeatureShards(output)) == PICTURES - 2


def test_a_rank_that_is_killed_costs_its_shard_alone(folder: Path) -> None:
    output, whole = folder / "killed", contents(folder / "alone")
    broken = launch(folder, output, die=8)  # in its third shard: the memory of its first, now written
    assert broken.returncode != 0
    left = {name: content for name, content in contents(output).items() if name.startswith("shard-")}
    assert 0 < len(left) < sum(name.startswith("shard-") for name in whole)
    assert all(content == whole[name] for name, content in left.items())
    assert "index.jsonl" not in contents(output)

    times = {name: (output / name).stat().st_mtime_ns for name in left}
    resumed = launch(folder, output, ranks=1)  # another number of ranks
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    batches = int((folder / "killed.rank0").read_text())
    assert PICTURES - SHARD_SIZE * len(left) == pytest.approx(batches * BATCH_SIZE, abs=BATCH_SIZE)
    assert contents(output) == whole
    assert all((output / name).stat().st_mtime_ns == written for name, written in times.items())


def test_the_command_tells_an_error_once(folder: Path) -> None:
    command = [*LAUNCHER, "2", "-m", "vlm_vision.cli", "features", str(folder / "tower")]
    command += [str(folder / "pictures"), "-o", str(folder / "alone"), "--layer", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode != 0
    assert finished.stderr.count("error: ") == 1
    assert "was begun with layers [2], now [1]" in finished.stderr
