"""Alignment on real ranks (torchrun, gloo): ZeRO stages and world sizes agree, a resume changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from align_worker import ATTENDING, BATCH_SIZE, STEPS
from tiny import colour_records, tiny_llm

from vlm_vision.train.pairs import EpochBatches

pytest.importorskip("deepspeed")
RECORDS, TEXT_ONLY = 16, 8
WORKER = Path(__file__).with_name("align_worker.py")


def launch(ranks: int, data: Path, output: Path) -> dict[str, Any]:
    """Run the worker without any compiler at hand, as on a machine that has none."""
    launcher = (
        [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    )
    environment = {
        "OMP_NUM_THREADS": "1",
        "HOME": str(output),
        "PATH": "",
        "TORCH_EXTENSIONS_DIR": str(output / "jit"),
    }
    output.mkdir()
    command = [sys.executable, *launcher, str(WORKER), str(data), str(output)]
    with (output / "log").open("w+") as log:
        worker = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        try:
            code = worker.wait(timeout=300)
        finally:
            worker.terminate()  # torchrun then ends its ranks, which a kill would leave behind
            worker.wait(timeout=60)
        assert code == 0, (output / "log").read_text()[-4000:]
    assert not (output / "jit").exists(), "DeepSpeed compiled something"
    results: dict[str, Any] = json.loads((output / "results.json").read_text())
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    data = tmp_path_factory.mktemp("data")
    tiny_llm(data / "llm")
    colour_records(data, RECORDS, TEXT_ONLY)
    return {ranks: launch(ranks, data, data / f"ranks{ranks}") for ranks in (1, 2)}


def test_some_step_pairs_a_text_only_rank_with_a_picture_rank() -> None:
    shares = [list(EpochBatches(RECORDS, BATCH_SIZE, 0, 0, STEPS, rank, 2)) for rank in (0, 1)]
    kinds = [[[index >= RECORDS - TEXT_ONLY for _, index in keys] for keys in share] for share in shares]
    pairs = [
        (a, b) for step_a, step_b in zip(*kinds, strict=True) for a, b in zip(step_a, step_b, strict=True)
    ]
    assert any(a != b for a, b in pairs)


def test_losses_agree_over_zero_stages_and_ranks(results: dict[int, dict[str, Any]]) -> None:
    reference = results[1]["zero0"]["losses"]
    assert len(reference) == STEPS
    assert reference[-1] < reference[0]
    for ranks in (1, 2):
        for zero_stage in (0, 1, 2, 3):
            # Worst difference measured: 2.4e-7.
            assert results[ranks][f"zero{zero_stage}"]["losses"] == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("name", ATTENDING)
def test_projectors_that_attend_agree_over_zero_stages_and_ranks(
    results: dict[int, dict[str, Any]], name: str
) -> None:
    """With text alone on one of two ranks, too: the other waits for no gathering."""
    reference = results[1][f"{name}0"]["losses"]
    assert reference[-1] < reference[0]
    for ranks in (1, 2):
        # Worst difference measured: 4.8e-7.
        assert results[ranks][f"{name}3"]["losses"] == pytest.approx(reference, abs=1e-5)


def test_pictures_in_tiles_agree_over_zero_stages_and_ranks(results: dict[int, dict[str, Any]]) -> None:
    """With text alone on one of two ranks, too; the newline learns and is saved as of one process."""
    reference = results[1]["tiles0"]
    assert reference["losses"][-1] < reference["losses"][0]
    assert reference["weights"]["tiles"][:2] == [1, 32]
    for ranks, zero_stage in ((1, 3), (2, 2), (2, 3)):
        found = results[ranks][f"tiles{zero_stage}"]
        # Worst difference measured: 0.
        assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        # Worst difference measured: 6.5e-8.
        assert found["weights"]["tiles"][2] == pytest.approx(reference["weights"]["tiles"][2], rel=1e-6)


def test_saved_weights_are_whole_and_agree(results: dict[int, dict[str, Any]]) -> None:
    reference = results[1]["zero0"]["weights"]
    for ranks in (1, 2):
        for zero_stage in (0, 1, 2, 3):
            found = results[ranks][f"zero{zero_stage}"]["weights"]
            for part, (tensors, elements, magnitude) in reference.items():
                assert found[part][:2] == [tensors, elements]
                # Worst difference measured: 5.2e-9.
                assert found[part][2] == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_resume_is_exact(results: dict[int, dict[str, Any]], ranks: int, zero_stage: int) -> None:
    through, resumed = (results[ranks][f"saved{zero_stage}{suffix}"] for suffix in ("", "_resumed"))
    # Measured equal; the room is for memory alignment, by which sums on a CPU may differ in the last bit.
    assert resumed["losses"] == pytest.approx(through["losses"], abs=1e-6)
    for part, (*_, magnitude) in through["weights"].items():
        assert resumed["weights"][part][2] == pytest.approx(magnitude, rel=1e-7)


def test_kept_features_change_nothing_and_a_text_only_rank_waits_for_no_tower(
    results: dict[int, dict[str, Any]],
) -> None:
    reference = results[1]["frozen3"]["losses"]
    for ranks in (1, 2):
        # Worst difference measured: 2.4e-7.
        assert results[ranks]["kept3"]["losses"] == pytest.approx(reference, abs=1e-5)
