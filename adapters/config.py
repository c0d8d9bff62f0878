"""Projector configs: what stands between patches and a language model, and how many tokens come out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from vlm_vision.config import Config, validate
from vlm_vision.errors import ConfigError
from vlm_vision.registry import Registry, Variant

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector

Grid = tuple[int, int]
"""Patches of one picture as (rows, columns)."""

PROJECTORS = Registry(
    kind="projector",
    group="vlm_vision.projectors",
    builtin=(
        ("linear", "vlm_vision.adapters.mlp_config:LinearConfig"),
        ("mlp", "vlm_vision.adapters.mlp_config:MlpConfig"),
        ("qformer", "vlm_vision.adapters.qformer_config:QFormerConfig"),
        ("qformer_text", "vlm_vision.adapters.qformer_config:QFormerTextConfig"),
        ("perceiver_resampler", "vlm_vision.adapters.perceiver_config:PerceiverResamplerConfig"),
        ("idefics2_perceiver", "vlm_vision.adapters.perceiver_config:Idefics2PerceiverConfig"),
        ("token_packer", "vlm_vision.adapters.token_packer_config:TokenPackerConfig"),
        ("sva", "vlm_vision.adapters.sva_config:SvaConfig"),
    ),
)

Width = Annotated[int, Field(gt=0)]


class ProjectorConfig(Config):
    """Base of every projector config, ours and others'. No torch here: all but `build` costs nothing."""

    name: str

    def grid_out(self, grid: Grid) -> Grid:
        """Rows and columns of the tokens that a picture of `grid` patches becomes; queries are one row.

        Raises:
            ConfigError: a grid that this projector cannot take, and what would help.
        """
        raise NotImplementedError

    def tokens_out(self, grid: Grid) -> int:
        """Tokens M that a picture of `grid` patches takes in the language model.

        Raises:
            ConfigError: as `grid_out`.
        """
        rows, columns = self.grid_out(grid)
        return rows * columns

    def check(self, in_features: int, out_features: int, grid: Grid) -> None:
        """What can be told before anything is built: that widths and grid fit.

        Raises:
            ConfigError: they do not.
        """
        self.grid_out(grid)

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        """Weights of the module that `build` makes, by formula."""
        raise NotImplementedError

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        """The module [B,N,D] -> [B,M,L] for D `in_features` and L `out_features`, freshly initialised."""
        raise NotImplementedError


class ProjectorVariant(Variant):
    """A projector node, in which LLaVA's `mlp{depth}x_gelu` names an MLP of that depth."""

    def class_of(self, node: Any) -> type[Config] | None:
        try:
            return super().class_of(_expand_llava_name(node))
        except PydanticCustomError:
            return PROJECTORS.config_class("mlp")

    def validate(self, value: Any) -> Config:
        return super().validate(_expand_llava_name(value))


ProjectorNode = Annotated[ProjectorConfig, ProjectorVariant(PROJECTORS)]
"""A config field that holds a projector: a name, or a mapping with `name` and options."""


class BuildArguments(Config):
    """What `build_projector` is asked for, checked as one so that every mistake shows at once."""

    projector: ProjectorNode
    in_features: Width
    out_features: Width
    grid: tuple[Width, Width]

    @model_validator(mode="after")
    def _fits(self) -> BuildArguments:
        try:
            self.projector.check(self.in_features, self.out_features, self.grid)
        except ConfigError as error:
            raise PydanticCustomError("projector", "{reason}", {"reason": str(error)}) from error
        return self


def parse_projector(projector: str | Mapping[str, Any] | ProjectorConfig) -> ProjectorConfig:
    """The config that a name or a mapping stands for.

    Raises:
        ConfigError: unknown name or option, with the nearest valid one.
    """
    return validate(_Named, {"projector": projector}, "projector").projector


class _Named(Config):
    projector: ProjectorNode


def _expand_llava_name(node: Any) -> Any:
    """`mlp3x_gelu`, alone or as `name`, as the mapping it stands for; anything else as it is."""
    options = {"name": node} if isinstance(node, str) else node
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        return node
    found = re.fullmatch(r"mlp([1-9]\d*)x_gelu", options["name"])
    if not found:
        return node
    meant = {"name": "mlp", "depth": int(found[1]), "activation": "gelu"}
    for key in meant.keys() & options.keys() - {"name"}:
        if options[key] != meant[key]:
            raise PydanticCustomError(
                "variant",
                "{given} says {key} {meant}, but {key} is given as {other}: use the name 'mlp' to set it",
                {"given": repr(options["name"]), "key": key, "meant": meant[key], "other": options[key]},
            )
    return {**options, **meant}
