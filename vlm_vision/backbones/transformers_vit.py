"""Families of transformers that are known by heart: where a model keeps its parts, and how they are run.

A family is a row of `FAMILIES`. Embeddings are written out from those parts, so that every family takes every
size and no family depends on what a version of the library happens to offer; blocks are the library's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig
from transformers.activations import QuickGELUActivation

from vlm_vision.backbone import Backbone, BackboneInfo, at_size, grids_of_strides
from vlm_vision.backbones.config import TransformersConfig
from vlm_vision.backbones.encoder import QUICK_GELU, Activation, PlainBlock, resample_positions, run_blocks
from vlm_vision.compat import clip_vision_trunk, config_fields
from vlm_vision.errors import ConfigError
from vlm_vision.tower_config import PreprocessConfig

# Blocks with nothing in them beside norms, attention, MLP and layer scale.
PLAIN_BLOCKS = {
    "CLIPEncoderLayer",
    "SiglipEncoderLayer",
    "Siglip2EncoderLayer",
    "Dinov2Layer",
    "Dinov2WithRegistersLayer",
    "ViTMAELayer",
}
CONVNEXT_STRIDES = (4, 8, 16, 32)
DROP_RATES = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate")


class LibraryBackbone(Backbone):
    """What the known families share: where they came from, a list of blocks, a norm after them."""

    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(
        self,
        model: Any,
        family: Family,
        config: TransformersConfig,
        model_config: PretrainedConfig,
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__()
        self.blocks = next(found for path in family.blocks if (found := _part(model, path)) is not None)
        self.norm = getattr(model, family.norm)
        self._portable = config.model_copy(
            update={"architecture": config_fields(model_config), "preprocess": preprocess}
        )
        self._checkpointing = False

    def layer_modules(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def checkpoint_activations(self, enabled: bool) -> None:
        self._checkpointing = enabled

    def portable_config(self) -> TransformersConfig:
        return self._portable


class VitBackbone(LibraryBackbone):
    """A ViT: prefix tokens, patches, blocks, a final norm that only the pooled head uses.

    The pooled head is the class token after the final norm, or the family's own attention pooling over all
    tokens after it.
    """

    head: nn.Module | None

    def __init__(
        self,
        model: Any,
        family: Family,
        config: TransformersConfig,
        model_config: PretrainedConfig,
        preprocess: PreprocessConfig,
    ) -> None:
        model = clip_vision_trunk(model)
        super().__init__(model, family, config, model_config, preprocess)
        self._family, self._model_config = family, model_config
        self.embeddings = model.embeddings
        if hasattr(self.embeddings, "mask_token"):
            # Only masked pre-training uses it; as a parameter without gradient it would make DDP wait.
            self.embeddings.mask_token = None
        if getattr(model_config, "num_register_tokens", 1) == 0:
            del self.embeddings.register_tokens  # an empty tensor, which no file should hold
        self.pre_norm = getattr(model, family.pre_norm) if family.pre_norm else nn.Identity()
        self.head = getattr(model, "head", None)
        self._drops = any(getattr(model_config, name, 0.0) for name in DROP_RATES)
        # Older versions of the library want masks, though None, by position.
        self._demanded = {
            name: None
            for name, parameter in list(inspect.signature(self.blocks[0].forward).parameters.items())[1:]
            if parameter.default is inspect.Parameter.empty and name.endswith("mask")
        }
        self._step = patch_size(model_config)
        self._grid = self._grid_of(preprocess)
        layers, pools = len(self.blocks), family.class_token is not None or self.head is not None
        self.info = BackboneInfo(
            widths=(model_config.hidden_size,) * layers,
            grids=(self._grid,) * layers,
            prefix_tokens=(family.class_token is not None) + getattr(model_config, "num_register_tokens", 0),
            default_layer=-2 if layers > 1 else -1,
            embed_dim=model_config.hidden_size if pools else None,
            preprocess=preprocess,
            # Where the native size is no multiple, what is over is dropped there, and there alone.
            size_step=self._step,
            any_size=family.any_size,
            registers=getattr(model_config, "num_register_tokens", 0),
            assumptions=family.assumptions,
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        return self._run_blocks(self._embed(pixels), layers, **self._block_inputs(pixels))

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        return self.forward_with_pooled(pixels, [])[1]

    def forward_with_pooled(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> tuple[list[Float[Tensor, "b tokens d"]], Float[Tensor, "b e"]]:
        outputs = self.forward_layers(pixels, sorted({*layers, self.info.num_layers}))
        tokens: Tensor = self.norm(outputs[-1])
        return outputs[: len(layers)], tokens[:, 0] if self.head is None else self.head(tokens)

    def truncate(self, layer: int) -> None:
        self.blocks = self.blocks[:layer]
        self.norm, self.head = nn.Identity(), None

    def resize(self, image_size: int | tuple[int, int]) -> None:
        preprocess = at_size(self.info.preprocess, image_size, self._step)
        grid = self._grid_of(preprocess)
        self._store_positions(grid)
        grids = (grid,) * self.info.num_layers
        self.info = replace(self.info, grids=grids, preprocess=preprocess)

    def _grid_of(self, preprocess: PreprocessConfig) -> tuple[int, int]:
        return (preprocess.height // self._step, preprocess.width // self._step)

    def _run_blocks(self, tokens: Tensor, layers: Sequence[int], **inputs: Any) -> list[Tensor]:
        return run_blocks(
            list(self.blocks),
            tokens,
            layers,
            run=partial(_run_block, inputs={**self._demanded, **inputs}),
            plain=_no_plain_block if inputs else self._plain_block,
            checkpointing=self._checkpointing,
        )

    def _plain_block(self, block: nn.Module) -> PlainBlock | None:
        return None if self._drops and block.training else plain_block(block)

    def _block_inputs(self, pixels: Float[Tensor, "b 3 h w"]) -> dict[str, Any]:
        """What blocks take beside tokens."""
        return {}

    def _embed(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b tokens d"]:
        family, embeddings = self._family, self.embeddings
        maps = _part(embeddings, family.patches)(pixels)
        tokens = rearrange(maps, "b d h w -> b (h w) d")
        if family.patch_norm:
            tokens = getattr(embeddings, family.patch_norm)(tokens)
        if family.class_token:
            class_token = getattr(embeddings, family.class_token).expand(tokens.shape[0], 1, -1)
            tokens = torch.cat([class_token, tokens], dim=1)
        positions = self._positions(maps.shape[-2:])
        if positions is not None:
            tokens = tokens + positions
        if hasattr(embeddings, "register_tokens"):
            registers = embeddings.register_tokens.expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        if hasattr(embeddings, "dropout"):
            tokens = embeddings.dropout(tokens)
        embedded: Tensor = self.pre_norm(tokens)
        return embedded

    def _positions(self, grid: Sequence[int]) -> Float[Tensor, "tokens d"] | None:
        """Position embeddings of a grid, those of the class token first; None where there are none to add."""
        family = self._family
        if family.positions is None:
            return None
        stored = _part(self.embeddings, family.positions)
        if stored is None:  # AIMv2's models of native resolution
            return sine_positions(grid, self._model_config.hidden_size, next(self.parameters()))
        positions = stored.flatten(0, -2)
        prefix = int(family.class_token is not None)
        return resample_positions(positions, prefix, self._grid, grid, family.resampling)

    def _store_positions(self, grid: tuple[int, int]) -> None:
        """Make a grid the native one."""
        place = self._family.positions or ""
        path, _, name = place.rpartition(".")
        stored = _part(self.embeddings, place)
        if stored is not None:
            with torch.no_grad():
                new = self._positions(grid)
            assert new is not None
            owner = self.embeddings.get_submodule(path)
            setattr(owner, name, nn.Parameter(new.view(*stored.shape[:-2], *new.shape), stored.requires_grad))
        self._grid = grid


class RotaryBackbone(VitBackbone):
    """DINOv3's ViT: positions are rotations of queries and keys, which any grid has.

    Without the random shifts of coordinates that the library adds in training mode: a tower gives the same
    features in both. Angles are computed in float32 whatever the tower's dtype, as where the library loads
    weights in that dtype.
    """

    def _block_inputs(self, pixels: Float[Tensor, "b 3 h w"]) -> dict[str, Any]:
        config = self._model_config
        grid = (pixels.shape[-2] // self._step, pixels.shape[-1] // self._step)
        head_width = config.hidden_size // config.num_attention_heads
        rotation = rotary_positions(grid, head_width, config.rope_theta, pixels)
        return {"position_embeddings": rotation}


class NaflexBackbone(VitBackbone):
    """SigLIP2 of any aspect ratio (arXiv:2502.14786): positions of a picture's own grid, one masked batch."""

    def forward_mixed(
        self, pictures: Sequence[Float[Tensor, "3 h w"]], layers: Sequence[int]
    ) -> list[list[Float[Tensor, "tokens d"]]]:
        patches = [self._patchify(picture) for picture in pictures]
        counts = [len(rows) for rows in patches]
        positions = [
            self._positions((picture.shape[1] // self._step, picture.shape[2] // self._step))
            for picture in pictures
        ]
        tokens = self.embeddings.patch_embedding(pad_sequence(patches, batch_first=True))
        tokens = tokens + pad_sequence([rows for rows in positions if rows is not None], batch_first=True)
        lengths = torch.tensor(counts, device=tokens.device)
        padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
        mask = torch.zeros_like(padding, dtype=tokens.dtype).masked_fill_(
            padding, torch.finfo(tokens.dtype).min
        )
        outputs = self._run_blocks(tokens, layers, attention_mask=mask[:, None, None, :])
        return [[rows[:count] for rows, count in zip(output, counts, strict=True)] for output in outputs]

    def _patchify(self, pixels: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b patches values"]:
        patches: Tensor = rearrange(
            pixels, "... c (h p) (w q) -> ... (h w) (p q c)", p=self._step, q=self._step
        )
        return patches

    def _embed(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b tokens d"]:
        grid = (pixels.shape[-2] // self._step, pixels.shape[-1] // self._step)
        embedded: Tensor = self.embeddings.patch_embedding(self._patchify(pixels)) + self._positions(grid)
        return embedded

    def _store_positions(self, grid: tuple[int, int]) -> None:
        """Nothing: positions are resampled for every picture from the grid that was trained."""


class StagesBackbone(LibraryBackbone):
    """DINOv3's ConvNeXt: layers are the four stages, at strides 4, 8, 16 and 32; no prefix tokens.

    The pooled head is the mean over the last stage, after the final norm.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        config: TransformersConfig,
        model_config: PretrainedConfig,
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__(model, family, config, model_config, preprocess)
        self.info = BackboneInfo(
            widths=tuple(model_config.hidden_sizes),
            grids=grids_of_strides(preprocess, CONVNEXT_STRIDES),
            prefix_tokens=0,
            default_layer=-1,
            embed_dim=model_config.hidden_sizes[-1],
            preprocess=preprocess,
            size_step=CONVNEXT_STRIDES[-1],
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        maps = run_blocks(
            list(self.blocks),
            pixels,
            layers,
            run=partial(_run_block, inputs={}),
            plain=_no_plain_block,
            checkpointing=self._checkpointing,
        )
        return [rearrange(features, "b d h w -> b (h w) d") for features in maps]

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        last = self.forward_layers(pixels, [self.info.num_layers])[0]
        embedding: Tensor = self.norm(last.mean(dim=1))
        return embedding

    def truncate(self, layer: int) -> None:
        self.blocks, self.norm = self.blocks[:layer], nn.Identity()

    def resize(self, image_size: int | tuple[int, int]) -> None:
        preprocess = at_size(self.info.preprocess, image_size, CONVNEXT_STRIDES[-1])
        grids = grids_of_strides(preprocess, CONVNEXT_STRIDES)
        self.info = replace(self.info, grids=grids, preprocess=preprocess)


# How a family of weights was shown pictures, where no file beside them says so.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_rounding": "down"}
_SQUASHED = {**IMAGENET, "resize": "squash", "interpolation": "bilinear"}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize": "squash", "crop_rounding": "down"}
_BICUBIC: Mapping[str, Any] = {"mode": "bicubic", "align_corners": False}


@dataclass(frozen=True)
class Family:
    """Where a family of the library keeps what a tower needs.

    Attributes:
        config, model: names of its classes in transformers.
        beside: beginnings of the names of tensors that whole checkpoints hold beside the vision model.
        preprocess: how pictures are prepared where no file beside the weights says so.
        backbone: what runs it.
        blocks: places of the list of blocks, today's first.
        norm: the final norm.
        patches: the convolution that makes tokens of patches; this and what follows is within `embeddings`.
        patch_norm: the norm of patches before positions are added.
        class_token: the class token; registers are found by the library's one name for them.
        positions: position embeddings, a row for the class token first where there is one.
        pre_norm: the norm before the first block, of the model.
        resampling: settings of `torch.nn.functional.interpolate` for positions of other sizes.
        loading: arguments of the library's `from_pretrained` that whole checkpoints need.
        any_size: whether it was trained on pictures of all sizes.
        assumptions: what the library does not say.
    """

    config: str
    model: str
    beside: tuple[str, ...]
    preprocess: Mapping[str, Any]
    backbone: type[VitBackbone | StagesBackbone] = VitBackbone
    blocks: tuple[str, ...] = ("encoder.layer", "encoder.layers", "layers")
    norm: str = "layernorm"
    patches: str = "patch_embeddings.projection"
    patch_norm: str | None = None
    class_token: str | None = "cls_token"
    positions: str | None = "position_embeddings"
    pre_norm: str | None = None
    resampling: Mapping[str, Any] = field(default_factory=lambda: _BICUBIC)
    loading: Mapping[str, Any] = field(default_factory=dict)
    any_size: bool = False
    assumptions: tuple[str, ...] = ()


_TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
_SIGLIP = Family(
    config="SiglipVisionConfig",
    model="SiglipVisionModel",
    beside=(*_TEXT_SIDE, "classifier."),
    preprocess=_HALF,
    norm="post_layernorm",
    patches="patch_embedding",
    class_token=None,
    positions="position_embedding.weight",
)
_DINOV2 = Family(config="Dinov2Config", model="Dinov2Model", beside=("classifier.",), preprocess=IMAGENET)
FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(
        config="CLIPVisionConfig",
        model="CLIPVisionModel",
        beside=(*_TEXT_SIDE, "classifier."),
        preprocess={"crop_rounding": "down"},
        norm="post_layernorm",
        patches="patch_embedding",
        class_token="class_embedding",
        positions="position_embedding.weight",
        pre_norm="pre_layrnorm",
    ),
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": replace(
        _SIGLIP,
        config="Siglip2VisionConfig",
        model="Siglip2VisionModel",
        backbone=NaflexBackbone,
        preprocess={**_HALF, "resize": "flexible", "interpolation": "bilinear"},
        resampling={"mode": "bilinear", "align_corners": False, "antialias": True},
        any_size=True,
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": replace(
        _DINOV2,
        config="Dinov2WithRegistersConfig",
        model="Dinov2WithRegistersModel",
        resampling={**_BICUBIC, "antialias": True},
    ),
    "dinov3_vit": Family(
        config="DINOv3ViTConfig",
        model="DINOv3ViTModel",
        beside=(),
        preprocess=_SQUASHED,
        backbone=RotaryBackbone,
        blocks=("model.layer", "layer"),
        norm="norm",
        patches="patch_embeddings",
        positions=None,
    ),
    "dinov3_convnext": Family(
        config="DINOv3ConvNextConfig",
        model="DINOv3ConvNextModel",
        beside=(),
        preprocess=_SQUASHED,
        backbone=StagesBackbone,
        blocks=("model.stages", "stages"),
        norm="layer_norm",
    ),
    "aimv2_vision_model": Family(
        config="Aimv2VisionConfig",
        model="Aimv2VisionModel",
        beside=_TEXT_SIDE,
        preprocess={"crop_rounding": "down"},
        norm="rms_norm",
        patches="patch_embed",
        patch_norm="rms_norm",
        class_token=None,
        positions="position_embedding.weight",
        loading={"key_mapping": {"^vision_model[.]": ""}},
        assumptions=(
            "position embeddings of another size are resampled as SigLIP's are: its library takes one size",
        ),
    ),
    "vit_mae": Family(
        config="ViTMAEConfig",
        model="ViTMAEModel",
        beside=("decoder.",),
        preprocess=_SQUASHED,
    ),
}
# Whole models, whose `config.json` may leave out what their vision part is.
VISION_PART = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
    "aimv2": "aimv2_vision_model",
}


def patch_size(model_config: Any) -> int:
    """Pixels between patches.

    Raises:
        ConfigError: patches that are not square.
    """
    size = model_config.patch_size
    rows, columns = (size, size) if isinstance(size, int) else size
    if rows != columns:
        raise ConfigError(f"patches of {rows}x{columns} pixels: only square ones can be taken")
    return int(rows)


def sine_positions(grid: Sequence[int], width: int, like: Tensor) -> Float[Tensor, "tokens d"]:
    """Fixed positions of a grid as sines and cosines, columns before rows, in `like`'s dtype, on its device.

    Matches `build_2d_sinusoidal_position_embedding` of transformers' modeling_aimv2.py, halves swapped as it
    is called there.
    """
    count = width // 4
    frequencies = 1.0 / 10000.0 ** (torch.arange(count, dtype=torch.float64, device=like.device) / count)
    rows, columns = (torch.arange(side, dtype=torch.float64, device=like.device) for side in grid)
    places = torch.meshgrid(rows, columns, indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in reversed(places)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).to(like.dtype)


def rotary_positions(
    grid: Sequence[int], head_width: int, theta: float, like: Tensor
) -> tuple[Float[Tensor, "patches d"], Float[Tensor, "patches d"]]:
    """Cosines and sines by which DINOv3 turns queries and keys of patches, in `like`'s dtype.

    Matches `DINOv3ViTRopePositionEmbedding` of transformers' modeling_dinov3_vit.py in evaluation mode.
    """
    frequencies = 1 / theta ** torch.arange(0, 1, 4 / head_width, dtype=torch.float32, device=like.device)
    sides = [torch.arange(0.5, side, dtype=torch.float32, device=like.device) / side for side in grid]
    centres = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1) * 2.0 - 1.0
    angles = (2 * math.pi * centres[:, :, None] * frequencies).flatten(1, 2).tile(2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def plain_block(block: Any) -> PlainBlock | None:
    """The parts of a block that is plain, without adapters, under the names of any supported transformers."""
    own = all(type(part).__module__.split(".")[0] in ("torch", "transformers") for part in block.modules())
    if type(block).__name__ not in PLAIN_BLOCKS or not own:
        return None
    attention = _first(block, "self_attn", "attention")
    projections = [
        _first(attention, f"{name[0]}_proj", f"attention.{name}") for name in ("query", "key", "value")
    ]
    norms = [_first(block, "layer_norm1", "norm1", "layernorm_before")]
    norms += [_first(block, "layer_norm2", "norm2", "layernorm_after")]
    out = _first(attention, "out_proj", "o_proj", "output.dense")
    up, down = _first(block, "mlp.fc1"), _first(block, "mlp.fc2")  # a gated MLP has others
    scales = [_first(block, f"layer_scale{number}.lambda1") for number in (1, 2)]
    if not all(type(layer) is nn.Linear for layer in (*projections, out, up, down)):
        return None
    activation = _first(block, "mlp.activation_fn", "mlp.activation")
    return PlainBlock(
        norm_1=norms[0],
        projections=tuple((layer.weight, layer.bias) for layer in projections),
        out=out,
        norm_2=norms[1],
        up=up,
        activation=QUICK_GELU if isinstance(activation, QuickGELUActivation) else Activation(activation),
        down=down,
        heads=_first(attention, "num_heads", "num_attention_heads", "attention.num_attention_heads"),
        scales=None if None in scales else (scales[0], scales[1]),
    )


def _no_plain_block(block: nn.Module) -> None:
    """For blocks that take more than tokens."""


def _run_block(block: nn.Module, tokens: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Run a block of any supported transformers: older ones return tuples."""
    output = block(tokens, **inputs)
    following: Tensor = output[0] if isinstance(output, tuple) else output
    return following


def _part(owner: Any, path: str) -> Any:
    """What lies at a dotted path within a module, or None."""
    return reduce(lambda found, name: getattr(found, name, None), path.split("."), owner)


def _first(owner: Any, *paths: str) -> Any:
    """What lies at the first of some paths that there is, or None."""
    return next((found for path in paths if (found := _part(owner, path)) is not None), None)
