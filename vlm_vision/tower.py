"""The vision tower: one interface over every backbone, from pixels to patch features."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm_vision.backbone import Backbone
from vlm_vision.compat import attention_kernel
from vlm_vision.config import load_config, validate
from vlm_vision.device_map import DeviceMap, MaxMemory, place
from vlm_vision.errors import ConfigError
from vlm_vision.features import resolve_layers, select_tokens
from vlm_vision.files import whole_folder
from vlm_vision.preprocess import ImageProcessor
from vlm_vision.text import Tokenizer
from vlm_vision.tower_config import BACKBONES, TowerConfig, list_source
from vlm_vision.weights import check_whole, load_strict, read_state_dict, without_init

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER = "config.json", "model.safetensors", "tokenizer"
MODEL_TYPE = "vlm_vision_tower"
DUAL_ENCODER_TYPE = "vlm_vision_dual_encoder"

Source = str | Path | Mapping[str, Any] | TowerConfig


class VisionTower(nn.Module):
    """Patch features of one backbone.

    `tower(pixels)` maps [B,3,H,W] to [B,N,D] in the tower's dtype; gradients follow `requires_grad`.
    Layers after the deepest selected one are freed, unless the config keeps the pooled head.

    Attributes:
        config: the frozen config it was built from.
        image_processor: pictures to the pixels that this tower expects.
        hidden_size: D, channels of a feature (of all selected layers together).
        num_patches: N of `select: patch`; without class token.
        grid: rows and columns of patches.
        patch_size: pixels between patches.
        hf_device_map: where layers are that a `device_map` put on another device than the tower's; absent
            where none are.
    """

    hf_device_map: dict[str, str]

    def __init__(self, config: TowerConfig, backbone: Backbone) -> None:
        """Take a backbone as the config wants it.

        Raises:
            ConfigError: a layer out of range, layers whose grids differ, a class token or pooled head that is
                not there, an image size that the backbone cannot take.
        """
        super().__init__()
        if config.image_size is not None and config.image_size != backbone.info.preprocess.image_size:
            backbone.resize(config.image_size)
        info = backbone.info
        layers = resolve_layers(config.layer, info.num_layers, info.default_layer)
        grids = {info.grids[layer - 1] for layer in layers}
        if len(grids) > 1:
            raise ConfigError(
                f"layer {config.layer}: its grids differ, {sorted(grids)}, so they cannot be joined"
            )
        if config.select in ("cls", "cls_patch") and not info.has_class_token:
            raise ConfigError(
                f"select {config.select!r}: this backbone has no class token; use select 'patch'"
            )
        if config.keeps_head and info.embed_dim is None:
            raise ConfigError("pooled_head: this backbone has no pooled head")
        self.config = config
        self.backbone = backbone
        self.image_processor = ImageProcessor(info.preprocess)
        self.layers = layers
        self.grid = grids.pop()
        self.embed_dim = info.embed_dim if config.keeps_head else None
        self.hidden_size = sum(info.widths[layer - 1] for layer in layers)
        if config.select == "pooled" and info.embed_dim is not None:
            self.hidden_size = info.embed_dim
        if not config.keeps_head:
            backbone.truncate(max(layers))
        self.to(getattr(torch, config.dtype))

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of the pictures in pixels; (rows, columns) where they are not square."""
        return self.backbone.info.preprocess.image_size

    @property
    def patch_size(self) -> int:
        return self.backbone.info.preprocess.height // self.grid[0]

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_patches_per_side(self) -> int:
        """Rows of the grid, which are its columns too.

        Raises:
            ConfigError: the grid is not square.
        """
        rows, columns = self.grid
        if rows != columns:
            raise ConfigError(f"the grid is {rows}x{columns}, so it has no one side; use tower.grid")
        return rows

    @property
    def num_tokens(self) -> int:
        """Tokens that `forward` gives for a picture, by `select`."""
        counts = {"patch": self.num_patches, "cls_patch": self.num_patches + 1, "cls": 1, "pooled": 1}
        return counts[self.config.select]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where pixels go, and features come from."""
        if hasattr(self, "hf_device_map"):
            return torch.device(self.hf_device_map[""])
        return next(self.parameters()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionTower:
        """What `to`, `half`, `cuda` and their kind do, of this tower or of a model around it.

        Raises:
            ConfigError: a tower that a `device_map` spread would be moved, or cast in part.
        """
        if hasattr(self, "hf_device_map"):
            places = {parameter.device for parameter in self.parameters()}
            waits = torch.device("meta") in places
            if waits or any(fn(torch.empty(0, device=place)).device != place for place in places):
                raise ConfigError(
                    "device_map spread this tower once for all: it cannot be moved, nor cast where layers "
                    "wait on the CPU or the disk; load it anew with another device_map or dtype"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @overload
    def forward(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor: ...

    @overload
    def forward(self, pixels: Sequence[Tensor], *, interpolate: bool = False) -> Tensor | list[Tensor]: ...

    def forward(
        self,
        pixels: Float[Tensor, "b 3 h w"] | Sequence[Float[Tensor, "3 h w"]],
        *,
        interpolate: bool = False,
    ) -> Float[Tensor, "b n d"] | list[Float[Tensor, "n d"]]:
        """Features of the selected layers and tokens; a list of pictures runs as one batch.

        Pictures of other sizes than the native one, square or not, are features as of a tower loaded at that
        size (`image_size`); nothing changes at the native size. `backbone.info.size_step` tells which, and
        `vlm-vision towers show` says it: ViTs take multiples of their patch, windowed and staged backbones
        multiples of their last stride, open_clip's, timm's and transformers' alike. Gradients reach the
        positions that were resampled. Backbones whose library ties weights to one size (MLP-Mixer, GCViT,
        LeViT, Hiera among timm's) and `fused` take that alone.

        Args:
            interpolate: take pictures of other sizes too, with position embeddings, relative positions and
                windows resampled as the backbone's own library does. A list may mix sizes: each size runs as
                one batch, and a list of [N,D] comes back.

        Raises:
            ConfigError: pixels of a size that the backbone does not take, or none at all.
        """
        with attention_kernel(self.config.attention):
            if isinstance(pixels, Tensor):
                return self._features(self.check_pixels(pixels, interpolate))
            pictures = [self.check_pixels(picture[None], interpolate)[0] for picture in listed_pixels(pixels)]
            if len({picture.shape for picture in pictures}) == 1:
                return self._features(torch.stack(pictures))
            if self.config.select == "pooled":
                return [self._features(picture[None])[0] for picture in pictures]
            ascending = sorted(self.layers)
            outputs = self.backbone.forward_mixed(pictures, ascending)
            by_layer = dict(zip(ascending, outputs, strict=True))
            return [
                self._selected({layer: tokens[place] for layer, tokens in by_layer.items()})
                for place in range(len(pictures))
            ]

    def pooled(
        self,
        pixels: Float[Tensor, "b 3 h w"] | Sequence[Float[Tensor, "3 h w"]],
        *,
        interpolate: bool = False,
    ) -> Float[Tensor, "b e"]:
        """Image embedding of the whole backbone with its head, not normalised.

        A list may mix sizes, if the tower takes them; pictures then run one by one.

        Raises:
            ConfigError: the tower was built without `pooled_head`.
        """
        if not self.config.keeps_head:
            raise ConfigError("this tower has no pooled head: build it with pooled_head=True")
        if not isinstance(pixels, Tensor):
            pictures = listed_pixels(pixels)
            if len({picture.shape for picture in pictures}) > 1:
                return torch.cat(
                    [self.pooled(picture[None], interpolate=interpolate) for picture in pictures]
                )
            pixels = torch.stack(pictures)
        with attention_kernel(self.config.attention):
            return self.backbone.pooled(self.check_pixels(pixels, interpolate)).to(self.device)

    def features_with_pooled(
        self, pixels: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b e"]]:
        """What `forward` and `pooled` give, for the cost of one where the backbone can.

        Raises:
            ConfigError: as `forward` and `pooled`.
        """
        if not self.config.keeps_head or self.config.select == "pooled":
            raise ConfigError("features beside the pooled embedding take select='patch' and pooled_head=True")
        ascending = sorted(self.layers)
        with attention_kernel(self.config.attention):
            outputs, embedding = self.backbone.forward_with_pooled(
                self.check_pixels(pixels, False), ascending
            )
        return self._selected(dict(zip(ascending, outputs, strict=True))), embedding.to(self.device)

    def _features(self, batch: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        if self.config.select == "pooled":
            return self.backbone.pooled(batch)[:, None].to(self.device)
        ascending = sorted(self.layers)
        outputs = self.backbone.forward_layers(batch, ascending)
        return self._selected(dict(zip(ascending, outputs, strict=True)))

    def _selected(self, by_layer: Mapping[int, Float[Tensor, "... tokens d"]]) -> Float[Tensor, "... n d"]:
        prefix_tokens = self.backbone.info.prefix_tokens
        chosen = [
            select_tokens(by_layer[layer], self.config.select, prefix_tokens).to(self.device)
            for layer in self.layers
        ]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    def check_pixels(self, batch: Tensor, interpolate: bool) -> Float[Tensor, "b 3 h w"]:
        """Pixels on the tower's device and in its dtype, if their size is one that it takes.

        Raises:
            ConfigError: it is not.
        """
        info = self.backbone.info
        native = (3, info.preprocess.height, info.preprocess.width)
        if batch.ndim != 4 or batch.shape[1] != 3 or tuple(batch.shape[1:]) != native:
            step = info.size_step
            fits = batch.ndim == 4 and batch.shape[1] == 3
            if step is None or not (fits and (interpolate or info.any_size)):
                raise ConfigError(self._refusal(batch, native, step, interpolate))
            if batch.shape[2] % step or batch.shape[3] % step or 0 in batch.shape[2:]:
                raise ConfigError(
                    f"pixels of shape {list(batch.shape)}: both sides must be multiples of {step} pixels"
                )
        if self.device.type == "meta" != batch.device.type:
            raise ConfigError(
                "this tower has no weights: load_tower gives one that has; a device_map of a model around it "
                "must not have the tower wait on the CPU, beside a GPU, or on the disk"
            )
        return batch.to(device=self.device, dtype=self.dtype)

    @staticmethod
    def _refusal(batch: Tensor, native: tuple[int, ...], step: int | None, interpolate: bool) -> str:
        _, height, width = native
        wanted = (
            f"pixels of shape {list(batch.shape)}: this tower takes [B, 3, {height}, {width}], or a list of "
            f"[3, {height}, {width}]; tower.image_processor(pictures) makes them from pictures of any size"
        )
        if interpolate:
            return f"{wanted}; its backbone takes no other size"
        return wanted + ("; interpolate=True takes other sizes" if step else "")

    def train_only(self, part: Literal["nothing", "everything"] | int) -> None:
        """Say what learns: `requires_grad` of every parameter is set.

        Args:
            part: nothing (frozen), everything, or the last so many of the layers it has. For LoRA see
                `vlm_vision.adapters.lora`; for rules by name and rate, the training recipes.

        Raises:
            ConfigError: more layers than there are, or none of these.
        """
        counts = isinstance(part, int) and not isinstance(part, bool) and part != 0
        if not counts and part not in ("nothing", "everything"):
            raise ConfigError(
                f"train_only takes 'nothing', 'everything' or a number of layers, the last ones, not {part!r}"
            )
        self.requires_grad_(part == "everything")
        if isinstance(part, str):
            return
        blocks = list(self.backbone.layer_modules())
        if not 0 < part <= len(blocks):
            raise ConfigError(f"last {part} layers: this tower has {len(blocks)}")
        for block in blocks[-part:]:
            block.requires_grad_(True)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Trade time for memory in training: store only what enters a block, and run it again backwards.

        Raises:
            ConfigError: the backbone does not offer it.
        """
        self.backbone.checkpoint_activations(enabled)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and `preprocessor_config.json`; complete or absent."""
        portable = self.config.model_copy(update={"backbone": self.backbone.portable_config()})
        save_folder(
            folder,
            {"model_type": MODEL_TYPE, "tower": portable.model_dump(mode="json")},
            self.state_dict(),
            self.image_processor,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device_map: DeviceMap | None = None,
        max_memory: MaxMemory | None = None,
        offload_folder: str | Path | None = None,
        **overrides: Any,
    ) -> VisionTower:
        """Load a tower, in evaluation mode, from a folder or hub id.

        Its `save_pretrained` may have been a tower's or a dual encoder's.

        Args:
            device_map, max_memory, offload_folder: as of `load_tower`.
            overrides: fields of `TowerConfig` to change, such as `layer=-3`.

        Raises:
            ConfigError: no such folder, or not one of ours.
            WeightsError: weights that do not fit.
        """
        folder = resolve_folder(source)
        stored, state = read_folder(folder, MODEL_TYPE, DUAL_ENCODER_TYPE)
        if any(name.startswith("tower.") for name in state):
            state = {
                name.removeprefix("tower."): value
                for name, value in state.items()
                if name.startswith("tower.")
            }
        with without_init():
            backbone = stored.backbone.build(load_weights=False)
        tower = cls(stored, backbone)
        load_strict(tower, state, str(folder))
        if overrides:
            wanted = validate(TowerConfig, {**stored.model_dump(mode="json"), **overrides}, str(folder))
            if wanted.keeps_head and not stored.keeps_head:
                raise ConfigError(
                    f"{folder}: was saved without its pooled head; take it from the dual encoder"
                )
            asked = resolve_layers(wanted.layer, backbone.info.num_layers, backbone.info.default_layer)
            if not stored.keeps_head and max(asked) > max(tower.layers):
                raise ConfigError(
                    f"{folder}: was saved up to layer {max(tower.layers)}, layer {wanted.layer} is not in it"
                )
            tower = cls(wanted, backbone)
        place(tower.eval(), device_map, max_memory=max_memory, offload_folder=offload_folder)
        return tower


def load_tower(
    source: Source,
    *,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    **overrides: Any,
) -> VisionTower:
    """Load a vision tower, in evaluation mode.

    Args:
        source: `source:model[@weights]` (`open_clip:ViT-L-14-336-quickgelu@openai`), a YAML or mapping of
            `TowerConfig`'s fields, the config itself, or a folder written by `save_pretrained`.
        device_map: where the weights go: a device, `{"": device}`, "auto", or devices of modules; the CPU by
            default. This and the two that belong to it are as of `vlm_vision.device_map.place`.
        overrides: fields of `TowerConfig`, such as `layer=-2` or `dtype="bfloat16"`.

    Raises:
        ConfigError: the source or a field is not known, or a `device_map` that cannot be done.
        WeightsError: the weights are missing or do not fit.
    """
    places: dict[str, Any] = {
        "device_map": device_map,
        "max_memory": max_memory,
        "offload_folder": offload_folder,
    }
    folder = saved_folder(source)
    if folder is not None:
        return VisionTower.from_pretrained(folder, **places, **overrides)
    config = tower_config(source, **overrides)
    tower = VisionTower(config, config.backbone.build()).eval()
    place(tower, **places)
    return tower


def tower_config(source: Source, **overrides: Any) -> TowerConfig:
    """The config behind any source that `load_tower` takes; reads no weights.

    Raises:
        ConfigError: the source or a field is not known.
    """
    folder = saved_folder(source)
    if folder is not None:
        stored = _read_config(folder, MODEL_TYPE, DUAL_ENCODER_TYPE)
        return validate(TowerConfig, {**stored.model_dump(mode="json"), **overrides}, str(folder))
    if isinstance(source, TowerConfig):
        source = source.model_dump(mode="json")
    if isinstance(source, Mapping):
        return load_config(TowerConfig, {**source, **overrides})
    text = str(source)
    if text.endswith((".yaml", ".yml")):
        tree = load_config(TowerConfig, text)
        return (
            validate(TowerConfig, {**tree.model_dump(mode="json"), **overrides}, text) if overrides else tree
        )
    if ":" not in text:
        raise ConfigError(
            f"{text!r} is no folder with a {CONFIG_FILE}, no YAML file, and no `source:model[@weights]` "
            f"(sources: {', '.join(BACKBONES.names())}){_way_out(Path(text)) or _with_source(text)}"
        )
    return load_config(TowerConfig, {"backbone": text, **overrides})


def describe_tower(source: Source, **overrides: Any) -> VisionTower:
    """The tower of any source that `load_tower` takes, without its weights: facts and parameter counts.

    It is on the meta device, where tensors have shapes and no memory; no weights file is touched.

    Raises:
        ConfigError: the source or a field is not known.
    """
    config = tower_config(source, **overrides)
    with torch.device("meta"):
        return VisionTower(config, config.backbone.build(load_weights=False)).eval()


def list_backbones() -> list[str]:
    """Every backbone that `load_tower` can build, as `source:model`, those of installed plug-ins included.

    A source that does not list its models stands alone by its name.
    """
    return [tower for source in BACKBONES.names() for tower in list_source(source)]


def saved_folder(source: object) -> Path | None:
    """The folder that a source names, when it is one with a `config.json`."""
    if isinstance(source, (str, Path)) and (Path(source) / CONFIG_FILE).is_file():
        return Path(source)
    return None


def listed_pixels(pixels: Iterable[Tensor]) -> list[Tensor]:
    """Pixels that are no tensor, one picture after the other.

    Raises:
        ConfigError: they are no list of tensors, or an empty one.
    """
    pictures = list(pixels) if isinstance(pixels, Iterable) else [pixels]
    if not pictures:
        raise ConfigError("no pixels were given")
    if not all(isinstance(picture, Tensor) for picture in pictures):
        kind = type(pixels).__name__
        kind = f"{kind} of {type(pictures[0]).__name__}" if isinstance(pixels, (list, tuple)) else kind
        raise ConfigError(
            f"a tower takes pixels, [B, 3, H, W] or a list of [3, H, W], not a {kind}; "
            "tower.image_processor(pictures) makes them from pictures"
        )
    return pictures


def saved_type(folder: Path) -> str | None:
    """The `model_type` that a folder's `config.json` names.

    Raises:
        ConfigError: there is none, or it is not JSON.
    """
    found: str | None = _read_json(folder).get("model_type")
    return found


def save_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    processor: ImageProcessor,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model folder, complete or absent.

    Raises:
        WeightsError: as `check_whole`.
    """
    check_whole(state, f"{folder} is not written")
    with whole_folder(folder) as partial:
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, partial / WEIGHTS_FILE, {"format": "pt"})
        processor.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)


