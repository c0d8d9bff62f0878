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
            "use one from open_clip, e.g. open_clip:ViT-B-16-quickgelu@openai"
        )


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
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
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
    """How a picture becomes the square a backbone expects.

    Attributes:
        image_size: side of the square in pixels, or (rows, columns).
        resize: `shortest` scales the shorter side to `resize_to` and crops the centre; `squash` scales both
            sides to the square; `longest` scales the longer side and pads with `fill`.
        resize_to: None means `image_size`.
        crop_rounding: where an odd margin goes. torchvision rounds half to even, transformers rounds down.
        mean, std: per channel, on the 0..1 scale.
        fill: padding colour, 0..255, of `longest`.
    """

    image_size: PositiveInt | tuple[PositiveInt, PositiveInt]
    resize: Literal["shortest", "squash", "longest"] = "shortest"
    resize_to: PositiveInt | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    crop_rounding: Literal["even", "down"] = "even"
    mean: Rgb = (0.48145466, 0.4578275, 0.40821073)
    std: Rgb = (0.26862954, 0.26130258, 0.27577711)
    fill: Annotated[int, Field(ge=0, le=255)] = 0

    @property
    def height(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    def at_size(self, image_size: int | tuple[int, int]) -> PreprocessConfig:
        """The same settings for another size; a margin that is cropped away scales with it."""
        height = image_size if isinstance(image_size, int) else image_size[0]
        resize_to = self.resize_to and round(self.resize_to * height / self.height)
        return self.model_copy(update={"image_size": image_size, "resize_to": resize_to})
