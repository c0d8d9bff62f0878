"""Any model of timm with `forward_intermediates`, alone or as the trunk of an open_clip model."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from timm.data import resolve_model_data_config
from timm.layers import Format
from torch import Tensor, nn

from vlm_vision.backbone import Backbone, BackboneInfo, Shape, find_size_step
from vlm_vision.backbones.config import TimmConfig
from vlm_vision.errors import ConfigError, WeightsError, first_line, nearest
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import load_strict, read_state_dict, without_init

RANDOM = "none"


def list_models() -> list[str]:
    """Architectures of timm; each also takes its pretrained tags, as `NAME.TAG`."""
    return list(timm.list_models())


def build(config: TimmConfig, *, load_weights: bool = True) -> Backbone:
    """A timm model without its classifier.

    Raises:
        ConfigError: unknown model, or one without `forward_intermediates`.
        WeightsError: weights that cannot be had or do not fit.
    """
    name = str(config.model)
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    from_tag = load_weights and config.weights is None
    from_file = load_weights and config.weights not in (None, RANDOM)
    try:
        with without_init(from_file):
            model = timm.create_model(name, pretrained=from_tag, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"timm:{name}: pretrained weights cannot be had ({first_line(error)}); "
            f"name a weights file, or {RANDOM!r} for random weights"
        ) from error
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"timm model {name!r} has no forward_intermediates, so it gives no patch features")
    if from_file:
        state = read_state_dict(Path(str(config.weights)))
        classifiers = tuple(f"{layer}." for layer in _classifier_names(model))
        own = {key: value for key, value in state.items() if not key.startswith(classifiers)}
        load_strict(model, own, f"timm:{name}@{config.weights}")
    return TimmBackbone(model, config)


class TrunkBackbone(Backbone):
    """Layers are timm's feature entries: blocks of a ViT, stages of the rest.

    Trunks whose entries all have one shape are blocks, so that -2 is their default as for every ViT.
    """

    def __init__(
        self, origin: str, model: Any, trunk: Any, preprocess: PreprocessConfig, twin: Callable[[], Any]
    ) -> None:
        """Measure a model's facts on twins of it that take no memory.

        `feature_info` only tells strides, and whether a stage of an odd size rounds up or down depends on its
        padding.

        Args:
            origin: its name, in errors.
            model: gives image embeddings.
            trunk: the part of it, or itself, that is timm's model.
            twin: builds the like of `model`, `trunk` within it, for pictures of the native size.

        Raises:
            ConfigError: the model does not take pictures of the size in `preprocess`.
        """
        super().__init__()
        self._origin, self._twin = origin, twin
        takes_prefix = "return_prefix_tokens" in inspect.signature(trunk.forward_intermediates).parameters
        prefix_tokens = int(getattr(trunk, "num_prefix_tokens", 0)) if takes_prefix else 0
        has_class_token = getattr(trunk, "has_class_token", getattr(trunk, "cls_token", None) is not None)
        _take_any_size(trunk)
        # A model without memory is measured itself; as a tower's part it is in evaluation mode too.
        is_meta = any(parameter.is_meta for parameter in model.parameters())
        twin_model, twin_trunk = (model.eval(), trunk) if is_meta else self._build_twin()
        size = (preprocess.height, preprocess.width)
        try:
            shapes = _shapes(twin_trunk, size)
            with torch.no_grad():
                embed_dim = twin_model(torch.empty(1, 3, *size, device="meta")).shape[-1]
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(f"{origin} does not take pictures of {size[0]}x{size[1]}: {error}") from error
        self.info = BackboneInfo(
            widths=tuple(width for width, _, _ in shapes),
            grids=tuple((rows, columns) for _, rows, columns in shapes),
            prefix_tokens=prefix_tokens,
            default_layer=-2 if len(set(shapes)) == 1 < len(shapes) else -1,
            embed_dim=int(embed_dim),
            preprocess=preprocess,
            size_step=find_size_step(size, shapes, partial(_shapes_or_none, twin_trunk)),
            registers=max(0, prefix_tokens - has_class_token),
        )

    @property
    @abstractmethod
    def trunk(self) -> Any:
        """timm's model."""

    @staticmethod
    @abstractmethod
    def _trunk_of(model: Any) -> Any:
        """timm's model within a twin."""

    def _build_twin(self) -> tuple[Any, Any]:
        with torch.device("meta"):
            model = self._twin().eval()
        trunk = self._trunk_of(model)
        _take_any_size(trunk)
        return model, trunk

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        common: dict[str, Any] = {
            "indices": [layer - 1 for layer in layers],
            "stop_early": True,
            "intermediates_only": True,
        }
        if not self.info.prefix_tokens:
            maps = self.trunk.forward_intermediates(pixels, output_fmt="NCHW", **common)
            return [rearrange(features, "b d h w -> b (h w) d") for features in maps]
        outputs = self.trunk.forward_intermediates(
            pixels, output_fmt="NLC", return_prefix_tokens=True, **common
        )
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]

    def truncate(self, layer: int) -> None:
        self.trunk.prune_intermediate_layers([layer - 1], prune_norm=True, prune_head=True)

    def layer_modules(self) -> Sequence[nn.Module]:
        held = dict(self.trunk.named_modules())
        names = dict.fromkeys(entry["module"] for entry in self.trunk.feature_info)
        return [held[name] for name in names if name in held and not isinstance(held[name], nn.Identity)]

    def checkpoint_activations(self, enabled: bool) -> None:
        try:
            self.trunk.set_grad_checkpointing(enabled)
        except (AssertionError, AttributeError) as error:
            raise ConfigError(f"{self._origin} has no activation checkpointing") from error

    def resize(self, image_size: int | tuple[int, int]) -> None:
        preprocess = self.info.preprocess.at_size(image_size)
        size = (preprocess.height, preprocess.width)
        _, twin = self._build_twin()
        try:
            for trunk in (twin, self.trunk):  # the twin is what may fail
                if hasattr(trunk, "set_input_size"):
                    trunk.set_input_size(img_size=size)
                shapes = _shapes(twin, size)
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"image_size {image_size}: {self._origin} does not take it: {first_line(error)}"
            ) from error
        grids = tuple((rows, columns) for _, rows, columns in shapes)
        self.info = replace(self.info, grids=grids, preprocess=preprocess)


