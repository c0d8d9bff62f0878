"""A checkpoint is complete or absent, whatever a kill or a full disk leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from vlm_vision.errors import DataError
from vlm_vision.train.checkpoint import (
    MANIFEST,
    find_checkpoint,
    is_complete,
    latest_checkpoint,
    save_checkpoint,
)


def write(folder: Path) -> None:
    (folder / "nested").mkdir()
    (folder / "weights").write_bytes(b"0123456789")
    (folder / "nested" / "state").write_bytes(b"ab")


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, write)
    assert path == tmp_path / "step_7"
    assert latest_checkpoint(tmp_path) == (7, path)
    assert json.loads((path / MANIFEST).read_text())["files"] == {"nested/state": 2, "weights": 10}


def test_nothing_there_is_nothing_found(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert find_checkpoint(tmp_path / "absent", resume=True) is None


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        save_checkpoint(tmp_path, step, write)
    assert steps(tmp_path) == ["step_10", "step_12"]  # by number, not by letter


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, write, keep=0)
    assert steps(tmp_path) == ["step_2"]


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_kill_while_saving_leaves_the_last_good_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, write)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "renaming":
            patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, die if moment == "writing" else write)
    assert steps(tmp_path) == ["step_1", "step_2.tmp"]
    assert latest_checkpoint(tmp_path) == (1, tmp_path / "step_1")
    assert find_checkpoint(tmp_path, resume=True) == (1, tmp_path / "step_1")
    assert steps(tmp_path) == ["step_1"]  # the leftover is swept
    save_checkpoint(tmp_path, 2, write)
    assert latest_checkpoint(tmp_path) == (2, tmp_path / "step_2")


def test_a_leftover_that_another_rank_sweeps_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / "step_2.tmp"
    leftover.mkdir()
    rmtree = shutil.rmtree

    def twice(path: Path, **options: bool) -> None:
        rmtree(path)
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", twice)
    assert find_checkpoint(tmp_path, resume=True) is None
    assert not leftover.exists()


def damage_size(path: Path) -> None:
    (path / "weights").write_bytes(b"01234")


def damage_file(path: Path) -> None:
    (path / "nested" / "state").unlink()


def damage_manifest(path: Path) -> None:
    (path / MANIFEST).write_text('{"files": ')


def damage_content(path: Path) -> None:
    (path / MANIFEST).write_text("[]")


DAMAGES = (damage_size, damage_file, damage_manifest, damage_content, lambda path: (path / MANIFEST).unlink())


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_damaged_checkpoint_is_passed_over(number: int, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, write)
    DAMAGES[number](tmp_path / "step_2")
    assert not is_complete(tmp_path / "step_2")
    assert latest_checkpoint(tmp_path) == (1, tmp_path / "step_1")


def test_damaged_ones_take_no_place_among_the_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write)
    for step in (8, 9):
        save_checkpoint(tmp_path, step, write, keep=9)
        damage_file(tmp_path / f"step_{step}")
    save_checkpoint(tmp_path, 2, write)
    assert steps(tmp_path) == ["step_1", "step_2"]


def test_a_new_run_does_not_write_over_an_old_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, write)
    with pytest.raises(DataError, match="already holds a checkpoint of step 3: continue it with --resume"):
        find_checkpoint(tmp_path, resume=False)
    assert steps(tmp_path) == ["step_3"]


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, write)
    (tmp_path / "step_9").write_text("a file")
    (tmp_path / "step_best").mkdir()
    assert latest_checkpoint(tmp_path) == (3, tmp_path / "step_3")
