"""Frozen configs from YAML files and `a.b=c` overrides, validated once, every error at once.

A config class never imports torch, so that a config can be checked and planned before anything heavy loads.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from vlm_vision.errors import ConfigError, nearest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every config: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)


def load_config(
    config_class: type[C], source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()
) -> C:
    """Read a YAML file (or take a mapping), apply `a.b=c` overrides in order, and validate.

    Raises:
        ConfigError: the file is missing or is not YAML, an override is not `a.b=c`, or values are wrong;
            lists every wrong value with its path and the nearest valid name.
    """
    if isinstance(source, Mapping):
        tree, origin = deepcopy(dict(source)), config_class.__name__
    else:
        tree, origin = read_yaml(Path(source)), str(source)
    for override in overrides:
        _apply_override(tree, override)
    return validate(config_class, tree, origin)


def validate(config_class: type[C], tree: Mapping[str, Any], origin: str) -> C:
    """Validate a mapping; `origin` (a file or a name) opens the error text."""
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        wrong_values = _by_value(tree, _without_consequences(error.errors()))
        lines = [_explain(config_class, tree, *wrong) for wrong in wrong_values]
        raise ConfigError(f"{origin}: {len(lines)} wrong value(s)\n" + "\n".join(lines)) from None


def save_config(config: Config, path: str | Path) -> None:
    """Write a config as YAML that `load_config` reads back to an equal config."""
    Path(path).write_text(
        OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))), encoding="utf-8"
    )


def expand_shorthand(text: str) -> dict[str, Any]:
    """`name:model[@weights]` as the mapping it stands for; a bare `name` gives only the name.

    The weights follow the last `@`, so that neither a Windows drive nor a revision in a model id is cut.
    """
    name, _, rest = text.partition(":")
    node: dict[str, Any] = {"name": name}
    if rest:
        model, at, weights = rest.rpartition("@")
        node["model"] = model if at else rest
        if at:
            node["weights"] = weights
    return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file, with its `${...}` references resolved.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something else than keys and values.
    """
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"config file {str(path)!r} does not exist{nearest(str(path), siblings)}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    except Exception as error:  # yaml.YAMLError, whose package OmegaConf wraps without re-exporting
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path}: is not valid YAML: {error}") from error
        raise
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys and values, but holds {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} must have the form a.b=value")
    try:
        value = _parse(text)
    except Exception as error:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value: {error}") from error
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        child = _child(node, key, override)
        if child is None:
            child = {}
        elif isinstance(child, str):
            child = expand_shorthand(child)
        elif not isinstance(child, (dict, list)):
            raise ConfigError(
                f"override {override!r}: {'.'.join(keys[: depth + 1])} is a single value, not a node"
            )
        _assign(node, key, child, override)
        node = child
    last = keys[-1]
    if last == "name" and isinstance(node, dict) and node.get("name") != value:
        node.clear()  # fields of the old variant mean nothing to the new one
    _assign(node, last, value, override)


def _parse(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)["value"]  # type: ignore[index,call-overload]


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    return node.get(key)


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"override {override!r}: {key!r} must be an index below {len(node)}")
    return int(key)


def _assign(node: Any, key: str, value: Any, override: str) -> None:
    if isinstance(node, list):
        node[_index(node, key, override)] = value
    else:
        node[key] = value


def _without_consequences(errors: Sequence[Any]) -> list[Any]:
    """Errors without those of lists that are too short only because pydantic dropped their wrong items."""
    parents = {details["loc"][:depth] for details in errors for depth in range(len(details["loc"]))}
    return [details for details in errors if details["type"] != "too_short" or details["loc"] not in parents]


def _by_value(tree: Any, errors: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """Errors grouped by the value they are about, with its path: a union reports one for each of its arms.

    Where one arm got further into the value than the others, only its errors are kept.
    """
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for details in errors:
        place, node = [], tree
        for depth, part in enumerate(details["loc"]):
            is_key = (
                part in node
                if isinstance(node, Mapping)
                else isinstance(node, (list, tuple)) and isinstance(part, int)
            )
            is_absent = details["type"] == "missing" and depth == len(details["loc"]) - 1
            if is_key or is_absent:  # else it is the label of an arm
                place.append(part)
                node = _descend(node, part)
        groups.setdefault(tuple(place), []).append(details)
    inner = {place[:depth] for place in groups for depth in range(len(place))}
    return [
        (".".join(map(str, place)) or "(root)", group)
        for place, group in groups.items()
        if place not in inner
    ]


def _explain(config_class: type[Config], tree: Any, path: str, group: Sequence[Any]) -> str:
    """What is wrong with one value as one line: path, problem, value given, nearest valid name."""
    details = group[0]
    loc = details["loc"]
    if details["type"] == "extra_forbidden":
        owner = _owner(config_class, tree, loc[:-1])
        known = list(owner.model_fields) if owner else []
        listing = f" (known: {', '.join(known)})" if known else ""
        return f"  {path}: unknown key{nearest(str(loc[-1]), known)}{listing}"
    if details["type"] == "missing":
        return f"  {path}: missing"
    hint = ""
    if details["type"] in ("literal_error", "enum") and isinstance(details["input"], str):
        hint = nearest(
            details["input"],
            str(details["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", "),
        )
    messages = [str(arm["msg"]).removeprefix("Value error, ") for arm in group]
    problem = ", or ".join(message[:1].lower() + message[1:] for message in messages)
    return f"  {path}: {problem} (got {details['input']!r:.120}){hint}"


def _owner(config_class: type[Config], tree: Any, loc: Iterable[Any]) -> type[Config] | None:
    """The config class that owns the node at `loc`."""
    annotation: Any = config_class
    for part in loc:
        if _descend(tree, part) is not None:  # else it is the label of a union's arm
            annotation, tree = _inside(annotation, tree, part), _descend(tree, part)
    return _class_of(annotation, tree)


def _class_of(annotation: Any, node: Any) -> type[Config] | None:
    """The Config class behind a node's annotation: a variant by its name, one arm of a union; no list's."""
    if isinstance(node, list):
        return None
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        variant = next((marker for marker in metadata if hasattr(marker, "class_of")), None)
        return variant.class_of(node) if variant else _class_of(inner, node)
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for arm in get_args(annotation) if (found := _class_of(arm, node))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def _inside(annotation: Any, node: Any, part: Any) -> Any:
    """The annotation of what a node holds at `part`: a field, or an item of a list or mapping."""
    owner = _class_of(annotation, node)
    if owner is not None:
        field = owner.model_fields.get(str(part))
        if field is None or not field.metadata:
            return field and field.annotation
        annotated: Any = Annotated
        parts = (field.annotation, *field.metadata)
        return annotated[parts]
    if get_origin(annotation) is Annotated:
        return _inside(get_args(annotation)[0], node, part)
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for arm in get_args(annotation) if (found := _inside(arm, node, part))), None)
    if get_origin(annotation) in (list, tuple):
        return get_args(annotation)[0]
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def _descend(tree: Any, part: Any) -> Any:
    if isinstance(tree, Mapping):
        return tree.get(part)
    if isinstance(tree, (list, tuple)) and isinstance(part, int) and part < len(tree):
        return tree[part]
    return None
