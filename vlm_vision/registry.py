"""Names to config classes: a visible table for ours, entry points for others', found the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from vlm_vision.config import Config, expand_shorthand
from vlm_vision.errors import ConfigError, nearest


@dataclass(frozen=True)
class Registry:
    """The variants that a config node may name.

    Attributes:
        kind: what the variants are, in error texts ("backbone").
        group: entry points through which other packages add theirs; each loads a config class.
        builtin: our names, as `module:Class`, imported only when asked for.
        aliases: examples of what else is understood, for hints.
    """

    kind: str
    group: str
    builtin: tuple[tuple[str, str], ...]
    aliases: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Every name, ours first, then those of installed packages."""
        return list(self._targets())

    def config_class(self, name: str) -> type[Config]:
        """The config class that a name stands for.

        Raises:
            ConfigError: no such name, two owners of it, or a plug-in that is not a config class.
        """
        targets = self._targets()
        if name not in targets:
            raise ConfigError(
                f"unknown {self.kind} {name!r}{nearest(name, (*self.aliases, *targets))} "
                f"(known: {', '.join(targets)})"
            )
        target = targets[name]
        if isinstance(target, EntryPoint):
            try:
                loaded = target.load()
            except Exception as error:
                raise ConfigError(
                    f"{self.kind} {name!r}: its plug-in {target.value!r} cannot be imported: {error}"
                ) from error
        else:
            module, _, attribute = target.partition(":")
            loaded = getattr(import_module(module), attribute)
        if not (isinstance(loaded, type) and issubclass(loaded, Config)):
            raise ConfigError(
                f"{self.kind} {name!r}: its entry point must name a subclass of vlm_vision.config.Config, "
                f"got {loaded!r}"
            )
        return loaded

    def _targets(self) -> Mapping[str, str | EntryPoint]:
        return _collect(self)


@cache
def _collect(registry: Registry) -> dict[str, str | EntryPoint]:
    targets: dict[str, str | EntryPoint] = dict(registry.builtin)
    owners = dict.fromkeys(targets, "vlm_vision")
    for entry in sorted(entry_points(group=registry.group), key=lambda entry: entry.name):
        owner = entry.dist.name if entry.dist else entry.value
        if entry.name in targets and owners[entry.name] != owner:
            raise ConfigError(
                f"{registry.kind} {entry.name!r} is offered by both {owners[entry.name]!r} and {owner!r}: "
                "uninstall one"
            )
        targets[entry.name], owners[entry.name] = entry, owner
    return targets


@dataclass(frozen=True)
class Variant:
    """Marks a config field whose class depends on its `name`.

    Used as `Annotated[BackboneConfig, Variant(BACKBONES)]`.

    A string is the one-line form of the node, `name:model[@weights]`.
    """

    registry: Registry

    def class_of(self, node: Any) -> type[Config] | None:
        """The config class for a raw node, or None when it names none."""
        name = node.get("name") if isinstance(node, Mapping) else None
        try:
            return self.registry.config_class(name) if isinstance(name, str) else None
        except ConfigError:
            return None

    def validate(self, value: Any) -> Config:
        if isinstance(value, Config):
            return value
        node = expand_shorthand(value) if isinstance(value, str) else value
        if not isinstance(node, Mapping) or not isinstance(node.get("name"), str):
            raise PydanticCustomError(
                "variant",
                "must name a {kind}: a mapping with `name`, or `name:model[@weights]` (known: {known})",
                {"kind": self.registry.kind, "known": ", ".join(self.registry.names())},
            )
        try:
            config_class = self.registry.config_class(node["name"])
        except ConfigError as error:
            raise PydanticCustomError("variant", "{reason}", {"reason": str(error)}) from error
        return config_class.model_validate(dict(node))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda config: config.model_dump(mode="json"), when_used="always"
            ),
        )
