"""The project's one progress bar."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, description: str, *, start: int = 0, disable: bool = False) -> Any:
    """Description, share done, time left, latest values; in a log file, a line every ten seconds."""
    return tqdm(
        total=total,
        initial=start,
        desc=description,
        disable=disable,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