def resolve_folder(source: str | Path) -> Path:
    """A local folder, or the local copy of a hub repository.

    Raises:
        ConfigError: neither exists.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(source), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            )
        )
    except Exception as error:
        raise ConfigError(
            f"{str(source)!r} is neither a folder nor a hub id that can be reached: {error}"
        ) from error


def read_folder(folder: Path, *types: str) -> tuple[TowerConfig, dict[str, Tensor]]:
    """Config and tensors of a folder of one of the given model types."""
    return _read_config(folder, *types), read_state_dict(folder / WEIGHTS_FILE)


def _read_config(folder: Path, *types: str) -> TowerConfig:
    content = _read_json(folder)
    found = content.get("model_type")
    if found not in types:
        raise ConfigError(
            f"{folder}: model_type is {found!r}, expected {' or '.join(types)}{_way_out(folder, found)}"
        )
    return validate(TowerConfig, content.get("tower", {}), str(folder / CONFIG_FILE))


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {CONFIG_FILE}: it is not a saved tower") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _with_source(model: str) -> str:
    source = "transformers" if "/" in model else "open_clip"
    return f"; a model is named with its source, such as '{source}:{model}'"


def _way_out(folder: Path, model_type: object = None) -> str:
    """What a folder that is no tower holds, and how to get a tower from it; empty where nothing is known."""
    if (folder / "learnt.safetensors").is_file() or (folder / "adapter_config.json").is_file():
        kind = "a PEFT adapter" if (folder / "adapter_config.json").is_file() else "a checkpoint of a run"
        return (
            f". It is {kind}, which holds what learnt and not the rest: load its base, then "
            f"vlm_vision.adapters.load_adapter(tower, {str(folder)!r})"
        )
    for part, kind in (("model", "the folder of a run"), ("tower", "a vision-language model")):
        if (folder / part / CONFIG_FILE).is_file():
            return f". It is {kind}: name {str(folder / part)!r}"
    if model_type in (MODEL_TYPE, DUAL_ENCODER_TYPE):
        return "; a tower alone has no text tower" if model_type == MODEL_TYPE else ""
    return f"; for a transformers model use 'transformers:{folder}'" if model_type else ""
