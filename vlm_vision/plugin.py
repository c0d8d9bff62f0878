"""A new package that plugs a backbone in: the files of `vlm_vision/scaffold`, a working ViT, renamed."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path

from vlm_vision.errors import ConfigError
from vlm_vision.files import whole_folder
from vlm_vision.tower_config import BACKBONES

TEMPLATE = "scaffold"


def write_plugin(folder: str | Path) -> list[Path]:
    """Write a package and tests of it; the folder's name becomes the package's and the source's.

    Returns:
        its files.

    Raises:
        ConfigError: the folder is there already, or its name is taken or none that a package can have.
    """
    folder = Path(folder)
    name = folder.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or iskeyword(name):
        raise ConfigError(f"{name!r} is no name for a package: lower-case letters, digits, underscores")
    if name in BACKBONES.names():
        raise ConfigError(f"a source {name!r} is there already: give another name")
    if find_spec(name) is not None:
        raise ConfigError(f"a package {name!r} is installed already, and would be hidden: give another name")
    if folder.exists():
        raise ConfigError(f"{folder} is there already: give another folder")
    source = f"src/{name}"
    places = {"pyproject.toml": ".", "README.md": ".", "test_tower.py": "."}
    places |= {"__init__.py": source, "config.py": source, "backbone.py": source}
    with whole_folder(folder) as partial:
        (partial / source).mkdir(parents=True)
        for file, place in places.items():
            text = (files("vlm_vision") / TEMPLATE / file).read_text(encoding="utf-8")
            text = text.replace(f"vlm_vision.{TEMPLATE}", name).replace(TEMPLATE, name)
            (partial / place / file).write_text(text, encoding="utf-8")
    return [folder / place / file for file, place in places.items()]
