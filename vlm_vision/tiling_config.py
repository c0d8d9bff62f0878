"""How pictures of any shape become tiles, and tiles' features one sequence. No torch here."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

from pydantic import PositiveInt, field_validator, model_validator

from vlm_vision.config import Config, validate
from vlm_vision.errors import ConfigError

# LLaVA-NeXT's shorthand for every size from the first to the last, in tiles: "(1x1),...,(6x6)".
_RANGE = re.compile(r"\s*\((\d+)x(\d+)\)\s*,\s*\.\.\.\s*,\s*\((\d+)x(\d+)\)\s*")
_PINPOINTS = 'must be [[width, height], ...] in pixels, or a rising range "(1x1),...,(6x6)" in tiles'


class TilingConfig(Config):
    """What LLaVA's `image_aspect_ratio`, `image_grid_pinpoints` and `mm_patch_merge_type` say.

    Attributes:
        mode: `square` leaves the picture to the image processor; `pad` expands it to a square with the mean
            colour first; `anyres` gives the whole picture as one tile, then its parts at a higher resolution.
        grid_pinpoints: of `anyres`, the sizes that a picture may be scaled to, as (width, height) in pixels;
            or LLaVA-NeXT's range "(1x1),...,(6x6)", as (columns x rows) of tiles.
        max_tiles: of `anyres` with `spatial_unpad`, the N of LLaVA-NeXT's `anyres_max_N`: more tokens than
            so many tiles have are shrunk to about that number.
        merge: `flat` puts tile after tile; `spatial` row after row of the tiled picture; `spatial_unpad` also
            leaves out what only shows padding and ends each row with the newline; `spatial_maxpool2x2` takes
            the largest of every 2x2 tokens.
        base: whether the whole picture's tokens come before those of its parts.
        margins: of `spatial_unpad`, whose arithmetic tells padding: `llava` cuts fractions of a row off,
            `transformers` rounds to seven digits before. They differ where a float ends just under a whole
            number: for one of 100,000 random sizes up to 2400 pixels.
    """

    mode: Literal["square", "pad", "anyres"] = "square"
    grid_pinpoints: tuple[tuple[PositiveInt, PositiveInt], ...] | str | None = None
    max_tiles: PositiveInt | None = None
    merge: Literal["flat", "spatial", "spatial_unpad", "spatial_maxpool2x2"] = "flat"
    base: bool = True
    margins: Literal["llava", "transformers"] = "llava"

    @classmethod
    def from_llava(
        cls,
        image_aspect_ratio: str | None = None,
        image_grid_pinpoints: str | Sequence[Sequence[int]] | None = None,
        mm_patch_merge_type: str | None = None,
    ) -> TilingConfig:
        """The same settings under LLaVA's names, as its `config.json` and command line give them.

        Args:
            image_aspect_ratio: `square`, `pad`, `anyres`, `anyres_max_9`; None is `square`.
            image_grid_pinpoints: a list, a list as text, or a range; not looked at unless `anyres` needs it.
            mm_patch_merge_type: `flat`, or `spatial` with any of `_unpad`, `_maxpool2x2`, `_nobase` as
                LLaVA-NeXT reads them; None is `flat`. LLaVA itself knows `_unpad` alone of these.

        Raises:
            ConfigError: a value that is not known, or that does not go with the others.
        """
        aspect = image_aspect_ratio or "square"
        limit = re.fullmatch(r"anyres_max_(\d+)", aspect)
        words = (mm_patch_merge_type or "flat").split("_")
        tree = {
            "mode": "anyres" if limit else aspect,
            "grid_pinpoints": _read_pinpoints(image_grid_pinpoints) if aspect.startswith("anyres") else None,
            "max_tiles": int(limit[1]) if limit else None,
            "merge": "_".join(word for word in words if word != "nobase"),
            "base": "nobase" not in words,
        }
        return validate(cls, tree, "image_aspect_ratio, image_grid_pinpoints, mm_patch_merge_type")

    def to_llava(self, tile_width: int, tile_height: int) -> dict[str, Any]:
        """The settings under LLaVA's names, for its `config.json`; a range as the list that LLaVA wants.

        Raises:
            ConfigError: as `resolutions`.
        """
        merge = self.merge if self.base else f"{self.merge}_nobase"
        fields = {"image_aspect_ratio": self.mode, "mm_patch_merge_type": merge}
        if self.mode != "anyres":
            return fields
        sizes = [list(size) for size in self.resolutions(tile_width, tile_height)]
        limit = f"_max_{self.max_tiles}" if self.max_tiles else ""
        return {**fields, "image_aspect_ratio": f"anyres{limit}", "image_grid_pinpoints": sizes}

    def resolutions(self, tile_width: int, tile_height: int) -> list[tuple[int, int]]:
        """The grid pinpoints in pixels, as (width, height), in the order in which they are tried.

        Raises:
            ConfigError: one that tiles of this size do not fill.
        """
        if isinstance(self.grid_pinpoints, str):
            first_column, first_row, last_column, last_row = _read_range(self.grid_pinpoints)
            tiles = product(range(first_column, last_column + 1), range(first_row, last_row + 1))
            return [(columns * tile_width, rows * tile_height) for columns, rows in tiles]
        sizes = list(self.grid_pinpoints or ())
        wrong = [f"{w}x{h}" for w, h in sizes if w % tile_width or h % tile_height]
        if wrong:
            raise ConfigError(
                f"grid_pinpoints {', '.join(wrong)}: not multiples of the tower's tile, "
                f'{tile_width}x{tile_height}; a range such as "(1x1),...,(3x3)" counts in tiles'
            )
        return sizes

    @field_validator("grid_pinpoints", mode="before")
    @classmethod
    def _pinpoints_are_sizes_or_a_range(cls, given: object) -> object:
        if isinstance(given, str):
            _read_range(given)
        elif given is not None and not (
            isinstance(given, (list, tuple)) and given and all(map(_is_size, given))
        ):
            raise ValueError(_PINPOINTS)
        return given

    @model_validator(mode="after")
    def _fields_go_together(self) -> TilingConfig:
        if self.mode == "anyres" and self.grid_pinpoints is None:
            raise ValueError("mode 'anyres' needs grid_pinpoints")
        if self.mode != "anyres" and (self.grid_pinpoints or self.max_tiles):
            raise ValueError(f"mode {self.mode!r} has no grid_pinpoints and no max_tiles: 'anyres' has them")
        if self.max_tiles and self.merge != "spatial_unpad":
            raise ValueError(
                f"max_tiles shrinks what merge 'spatial_unpad' gives, and nothing of {self.merge!r}; leave "
                "it out (LLaVA-NeXT then does the same for 'anyres' as for 'anyres_max_N')"
            )
        if not self.base and self.merge == "flat":
            raise ValueError(
                "merge 'flat' always has the whole picture's tokens; base=False goes with 'spatial'"
            )
        return self


def _is_size(given: object) -> bool:
    return (
        isinstance(given, (list, tuple))
        and len(given) == 2
        and all(isinstance(side, int) and side > 0 for side in given)
    )


def _read_range(text: str) -> tuple[int, int, int, int]:
    matched = _RANGE.fullmatch(text)
    first_column, first_row, last_column, last_row = map(int, matched.groups()) if matched else (0, 0, 0, 0)
    if not (1 <= first_column <= last_column and 1 <= first_row <= last_row):
        raise ValueError(_PINPOINTS)
    return first_column, first_row, last_column, last_row


def _read_pinpoints(given: str | Sequence[Sequence[int]] | None) -> object:
    """A list that is written as text, as LLaVA's command line takes it, read; anything else as it is."""
    if not isinstance(given, str) or not given.strip().startswith("["):
        return given
    try:
        return ast.literal_eval(given.strip())
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"image_grid_pinpoints {given!r} is not a list of (width, height)") from error
