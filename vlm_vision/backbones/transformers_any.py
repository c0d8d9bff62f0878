"""Any model of transformers that gives hidden states of pictures, with what had to be assumed of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from vlm_vision.backbone import Backbone, BackboneInfo, Shape, at_size, find_size_step
from vlm_vision.backbones.config import TransformersConfig
from vlm_vision.compat import config_fields
from vlm_vision.errors import ConfigError, first_line
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import without_init

# Beginnings of the names of tensors that models for a task hold beside the model that AutoModel takes.
HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.", "decoder.", "lm_head.", "pooler.")
INTERPOLATE = "interpolate_pos_encoding"


class GenericBackbone(Backbone):
    """A model of the library by what it shows when it runs; `info.assumptions` tells what that left open.

    It is measured on twins that take no memory. Where a list of modules is found whose outputs are the hidden
    states, it is the list of layers, and is cut after the deepest one asked for; else the whole model runs.
    Parameters on which the features do not depend are kept as buffers, so that nothing waits for a gradient.
    """

    def __init__(
        self,
        model: Any,
        config: TransformersConfig,
        model_config: PretrainedConfig,
        preprocess: PreprocessConfig,
    ) -> None:
        """Measure the model.

        Raises:
            ConfigError: it does not run on pixels, gives no hidden states, or it cannot be known which of its
                tokens are patches.
        """
        super().__init__()
        self.model, self._model_config = model, model_config
        self._portable = config.model_copy(
            update={"architecture": config_fields(model_config), "preprocess": preprocess}
        )
        self._native = size = (preprocess.height, preprocess.width)
        self._outputs = _Outputs()
        twin = self._twin()
        states, pooled = self._measure(twin, size)
        self._blocks_path, self._can_cut = self._find_blocks(size)
        count = _count_layers(states, model_config) if self.blocks is None else len(self.blocks)
        states = states[len(states) - count :]
        shapes, prefix_tokens, about_tokens = _read_shapes(states, size, model_config)
        registers = int(getattr(model_config, "num_register_tokens", 0))
        self.info = BackboneInfo(
            widths=tuple(width for width, _, _ in shapes),
            grids=tuple((rows, columns) for _, rows, columns in shapes),
            prefix_tokens=prefix_tokens,
            default_layer=-2 if len(set(shapes)) == 1 < len(shapes) else -1,
            embed_dim=None if pooled is None else int(pooled.flatten(1).shape[1]),
            preprocess=preprocess,
            size_step=find_size_step(size, shapes, partial(self._shapes_at, twin, count)),
            registers=registers if prefix_tokens == registers else max(0, prefix_tokens - 1),
            assumptions=(self._about_layers(count), about_tokens),
        )
        if self.blocks is not None:
            _record(self.blocks, self._outputs)
        _keep_as_buffers(self.model, _unused(twin, [*states, *([] if pooled is None else [pooled])]))

    @property
    def blocks(self) -> Any:
        """The list of layers, where one was found."""
        return None if self._blocks_path is None else self.model.get_submodule(self._blocks_path)

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        if self.blocks is None:
            states = self._call(self.model, pixels, output_hidden_states=True).hidden_states
            states = states[len(states) - self.info.num_layers :]
            return [_as_tokens(states[layer - 1], pixels.shape[-2:]) for layer in layers]
        self._call(self.model, pixels)
        outputs = [_as_tokens(self._outputs[layer], pixels.shape[-2:]) for layer in layers]
        self._outputs.clear()
        return outputs

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        embedding: Tensor = self._call(self.model, pixels).pooler_output
        self._outputs.clear()
        return embedding.flatten(1)

    def truncate(self, layer: int) -> None:
        twin, outputs = self._twin(), _Outputs()
        if self._blocks_path is not None:
            _record(twin.get_submodule(self._blocks_path), outputs)
        states, _ = self._measure(twin, self._native)
        states = states[len(states) - self.info.num_layers :]
        unused = _unused(twin, [outputs[layer] if outputs else states[layer - 1]])
        if self._blocks_path is not None and self._can_cut:
            _cut(self.model, self._blocks_path, layer, unused)
        _keep_as_buffers(self.model, unused)

    def layer_modules(self) -> Sequence[nn.Module]:
        return super().layer_modules() if self.blocks is None else list(self.blocks)

    def portable_config(self) -> TransformersConfig:
        return self._portable

    def resize(self, image_size: int | tuple[int, int]) -> None:
        """Another size as the native one; the library resamples positions in every call."""
        step = self.info.size_step
        if step is None:
            return super().resize(image_size)
        preprocess = at_size(self.info.preprocess, image_size, step)
        height, width = self.info.preprocess.height // step, self.info.preprocess.width // step
        grids = tuple(
            (rows * (preprocess.height // step) // height, columns * (preprocess.width // step) // width)
            for rows, columns in self.info.grids
        )
        self.info = replace(self.info, grids=grids, preprocess=preprocess)
        return None

    def _twin(self) -> Any:
        """The like of the whole model, without memory."""
        # Some models of transformers 4 read numbers off tensors while they are built.
        with torch.inference_mode(False), torch.device("cpu"), without_init():
            twin = AutoModel.from_config(self._model_config).eval().to("meta")
        if getattr(self.model, "pooler", twin) is None:
            twin.pooler = None
        return twin

    def _call(self, model: Any, pixels: Float[Tensor, "b 3 h w"], **options: Any) -> Any:
        other = tuple(pixels.shape[-2:]) != self._native
        if other and INTERPOLATE in inspect.signature(model.forward).parameters:
            options[INTERPOLATE] = True
        return model(pixels, return_dict=True, **options)

    def _measure(self, twin: Any, size: tuple[int, int]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Hidden states and the pooled output of a twin."""
        kind = self._model_config.model_type
        try:
            with torch.inference_mode(False), torch.enable_grad():
                output = self._call(twin, torch.empty(1, 3, *size, device="meta"), output_hidden_states=True)
        except Exception as error:  # whatever a model that is not for pictures does with them
            raise ConfigError(
                f"transformers' {kind!r} does not run on pixels [1, 3, {size[0]}, {size[1]}]: "
                f"{first_line(error)}"
            ) from error
        states = getattr(output, "hidden_states", None)
        if not states or len(states) < 2:
            raise ConfigError(f"transformers' {kind!r} gives no hidden states, so no features of layers")
        return tuple(states), getattr(output, "pooler_output", None)

    def _find_blocks(self, size: tuple[int, int]) -> tuple[str | None, bool]:
        """Where the list is whose modules give the hidden states, and whether the model runs without its end.

        The last hidden state may be another tensor than the last block's: some models give it after their
        final norm.
        """
        path: str
        for path, candidate in self._twin().named_modules():
            if not isinstance(candidate, nn.ModuleList) or not len(candidate):
                continue
            twin, outputs = self._twin(), _Outputs()
            _record(twin.get_submodule(path), outputs)
            states, _ = self._measure(twin, size)
            count = len(candidate)
            if len(states) - count not in (0, 1) or len(outputs) != count:
                continue
            own = states[len(states) - count :]
            if any(own[number - 1] is not outputs[number] for number in range(1, max(count, 2))):
                continue
            _cut(twin, path, 1, _unused(twin, [outputs[1]]))
            try:
                self._measure(twin, size)
            except ConfigError:
                return path, False
            return path, True
        return None, False

    def _about_layers(self, count: int) -> str:
        if self.blocks is None:
            return (
                f"layers are the last {count} hidden states; no list of modules was found that gives them, "
                "so the whole model runs and is held, whichever layer is asked for"
            )
        whole = "" if self._can_cut else "; the model does not run without the last ones, so all are held"
        return (
            f"layers are the {count} modules of {self._blocks_path!r}, which give the hidden "
            f"states; the last one's output is taken as it is, without a norm after it{whole}"
        )

    def _shapes_at(self, twin: Any, count: int, size: tuple[int, int]) -> list[Shape] | None:
        """Shapes after the last so many hidden states, or None where the model does not take the size."""
        try:
            states, _ = self._measure(twin, size)
            return _read_shapes(states[len(states) - count :], size, self._model_config)[0]
        except ConfigError:
            return None


