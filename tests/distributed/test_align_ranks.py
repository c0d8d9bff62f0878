"""Alignment on real ranks (torchrun, gloo): ZeRO stages and world sizes agree, a resume changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from align_worker import ATTENDING, BATCH_SIZE, STEPS, STOP_AT, config
from live_memory import measured_data
from tiny import colour_records, tiny_llm

from vlm_vision.errors import VlmVisionError
from vlm_vision.train.checkpoint import latest_checkpoint
from vlm_vision.train.pairs import EpochBatches
from vlm_vision.train.ranks import run_on_ranks

pytest.importorskip("deepspeed")
RECORDS, TEXT_ONLY = 16, 8
STOPPED = [f"stopped{zero_stage}" for zero_stage in (0, 1, 2, 3)]
WORKER = Path(__file__).with_name("align_worker.py")


def launch(ranks: int, what: str, data: Path, output: Path, *, killed: bool = False) -> Any:
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
    output.mkdir(exist_ok=True)
    command = [sys.executable, *launcher, str(WORKER), what, str(data), str(output)]
    with (output / "log").open("w+") as log:
        worker = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        try:
            code = worker.wait(timeout=900)  # a slow machine is no failure
        finally:
            worker.terminate()  # torchrun then ends its ranks, which a kill would leave behind
            worker.wait(timeout=60)
        assert (code != 0) == killed, (output / "log").read_text()[-4000:]
    assert not (output / "jit").exists(), "DeepSpeed compiled something"
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    tiny_llm(data / "llm")
    colour_records(data, RECORDS, TEXT_ONLY)
    measured_data(data / "measured")
    return data


@pytest.fixture(scope="module")
def stopped(data: Path) -> tuple[list[int], Path]:
    """Exit codes and runs of two ranks that were stopped."""
    codes = launch(2, "stop", data, data / "stopped", killed=True)
    return codes, data / "stopped"


@pytest.fixture(scope="module")
def results(data: Path, stopped: tuple[list[int], Path]) -> dict[int, dict[str, Any]]:
    found = {}
    for ranks, names in ((1, STOPPED), (2, ["killed"]), (4, STOPPED)):
        output = data / f"ranks{ranks}"
        for name in names:
            shutil.copytree(stopped[1] / name, output / name)
        if ranks == 1:
            shutil.copytree(stopped[1] / "stopped2", output / "other_stage")
        found[ranks] = launch(ranks, "resume" if ranks == 4 else "all", data, output)
    return found


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


@pytest.mark.parametrize("tiles", ["", "_tiles"])
def test_kept_features_change_nothing_and_a_text_only_rank_waits_for_no_tower(
    results: dict[int, dict[str, Any]], tiles: str
) -> None:
    reference = results[1][f"frozen{tiles}3"]["losses"]
    for ranks in (1, 2):
        # Worst difference measured: 2.4e-7.
        assert results[ranks][f"kept{tiles}3"]["losses"] == pytest.approx(reference, abs=1e-5)


def align_broken(folder: Path, output: Path, max_bad_share: float) -> None:
    from vlm_vision.train.align import align

    files = {**config(folder, 2).stages[0].data.model_dump(), "max_bad_share": max_bad_share}
    align(config(folder, 2, data=files, steps=None, epochs=2), output)


def test_bad_records_of_all_ranks_are_counted_together_and_listed_once(tmp_path: Path) -> None:
    tiny_llm(tmp_path / "llm")
    colour_records(tmp_path, 16)
    for number in (0, 4, 8, 12):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(VlmVisionError, match="4 records cannot be used, max_bad_share allows 3"):
        run_on_ranks(2, align_broken, tmp_path, tmp_path / "three", 3 / 16)
    run_on_ranks(2, align_broken, tmp_path, tmp_path / "four", 4 / 16)
    listed = (tmp_path / "four" / "all" / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 4


def test_sigterm_to_one_rank_ends_all_after_a_checkpoint(stopped: tuple[list[int], Path]) -> None:
    codes, runs = stopped
    assert codes == [143] * 4
    for name in STOPPED:
        found = latest_checkpoint(runs / name / "all" / "checkpoints")
        assert found is not None
        assert found[0] == STOP_AT + 1  # the signal came when ranks had agreed to finish step STOP_AT
        files = {path.name for path in found[1].iterdir()}
        assert files == {"manifest.json", "state.json", "rank_0.pt", "rank_1.pt"}


@pytest.mark.parametrize(("ranks", "name"), [(1, "other_stage"), *product((1, 4), STOPPED)])
def test_a_run_of_two_ranks_goes_on_with_any_number(
    results: dict[int, dict[str, Any]], ranks: int, name: str
) -> None:
    """Frozen parts, adapters, several groups; every ZeRO stage, and ZeRO-2's checkpoint under ZeRO-3."""
    through, found = results[1]["through"], results[ranks][name]
    # Worst difference measured: 2.4e-7.
    assert found["losses"] == pytest.approx(through["losses"], abs=1e-5)
    for part, (tensors, elements, magnitude) in through["weights"].items():
        assert found["weights"][part][:2] == [tensors, elements]
        # Worst difference measured: 1.3e-9.
        assert found["weights"][part][2] == pytest.approx(magnitude, rel=1e-6)


def test_a_killed_run_goes_on_as_if_it_had_not_been(results: dict[int, dict[str, Any]]) -> None:
    through, found = results[2]["through"], results[2]["killed"]
    # Measured equal; the room is for memory alignment, as above.
    assert found["losses"] == pytest.approx(through["losses"], abs=1e-6)
    for part, (*_, magnitude) in through["weights"].items():
        assert found["weights"][part][2] == pytest.approx(magnitude, rel=1e-7)


def test_memory_of_two_ranks_is_what_torch_accounts_for(results: dict[int, dict[str, Any]]) -> None:
    for name, (kept, peak) in results[2]["memory"].items():
        # Worst difference measured: 6.6 % (ZeRO-3 keeps small parameters whole) and 3.7 %.
        assert kept[1] == pytest.approx(kept[0], rel=0.1), name
        assert peak[1] == pytest.approx(peak[0], rel=0.1), name


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_zero_3_loads_a_language_model_once(results: dict[int, dict[str, Any]], dtype: str) -> None:
    """The files are in fp32. What rank 0 gathers in the end is what loading it whole gives."""
    first, other = (results[2]["loading"][rank][dtype] for rank in ("first", "other"))
    assert other[0] < 1e-3  # of the model in memory before sharding
    assert first[1] == pytest.approx(0.5, abs=0.01)
    assert first[2]
