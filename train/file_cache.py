"""Files on this machine that can be made again: copies of remote tars, where the bytes of a tar lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import IO

from vlm_vision.files import whole_file


def cache_folder() -> Path:
    """`$VLM_VISION_CACHE`, or `vlm_vision` in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VLM_VISION_CACHE") or Path(caches) / "vlm_vision")


def file_key(*facts: object) -> str:
    """A name for what these facts tell from everything else."""
    return sha256("\0".join(map(str, facts)).encode()).hexdigest()[:32]


class FileCache:
    """Made once for all processes of this machine; of those longest unused, enough go to keep to the limit.

    Args:
        limit: bytes of all files; one that is larger by itself is still made, and stays until the next.
    """

    def __init__(self, limit: float) -> None:
        self.folder, self.limit = cache_folder() / "files", limit

    def path(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file called `name`, which `make` writes where it is not there. It may go at any later time."""
        from filelock import FileLock

        path = self.folder / name
        if not path.exists():
            locks = self.folder.parent / "locks"
            self.folder.mkdir(parents=True, exist_ok=True)
            locks.mkdir(exist_ok=True)
            with FileLock(locks / name):
                if not path.exists():
                    with whole_file(path) as partial:
                        make(partial)
                    self._make_room(path)
        with suppress(FileNotFoundError):
            os.utime(path)
        return path

    def open(self, name: str, make: Callable[[Path], None]) -> IO[bytes]:
        """The file called `name`, open for reading: it stays readable though it may go."""
        while True:
            with suppress(FileNotFoundError):  # another process needed the room just now
                return open(self.path(name, make), "rb")

    def _make_room(self, newest: Path) -> None:
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            if path != newest and not path.name.startswith("."):  # what is still being written
                path.unlink(missing_ok=True)
                total -= size