def _count_layers(states: Sequence[Tensor], model_config: Any) -> int:
    """How many of the hidden states layers give: most models give what enters the first one too."""
    stages = getattr(model_config, "depths", None)
    depth = getattr(model_config, "num_hidden_layers", None) if stages is None else len(stages)
    return len(states) if len(states) == depth else len(states) - 1


class _Outputs(dict[int, Tensor]):
    """What blocks gave, by their number from 1.

    A type of its own, because torch.export puts copies in the place of a module's plain dicts, which the
    blocks' hooks would not know.
    """


def _record(blocks: Iterable[nn.Module], outputs: _Outputs) -> None:
    """Have blocks leave what they give."""
    for number, block in enumerate(blocks, start=1):
        block.register_forward_hook(partial(_leave, outputs, number))


def _leave(outputs: _Outputs, number: int, block: nn.Module, given: Any, output: Any) -> None:
    outputs[number] = output[0] if isinstance(output, tuple) else output


def _unused(twin: Any, outputs: Sequence[Tensor]) -> set[str]:
    """Names of parameters on which outputs of a twin do not depend."""
    parameters = dict(twin.named_parameters())
    with torch.inference_mode(False), torch.enable_grad():
        total = torch.stack([output.float().sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}


def _cut(model: Any, blocks_path: str, layer: int, unused: set[str]) -> None:
    """Free the blocks after a layer, and what of norms and linear maps comes after them."""
    del model.get_submodule(blocks_path)[layer:]
    for path, module in list(model.named_modules()):
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if isinstance(module, (nn.LayerNorm, nn.Linear)) and own and own <= unused:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, nn.Identity())


