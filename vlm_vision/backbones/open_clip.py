"""open_clip's native ViTs and ModifiedResNets, with the text towers that were trained beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from einops import rearrange
from jaxtyping import Float
from open_clip.model import _build_text_tower, _build_vision_tower, convert_to_custom_text_state_dict
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from vlm_vision.backbone import Backbone, BackboneInfo
from vlm_vision.backbones.config import OpenClipConfig
from vlm_vision.text import TextSide, Tokenizer
from vlm_vision.errors import ConfigError, WeightsError, nearest
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import find_weights_file, load_strict, read_state_dict

RANDOM = "none"


def list_models() -> list[str]:
    """Models of open_clip whose trunk is a native ViT or a ModifiedResNet."""
    return [name for name in open_clip.list_models() if _is_native(open_clip.get_model_config(name)["vision_cfg"])]


def build(config: OpenClipConfig, *, load_weights: bool = True) -> Backbone:
    """The vision side of an open_clip model.

    Raises:
        ConfigError: unknown model, or a trunk from timm.
        WeightsError: no weights named, unknown tag, another activation than the weights', or tensors that do not fit.
    """
    architecture = _architecture(config)
    if not _is_native(architecture["vision_cfg"]):
        raise ConfigError(
            f"open_clip model {config.model!r} has a timm trunk, which this source does not read yet; "
            f"use timm:{architecture['vision_cfg']['timm_model_name']}"
        )
    visual = _build_vision_tower(architecture["embed_dim"], architecture["vision_cfg"], _quick_gelu(architecture))
    preprocess = config.preprocess or _preprocess(config, architecture)
    backbone: Backbone
    if isinstance(visual, ModifiedResNet):
        backbone = ResNetBackbone(visual, config, architecture, preprocess)
    else:
        backbone = VitBackbone(visual, config, architecture, preprocess)
    state = _weights(config, architecture) if load_weights else None
    if state is not None:
        own = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
        load_strict(visual, own, _origin(config))
    return backbone


def build_text(config: OpenClipConfig, *, load_weights: bool = True) -> TextSide:
    """The text side of an open_clip model: encoder, tokenizer, temperature.

    Raises:
        ConfigError: the architecture has no text tower.
        WeightsError: as for `build`.
    """
    architecture = _architecture(config)
    if "text_cfg" not in architecture:
        raise ConfigError("this architecture has no `text_cfg`, which a dual encoder needs")
    text_cfg = dict(architecture["text_cfg"])
    text_cfg["hf_model_pretrained"] = False  # the weights come from the checkpoint, never from a second download
    encoder = _build_text_tower(architecture["embed_dim"], text_cfg, _quick_gelu(architecture))
    logit_scale = torch.tensor(architecture.get("init_logit_scale", torch.tensor(1 / 0.07).log().item()))
    state = _weights(config, architecture) if load_weights else None
    if state is not None:
        own = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
        load_strict(encoder, own, _origin(config))
        logit_scale = state["logit_scale"].float().reshape(())
    return TextSide(encoder, Tokenizer(text_cfg), float(logit_scale))


class _OpenClipBackbone(Backbone):
    """What both trunk kinds share: the `visual` module of open_clip under its own parameter names."""

    def __init__(self, visual: nn.Module, config: OpenClipConfig, architecture: dict[str, Any]) -> None:
        super().__init__()
        self.visual = visual
        self._config = config
        self._architecture = architecture

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        output = self.visual(pixels)
        return output[0] if isinstance(output, tuple) else output

    def portable_config(self) -> OpenClipConfig:
        return self._config.model_copy(
            update={"architecture": self._architecture, "preprocess": self.info.preprocess}
        )


class VitBackbone(_OpenClipBackbone):
    """A native ViT: layers are transformer blocks, one class token before the patches."""

    def __init__(
        self,
        visual: VisionTransformer,
        config: OpenClipConfig,
        architecture: dict[str, Any],
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__(visual, config, architecture)
        layers = len(visual.transformer.resblocks)
        self.info = BackboneInfo(
            widths=(visual.conv1.out_channels,) * layers,
            grids=(tuple(visual.grid_size),) * layers,
            prefix_tokens=1,
            default_layer=-2 if layers > 1 else -1,
            embed_dim=visual.output_dim,
            preprocess=preprocess,
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        output = self.visual.forward_intermediates(
            pixels,
            indices=[layer - 1 for layer in layers],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        pairs = zip(output["image_intermediates_prefix"], output["image_intermediates"], strict=True)
        return [torch.cat(pair, dim=1) for pair in pairs]

    def truncate(self, layer: int) -> None:
        self.visual.prune_intermediate_layers([layer - 1], prune_norm=True, prune_head=True)
        self.visual.attn_pool = None


class ResNetBackbone(_OpenClipBackbone):
    """A ModifiedResNet: layers are the stem and the four stages, no class token, each stage halving the grid."""

    def __init__(
        self,
        visual: ModifiedResNet,
        config: OpenClipConfig,
        architecture: dict[str, Any],
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__(visual, config, architecture)
        width = visual.layer1[0].conv1.out_channels
        side = preprocess.image_size
        self.info = BackboneInfo(
            widths=(width, *(width * 4 * 2**stage for stage in range(4))),
            grids=tuple((side // stride, side // stride) for stride in (4, 4, 8, 16, 32)),
            prefix_tokens=0,
            default_layer=-1,
            embed_dim=visual.output_dim,
            preprocess=preprocess,
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        # stop_early=False is what stops early here: open_clip 3.3's ModifiedResNet has the flag inverted.
        output = self.visual.forward_intermediates(
            pixels, indices=[layer - 1 for layer in layers], stop_early=False, intermediates_only=True
        )
        return [rearrange(stage, "b d h w -> b (h w) d") for stage in output["image_intermediates"]]

    def truncate(self, layer: int) -> None:
        for stage in range(layer, 5):
            setattr(self.visual, f"layer{stage}", nn.Identity())
        self.visual.attnpool = nn.Identity()


def _is_native(vision_cfg: Mapping[str, Any]) -> bool:
    return not vision_cfg.get("timm_model_name")


def _quick_gelu(architecture: Mapping[str, Any]) -> bool:
    return bool(architecture.get("quick_gelu", False))


def _architecture(config: OpenClipConfig) -> dict[str, Any]:
    if config.architecture is not None:
        return deepcopy(config.architecture)
    found = open_clip.get_model_config(config.model)
    if found is None:
        known = open_clip.list_models()
        raise ConfigError(
            f"open_clip has no model {config.model!r}{nearest(str(config.model), known)} "
            "(all names: vlm-vision towers --source open_clip)"
        )
    return deepcopy(found)


def _origin(config: OpenClipConfig) -> str:
    return f"open_clip:{config.model or 'architecture'}@{config.weights}"


def _tag(config: OpenClipConfig) -> dict[str, Any]:
    """open_clip's record of a pretrained tag, empty when `weights` is not a tag of this model."""
    if config.model is None or config.weights in (None, RANDOM):
        return {}
    return dict(open_clip.get_pretrained_cfg(config.model, config.weights) or {})