class TimmBackbone(TrunkBackbone):
    """A timm model; the pooled head is its own pooling, without the classifier."""

    model: Any

    def __init__(self, model: Any, config: TimmConfig) -> None:
        preprocess = config.preprocess or _preprocess(model)
        name = str(config.model)
        super().__init__(
            f"timm:{name}", model, model, preprocess, lambda: timm.create_model(name, num_classes=0)
        )
        self.model = model
        self._portable = config.model_copy(update={"preprocess": preprocess})

    @property
    def trunk(self) -> Any:
        return self.model

    @staticmethod
    def _trunk_of(model: Any) -> Any:
        return model

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        pooled: Tensor = self.model(pixels)
        return pooled

    def portable_config(self) -> TimmConfig:
        return self._portable


def _take_any_size(trunk: Any) -> None:
    """Let a ViT with position embeddings resample them to the size of each call, as `dynamic_img_size` does.

    timm takes the flag when a model is built, and open_clip does not pass it on. Models of a size that is no
    multiple of their patch (SO400M/14 at 384) drop the rest of the picture, at that one size only.
    """
    embed: Any = getattr(trunk, "patch_embed", None)
    if not (
        hasattr(trunk, "dynamic_img_size") and hasattr(trunk, "_pos_embed") and hasattr(embed, "flatten")
    ):
        return
    whole = all(side % patch == 0 for side, patch in zip(embed.img_size, embed.patch_size, strict=True))
    if embed.flatten and whole:
        trunk.dynamic_img_size = True
        embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC


@torch.no_grad()
def _shapes(trunk: Any, size: tuple[int, int]) -> list[Shape]:
    """Channels, rows and columns after each layer of a trunk without memory."""
    picture = torch.empty(1, 3, *size, device="meta")
    maps = trunk.forward_intermediates(picture, output_fmt="NCHW", intermediates_only=True)
    return [(int(features.shape[1]), int(features.shape[2]), int(features.shape[3])) for features in maps]


def _shapes_or_none(trunk: Any, size: tuple[int, int]) -> list[Shape] | None:
    try:
        return _shapes(trunk, size)
    except (AssertionError, RuntimeError):
        return None


def _preprocess(model: Any) -> PreprocessConfig:
    """timm's own transform for evaluation: `transforms_imagenet_eval` of timm/data/transforms_factory.py."""
    data = resolve_model_data_config(model)
    height, width = data["input_size"][-2:]
    rows, columns = (int(side / data["crop_pct"]) for side in (height, width))
    pads = data["crop_mode"] == "border"
    return PreprocessConfig(
        image_size=height if height == width else (height, width),
        resize="longest" if pads else "squash" if data["crop_mode"] == "squash" else "shortest",
        resize_to=rows if rows == columns else (rows, columns),
        interpolation=data["interpolation"],
        fill=tuple(round(255 * level) for level in data["mean"]) if pads else 0,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _classifier_names(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
