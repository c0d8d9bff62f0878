"""Texts around class names, and lists of class names: by name, from a file, or as given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_vision.errors import ConfigError, DataError, nearest

TEMPLATES = {"openai_80": "OPENAI_IMAGENET_TEMPLATES", "openai_7": "SIMPLE_IMAGENET_TEMPLATES"}
"""Names of template lists, and what open_clip's `zero_shot_metadata` calls them."""

CLASSES = {"imagenet": "IMAGENET_CLASSNAMES"}
"""Names of class lists, likewise. Two names stand twice among ImageNet's 1000, as OpenAI published them."""


def read_templates(given: str | Sequence[str]) -> list[str]:
    """Templates with `{}` for the class name.

    Args:
        given: a list; `openai_80` or `openai_7`, which open_clip holds; or a file with one a line, in which
            `{c}` (CLIP_benchmark's mark) stands for the name too.

    Raises:
        ConfigError: an unknown name, no template, or one without exactly one mark.
    """
    if not isinstance(given, str):
        templates, origin = list(given), "templates"
    elif given in TEMPLATES:
        templates, origin = [function("{}") for function in _of_open_clip(TEMPLATES[given])], given
    else:
        templates, origin = _lines(given, "templates", TEMPLATES), given
        templates = [template.replace("{c}", "{}") for template in templates]
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ConfigError(f"{origin} must each hold one {{}}, but {wrong[:3] or 'there are none'}")
    return templates


def read_classes(given: str | Sequence[str]) -> list[str]:
    """Class names in their order.

    Args:
        given: a list; `imagenet`, open_clip's 1000 names; or a file with one a line.

    Raises:
        ConfigError: an unknown name, or no class.
    """
    if not isinstance(given, str):
        classes = list(given)
    elif given in CLASSES:
        classes = list(_of_open_clip(CLASSES[given]))
    else:
        classes = _lines(given, "classes", CLASSES)
    if not classes:
        raise ConfigError(f"classes {given!r}: there is no class")
    return classes


def class_numbers(labels: Sequence[str], classes: Sequence[str], origin: str) -> list[int]:
    """Which class each label is: by its name; by its number from 0; or, for ImageNet's folders, by its place
    among the synsets, of which there must be as many as classes.

    Raises:
        DataError: a label that is no class, or whose name several classes have.
    """
    distinct = sorted(set(labels))
    numbers = {name: number for number, name in enumerate(classes)}
    if not all(label in numbers for label in distinct):
        if all(label.isdecimal() and int(label) < len(classes) for label in distinct):
            return [int(label) for label in labels]
        is_synset = all(label[:1] == "n" and label[1:].isdecimal() and len(label) == 9 for label in distinct)
        if is_synset and len(distinct) == len(classes):
            places = {synset: place for place, synset in enumerate(distinct)}
            return [places[label] for label in labels]
        strange = next(label for label in distinct if label not in numbers)
        raise DataError(f"{origin}: label {strange!r} is no class{nearest(strange, classes)}")
    if len(numbers) < len(classes):
        repeated = [label for label in distinct if list(classes).count(label) > 1]
        if repeated:
            raise DataError(
                f"{origin}: several classes are called {repeated[0]!r}; give labels as numbers from 0"
            )
    return [numbers[label] for label in labels]


def _of_open_clip(name: str) -> Sequence[Any]:
    """Names, or functions from a name to a text."""
    from open_clip import zero_shot_metadata

    found: Sequence[Any] = getattr(zero_shot_metadata, name)
    return found


def _lines(path: str, kind: str, known: dict[str, str]) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ConfigError(
            f"{kind} {path!r}: no such file, and not one of {', '.join(known)}{nearest(path, known)}"
        ) from None
    return [line.strip() for line in lines if line.strip()]
