"""open_clip's native ViTs and ModifiedResNets, with the text towers that were trained beside them."""

from __future__ import annotations

import json
import math
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
from vlm_vision.errors import ConfigError, WeightsError, first_line, nearest
from vlm_vision.text import TextSide, Tokenizer
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import find_weights_file, load_strict, read_state_dict

RANDOM = "none"
# Beside the towers: CoCa's decoder, which a dual encoder leaves out, and SigLIP's bias.
KNOWN = ("visual.", "text.", "text_decoder.", "logit_scale", "logit_bias")
# Only OpenAI's own files carry these beside their tensors, and all of them use QuickGELU.
OPENAI_CONSTANTS = {"input_resolution", "context_length", "vocab_size"}


def list_models() -> list[str]:
    """Models of open_clip whose trunk is a native ViT or a ModifiedResNet."""
    return [
        name for name in open_clip.list_models() if _is_native(open_clip.get_model_config(name)["vision_cfg"])
    ]


def build(config: OpenClipConfig, *, load_weights: bool = True) -> Backbone:
    """The vision side of an open_clip model.

    Raises:
        ConfigError: unknown model, or a trunk from timm.
        WeightsError: no weights named, unknown tag, another activation, or tensors that do not fit.
    """
    architecture = _architecture(config)
    if not _is_native(architecture["vision_cfg"]):
        raise ConfigError(
            f"open_clip model {config.model!r} has a timm trunk, which this source does not read yet; "
            f"use timm:{architecture['vision_cfg']['timm_model_name']}"
        )
    state = _weights(config, architecture) if load_weights else None
    visual = _build_vision_tower(
        architecture["embed_dim"], architecture["vision_cfg"], _quick_gelu(architecture)
    )
    preprocess = _preprocess(config, architecture)
    backbone: Backbone
    if isinstance(visual, ModifiedResNet):
        backbone = ResNetBackbone(visual, config, architecture, preprocess)
    else:
        backbone = VitBackbone(visual, config, architecture, preprocess)
    if state is not None:
        own = {
            name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")
        }
        load_strict(visual, own, _origin(config))
    return backbone


def build_text(config: OpenClipConfig, *, load_weights: bool = True) -> TextSide:
    """The text side of an open_clip model: encoder, tokenizer, temperature.

    Raises:
        ConfigError: the architecture has no text tower, or its parts cannot be had.
        WeightsError: as for `build`.
    """
    architecture = _architecture(config)
    if "text_cfg" not in architecture:
        raise ConfigError("this architecture has no `text_cfg`, which a dual encoder needs")
    # The weights come from the checkpoint, never from a second download; token features are CoCa's decoder's.
    text_cfg = {**architecture["text_cfg"], "hf_model_pretrained": False, "output_tokens": False}
    try:
        encoder = _build_text_tower(architecture["embed_dim"], text_cfg, _quick_gelu(architecture))
        tokenizer = Tokenizer(text_cfg)
    except OSError as error:
        raise ConfigError(
            f"{_origin(config)}: its text tower needs files of "
            f"{text_cfg.get('hf_model_name') or text_cfg.get('hf_tokenizer_name')!r} from the hub, which "
            f"cannot be reached ({first_line(error)})"
        ) from error
    logit_scale = float(architecture.get("init_logit_scale", math.log(1 / 0.07)))
    state = _weights(config, architecture) if load_weights else None
    if state is not None:
        own = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
        own.pop("transformer.embeddings.position_ids", None)  # a constant in old files with text from the hub
        load_strict(encoder, own, _origin(config))
        if "logit_scale" not in state:
            raise WeightsError(
                f"{_origin(config)}: these weights have no logit_scale, so they are no dual encoder's"
            )
        logit_scale = float(state["logit_scale"])
    return TextSide(encoder, tokenizer, logit_scale)


class _OpenClipBackbone(Backbone):
    """What both trunk kinds share: the `visual` module of open_clip under its own parameter names."""

    visual: Any

    def __init__(self, visual: nn.Module, config: OpenClipConfig, architecture: dict[str, Any]) -> None:
        super().__init__()
        self.visual = visual
        self._config = config
        self._architecture = architecture

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        output = self.visual(pixels)
        embedding: Tensor = output[0] if isinstance(output, tuple) else output
        return embedding

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
        self.visual.attn_pool = self.visual.attn_pool_contrastive = None


class ResNetBackbone(_OpenClipBackbone):
    """A ModifiedResNet: layers are the stem and the four stages, each halving the grid; no class token."""

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


