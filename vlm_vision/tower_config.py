"""What a tower is built from. No torch here: a config is checked and planned before anything heavy loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from vlm_vision.config import Config
from vlm_vision.errors import ConfigError
from vlm_vision.registry import Registry, Variant

if TYPE_CHECKING:
    from vlm_vision.backbone import Backbone
    from vlm_vision.text import TextSide

BACKBONES = Registry(
    kind="backbone",
    group="vlm_vision.backbones",
    builtin=(
        ("open_clip", "vlm_vision.backbones.config:OpenClipConfig"),
        ("transformers", "vlm_vision.backbones.config:TransformersConfig"),
        ("timm", "vlm_vision.backbones.config:TimmConfig"),
        ("fused", "vlm_vision.backbones.config:FusedConfig"),
    ),
)

Select = Literal["patch", "cls_patch", "cls", "pooled"]
LayerList = Literal["slicefour", "slice_m25811_f6"]
Attention = Literal["auto", "flash", "efficient", "math"]
DType = Literal["float32", "bfloat16", "float16"]
Rgb = tuple[float, float, float]
Byte = Annotated[int, Field(ge=0, le=255)]
Size = PositiveInt | tuple[PositiveInt, PositiveInt]


class BackboneConfig(Config, ABC):
    """Base of backbone configs: which model of a source, and which weights.

    Attributes:
        name: the source; selects the config class.
        model: the source's name or id of the model.
        weights: a tag of the source, a file, or a folder; `none` asks for random weights.
    """

    name: str
    model: str | None = None
    weights: str | None = None

    @abstractmethod
    def build(self, *, load_weights: bool = True) -> Backbone:
        """Build the backbone; without `load_weights` it is random and no weights file is touched."""

    @classmethod
    def models(cls) -> list[str]:
        """Names or ids that `model` may take, as far as they are known without a network; may be empty."""
        return []

    def build_text(self, *, load_weights: bool = True) -> TextSide:
        """Build the text tower that was trained with this backbone.

        Raises:
            ConfigError: this source has no text tower.
        """
        raise ConfigError(
            f"backbone {self.name!r} has no text tower, which a dual encoder needs: "
            "use one from open_clip or transformers, e.g. open_clip:ViT-B-16-quickgelu@openai"
        )


def list_source(source: str) -> list[str]:
    """Towers of a source as `source:model`; where it does not list its models, its name alone.

    Raises:
        ConfigError: no such source.
    """
    models: list[str] = getattr(BACKBONES.config_class(source), "models", list)()
    return [f"{source}:{model}" for model in models] or [source]


class TowerConfig(Config):
    """A vision tower.

    Attributes:
        backbone: which model, from which library, with which weights: a node, or `source:model[@weights]`.
        layer: whose features are given, counted as transformers counts `hidden_states`: -1 is the last layer,
            -2 the one before it, k the k-th. A list is concatenated along the channels; two lists have
            LLaVA-NeXT's names: `slicefour` and `slice_m25811_f6`. None takes the backbone's own: -2 for
            transformers, -1 (the last stage) for trunks made of stages.
        select: patch tokens, class token followed by patch tokens, class token alone, or the pooled head's
            image embedding as one token.
        image_size: side of the pictures, or (rows, columns); position embeddings are resampled to it as the
            backbone's own library does. None keeps the weights' native size.
        dtype: of the weights, and so of the features.
        pooled_head: keep the layers after the selected one and the head, for image embeddings.
        attention: torch's kernel for scaled dot product attention; `auto` leaves the choice to torch.
    """

    backbone: Annotated[BackboneConfig, Variant(BACKBONES)]
    layer: int | tuple[int, ...] | LayerList | None = None
    select: Select = "patch"
    image_size: Size | None = None
    dtype: DType = "float32"
    pooled_head: bool = False
    attention: Attention = "auto"

    @property
    def keeps_head(self) -> bool:
        """Whether the whole backbone is kept: asked for, or because its head is what is selected."""
        return self.pooled_head or self.select == "pooled"

    @model_validator(mode="after")
    def _layers_are_named_once(self) -> TowerConfig:
        if isinstance(self.layer, tuple) and (not self.layer or len(set(self.layer)) != len(self.layer)):
            raise ValueError("layer must name at least one layer, and none twice")
        return self


class PreprocessConfig(Config):
    """How a picture becomes the rectangle a backbone expects.

    Attributes:
        image_size: of the rectangle in pixels: the side of a square, or rows and columns.
        resize: `shortest` scales until the picture covers `resize_to` and crops the centre; `squash` scales
            rows and columns each to `resize_to`; `longest` scales until the picture fits into `resize_to` and
            pads with `fill`; `flexible` keeps the aspect ratio and gives pictures of different sizes:
            multiples of `patch_size`, as large as `max_patches` allow (NaFlex, arXiv:2502.14786), where
            `image_size` is that of a square picture.
        resize_to: None means `image_size`. One number is, for `shortest`, what the shorter side becomes.
        crop_rounding: where an odd margin goes. torchvision rounds half to even, transformers rounds down.
        mean, std: per channel, on the 0..1 scale.
        fill: padding colour of `longest`, 0..255: a grey, or red, green and blue.
        resize_in: `bytes` rounds to whole levels as Pillow does; `floats` does not, as DINOv3's processor.
        max_patches, patch_size: of `flexible` alone, which needs both.
    """

    image_size: Size
    resize: Literal["shortest", "squash", "longest", "flexible"] = "shortest"
    resize_to: Size | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    crop_rounding: Literal["even", "down"] = "even"
    mean: Rgb = (0.48145466, 0.4578275, 0.40821073)
    std: Rgb = (0.26862954, 0.26130258, 0.27577711)
    fill: Byte | tuple[Byte, Byte, Byte] = 0
    resize_in: Literal["bytes", "floats"] = "bytes"
    max_patches: PositiveInt | None = None
    patch_size: PositiveInt | None = None

    @property
    def height(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @model_validator(mode="after")
    def _settings_fit_the_resize_mode(self) -> PreprocessConfig:
        if (self.resize == "flexible") != (self.max_patches is not None and self.patch_size is not None):
            raise ValueError(
                "resize 'flexible' needs max_patches and patch_size, and no other mode takes them"
            )
        if self.resize == "flexible" and self.resize_to is not None:
            raise ValueError("resize 'flexible' takes no resize_to: max_patches tells the size")
        if self.resize_in == "floats" and self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError("resize_in 'floats' is torch's resizing, which knows bicubic and bilinear alone")
        return self

    def squashed(self) -> PreprocessConfig:
        """The same settings, but for pictures that keep their shapes: those are squashed to `image_size`."""
        if self.resize != "flexible":
            return self
        return self.model_copy(update={"resize": "squash", "max_patches": None, "patch_size": None})

    def at_size(self, image_size: int | tuple[int, int]) -> PreprocessConfig:
        """The same settings for another size; a margin that is cropped away, and patches, scale with it."""
        resize_to = self.resize_to
        if resize_to is not None:
            given = (resize_to, resize_to) if isinstance(resize_to, int) else resize_to
            wanted = (image_size, image_size) if isinstance(image_size, int) else image_size
            rows = round(given[0] * wanted[0] / self.height)
            columns = round(given[1] * wanted[1] / self.width)
            resize_to = rows if rows == columns else (rows, columns)
        changed = self.model_copy(update={"image_size": image_size, "resize_to": resize_to})
        if self.patch_size is None:
            return changed
        patches = (changed.height // self.patch_size) * (changed.width // self.patch_size)
        return changed.model_copy(update={"max_patches": patches})
