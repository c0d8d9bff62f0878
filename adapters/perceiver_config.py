"""Resamplers: learnt latents that look at the patches, however many these are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vlm_vision.adapters.config import Grid, ProjectorConfig
from vlm_vision.errors import ConfigError

if TYPE_CHECKING:
    from vlm_vision.adapters.projector import Projector


class PerceiverResamplerConfig(ProjectorConfig):
    """Flamingo's perceiver resampler (arXiv 2204.14198, section 2.1 and appendix A.1.1).

    Numbers as of LLaVA-NeXT's `multimodal_resampler/perceiver.py` with the `mm_projector` behind it; with
    `project: before` as of TinyLLaVA's `connector/resampler.py`, with `project: none` and `activation: relu`
    as of transformers' `IdeficsPerceiverResampler`.

    [B,N,D] -> [B,num_latents,L] for every N. At width W (D, or L with `project: before`) and I = heads *
    head_width, a layer has 4WI + 2·ff_mult·W² + 6W weights (4·head_width more with `query_key_norm`);
    num_latents·W + 2W and the projection come on top.

    Attributes:
        num_latents: tokens that come out.
        layers: each looks at patches and latents together, then runs a perceptron.
        head_width: channels of a head.
        ff_mult: hidden width of the perceptron, as a multiple of W.
        query_key_norm: normalise queries and keys, as Idefics may.
        project: where the width changes from D to L; `none` where both are one.
        project_depth: linear layers of the projection, with GELU between: 2 is `mlp2x_gelu`.
    """

    name: Literal["perceiver_resampler"] = "perceiver_resampler"
    num_latents: int = Field(32, gt=0)
    layers: int = Field(3, gt=0)
    heads: int = Field(8, gt=0)
    head_width: int = Field(64, gt=0)
    ff_mult: int = Field(4, gt=0)
    activation: Literal["gelu", "relu"] = "gelu"
    query_key_norm: bool = False
    project: Literal["after", "before", "none"] = "after"
    project_depth: int = Field(1, gt=0)

    def grid_out(self, grid: Grid) -> Grid:
        return 1, self.num_latents

    def check(self, in_features: int, out_features: int, grid: Grid) -> None:
        if self.project == "none" and in_features != out_features:
            raise ConfigError(
                f"perceiver_resampler: project 'none' keeps the width of {in_features}, but {out_features} "
                "is wanted; use project 'after' or 'before'"
            )

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width = out_features if self.project == "before" else in_features
        layer = 4 * width * self.heads * self.head_width + 2 * self.ff_mult * width**2 + 6 * width
        layer += 4 * self.head_width if self.query_key_norm else 0
        projection = (in_features + 1) * out_features
        projection += (self.project_depth - 1) * (out_features + 1) * out_features
        return (
            self.layers * layer
            + (self.num_latents + 2) * width
            + (0 if self.project == "none" else projection)
        )

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.perceiver import PerceiverResampler

        return PerceiverResampler(self, in_features, out_features, grid)


class Idefics2PerceiverConfig(ProjectorConfig):
    """Idefics2's connector (arXiv 2405.02246, section 3.1): a gated perceptron to width L, then a perceiver.

    The module is transformers' `Idefics2Connector`; the defaults are those of Idefics2-8B.

    [B,N,D] -> [B,num_latents,L] for every N. 2D·hidden_size + hidden_size·L weights of the perceptron, for
    each layer 2(heads + kv_heads)·head_width·L + 12L² + 3L, and (num_latents + 1)·L.

    Attributes:
        num_latents: tokens that come out.
        heads, kv_heads, head_width: of the attention; queries share keys and values in groups.
        hidden_size: of the perceptron before the perceiver; the language model's `intermediate_size` there.
        norm_eps: of the RMS norms.
    """

    name: Literal["idefics2_perceiver"] = "idefics2_perceiver"
    num_latents: int = Field(64, gt=0)
    layers: int = Field(3, gt=0)
    heads: int = Field(16, gt=0)
    kv_heads: int = Field(4, gt=0)
    head_width: int = Field(96, gt=0)
    hidden_size: int = Field(14336, gt=0)
    norm_eps: float = Field(1e-6, gt=0)

    def grid_out(self, grid: Grid) -> Grid:
        return 1, self.num_latents

    def check(self, in_features: int, out_features: int, grid: Grid) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"idefics2_perceiver: {self.heads} heads do not share {self.kv_heads} keys and values "
                "evenly; kv_heads must divide heads"
            )

    def parameter_count(self, in_features: int, out_features: int, grid: Grid) -> int:
        width = out_features
        layer = 2 * (self.heads + self.kv_heads) * self.head_width * width + 12 * width**2 + 3 * width
        perceptron = (2 * in_features + width) * self.hidden_size
        return perceptron + self.layers * layer + (self.num_latents + 1) * width

    def build(self, in_features: int, out_features: int, grid: Grid) -> Projector:
        from vlm_vision.adapters.idefics2 import Idefics2Perceiver

        return Idefics2Perceiver(self, in_features, out_features, grid)
