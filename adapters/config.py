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
        ("identity", "vlm_vision.adapters.mlp_config:IdentityConfig"),
        ("linear", "vlm_vision.adapters.mlp_config:LinearConfig"),
        ("mlp", "vlm_vision.adapters.mlp_config:MlpConfig"),
        ("mlp_res", "vlm_vision.adapters.mlp_config:MlpResConfig"),
        ("fused_gelu_mlp", "vlm_vision.adapters.mlp_config:FusedGeluMlpConfig"),
        ("pixel_shuffle", "vlm_vision.adapters.downsample_config:PixelShuffleConfig"),
        ("mlp_downsample", "vlm_vision.adapters.downsample_config:MlpDownsampleConfig"),
        ("pool", "vlm_vision.adapters.downsample_config:PoolConfig"),
        ("pooler", "vlm_vision.adapters.downsample_config:PoolerConfig"),
        ("spatial_pool", "vlm_vision.adapters.downsample_config:SpatialPoolConfig"),
        ("c_abstractor", "vlm_vision.adapters.convolution_config:CAbstractorConfig"),
        ("d_abstractor", "vlm_vision.adapters.deformable_config:DAbstractorConfig"),
        ("ldp", "vlm_vision.adapters.convolution_config:LdpConfig"),
        ("ldpv2", "vlm_vision.adapters.convolution_config:LdpV2Config"),
        ("qformer", "vlm_vision.adapters.qformer_config:QFormerConfig"),
        ("qformer_text", "vlm_vision.adapters.qformer_config:QFormerTextConfig"),
        ("perceiver_resampler", "vlm_vision.adapters.perceiver_config:PerceiverResamplerConfig"),
        ("idefics2_perceiver", "vlm_vision.adapters.perceiver_config:Idefics2PerceiverConfig"),
        ("token_packer", "vlm_vision.adapters.token_packer_config:TokenPackerConfig"),
        ("sva", "vlm_vision.adapters.sva_config:SvaConfig"),
    ),
    aliases=("mlp2x_gelu", "mlp2x_res2x_gelu", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix"),
)

# Names in LLaVA, LLaVA-NeXT and VILA that say options too: the name here, and what they say beside it.
ALIASES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    (r"mlp(?P<depth>[1-9]\d*)x_gelu", "mlp", {"activation": "gelu"}),
    (r"mlp(?P<depth>[1-9]\d*)x_res(?P<blocks>[1-9]\d*)x_gelu", "mlp_res", {}),
    (r"mlp_downsample_(?P<variant>2x2|3x3)_fix", "mlp_downsample", {}),
    (r"mlp_downsample_(?P<variant>3x3_s2|3x3_s2_new)", "mlp_downsample", {}),
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
    """A projector node, in which the names of LLaVA and VILA (`mlp2x_gelu`) stand for a name and options."""

    def class_of(self, node: Any) -> type[Config] | None:
        meant = _meant(node)
        return super().class_of(node if meant is None else meant)

    def validate(self, value: Any) -> Config:
        meant = _meant(value)
        if meant is None:
            return super().validate(value)
        given = {"name": value} if isinstance(value, str) else value
        for key in meant.keys() & given.keys() - {"name"}:
            if given[key] != meant[key]:
                raise PydanticCustomError(
                    "variant",
                    "{alias} says {key} {meant}, but {key} is given as {other}: use the name {name} "
                    "to set it",
                    {
                        "alias": repr(given["name"]),
                        "key": key,
                        "meant": meant[key],
                        "other": given[key],
                        "name": repr(meant["name"]),
                    },
                )
        return super().validate({**given, **meant})


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


def _meant(node: Any) -> dict[str, Any] | None:
    """Name and options that an alias says, alone or as `name`; None where it is none."""
    alias = node.get("name") if isinstance(node, Mapping) else node
    if not isinstance(alias, str):
        return None
    for pattern, name, options in ALIASES:
        found = re.fullmatch(pattern, alias)
        if found:
            said = {key: int(value) if value.isdigit() else value for key, value in found.groupdict().items()}
            return {"name": name, **options, **said}
    return None
