"""Step checkpoints that are complete or absent: written beside, flushed, listed in a manifest, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vlm_vision.errors import DataError

MANIFEST = "manifest.json"


def save_checkpoint(folder: str | Path, step: int, write: Callable[[Path], None], *, keep: int = 2) -> Path:
    """Write `folder/step_N` through `write(temporary folder)`, then drop all but the newest `keep`.

    The old ones go only after the new one is in place, so at least one valid checkpoint exists at any time;
    damaged ones do not count, and go too.
    """
    folder = Path(folder)
    final, partial = folder / f"step_{step}", folder / f"step_{step}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    seal(partial, final)
    complete = [other for other in _steps(folder) if is_complete(folder / f"step_{other}")]
    for old in set(_steps(folder)) - set(complete[-max(1, keep) :]):
        shutil.rmtree(folder / f"step_{old}")
    return final


def seal(partial: Path, final: Path) -> None:
    """Flush every file, write the manifest last, and rename: from here on the checkpoint exists."""
    files = sorted(path for path in partial.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        _flush(path)
    sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    _flush(manifest)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    _flush(final.parent)


def latest_checkpoint(folder: str | Path) -> tuple[int, Path] | None:
    """Newest valid checkpoint as (step, path), or None. Leftovers of a killed save are not candidates."""
    folder = Path(folder)
    for step in reversed(_steps(folder)):
        path = folder / f"step_{step}"
        if is_complete(path):
            return step, path
    return None


def is_complete(path: Path) -> bool:
    """Whether every file that the manifest lists is there in full."""
    try:
        sizes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_checkpoint(folder: str | Path, resume: bool) -> tuple[int, Path] | None:
    """Where a run starts: its newest checkpoint when resuming, nothing for a new run.

    Raises:
        DataError: a new run would write into a folder that already holds checkpoints.
    """
    found = latest_checkpoint(folder)
    if found and not resume:
        raise DataError(
            f"{folder} already holds a checkpoint of step {found[0]}: continue it with --resume, "
            "or give another output folder"
        )
    for partial in Path(folder).glob("step_*.tmp"):
        shutil.rmtree(partial, ignore_errors=True)  # of several ranks, one is first
    return found


def _steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step_") for path in folder.glob("step_*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
