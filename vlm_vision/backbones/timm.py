"""Any model of timm with `forward_intermediates`, alone or as the trunk of an open_clip model."""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from timm.data import resolve_model_data_config
from timm.layers import Format
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlm_vision.backbone import Backbone, BackboneInfo, Shape, find_size_step
from vlm_vision.backbones.config import TimmConfig
from vlm_vision.errors import ConfigError, WeightsError, first_line, nearest
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import load_strict, read_state_dict, without_init

RANDOM = "none"
# What timm raises where a size does not suit a model.
REFUSALS = (AssertionError, RuntimeError, ValueError)
Found = TypeVar("Found")


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

    Pictures of other sizes run through the trunk itself where it takes them (convolutions, ViTs). Where it
    does not (rotary and relative positions, windows) they run through a trunk with the same tensors, set to
    their size for this one call, so that nothing of it can be out of date; it costs 10 to 150 ms of a CPU.
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
        self._first_size = size = (preprocess.height, preprocess.width)
        takes_prefix = "return_prefix_tokens" in inspect.signature(trunk.forward_intermediates).parameters
        prefix_tokens = int(getattr(trunk, "num_prefix_tokens", 0)) if takes_prefix else 0
        has_class_token = getattr(trunk, "has_class_token", getattr(trunk, "cls_token", None) is not None)
        _take_any_size(trunk)
        # A model without memory is measured itself; as a tower's part it is in evaluation mode too.
        is_meta = all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        twin_model, twin_trunk = (model.eval(), trunk) if is_meta else self._build_twin()
        try:
            shapes = _shapes(twin_trunk, size)
            with torch.no_grad():
                embed_dim = twin_model(torch.empty(1, 3, *size, device="meta")).shape[-1]
        except REFUSALS as error:
            raise ConfigError(f"{origin} does not take pictures of {size[0]}x{size[1]}: {error}") from error
        size_step = find_size_step(size, shapes, partial(_shapes_or_none, twin_trunk))
        self._is_set_to_size = size_step is None and hasattr(trunk, "set_input_size")
        if self._is_set_to_size:
            size_step = find_size_step(size, shapes, partial(_shapes_at, twin_trunk))
        self.info = BackboneInfo(
            widths=tuple(width for width, _, _ in shapes),
            grids=tuple((rows, columns) for _, rows, columns in shapes),
            prefix_tokens=prefix_tokens,
            default_layer=-2 if len(set(shapes)) == 1 < len(shapes) else -1,
            embed_dim=int(embed_dim),
            preprocess=preprocess,
            size_step=size_step,
            registers=max(0, prefix_tokens - has_class_token),
        )

    @property
    def trunk(self) -> Any:
        """timm's model."""
        return self._trunk_of(self._whole)

    @property
    @abstractmethod
    def _whole(self) -> Any:
        """The module that gives image embeddings."""

    @staticmethod
    @abstractmethod
    def _trunk_of(model: Any) -> Any:
        """timm's model within it, or within a twin of it."""

    def _build_twin(self) -> tuple[Any, Any]:
        with torch.device("meta"):
            model = self._twin().eval()
        trunk = self._trunk_of(model)
        _take_any_size(trunk)
        return model, trunk

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        run = partial(self._run_layers, pixels, layers)
        return run(self._whole) if self._runs_as_it_is(pixels) else self._run_at_size(pixels, run)

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        run = partial(_call, pixels=pixels)
        return run(self._whole) if self._runs_as_it_is(pixels) else self._run_at_size(pixels, run)

    def _runs_as_it_is(self, pixels: Tensor) -> bool:
        native = (self.info.preprocess.height, self.info.preprocess.width)
        return not self._is_set_to_size or tuple(pixels.shape[-2:]) == native

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_at_size(self, pixels: Tensor, run: Callable[[Any], Found]) -> Found:
        """Run the model set to the size of these pixels; to compile it would take minutes for each size."""
        height, width = pixels.shape[-2:]
        try:
            model = set_to_size(self._whole, self._trunk_of, (height, width))
        except REFUSALS as error:
            raise ConfigError(
                f"pixels of {height}x{width}: {self._origin} does not take them: {first_line(error)}"
            ) from error
        return run(model)

    def _run_layers(self, pixels: Tensor, layers: Sequence[int], model: Any) -> list[Tensor]:
        trunk = self._trunk_of(model)
        common: dict[str, Any] = {
            "indices": [layer - 1 for layer in layers],
            "stop_early": True,
            "intermediates_only": True,
        }
        if not self.info.prefix_tokens:
            maps = trunk.forward_intermediates(pixels, output_fmt="NCHW", **common)
            return [rearrange(features, "b d h w -> b (h w) d") for features in maps]
        outputs = trunk.forward_intermediates(pixels, output_fmt="NLC", return_prefix_tokens=True, **common)
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]

    def truncate(self, layer: int) -> None:
        self.trunk.prune_intermediate_layers([layer - 1], prune_norm=True, prune_head=True)

    def layer_modules(self) -> Sequence[nn.Module]:
        """A module per layer: timm's own, or a list of all that a layer is made of."""
        held = dict(self.trunk.named_modules())
        layers = [
            [held[path] for path in paths if not isinstance(held.get(path, nn.Identity()), nn.Identity)]
            for paths in self._layer_paths
        ]
        while layers and not layers[-1]:  # freed
            layers.pop()
        return [parts[0] if len(parts) == 1 else nn.ModuleList(parts) for parts in layers]

    @cached_property
    def _layer_paths(self) -> list[list[str]]:
        _, twin = self._build_twin()
        return _paths_of_layers(twin, self._first_size)

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
        except REFUSALS as error:
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
    def _whole(self) -> Any:
        return self.model

    @staticmethod
    def _trunk_of(model: Any) -> Any:
        return model

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


