"""Towers as models of transformers, so that its LLaVAs take them as their `vision_config`.

Importing this module registers everything with `AutoConfig`, `AutoModel`, `AutoImageProcessor` and
`AutoBackbone`; a program that loads such a folder imports it first: transformers looks for no plug-ins.

    tower = load_tower("open_clip:ViT-L-14-336-quickgelu@openai")
    config = LlavaConfig(
        vision_config=VlmVisionConfig.from_tower(tower), text_config=llm, **llava_fields(tower)
    )
    model = LlavaForConditionalGeneration(config)  # transformers builds every part with random weights
    model.model.vision_tower = VlmVisionModel.from_tower(tower)  # the trained ones
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from vlm_vision.backbone import Backbone
from vlm_vision.compat import attention_kernel
from vlm_vision.config import validate
from vlm_vision.device_map import DeviceMap, MaxMemory, place
from vlm_vision.errors import ConfigError, DataError, MissingExtraError, WeightsError
from vlm_vision.features import resolve_layers, select_tokens
from vlm_vision.preprocess import ImageProcessor, open_image
from vlm_vision.tower import (
    DUAL_ENCODER_TYPE,
    MODEL_TYPE,
    VisionTower,
    describe_tower,
    saved_folder,
    saved_type,
    tower_config,
)
from vlm_vision.tower_config import PreprocessConfig, Select

try:
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
    from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
    from transformers.image_transforms import to_pil_image
    from transformers.image_utils import make_flat_list_of_images
    from transformers.initialization import no_init_weights
    from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
    from transformers.utils.generic import can_return_tuple
except ImportError as error:
    import transformers

    raise MissingExtraError(
        f"vlm_vision.integrations.transformers needs transformers >= 5.20, and {transformers.__version__} is "
        "installed: pip install -U transformers. Where LLaVA's own code pins an older one, "
        "vlm_vision.integrations.llava gives it the tower"
    ) from error


class VlmVisionConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """A tower, and the facts that a vision-language model reads from its `vision_config`.

    The facts follow from `tower`, and are checked against it when a model is built.

    Attributes:
        tower: fields of `TowerConfig` that build it without any hub or file. Without weights and dtype: the
            checkpoint holds the weights, and `dtype` is a field of every config of transformers.
        hidden_size: channels of one layer, the deepest that the tower selects.
        image_size, patch_size: in pixels; [rows, columns] for pictures that are not square.
        num_hidden_layers: of the whole backbone, so that -2 means the same layer as in the tower.
        num_held_layers: those after it were freed; features past it cannot be asked for.
        has_class_token: whether token 0 is one; if not, strategy "default" would drop a patch.
        out_features, out_indices: of `VlmVisionBackbone`, "stage1" or 1 to the number of held layers; by
            default the deepest.
    """

    model_type = "vlm_vision"
    base_config_key = "vision_config"

    tower: dict[str, Any] | None = None
    hidden_size: int | None = None
    image_size: int | list[int] | None = None
    patch_size: int | None = None
    num_channels: int = 3
    num_hidden_layers: int = 0
    num_held_layers: int = 0
    has_class_token: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.tower is not None and self.hidden_size is None:
            described = describe_tower(self.tower)
            self.tower = _portable(described)
            for name, value in _facts(described).items():
                setattr(self, name, value)
        # As of transformers' own backbones: index k is what `hidden_states` has at k.
        self.stage_names = ["stem", *(f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1))]
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if features is None and indices is None:
            indices = [self.num_held_layers]
        self.set_output_features_output_indices(out_features=features, out_indices=indices)
        super().__post_init__(**kwargs)

    @classmethod
    def from_tower(cls, source: VisionTower | str | Path | dict[str, Any], **fields: Any) -> VlmVisionConfig:
        """The config of a tower, or of anything that `load_tower` takes; reads no weights.

        Args:
            fields: further fields of the config, such as `out_features=["stage3"]`.

        Raises:
            ConfigError: the source is not known.
        """
        tower = source if isinstance(source, VisionTower) else describe_tower(source)
        return cls(tower=_portable(tower), dtype=tower.dtype, **_facts(tower), **fields)


def llava_fields(tower: VisionTower) -> dict[str, Any]:
    """Fields of `LlavaConfig` and its kind, with which they read just what `tower(pixels)` gives.

    Raises:
        ConfigError: the tower gives what those models cannot read.
    """
    tower.image_processor.check_one_size("a LLaVA of transformers")
    select = tower.config.select
    if select not in ("patch", "cls_patch"):
        raise ConfigError(f"select {select!r}: a LLaVA of transformers reads patches; use select 'patch'")
    drops_first = select == "patch" and tower.backbone.info.has_class_token
    layers = [layer - tower.backbone.info.num_layers - 1 for layer in tower.layers]
    return {
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": "default" if drops_first else "full",
        "image_seq_length": tower.num_tokens,
    }


class VlmVisionPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What both models share: `tower`, and its layers as transformers counts them."""

    config: VlmVisionConfig
    config_class = VlmVisionConfig
    base_model_prefix = "vlm_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionTower"]  # noqa: RUF012 - as its base has it
    # The backbones choose their own kernels; refusing a name here would deny it to the language model beside.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VlmVisionConfig, tower: VisionTower | None = None) -> None:
        """Build the tower of a config with random weights, or take one as it is.

        Raises:
            ConfigError: the config has no tower, or facts that are not the tower's.
        """
        super().__init__(config)
        self.tower = _build(config) if tower is None else tower
        wrong = {name: value for name, value in _facts(self.tower).items() if getattr(config, name) != value}
        if wrong:
            raise ConfigError(f"vision_config does not fit its tower, which has {wrong}")
        self._recompute = self._recompute_whole = False
        self._unsaved_buffers = _unsaved_buffers(config, self.tower)
        if not any(parameter.is_meta for parameter in self.tower.parameters()):
            # Whoever built the tower gave it its weights; transformers would draw new ones over them.
            for module in self.tower.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()

    @classmethod
    def from_tower(cls, tower: VisionTower, **fields: Any) -> Any:
        """A model around a tower, which is not copied, in the tower's mode.

        Args:
            fields: as for `VlmVisionConfig.from_tower`.
        """
        return cls(VlmVisionConfig.from_tower(tower, **fields), tower).train(tower.training)

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        device_map: DeviceMap | None = None,
        max_memory: MaxMemory | None = None,
        offload_folder: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """As its base has it; the map's names are this model's, and it is done as for a tower alone.

        Raises:
            ConfigError: a map that cannot be done, as of `vlm_vision.device_map.place`; a tower's own folder,
                whose names are not this model's.
        """
        folder = saved_folder(args[0]) if args else None
        if folder is not None and saved_type(folder) in (MODEL_TYPE, DUAL_ENCODER_TYPE):
            raise ConfigError(
                f"{folder} is a tower's own folder: take {cls.__name__}.from_tower(load_tower("
                f"{str(folder)!r})), whose save_pretrained writes one that transformers loads"
            )
        loaded = super().from_pretrained(*args, **kwargs)
        if isinstance(device_map, Mapping):
            device_map = {re.sub(r"^tower(\.|$)", "", name): device for name, device in device_map.items()}
        tower = (loaded[0] if isinstance(loaded, tuple) else loaded).tower
        place(tower, device_map, max_memory=max_memory, offload_folder=offload_folder)
        return loaded

    @property
    def device(self) -> torch.device:
        return self.tower.device

    def _init_weights(self, module: nn.Module) -> None:
        """Called while loading, for each module of which the checkpoint gave not everything.

        Raises:
            ConfigError: the model around it is loaded with its tower on the disk.
            WeightsError: a weight is missing.
        """
        name = next(name for name, own in self.named_modules() if own is module)
        tensors = {**module._parameters, **module._buffers}
        unsaved = module._non_persistent_buffers_set
        lost = [
            f"{name}.{key}"
            for key, tensor in tensors.items()
            if tensor is not None and key not in unsaved and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if any(getattr(module, name.rpartition(".")[2]).is_meta for name in lost):
            raise ConfigError(
                "device_map puts the vision tower on the disk, where it cannot be read from: give it a device"
            )
        if lost:
            raise WeightsError(f"weights of the vision tower are missing or misshapen: {', '.join(lost)}")
        for key in unsaved:
            if (buffer := tensors[key]) is not None:
                buffer.copy_(self._unsaved_buffers[f"{name}.{key}"])

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass: by block, or else the tower as a whole."""
        return self._recompute

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._recompute, self._recompute_whole = enable, False
        for backbone in self.tower.modules():
            if not isinstance(backbone, Backbone):
                continue
            if any(hasattr(module, "gradient_checkpointing") for module in backbone.modules()):
                continue  # blocks of transformers, which it switches itself
            try:
                backbone.checkpoint_activations(enable)
            except ConfigError:  # not offered block by block
                self._recompute_whole = enable

    def _layers(self, layers: int | Sequence[int]) -> tuple[int, ...]:
        """Layers as 1-based numbers.

        Raises:
            ConfigError: out of range, or freed.
        """
        info, held = self.tower.backbone.info, self.config.num_held_layers
        resolved = resolve_layers(layers, info.num_layers, info.default_layer)
        if max(resolved) > held:
            raise ConfigError(
                f"layer {layers} is not held: this tower was built up to layer {held} of {info.num_layers} "
                f"(-{info.num_layers + 1 - held}); build it with that layer, or with pooled_head=True"
            )
        return resolved

    def _run(self, pixels: Tensor, layers: Sequence[int], interpolate: bool) -> list[Float[Tensor, "b n d"]]:
        """Class token, where there is one, and patches after the given layers, which ascend.

        Raises:
            ConfigError: pixels of a size that the tower does not take.
        """
        tower = self.tower
        batch = tower.check_pixels(pixels, interpolate)
        run: Callable[..., list[Tensor]] = tower.backbone.forward_layers
        if self._recompute_whole and self.training:
            run = partial(self._gradient_checkpointing_func, run)
        with attention_kernel(tower.config.attention):
            outputs = run(batch, layers)
        select: Select = "cls_patch" if self.config.has_class_token else "patch"
        prefix_tokens = tower.backbone.info.prefix_tokens
        return [select_tokens(output, select, prefix_tokens).to(batch.device) for output in outputs]

    def _hidden_states(
        self,
        pixels: Tensor,
        asked: bool | int | Sequence[int] | None,
        also: Sequence[int],
        interpolate: bool,
    ) -> tuple[tuple[Tensor | None, ...] | None, dict[int, Tensor]]:
        """`hidden_states` with None at what was not asked for, and the output of the layers in `also`."""
        if asked is None:
            asked = self.config.output_hidden_states
        if isinstance(asked, bool) or asked is None:
            wanted = tuple(range(1, self.config.num_held_layers + 1)) if asked else ()
        else:
            wanted = self._layers(asked)
        layers = sorted({*wanted, *also})
        outputs = dict(zip(layers, self._run(pixels, layers, interpolate), strict=True))
        if not wanted:
            return None, outputs
        numbers = range(self.config.num_hidden_layers + 1)
        return tuple(outputs[number] if number in wanted else None for number in numbers), outputs


class VlmVisionModel(VlmVisionPreTrainedModel):
    """A tower as `AutoModel` gives it: the `vision_tower` of transformers' LLaVAs.

    Refused with a `ConfigError` when it is put into one whose `vision_feature_layer` or
    `vision_feature_select_strategy` it cannot serve, or whose `vision_config` is another's.

    Attributes:
        tower: the `VisionTower` itself, with `save_pretrained` and the rest.
    """

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Features as transformers' own vision models give them, but that class token and patches are all.

        Args:
            output_hidden_states: True for all held layers, or which: counted from the embeddings (0, not
                offered) or from the end (-1).
            interpolate_pos_encoding: take pictures of other sizes too, as the tower's `interpolate`.

        Returns:
            `hidden_states`: [B,1+N,D] a layer, [B,N,D] without class token; None for layers not asked for.
            `last_hidden_state`: of the deepest held layer, before any final norm.
            `pooler_output`: the image embedding [B,E] if the tower has its pooled head and no layers are
            asked for by number, since it takes a second run; else None.

        Raises:
            ConfigError: a layer that is out of range or not held; pixels of a size that it does not take.
        """
        deepest, interpolate = self.config.num_held_layers, interpolate_pos_encoding
        hidden_states, outputs = self._hidden_states(
            pixel_values, output_hidden_states, [deepest], interpolate
        )
        pools = self.tower.config.keeps_head and isinstance(output_hidden_states, (bool, type(None)))
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs[deepest],
            pooler_output=self.tower.pooled(pixel_values, interpolate=interpolate) if pools else None,
            hidden_states=hidden_states,
        )


