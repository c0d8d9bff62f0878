"""What every backbone gives the tower: features after any layer, a pooled head, and its own facts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_vision.errors import ConfigError
from vlm_vision.tower_config import BackboneConfig, PreprocessConfig


@dataclass(frozen=True)
class BackboneInfo:
    """Facts of a backbone that are known before any weight is read.

    Attributes:
        widths: channels after each layer; its length is the number of layers (or stages).
        grids: rows and columns of patches after each layer, at the size that `preprocess` makes.
        prefix_tokens: tokens before the patches: the class token first, then registers.
        default_layer: layer given when the config names none.
        embed_dim: width of the pooled head, or None when there is none.
        preprocess: how pictures are prepared for these weights.
        size_step: sides of pictures that are multiples of it can be taken call by call, with position
            embeddings resampled where there are any; None where only the native size can.
        any_size: whether other sizes are what the weights were trained for (NaFlex), so need no asking.
        registers: of the prefix tokens, those that are no class token.
        assumptions: what was taken for granted because the library does not say it, a sentence each.
    """

    widths: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    prefix_tokens: int
    default_layer: int
    embed_dim: int | None
    preprocess: PreprocessConfig
    size_step: int | None = None
    any_size: bool = False
    registers: int = 0
    assumptions: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.widths)

    @property
    def has_class_token(self) -> bool:
        return self.prefix_tokens > self.registers


Shape = tuple[int, int, int]
"""Channels, rows and columns after a layer."""


def at_size(preprocess: PreprocessConfig, image_size: int | tuple[int, int], step: int) -> PreprocessConfig:
    """Settings for pictures of another size.

    Raises:
        ConfigError: its sides are no multiples of `step`.
    """
    resized = preprocess.at_size(image_size)
    if resized.height % step or resized.width % step:
        raise ConfigError(f"image_size {image_size}: both sides must be multiples of {step} pixels")
    return resized


def grids_of_strides(preprocess: PreprocessConfig, strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Rows and columns after stages that reduce a picture by these factors."""
    return tuple((preprocess.height // stride, preprocess.width // stride) for stride in strides)


def find_size_step(
    size: tuple[int, int],
    shapes: Sequence[Shape],
    measure: Callable[[tuple[int, int]], Sequence[Shape] | None],
) -> int | None:
    """The step of sizes that a model takes call by call, found by trying one beside the native.

    The native size may be no multiple of it, where a patch embedding drops the rest; one afar tells that from
    strides that round.

    Args:
        size: the native one, at which the layers have `shapes`.
        measure: shapes at another size, or None where the model does not take it.
    """
    _, rows, columns = shapes[-1]
    step = size[0] // rows
    if (size[0] // step, size[1] // step) != (rows, columns):
        return None
    tried = [(rows + 1, columns + 2)]
    if size != (step * rows, step * columns):
        tried.append((2 * rows + 1, 2 * columns))
    for new_rows, new_columns in tried:
        expected = [(width, r * new_rows // rows, c * new_columns // columns) for width, r, c in shapes]
        found = measure((new_rows * step, new_columns * step))
        if found is None or list(found) != expected:
            return None
    return step


class Backbone(nn.Module, ABC):
    """Base class of backbones; a plug-in subclasses it, and `tower_config.BackboneConfig`.

    Layers are counted from 1: layer k is the k-th block or stage. `vlm_vision.testing.check_tower` tests it.
    """

    info: BackboneInfo

    @abstractmethod
    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        """Raw output of the given layers (ascending, from 1), prefix tokens first; none past the last.

        Pixels of another size than the native one come only where `info.size_step` says that they may.
        """

    @abstractmethod
    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Output of the whole backbone with its head, not normalised."""

    def forward_with_pooled(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> tuple[list[Float[Tensor, "b tokens d"]], Float[Tensor, "b e"]]:
        """`forward_layers` and `pooled` of the same pixels.

        A backbone whose head takes the output of its last layer runs its layers once for both.
        """
        return self.forward_layers(pixels, layers), self.pooled(pixels)

    projection: tuple[str, ...] = ()
    """Names of the parameters that `project` uses."""

    def pooled_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """What `project` makes `pooled` of: the same in every epoch while only the projection learns."""
        return self.pooled(pixels)

    def project(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """The last step of `pooled`, where it is one of its own."""
        return features

    def drop_patches(self, share: float) -> None:
        """Leave out this share of the patches in training, others each time (FLIP, arXiv:2212.00794)."""
        if share:
            raise ConfigError(f"{type(self).__name__} does not offer patch dropout")

    @abstractmethod
    def truncate(self, layer: int) -> None:
        """Free every parameter past `layer`, the head included."""

    @abstractmethod
    def portable_config(self) -> BackboneConfig:
        """This backbone's config, complete enough to build it again without any hub or file.

        At its first size: a tower's `image_size` says what `resize` made of it.
        """

    def layer_modules(self) -> Sequence[nn.Module]:
        """The modules of the layers it still has, in order, for what is done layer by layer.

        Each holds every parameter of its layer; where a library has no one module for it, an `nn.ModuleList`.
        """
        raise ConfigError(f"{type(self).__name__} does not tell its layers apart")

    def resize(self, image_size: int | tuple[int, int]) -> None:
        """Make another size the native one, with position embeddings resampled to it; updates `info`.

        Raises:
            ConfigError: this backbone takes its own size only, or not that one.
        """
        raise ConfigError(
            f"image_size {image_size}: this backbone takes pictures of {self.info.preprocess.image_size} only"
        )

    def checkpoint_activations(self, enabled: bool) -> None:
        """Store a block's input only and run it again in the backward pass (arXiv:1604.06174)."""
        raise ConfigError(f"{type(self).__name__} does not offer activation checkpointing")

    def forward_mixed(
        self, pictures: Sequence[Float[Tensor, "3 h w"]], layers: Sequence[int]
    ) -> list[list[Float[Tensor, "tokens d"]]]:
        """As `forward_layers`, for pictures of several sizes: outputs per layer, and in it per picture.

        Pictures of one size run as one batch. A backbone that masks can run all of them as one.
        """
        outputs: list[list[Tensor]] = [[torch.empty(0)] * len(pictures) for _ in layers]
        for shape in dict.fromkeys(picture.shape for picture in pictures):
            places = [place for place, picture in enumerate(pictures) if picture.shape == shape]
            batch = self.forward_layers(torch.stack([pictures[place] for place in places]), layers)
            for whole, part in zip(outputs, batch, strict=True):
                for place, tokens in zip(places, part, strict=True):
                    whole[place] = tokens
        return outputs