def _call(model: Any, pixels: Tensor) -> Tensor:
    output: Tensor = model(pixels)
    return output


class _WithGraph(TorchFunctionMode):
    """Within it, what is computed keeps its graph, even under `no_grad` and when it becomes a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch.enable_grad():
            made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.grad_fn is not None:
            self._made[made.data_ptr()] = made
        return made

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """What a parameter was made of, with its graph: both have the same memory."""
        made = self._made.get(parameter.data_ptr())
        return made if made is not None and made.shape == parameter.shape else None


def set_to_size(model: nn.Module, trunk_of: Callable[[Any], Any], size: tuple[int, int]) -> Any:
    """The like of a model for pictures of another size, with the same tensors and hooks.

    timm's `set_input_size` resamples what depends on the size; where that learns, gradients reach what it was
    resampled from. The model itself stays as it is.

    Args:
        trunk_of: gives timm's model within the model.

    Raises:
        AssertionError, RuntimeError, ValueError: timm's, where the size does not suit.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    native = set(shared)
    for module in model.modules():
        shared |= {id(value): value for name, value in vars(module).items() if "hook" in name}
    like = copy.deepcopy(model, shared)
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    graph = _WithGraph()
    with graph if learns else nullcontext():
        trunk_of(like).set_input_size(img_size=size)
    elsewhere = not all(parameter.is_meta for parameter in model.parameters())
    for module in like.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) in native:
                continue
            if parameter.is_meta and elsewhere:
                raise RuntimeError(
                    f"{name} waits on the CPU or the disk; load the tower at this size instead"
                )
            if learns and parameter.requires_grad:
                resampled = graph.of(parameter)
                if resampled is None:
                    raise RuntimeError(f"{name} learns, and timm resamples it without a gradient")
                delattr(module, name)
                setattr(module, name, resampled)
    return like


@torch.no_grad()
def _shapes(trunk: Any, size: tuple[int, int]) -> list[Shape]:
    """Channels, rows and columns after each layer of a trunk without memory."""
    picture = torch.empty(1, 3, *size, device="meta")
    maps = trunk.forward_intermediates(picture, output_fmt="NCHW", intermediates_only=True)
    return [(int(features.shape[1]), int(features.shape[2]), int(features.shape[3])) for features in maps]


def _shapes_or_none(trunk: Any, size: tuple[int, int]) -> list[Shape] | None:
    try:
        return _shapes(trunk, size)
    except REFUSALS:
        return None


@torch.no_grad()
def _shapes_at(trunk: Any, size: tuple[int, int]) -> list[Shape] | None:
    """Shapes of a trunk that is set to the size first."""
    try:
        return _shapes(set_to_size(trunk, lambda model: model, size), size)
    except REFUSALS:
        return None


def _paths_of_layers(trunk: Any, size: tuple[int, int]) -> list[list[str]]:
    """Where the modules of each layer are: the largest whose parameters are all of that layer.

    A parameter is of the first layer that depends on it; but the stem, and what else lies beside the part
    that timm names as the first layer's, is of none.
    """
    with torch.inference_mode(False), torch.enable_grad():
        picture = torch.empty(1, 3, *size, device="meta")
        maps = trunk.forward_intermediates(picture, output_fmt="NCHW", intermediates_only=True)
    layer_of = dict(_first_use(maps))
    paths: list[list[str]] = [[] for _ in maps]
    named, _, _ = str(trunk.feature_info[0]["module"]).rpartition(".")

    def place(module: nn.Module, path: str) -> None:
        layers = {layer_of[parameter] for parameter in module.parameters() if parameter in layer_of}
        if len(layers) > 1 or f".{named}.".startswith(f"{path}."):
            for name, child in module.named_children():
                place(child, f"{path}.{name}")
        elif layers:
            paths[layers.pop()].append(path[1:])

    place(trunk, "")
    paths[0] = [path for path in paths[0] if path.startswith(f"{named}.")] or paths[0]
    return paths


def _first_use(outputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Every parameter on which outputs depend, and the number of the first of them that does."""
    seen: set[Any] = set()
    for number, output in enumerate(outputs):
        nodes = [output.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable, number
            nodes += [following for following, _ in node.next_functions]


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