def _preprocess(config: OpenClipConfig, architecture: Mapping[str, Any]) -> PreprocessConfig:
    """Settings of the weights over open_clip's defaults, at the model's image size."""
    tag = _tag(config)
    defaults = PreprocessConfig(image_size=architecture["vision_cfg"].get("image_size", 224))
    return defaults.model_copy(
        update={
            "mean": tuple(tag.get("mean") or defaults.mean),
            "std": tuple(tag.get("std") or defaults.std),
            "interpolation": tag.get("interpolation") or defaults.interpolation,
            "resize": tag.get("resize_mode") or defaults.resize,
        }
    )


def _weights(config: OpenClipConfig, architecture: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """All tensors of the weights in the `visual.` / `text.` layout, or None for random weights."""
    if config.weights == RANDOM:
        return None
    path = _weights_path(config, architecture)
    state = convert_to_custom_text_state_dict(read_state_dict(path))
    # Constants that OpenAI's files carry beside their tensors.
    return {name: value for name, value in state.items() if name not in ("input_resolution", "context_length", "vocab_size")}


def _weights_path(config: OpenClipConfig, architecture: Mapping[str, Any]) -> Path:
    tags = open_clip.list_pretrained_tags_by_model(config.model) if config.model else []
    choices = f"a tag of this model ({', '.join(tags) or 'it has none'}), a file, a folder, or {RANDOM!r} for random weights"
    if config.weights is None:
        raise WeightsError(f"{_origin(config)}: no weights named; give {choices}")
    path = Path(config.weights)
    if path.is_dir():
        return find_weights_file(path)
    if path.is_file():
        return path
    tag = _tag(config)
    if not tag:
        raise WeightsError(
            f"{_origin(config)}: {config.weights!r} is neither a file nor a tag of this model"
            f"{nearest(config.weights, tags)}; give {choices}"
        )
    trained_with_quick_gelu = bool(tag.get("quick_gelu", False))
    if trained_with_quick_gelu != _quick_gelu(architecture):
        suffix = "-quickgelu"
        other = f"{config.model}{suffix}" if trained_with_quick_gelu else str(config.model).removesuffix(suffix)
        raise WeightsError(
            f"{_origin(config)}: these weights were trained with {'QuickGELU' if trained_with_quick_gelu else 'GELU'}, "
            f"this model computes {'GELU' if trained_with_quick_gelu else 'QuickGELU'}, so its features would be wrong; "
            f"use open_clip:{other}@{config.weights}"
        )
    return Path(open_clip.download_pretrained(tag))
