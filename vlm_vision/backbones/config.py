"""Config nodes of the built-in backbones. No torch here: each builds through a lazy import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PositiveInt, model_validator

from vlm_vision.config import Config
from vlm_vision.registry import Variant
from vlm_vision.tower_config import BACKBONES, BackboneConfig, PreprocessConfig

_CLIP = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_CLIP_BASE = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "projection_dim": 512,
}
_CLIP_LARGE = {
    **_CLIP,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_DINOV2 = {
    "model_type": "dinov2",
    "image_size": 518,
    "patch_size": 14,
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
}

# What the hub's config.json of these models says, so that they are described and planned without a network.
# Weights are always built by the config.json beside them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "openai/clip-vit-base-patch32": {**_CLIP_BASE, "patch_size": 32},
    "openai/clip-vit-base-patch16": {**_CLIP_BASE, "patch_size": 16},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "facebook/dinov2-small": {
        **_DINOV2,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    },
    "facebook/dinov2-base": {
        **_DINOV2,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "facebook/dinov2-large": {
        **_DINOV2,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "facebook/dinov2-giant": {
        **_DINOV2,
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
}

if TYPE_CHECKING:
    from vlm_vision.backbone import Backbone
    from vlm_vision.text import TextSide


class OpenClipConfig(BackboneConfig):
    """A model of open_clip: `open_clip:ViT-L-14-336-quickgelu@openai`.

    Attributes:
        model: a name of `open_clip.list_models()`.
        architecture: instead of a name, the model written out as in open_clip's `model_configs/*.json`:
            `embed_dim`, `vision_cfg`, `text_cfg`, optionally `quick_gelu`.
        weights: a pretrained tag of that model, a weights file, or a folder with one; `none` for random.
        preprocess: None takes what the weights were trained with.
    """

    name: Literal["open_clip"] = "open_clip"
    architecture: dict[str, Any] | None = None
    preprocess: PreprocessConfig | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> OpenClipConfig:
        if self.model is None and self.architecture is None:
            raise ValueError("name a `model` of open_clip, or write out its `architecture`")
        if self.architecture is not None and not {"embed_dim", "vision_cfg"} <= self.architecture.keys():
            raise ValueError("`architecture` needs `embed_dim` and `vision_cfg`")
        return self

    @classmethod
    def models(cls) -> list[str]:
        from vlm_vision.backbones.open_clip import list_models

        return list_models()

    def build(self, *, load_weights: bool = True) -> Backbone:
        from vlm_vision.backbones.open_clip import build

        return build(self, load_weights=load_weights)

    def build_text(self, *, load_weights: bool = True) -> TextSide:
        from vlm_vision.backbones.open_clip import build_text

        return build_text(self, load_weights=load_weights)


class TransformersConfig(BackboneConfig):
    """A vision model of transformers: `transformers:openai/clip-vit-large-patch14-336`, or a local folder.

    Attributes:
        model: hub id or folder, of CLIP (the whole model or its vision part) or DINOv2.
        architecture: instead of `model`, the content of its vision `config.json`.
        weights: None takes those of `model`; another hub id or folder; `none` for random.
        preprocess: None takes what the weights' `preprocessor_config.json` says.
    """

    name: Literal["transformers"] = "transformers"
    architecture: dict[str, Any] | None = None
    preprocess: PreprocessConfig | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> TransformersConfig:
        if self.model is None and self.architecture is None:
            raise ValueError("name a `model` (hub id or folder), or write out its `architecture`")
        return self

    @classmethod
    def models(cls) -> list[str]:
        return list(PUBLISHED)

    def build(self, *, load_weights: bool = True) -> Backbone:
        from vlm_vision.backbones.transformers import build

        return build(self, load_weights=load_weights)


class TimmConfig(BackboneConfig):
    """A model of timm with `forward_intermediates`: `timm:vit_base_patch16_224.augreg_in21k`.

    Attributes:
        model: a name of `timm.list_models()`, with or without its pretrained tag.
        weights: None takes the tag's; a weights file; `none` for random.
        preprocess: None takes what the tag says.
    """

    name: Literal["timm"] = "timm"
    preprocess: PreprocessConfig | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> TimmConfig:
        if self.model is None:
            raise ValueError("name a `model` of timm")
        return self

    @classmethod
    def models(cls) -> list[str]:
        from vlm_vision.backbones.timm import list_models

        return list_models()

    def build(self, *, load_weights: bool = True) -> Backbone:
        from vlm_vision.backbones.timm import build

        return build(self, load_weights=load_weights)


class FusedPart(Config):
    """One backbone among several.

    Attributes:
        backbone: as the `backbone` of a tower.
        layer: whose features are taken, counted as a tower's; None takes the backbone's own.
    """

    backbone: Annotated[BackboneConfig, Variant(BACKBONES)]
    layer: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _takes_a_backbone_alone(cls, value: Any) -> Any:
        alone = isinstance(value, str) or (isinstance(value, dict) and "name" in value)
        return {"backbone": value} if alone else value


class FusedConfig(BackboneConfig):
    """Several backbones as one.

    Attributes:
        parts: each a backbone, or a backbone with its layer.
        join: `channels` puts the features of a patch side by side, on one grid; `tokens` puts the parts'
            tokens one after the other, which takes parts of one width.
        grid: rows and columns to which features are interpolated, of `channels`; None takes the first part's.
    """

    name: Literal["fused"] = "fused"
    parts: tuple[FusedPart, ...]
    join: Literal["channels", "tokens"] = "channels"
    grid: tuple[PositiveInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> FusedConfig:
        if len(self.parts) < 2:
            raise ValueError("name at least two `parts`")
        if self.model is not None or self.weights is not None:
            raise ValueError("`model` and `weights` are of the parts, not of the whole")
        if self.grid is not None and self.join == "tokens":
            raise ValueError("`grid` is for `join: channels`; tokens one after the other keep their grids")
        return self

    def build(self, *, load_weights: bool = True) -> Backbone:
        from vlm_vision.backbones.fused import build

        return build(self, load_weights=load_weights)
