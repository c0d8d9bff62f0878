"""Grids that are cut into square regions, each of which becomes one token. No torch here."""

from __future__ import annotations

from vlm_vision.adapters.config import Grid
from vlm_vision.errors import ConfigError


def grid_of_regions(option: str, grid: Grid, side: int) -> Grid:
    """Rows and columns of regions of `side` x `side` patches.

    Args:
        option: what sets the side, for the error text: `token_packer.scale`.

    Raises:
        ConfigError: the grid does not divide; names the sides that would do.
    """
    rows, columns = grid
    if rows % side or columns % side:
        fitting = [n for n in range(1, min(grid) + 1) if rows % n == columns % n == 0]
        raise ConfigError(
            f"{option}: a grid of {rows}x{columns} patches does not divide into regions of {side}x{side}; "
            f"sides that fit: {', '.join(map(str, fitting))}"
            + (" (a class token makes it no grid: use select 'patch')" if min(grid) == 1 else "")
        )
    return rows // side, columns // side
