"""Config nodes of the built-in backbones. No torch here: each builds through a lazy import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PositiveInt, model_validator

from vlm_vision.config import Config
from vlm_vision.registry import Variant
from vlm_vision.tower_config import BACKBONES, BackboneConfig, PreprocessConfig

# What the hub's config.json of these models says, where the library's defaults do not, so that they are
# described and planned without a network. Weights are always built by the config.json beside them.
_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_BASE = dict(zip(_WIDTHS, (768, 3072, 12, 12), strict=True))
_LARGE = dict(zip(_WIDTHS, (1024, 4096, 24, 16), strict=True))
_SO400M = dict(zip(_WIDTHS, (1152, 4304, 27, 16), strict=True))
_GIANT_OPT = dict(zip(_WIDTHS, (1536, 6144, 40, 16), strict=True))
_HUGE = dict(zip(_WIDTHS, (1280, 5120, 32, 16), strict=True))


def _row(
    model_type: str, size: Mapping[str, int], image_size: int, patch_size: int, **more: Any
) -> dict[str, Any]:
    return {"model_type": model_type, **size, "image_size": image_size, "patch_size": patch_size, **more}


def _published() -> dict[str, dict[str, Any]]:
    """Architectures by hub id."""
    models: dict[str, dict[str, Any]] = {}
    for name, size, patch, image, projection in (
        ("base-patch32", _BASE, 32, 224, 512),
        ("base-patch16", _BASE, 16, 224, 512),
        ("large-patch14", _LARGE, 14, 224, 768),
        ("large-patch14-336", _LARGE, 14, 336, 768),
    ):
        more = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": projection}
        models[f"openai/clip-vit-{name}"] = _row("clip_vision_model", size, image, patch, **more)
    for name, size, patch, images in (
        ("siglip-base", _BASE, 16, (224, 256, 384, 512)),
        ("siglip-large", _LARGE, 16, (256, 384)),
        ("siglip-so400m", _SO400M, 14, (224, 384)),
        ("siglip2-base", _BASE, 32, (256,)),
        ("siglip2-base", _BASE, 16, (224, 256, 384, 512)),
        ("siglip2-large", _LARGE, 16, (256, 384, 512)),
        ("siglip2-so400m", _SO400M, 14, (224, 384)),
        ("siglip2-so400m", _SO400M, 16, (256, 384, 512)),
        ("siglip2-giant-opt", _GIANT_OPT, 16, (256, 384)),
    ):
        for image in images:
            models[f"google/{name}-patch{patch}-{image}"] = _row("siglip_vision_model", size, image, patch)
    for name, size in (("base", _BASE), ("so400m", _SO400M)):
        naflex = {"model_type": "siglip2_vision_model", **size, "patch_size": 16, "num_patches": 256}
        models[f"google/siglip2-{name}-patch16-naflex"] = naflex
    for name, width, layers, heads in (
        ("small", 384, 12, 6),
        ("base", 768, 12, 12),
        ("large", 1024, 24, 16),
        ("giant", 1536, 40, 24),
    ):
        size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        more = {"use_swiglu_ffn": name == "giant", "layer_norm_eps": 1e-6}
        models[f"facebook/dinov2-{name}"] = _row("dinov2", size, 518, 14, **more)
        models[f"facebook/dinov2-with-registers-{name}"] = _row(
            "dinov2_with_registers", size, 518, 14, num_register_tokens=4, **more
        )
    gated = {"use_gated_mlp": True, "hidden_act": "silu"}
    for name, widths, more in (
        ("s16", (384, 1536, 12, 6), {}),
        ("s16plus", (384, 1536, 12, 6), gated),
        ("b16", (768, 3072, 12, 12), {}),
        ("l16", (1024, 4096, 24, 16), {}),
        ("h16plus", (1280, 5120, 32, 20), gated),
        ("7b16", (4096, 8192, 40, 32), {**gated, "query_bias": False, "value_bias": False}),
    ):
        size = dict(zip(_WIDTHS, widths, strict=True))
        models[f"facebook/dinov3-vit{name}-pretrain-lvd1689m"] = _row(
            "dinov3_vit", size, 224, 16, num_register_tokens=4, **more
        )
    for name, width, layers in (("tiny", 96, 9), ("small", 96, 27), ("base", 128, 27), ("large", 192, 27)):
        models[f"facebook/dinov3-convnext-{name}-pretrain-lvd1689m"] = {
            "model_type": "dinov3_convnext",
            "hidden_sizes": [width, width * 2, width * 4, width * 8],
            "depths": [3, 3, layers, 3],
            "image_size": 224,
        }
    for name, widths in (
        ("large", (1024, 2816, 24, 8)),
        ("huge", (1536, 4096, 24, 12)),
        ("1B", (2048, 5632, 24, 16)),
        ("3B", (3072, 8192, 24, 24)),
    ):
        size = dict(zip(_WIDTHS, widths, strict=True))
        for image in (224, 336, 448):
            models[f"apple/aimv2-{name}-patch14-{image}"] = _row(
                "aimv2_vision_model", size, image, 14, use_head=False
            )
    for name, size, patch in (("base", _BASE, 16), ("large", _LARGE, 16), ("huge", _HUGE, 14)):
        models[f"facebook/vit-mae-{name}"] = _row("vit_mae", size, 224, patch)
    return models


PUBLISHED = _published()

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
        tokenizer: folder or hub id of a dual encoder's tokenizer, where that is one of transformers; None
            takes the one that the architecture names.
    """

    name: Literal["open_clip"] = "open_clip"
    architecture: dict[str, Any] | None = None
    preprocess: PreprocessConfig | None = None
    tokenizer: str | None = None

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
        model: hub id or folder, of a whole model or its vision part: CLIP, SigLIP, SigLIP2 (fixed, NaFlex),
            DINOv2 (with registers), DINOv3 (ViT, ConvNeXt), AIMv2, ViT-MAE; or any other that AutoModel loads
            and that gives hidden states of pictures, with `assumptions` in the tower's facts. Whole CLIP,
            SigLIP and SigLIP2 are dual encoders too.
        architecture: instead of `model`, the content of its `config.json`, or of its vision part's.
        text_architecture: of a dual encoder whose `architecture` is the vision part's, that of the whole.
        weights: None takes those of `model`; another hub id or folder; `none` for random.
        preprocess: None takes what the weights' `preprocessor_config.json` says.
        tokenizer: folder or hub id of a dual encoder's tokenizer; None takes that of `model`.
    """

    name: Literal["transformers"] = "transformers"
    architecture: dict[str, Any] | None = None
    text_architecture: dict[str, Any] | None = None
    preprocess: PreprocessConfig | None = None
    tokenizer: str | None = None

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

    def build_text(self, *, load_weights: bool = True) -> TextSide:
        from vlm_vision.backbones.transformers_text import build_text

        return build_text(self, load_weights=load_weights)


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