def _record(config: OpenClipConfig) -> dict[str, Any]:
    """How the weights were trained: open_clip's record of a tag, or `open_clip_config.json` beside them."""
    if config.weights in (None, RANDOM):
        return {}
    described = Path(str(config.weights)) / "open_clip_config.json"
    if described.is_file():
        try:
            content = json.loads(described.read_text(encoding="utf-8"))
            return {**content["preprocess_cfg"], "quick_gelu": content["model_cfg"].get("quick_gelu", False)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{described} needs `model_cfg` and `preprocess_cfg`, as open_clip writes them: {error!r}"
            ) from error
    return dict((config.model and open_clip.get_pretrained_cfg(config.model, config.weights)) or {})


def _preprocess(config: OpenClipConfig, architecture: Mapping[str, Any]) -> PreprocessConfig:
    """Settings of the weights over open_clip's defaults, at the model's image size.

    Raises:
        ConfigError: `preprocess` of another size than the model's.
    """
    side = architecture["vision_cfg"].get("image_size", 224)
    if config.preprocess is not None:
        if config.preprocess.image_size != side:
            raise ConfigError(
                f"{_origin(config)}: preprocess.image_size is {config.preprocess.image_size}, "
                f"the model's is {side}"
            )
        return config.preprocess
    record, defaults = _record(config), PreprocessConfig(image_size=side)
    return defaults.model_copy(
        update={
            "mean": tuple(record.get("mean") or defaults.mean),
            "std": tuple(record.get("std") or defaults.std),
            "interpolation": record.get("interpolation") or defaults.interpolation,
            "resize": record.get("resize_mode") or defaults.resize,
        }
    )


def _check_activation(
    config: OpenClipConfig, architecture: Mapping[str, Any], trained_with_quick_gelu: bool
) -> None:
    """Refuse weights trained with another activation than the model computes: no tensor's shape would tell.

    Raises:
        WeightsError: names the twin model that fits.
    """
    if trained_with_quick_gelu == _quick_gelu(architecture):
        return
    names = ("QuickGELU", "GELU") if trained_with_quick_gelu else ("GELU", "QuickGELU")
    if config.model is None:
        way_out = f"set architecture.quick_gelu to {str(trained_with_quick_gelu).lower()}"
    else:
        stem = config.model.removesuffix("-quickgelu")
        way_out = f"use open_clip:{stem}{'-quickgelu' if trained_with_quick_gelu else ''}@{config.weights}"
    raise WeightsError(
        f"{_origin(config)}: these weights were trained with {names[0]}, this model computes {names[1]}, "
        f"so its features would be wrong; {way_out}"
    )


def _weights(config: OpenClipConfig, architecture: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """All tensors of the weights in the `visual.` / `text.` layout, or None for random weights."""
    if config.weights == RANDOM:
        return None
    path = _weights_path(config, architecture)
    state: dict[str, Tensor] = convert_to_custom_text_state_dict(read_state_dict(path))
    if OPENAI_CONSTANTS & state.keys():
        _check_activation(config, architecture, trained_with_quick_gelu=True)
    strange = [name for name in state if not name.startswith(KNOWN) and name not in OPENAI_CONSTANTS]
    if strange:
        raise WeightsError(
            f"{_origin(config)}: {len(strange)} tensor(s) belong to no part of an open_clip model: "
            f"{', '.join(sorted(strange)[:5])}"
        )
    return state


def _weights_path(config: OpenClipConfig, architecture: Mapping[str, Any]) -> Path:
    tags = open_clip.list_pretrained_tags_by_model(config.model) if config.model else []
    listed = ", ".join(tags) or "it has none"
    choices = f"a tag of this model ({listed}), a file, a folder, or {RANDOM!r} for random weights"
    if config.weights is None:
        raise WeightsError(f"{_origin(config)}: no weights named; give {choices}")
    path = Path(config.weights)
    record = _record(config)
    if record:
        _check_activation(config, architecture, bool(record.get("quick_gelu", False)))
    if path.is_dir():
        return find_weights_file(path)
    if path.is_file():
        return path
    if not record:
        raise WeightsError(
            f"{_origin(config)}: {config.weights!r} is neither a file nor a tag of this model"
            f"{nearest(config.weights, tags)}; give {choices}"
        )
    try:
        return Path(open_clip.download_pretrained(record))
    except Exception as error:  # the hub's and the web's errors are many families
        raise WeightsError(
            f"{_origin(config)}: weights cannot be downloaded ({first_line(error)}); "
            "offline, name a file or folder that holds them"
        ) from error