class VlmVisionBackbone(BackboneMixin, VlmVisionPreTrainedModel):  # type: ignore[misc]
    """A tower as `AutoBackbone` gives it: maps of features for dense heads.

    Load a folder with `VlmVisionBackbone.from_pretrained(folder, out_features=[...])`;
    `AutoBackbone.from_pretrained` asks the hub first, even for a folder.
    """

    has_attentions = False

    def __init__(self, config: VlmVisionConfig, tower: VisionTower | None = None) -> None:
        """As its base.

        Raises:
            ConfigError: also for a stage that is not held, or the stem.
        """
        super().__init__(config, tower)
        widths = self.tower.backbone.info.widths
        self.num_features = [widths[0], *widths]
        self._layers(self.out_indices)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Patches after the stages in `out_features`, each [B,C,H,W]; arguments as of `VlmVisionModel`.

        Raises:
            ConfigError: a layer that is out of range or not held; pixels of a size that it does not take.
        """
        stages = self._layers(self.out_indices)
        hidden_states, outputs = self._hidden_states(
            pixel_values, output_hidden_states, stages, interpolate_pos_encoding
        )
        info, height = self.tower.backbone.info, pixel_values.shape[2]
        rows = (info.grids[stage - 1][0] * height // info.preprocess.height for stage in stages)
        maps = tuple(
            rearrange(outputs[stage][:, int(self.config.has_class_token) :], "b (h w) c -> b c h w", h=count)
            for stage, count in zip(stages, rows, strict=True)
        )
        return BackboneOutput(feature_maps=maps, hidden_states=hidden_states)


class VlmVisionImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """A tower's own pixels by transformers' calls: `processor(images=..., return_tensors="pt")`.

    Its settings are the tower's and cannot be changed by a call. Pictures may be files, Pillow's, or arrays
    and tensors of bytes.

    Attributes:
        own: the tower's `ImageProcessor`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - as its base has it

    def __init__(self, vlm_vision: dict[str, Any] | None = None, **repeated: Any) -> None:
        """From the content of a `preprocessor_config.json`.

        Args:
            vlm_vision: fields of `PreprocessConfig`; they alone count.
            repeated: the same in transformers' words, for others to read.

        Raises:
            ConfigError: `vlm_vision` is missing.
        """
        if vlm_vision is None:
            raise ConfigError(
                "no `vlm_vision` settings: this image processor comes from `from_tower`, or a folder of ours"
            )
        self.own = ImageProcessor(validate(PreprocessConfig, vlm_vision, "image processor"))
        config = self.own.config
        size = {"height": config.height, "width": config.width}
        self._settings = {
            "vlm_vision": config.model_dump(mode="json"),
            "size": size,
            "crop_size": size,
            "image_mean": list(config.mean),
            "image_std": list(config.std),
        }
        super().__init__(**self._settings)

    @classmethod
    def from_tower(cls, tower: VisionTower) -> VlmVisionImageProcessor:
        """The image processor of a tower."""
        return cls(tower.image_processor.config.model_dump(mode="json"))

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """One picture or several to `pixel_values`, [B,3,H,W] with `return_tensors="pt"`.

        Raises:
            ConfigError: a setting that differs from the tower's, or one tensor of pictures of several sizes.
            DataError: a picture cannot be read, or holds floats.
        """
        self._refuse(kwargs)
        pixels = self.own(self.open_pictures(images))
        if isinstance(pixels, list) and return_tensors is not None:
            self.own.check_one_size("return_tensors")
        return BatchFeature({"pixel_values": list(pixels)}, tensor_type=return_tensors)

    def open_pictures(self, images: Any) -> list[Any]:
        """One picture or several, in whatever nesting, as a list of what `open_image` takes.

        Raises:
            DataError: a picture cannot be read, or holds floats.
        """
        return [_picture(image) for image in make_flat_list_of_images(self.fetch_images(images))]

    def fetch_images(self, images: Any) -> Any:
        """Files are read by this package's rules (orientation, transparency); addresses by transformers'."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, Path) or (isinstance(images, str) and "://" not in images):
            return open_image(images)
        return super().fetch_images(images)

    def to_dict(self) -> dict[str, Any]:
        return {**self._settings, "image_processor_type": type(self).__name__}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        with_rest = kwargs.pop("return_unused_kwargs", False)
        processor = cls(**image_processor_dict)
        processor._refuse({name: kwargs[name] for name in cls.valid_kwargs.__annotations__ if name in kwargs})
        return (processor, kwargs) if with_rest else processor

    def _refuse(self, given: dict[str, Any]) -> None:
        steps = {"do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True}
        own = {**steps, **self._settings}
        for name, value in given.items():
            if value is not None and own.get(name) != value:
                raise ConfigError(
                    f"{name}={value!r}: a tower's pixels are made in one way, {self.own.config!r}"
                )


def _picture(image: Any) -> Any:
    if getattr(image, "dtype", None) is None:
        return image
    if str(image.dtype).removeprefix("torch.") != "uint8":
        raise DataError(f"a picture of {image.dtype}: its scale is not known; give bytes, 0 to 255")
    return to_pil_image(image, do_rescale=False)


def _portable(tower: VisionTower) -> dict[str, Any]:
    """Fields of `TowerConfig` that build this tower anywhere, but for its weights and dtype."""
    portable = tower.config.model_copy(update={"backbone": tower.backbone.portable_config()})
    fields: dict[str, Any] = _without_weights(portable.model_dump(mode="json", exclude={"dtype"}))
    return fields


def _without_weights(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: None if key == "weights" else _without_weights(value) for key, value in node.items()}
    return [_without_weights(item) for item in node] if isinstance(node, list) else node


def _facts(tower: VisionTower) -> dict[str, Any]:
    """Fields of `VlmVisionConfig` that follow from its tower."""
    info, deepest = tower.backbone.info, max(tower.layers)
    return {
        "hidden_size": info.widths[deepest - 1],
        "image_size": tower.image_size if isinstance(tower.image_size, int) else list(tower.image_size),
        "patch_size": tower.patch_size,
        "num_hidden_layers": info.num_layers,
        "num_held_layers": info.num_layers if tower.config.keeps_head else deepest,
        "has_class_token": info.has_class_token,
    }


def _build(config: VlmVisionConfig) -> VisionTower:
    if config.tower is None:
        raise ConfigError(
            "this VlmVisionConfig has no tower: make it with VlmVisionConfig.from_tower(source)"
        )
    # It is in this way that transformers tells its models their dtype.
    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    wanted = tower_config(config.tower, dtype=dtype)
    return VisionTower(wanted, wanted.backbone.build(load_weights=False))


def _unsaved_buffers(config: VlmVisionConfig, tower: VisionTower) -> dict[str, Tensor]:
    """What a tower on the meta device must be given beside its checkpoint, such as numbers of positions."""
    found = _non_persistent(tower)
    if not any(buffer.is_meta for buffer in found.values()):
        return {}
    with torch.device("cpu"), no_init_weights():
        return _non_persistent(_build(config))


def _non_persistent(tower: VisionTower) -> dict[str, Tensor]:
    saved = tower.state_dict(prefix="tower.").keys()
    return {name: buffer for name, buffer in tower.named_buffers("tower") if name not in saved}


def _check_plug(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuse a place whose settings the tower cannot serve: only here are both known.

    Raises:
        ConfigError: says which setting, and to what to change it.
    """
    if not isinstance(child, VlmVisionModel):
        return
    config: Any = getattr(parent, "config", None)
    if not hasattr(config, "vision_feature_select_strategy"):
        return
    own, theirs = child.config, config.vision_config
    if not isinstance(theirs, VlmVisionConfig) or theirs.tower != own.tower:
        raise ConfigError(
            f"{name}: vision_config is not this tower's, so that a saved model would not load; set it to "
            "VlmVisionConfig.from_tower(tower)"
        )
    if config.vision_feature_select_strategy == "default" and not own.has_class_token:
        raise ConfigError(
            "vision_feature_select_strategy 'default' drops token 0, which is a patch in a backbone without "
            "class token: use 'full'"
        )
    layer = getattr(config, "vision_feature_layer", None)
    if layer is not None:
        widths = {child.tower.backbone.info.widths[number - 1] for number in child._layers(layer)}
        if widths != {own.hidden_size}:
            raise ConfigError(
                f"vision_feature_layer {layer} has {sorted(widths)} channels, hidden_size is "
                f"{own.hidden_size}; llava_fields(tower) gives the layer that the tower was built for"
            )


register_module_module_registration_hook(_check_plug)
AutoConfig.register(VlmVisionConfig.model_type, VlmVisionConfig)
AutoModel.register(VlmVisionConfig, VlmVisionModel)
AutoBackbone.register(VlmVisionConfig, VlmVisionBackbone)
AutoImageProcessor.register(
    VlmVisionConfig,
    image_processor_classes={"torchvision": VlmVisionImageProcessor, "pil": VlmVisionImageProcessor},
)
