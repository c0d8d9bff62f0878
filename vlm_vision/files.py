"""Folders and files that are complete or absent, and paths that stay inside theirs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, beside its place; it is renamed there when the block ends without an error.

    What was at its place is replaced as a whole, or stays as it was.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A file to write, beside its place; it is renamed there when the block ends without an error.

    Its bytes are on the disk before it is, so it is whole after any crash. What a killed process leaves is
    called `.NAME.*.partial`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_inside(path: str, real_folder: str) -> bool:
    """Whether a path, with its links followed, lies in a folder, given by its `os.path.realpath`."""
    return os.path.commonpath([real_folder, os.path.realpath(path)]) == real_folder