def _keep_as_buffers(model: Any, unused: set[str]) -> None:
    """Make buffers of parameters that no feature depends on, such as mask tokens: DDP would wait for them."""
    for name, parameter in list(model.named_parameters()):
        if name in unused:
            path, _, own = name.rpartition(".")
            owner = model.get_submodule(path)
            delattr(owner, own)
            owner.register_buffer(own, parameter.data)


def _as_tokens(state: Tensor, size: Sequence[int]) -> Float[Tensor, "b tokens d"]:
    if state.ndim == 3:
        return state
    channels_last = _is_channels_last(state, size)
    tokens: Tensor = rearrange(state, "b h w d -> b (h w) d" if channels_last else "b d h w -> b (h w) d")
    return tokens


def _is_channels_last(state: Tensor, proportions: Sequence[int]) -> bool:
    """Whether maps have their channels last: their rows and columns have a picture's proportions."""
    height, width = proportions
    return state.shape[2] * width != state.shape[3] * height


def _read_shapes(
    states: Sequence[Tensor], size: tuple[int, int], model_config: Any
) -> tuple[list[Shape], int, str]:
    """Channels, rows and columns of every hidden state; tokens before the patches; what was assumed.

    Raises:
        ConfigError: it cannot be known which tokens are patches.
    """
    height, width = size
    if all(state.ndim == 4 for state in states):
        maps = [
            (int(state.shape[3]), int(state.shape[1]), int(state.shape[2]))
            if _is_channels_last(state, size)
            else (int(state.shape[1]), int(state.shape[2]), int(state.shape[3]))
            for state in states
        ]
        return maps, 0, "hidden states are maps of stages, without tokens before the patches"
    if any(state.ndim != 3 for state in states):
        raise ConfigError(
            f"hidden states of shapes {[list(state.shape) for state in states]}: neither tokens nor maps"
        )
    counts = {int(state.shape[1]) for state in states}
    if len(counts) > 1:  # stages: a grid has the picture's proportions
        shapes = []
        for state in states:
            stride = math.sqrt(height * width / state.shape[1])
            if not stride.is_integer() or height % int(stride) or width % int(stride):
                raise ConfigError(f"{state.shape[1]} tokens are no grid of a picture of {height}x{width}")
            shapes.append((int(state.shape[2]), height // int(stride), width // int(stride)))
        return shapes, 0, "hidden states are grids of stages, without tokens before the patches"
    count, patch = counts.pop(), getattr(model_config, "patch_size", None)
    if patch is None:
        raise ConfigError(
            f"{count} tokens: which are patches cannot be known, as the config has no patch_size"
        )
    patch_rows, patch_columns = (patch, patch) if isinstance(patch, int) else patch
    grid = (height // patch_rows, width // patch_columns)
    prefix, registers = count - grid[0] * grid[1], int(getattr(model_config, "num_register_tokens", 0))
    if prefix not in {0, 1, 2, registers, registers + 1}:
        raise ConfigError(
            f"{count} tokens for a grid of {grid[0]}x{grid[1]}: which {prefix} are none of it cannot be known"
        )
    about = f"of {count} tokens the first {prefix} come before the {grid[0]}x{grid[1]} patches, rows first"
    return [(int(state.shape[2]), *grid) for state in states], prefix, about
