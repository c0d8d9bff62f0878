"""The project's one progress bar."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(
    total: int, description: str, *, start: int = 0, disable: bool = False, delay: float = 0, unit: str = "it"
) -> Any:
    """Description, share done, time left, latest values; in a log file, a line every ten seconds.

    Args:
        delay: seconds within which what is done shows no bar.
        unit: of the total; bytes are `B`.
    """
    return tqdm(
        total=total,
        initial=start,
        desc=description,
        disable=disable,
        delay=delay,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
