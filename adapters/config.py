"""Projector configs: what stands between patches and a language model, and how many tokens come out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from vlm_vision.config import Config, validate
from vlm_vision.registry import Registry, Variant

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector

Grid = tuple[int, int]
"""Patches of one picture as (rows, columns)."""

PROJECTORS = Registry(
    kind="projector",
    group="vlm_vision.projectors",
    builtin=(
        ("linear", "vlm_vision.adapters.config:LinearConfig"),
        ("mlp", "vlm_vision.adapters.config:MlpConfig"),
        ("qformer", "vlm_vision.adapters.config:QFormerConfig"),
    ),
)

Width = Annotated[int, Field(gt=0)]


class ProjectorConfig(Config):
    """Base of every projector config, ours and others'."""

    name: str

    def tokens_out(self, grid: Grid) -> int:
        """Tokens M that a picture of `grid` patches takes in the language model."""
        raise NotImplementedError

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        """The module [B,N,D] -> [B,M,L] for D `in_features` and L `out_features`, freshly initialised."""
        raise NotImplementedError


class LinearConfig(ProjectorConfig):
    """One linear layer per patch, as in the first LLaVA (arXiv 2304.08485, section 4.1)."""

    name: Literal["linear"] = "linear"

    def tokens_out(self, grid: Grid) -> int:
        return grid[0] * grid[1]

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.mlp import LinearProjector

        return LinearProjector(self, in_features, out_features, grid)


class MlpConfig(ProjectorConfig):
    """A perceptron per patch, LLaVA-1.5's connector (arXiv 2310.03744, section 3.2); `mlp2x_gelu` is depth 2.

    Attributes:
        depth: number of linear layers; the first goes to the language model's width, the rest stay there.
        activation: between two linear layers.
    """

    name: Literal["mlp"] = "mlp"
    depth: int = Field(2, ge=1)
    activation: Literal["gelu", "relu", "silu"] = "gelu"

    def tokens_out(self, grid: Grid) -> int:
        return grid[0] * grid[1]

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.mlp import MlpProjector

        return MlpProjector(self, in_features, out_features, grid)


class QFormerConfig(ProjectorConfig):
    """BLIP-2's querying transformer (arXiv 2301.12597, section 3.1) and the linear layer behind it.

    Attributes:
        num_queries: learnt queries, which are the tokens that come out, however many patches go in.
        layers, heads, hidden_size: BERT-base by default.
        cross_attention_frequency: every how many layers the queries look at the patches.
        dropout: on hidden states and attention while training.
    """

    name: Literal["qformer"] = "qformer"
    num_queries: int = Field(32, gt=0)
    layers: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)
    hidden_size: int = Field(768, gt=0)
    cross_attention_frequency: int = Field(2, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> QFormerConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.heads} heads")
        return self

    def tokens_out(self, grid: Grid) -> int:
        return self.num_queries

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.qformer import QFormerProjector

        return QFormerProjector(self, in_features, out_features, grid)


class ProjectorVariant(Variant):
    """A projector node, in which LLaVA's `mlp{depth}x_gelu` names an MLP of that depth."""

    def class_of(self, node: Any) -> type[Config] | None:
        try:
            return super().class_of(_expand_llava_name(node))
        except PydanticCustomError:
            return MlpConfig

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


def parse_projector(projector: str | Mapping[str, Any] | ProjectorConfig) -> ProjectorConfig:
    """The config that a name or a mapping stands for.

    Raises:
        ConfigError: unknown name or option, with the nearest valid one.
    """
    arguments = {"projector": projector, "in_features": 1, "out_features": 1, "grid": (1, 1)}
    return validate(BuildArguments, arguments, "projector").projector


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
