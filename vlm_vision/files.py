"""Folders and files that are complete or absent, and paths that stay inside theirs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_vision.errors import ConfigError


def make_folder(folder: str | Path) -> Path:
    """A folder to write into, made with its parents if absent.

    Raises:
        ConfigError: it cannot be made or written.
    """
    folder = Path(folder)
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{str(path)!r} cannot be written ({reason}): give another place") from error


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, beside its place; it is renamed there when the block ends without an error.

    What was at its place is replaced as a whole, or stays as it was.

    Raises:
        ConfigError: nothing can be written there.
    """
    folder = Path(folder)
    with _writable(folder):
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

    Raises:
        ConfigError: nothing can be written there.
    """
    path = Path(path)
    with _writable(path):
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
