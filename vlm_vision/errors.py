"""Errors that a user can act on: each says what was given, what was expected, and what to type instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement


class VlmVisionError(Exception):
    """Base of every error that input causes, not a defect; the command line prints it without traceback."""


class ConfigError(VlmVisionError):
    """A config has an unknown key, a wrong value, or names something that does not exist."""


class WeightsError(VlmVisionError):
    """Weights do not fit the model: missing, unexpected, misshapen; a wrong activation; an unsafe file."""


class DataError(VlmVisionError):
    """Data that cannot be read or does not make sense: a missing file, a broken picture, an empty caption."""


class MissingExtraError(VlmVisionError, ImportError):
    """A part needs packages of an optional extra that is not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name closest to `name`, or an empty string when none is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: Exception) -> str:
    """What another library's error says, without the pages that some add."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def require(extra: str, *modules: str) -> None:
    """Check that the modules of an extra are there, as new as it wants them, without importing them.

    Raises:
        MissingExtraError: names those that are missing or too old, and the command that installs them.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"this needs {', '.join(missing)}, which the extra {extra!r} brings: "
            f"pip install 'vlm_vision[{extra}]'"
        )
    for needed in _requirements(extra):
        version = _version(needed.name) if needed.name in modules else None
        if version is not None and not needed.specifier.contains(version, prereleases=True):
            raise MissingExtraError(
                f"this needs {needed.name}{needed.specifier}, and {version} is installed: "
                f"pip install 'vlm_vision[{extra}]'"
            )


def _requirements(extra: str) -> list[Requirement]:
    """What an extra brings, as this package's metadata say."""
    from packaging.requirements import Requirement

    needed = map(Requirement, metadata.requires("vlm_vision") or ())
    return [each for each in needed if each.marker and each.marker.evaluate({"extra": extra})]


def _version(package: str) -> str | None:
    """The version that is installed; None of a module that no package manager brought."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
