"""Folders and files that are complete or absent, and paths that stay inside theirs."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST
from pathlib import Path

from vlm_vision.errors import ConfigError

# Weights by the libraries' names: one file, or shards and an index. Loaders take the first of them they find.
_WEIGHTS = re.compile(r"(\w*model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")


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
    """A folder to write into, which takes its place when the block ends without an error.

    In a folder that is there already, files and folders of the same names are replaced, each as a whole, and
    weights by all their shards; what else lies in it stays.

    Raises:
        ConfigError: nothing can be written there.
    """
    folder = Path(folder)
    with _writable(folder):
        if folder.is_file():
            raise FileExistsError(EEXIST, "it is a file")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Within a folder that is there: it may be a link, or a disk of its own, to which nothing is renamed.
        within = folder if folder.is_dir() else folder.parent
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=within))
    try:
        partial.chmod(0o755)
        yield partial
        with _writable(folder):
            if folder.is_dir():
                _replace_each(partial, folder)
            else:
                os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_each(partial: Path, folder: Path) -> None:
    """Move what one folder holds into another, without waiting for what was there to be deleted."""
    new_weights = {weights[1] for path in partial.iterdir() if (weights := _WEIGHTS.fullmatch(path.name))}
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as replaced:
        for old in folder.iterdir():
            weights = _WEIGHTS.fullmatch(old.name)
            if weights and weights[1] in new_weights and not (partial / old.name).exists():
                os.rename(old, Path(replaced) / old.name)
        for new in sorted(partial.iterdir()):
            old = folder / new.name
            if old.is_dir() and not old.is_symlink():
                os.rename(old, Path(replaced) / new.name)
            os.replace(new, old)


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
