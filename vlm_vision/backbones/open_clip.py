"""Every image tower of open_clip, with the text towers that were trained beside them.

Native ViTs (CLIP, CLIPA, CoCa), ModifiedResNets, and trunks from timm (SigLIP, SigLIP2, PE, EVA, ViTamin,
ConvNeXt, Swin, FastViT).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from einops import rearrange
from jaxtyping import Float
from open_clip.coca_model import _build_text_decoder_tower
from open_clip.model import _build_text_tower, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import PatchDropout, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from vlm_vision.backbone import Backbone, BackboneInfo, at_size, grids_of_strides
from vlm_vision.backbones.config import OpenClipConfig
from vlm_vision.backbones.encoder import QUICK_GELU, Activation, PlainBlock, resample_positions, run_blocks
from vlm_vision.backbones.timm import TrunkBackbone
from vlm_vision.errors import ConfigError, WeightsError, first_line, nearest
from vlm_vision.layouts import read_converted
from vlm_vision.preprocess import PREPROCESSOR_FILE, read_preprocess
from vlm_vision.text import OpenClipTokenizer, TextSide
from vlm_vision.tower_config import PreprocessConfig
from vlm_vision.weights import find_weights_file, load_strict, without_init

RANDOM = "none"
RESAMPLING = {"mode": "bicubic", "antialias": True, "align_corners": False}  # of `resize_pos_embed`
RESNET_STRIDES = (4, 4, 8, 16, 32)
# Beside the towers: CoCa's decoder and SigLIP's bias.
KNOWN = ("visual.", "text.", "text_decoder.", "logit_scale", "logit_bias")


def list_models() -> list[str]:
    """All models of open_clip."""
    return list(open_clip.list_models())


def build(config: OpenClipConfig, *, load_weights: bool = True) -> Backbone:
    """The vision side of an open_clip model.

    Raises:
        ConfigError: unknown model.
        WeightsError: no weights named, unknown tag, another activation, or tensors that do not fit.
    """
    architecture = _architecture(config)
    state = _weights(config, architecture) if load_weights else None
    with without_init(state is not None):
        visual = build_visual(architecture)
    side = _image_size(visual, architecture)
    preprocess = _preprocess(config, side)
    backbone: Backbone
    if isinstance(visual, TimmModel):
        backbone = TrunkInOpenClip(visual, config, architecture, preprocess)
    elif isinstance(visual, ModifiedResNet):
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
    captions = "multimodal_cfg" in architecture
    text_cfg = {**architecture["text_cfg"], "hf_model_pretrained": False, "output_tokens": captions}
    try:
        encoder = _build_text_tower(architecture["embed_dim"], text_cfg, _quick_gelu(architecture))
        tokenizer = OpenClipTokenizer(text_cfg, config.tokenizer)
    except OSError as error:
        raise ConfigError(
            f"{_origin(config)}: its text tower needs files of "
            f"{text_cfg.get('hf_model_name') or text_cfg.get('hf_tokenizer_name')!r} from the hub, which "
            f"cannot be reached ({first_line(error)})"
        ) from error
    decoder = _build_decoder(architecture) if captions else None
    logit_scale = float(architecture.get("init_logit_scale", math.log(1 / 0.07)))
    logit_bias = architecture.get("init_logit_bias")
    state = _weights(config, architecture) if load_weights else None
    if state is not None:
        own = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
        own.pop("transformer.embeddings.position_ids", None)  # a constant in old files with text from the hub
        load_strict(encoder, own, _origin(config))
        if decoder is not None:
            own = {
                name.removeprefix("text_decoder."): value
                for name, value in state.items()
                if name.startswith("text_decoder.")
            }
            load_strict(decoder, own, f"{_origin(config)} (text_decoder)")
        if "logit_scale" not in state:
            raise WeightsError(
                f"{_origin(config)}: these weights have no logit_scale, so they are no dual encoder's"
            )
        logit_scale, logit_bias = float(state["logit_scale"]), state.get("logit_bias")
    return TextSide(
        encoder,
        tokenizer,
        logit_scale,
        logit_bias=None if logit_bias is None else float(logit_bias),
        text_decoder=decoder,
        fields={"tokenizer": None},  # it is saved with the model
    )


def _build_decoder(architecture: Mapping[str, Any]) -> nn.Module:
    """CoCa's decoder with random weights."""
    vocabulary = architecture["text_cfg"].get("vocab_size", 49408)
    decoder: Any = _build_text_decoder_tower(
        vocabulary, architecture["multimodal_cfg"], _quick_gelu(architecture)
    )
    # open_clip leaves it as the memory was: `init_parameters` is never called, and could not be.
    nn.init.normal_(decoder.text_projection, std=decoder.width**-0.5)
    built: nn.Module = decoder
    return built


class _NativeBackbone(Backbone):
    """What both native kinds share: the `visual` module of open_clip under its own parameter names."""

    visual: Any

    def __init__(
        self,
        visual: nn.Module,
        config: OpenClipConfig,
        architecture: dict[str, Any],
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__()
        self.visual = visual
        self._portable = _portable(config, architecture, preprocess)
        self._checkpointing = False

    def checkpoint_activations(self, enabled: bool) -> None:
        self._checkpointing = enabled

    def portable_config(self) -> OpenClipConfig:
        return self._portable


class VitBackbone(_NativeBackbone):
    """A native ViT: layers are transformer blocks, one class token before the patches."""

    def __init__(
        self,
        visual: VisionTransformer,
        config: OpenClipConfig,
        architecture: dict[str, Any],
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__(visual, config, architecture, preprocess)
        layers = len(visual.transformer.resblocks)
        self.info = BackboneInfo(
            widths=(visual.conv1.out_channels,) * layers,
            grids=(tuple(visual.grid_size),) * layers,
            prefix_tokens=1,
            default_layer=-2 if layers > 1 else -1,
            embed_dim=visual.output_dim,
            preprocess=preprocess,
            size_step=visual.patch_size[0],
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        return run_blocks(
            self.visual.transformer.resblocks,
            self._embed(pixels),
            layers,
            run=_run_block,
            plain=_plain_block,
            checkpointing=self._checkpointing,
        )

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        return self.forward_with_pooled(pixels, [])[1]

    def forward_with_pooled(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> tuple[list[Float[Tensor, "b tokens d"]], Float[Tensor, "b e"]]:
        outputs = self.forward_layers(pixels, sorted({*layers, self.info.num_layers}))
        return outputs[: len(layers)], self._head(outputs[-1])[0]

    def pooled_with_tokens(
        self, pixels: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b m d"]]:
        """Also the tokens that were not pooled, which CoCa's decoder looks at."""
        return self._head(self.forward_layers(pixels, [self.info.num_layers])[0])

    def _head(self, last: Float[Tensor, "b tokens d"]) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b m d"]]:
        embedding, tokens = self.visual._pool(last)
        return self.project(embedding), tokens

    projection = ("visual.proj",)

    def pooled_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        features: Tensor = self.visual._pool(self.forward_layers(pixels, [self.info.num_layers])[0])[0]
        return features

    def project(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return features if self.visual.proj is None else features @ self.visual.proj

    def drop_patches(self, share: float) -> None:
        self.visual.patch_dropout = PatchDropout(share) if share else nn.Identity()

    def _embed(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b tokens d"]:
        visual = self.visual
        maps = visual.conv1(pixels)
        positions = _positions_at(visual.positional_embedding, visual.grid_size, maps.shape[-2:])
        patches = rearrange(maps, "b d h w -> b (h w) d")
        cls = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = torch.cat([cls, patches], dim=1) + positions.to(patches.dtype)
        embedded: Tensor = visual.ln_pre(visual.patch_dropout(tokens))
        return embedded

    def truncate(self, layer: int) -> None:
        self.visual.prune_intermediate_layers([layer - 1], prune_norm=True, prune_head=True)
        self.visual.attn_pool = self.visual.attn_pool_contrastive = None

    def layer_modules(self) -> Sequence[nn.Module]:
        return list(self.visual.transformer.resblocks)

    def resize(self, image_size: int | tuple[int, int]) -> None:
        visual, step = self.visual, self.visual.patch_size[0]
        preprocess = at_size(self.info.preprocess, image_size, step)
        size = (preprocess.height, preprocess.width)
        grid = (size[0] // step, size[1] // step)
        old = visual.positional_embedding
        with torch.no_grad():
            new = _positions_at(old, visual.grid_size, grid)
        visual.positional_embedding = nn.Parameter(new, requires_grad=old.requires_grad)
        visual.grid_size, visual.image_size = grid, size
        self.info = replace(self.info, grids=(grid,) * self.info.num_layers, preprocess=preprocess)


class ResNetBackbone(_NativeBackbone):
    """A ModifiedResNet: layers are the stem and the four stages, each halving the grid; no class token."""

    def __init__(
        self,
        visual: ModifiedResNet,
        config: OpenClipConfig,
        architecture: dict[str, Any],
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__(visual, config, architecture, preprocess)
        width = visual.layer1[0].conv1.out_channels
        self.info = BackboneInfo(
            widths=(width, *(width * 4 * 2**stage for stage in range(4))),
            grids=grids_of_strides(preprocess, RESNET_STRIDES),
            prefix_tokens=0,
            default_layer=-1,
            embed_dim=visual.output_dim,
            preprocess=preprocess,
            size_step=RESNET_STRIDES[-1],
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        maps = [self.visual.stem(pixels)]
        later = [layer - 1 for layer in layers if layer > 1]
        if later:
            maps += run_blocks(
                self._stages(),
                maps[0],
                later,
                run=_run_block,
                plain=_plain_block,
                checkpointing=self._checkpointing,
            )
        asked = maps if layers[0] == 1 else maps[1:]
        return [rearrange(features, "b d h w -> b (h w) d") for features in asked]

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        rows, columns = (side // RESNET_STRIDES[-1] for side in pixels.shape[2:])
        embedding: Tensor
        if (rows, columns) == self.info.grids[-1]:
            embedding = self.visual(pixels)
            return embedding
        pooling = copy(self.visual.attnpool)  # with positions of this call; all else is shared
        pooling._parameters = dict(pooling._parameters)
        positions = pooling._parameters.pop("positional_embedding")
        pooling.positional_embedding = _positions_at(positions, self.info.grids[-1], (rows, columns))
        tokens = self.forward_layers(pixels, [self.info.num_layers])[0]
        embedding = pooling(rearrange(tokens, "b (h w) d -> b d h w", h=rows))
        return embedding

    def truncate(self, layer: int) -> None:
        for stage in range(layer, 5):
            setattr(self.visual, f"layer{stage}", nn.Identity())
        self.visual.attnpool = nn.Identity()

    def layer_modules(self) -> Sequence[nn.Module]:
        return [stage for stage in self._stages() if not isinstance(stage, nn.Identity)]

    def resize(self, image_size: int | tuple[int, int]) -> None:
        """Another size of pictures; position embeddings are in the pooling only, and are resampled there."""
        preprocess = at_size(self.info.preprocess, image_size, RESNET_STRIDES[-1])
        grids, pooling = grids_of_strides(preprocess, RESNET_STRIDES), self.visual.attnpool
        if not isinstance(pooling, nn.Identity):
            old = pooling.positional_embedding
            with torch.no_grad():
                new = _positions_at(old, self.info.grids[-1], grids[-1])
            pooling.positional_embedding = nn.Parameter(new, requires_grad=old.requires_grad)
        self.info = replace(self.info, grids=grids, preprocess=preprocess)

    def _stages(self) -> list[nn.Module]:
        return [getattr(self.visual, f"layer{stage}") for stage in range(1, 5)]


class TrunkInOpenClip(TrunkBackbone):
    """A timm model as open_clip's image tower: its head, and the projection that open_clip adds."""

    visual: Any

    def __init__(
        self,
        visual: TimmModel,
        config: OpenClipConfig,
        architecture: dict[str, Any],
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__(
            _origin(config), visual, visual.trunk, preprocess, lambda: build_visual(architecture)
        )
        self.visual = visual
        self._portable = _portable(config, architecture, preprocess)

    @property
    def _whole(self) -> Any:
        return self.visual

    @staticmethod
    def _trunk_of(model: Any) -> Any:
        return model.trunk

    def truncate(self, layer: int) -> None:
        super().truncate(layer)
        self.visual.head = nn.Identity()

    def portable_config(self) -> OpenClipConfig:
        return self._portable


def _portable(
    config: OpenClipConfig, architecture: dict[str, Any], preprocess: PreprocessConfig
) -> OpenClipConfig:
    return config.model_copy(update={"architecture": architecture, "preprocess": preprocess})


def _run_block(block: nn.Module, tokens: Tensor) -> Tensor:
    following: Tensor = block(tokens)
    return following


def _plain_block(block: Any) -> PlainBlock | None:
    """The parts of a block without layer scale, adapters or attention of another kind."""
    if type(block) is not ResidualAttentionBlock or type(block.attn) is not nn.MultiheadAttention:
        return None
    linear = (block.mlp.c_fc, block.mlp.c_proj, block.attn.out_proj)
    scaled = not all(isinstance(scale, nn.Identity) for scale in (block.ls_1, block.ls_2))
    if scaled or not all(isinstance(layer, nn.Linear) for layer in linear):
        return None
    gelu = block.mlp.gelu
    return PlainBlock(
        norm_1=block.ln_1,
        projections=((block.attn.in_proj_weight, block.attn.in_proj_bias),),
        out=block.attn.out_proj,
        norm_2=block.ln_2,
        up=block.mlp.c_fc,
        activation=QUICK_GELU if isinstance(gelu, QuickGELU) else Activation(gelu),
        down=block.mlp.c_proj,
        heads=block.attn.num_heads,
    )


def _positions_at(
    positions: Float[Tensor, "tokens d"], old: Sequence[int], new: Sequence[int]
) -> Float[Tensor, "new_tokens d"]:
    return resample_positions(positions, 1, old, new, RESAMPLING)


def build_visual(architecture: Mapping[str, Any]) -> nn.Module:
    """open_clip's image tower with random weights: those of the trunk come with the checkpoint's."""
    vision_cfg = {**architecture["vision_cfg"], "timm_model_pretrained": False}
    visual: nn.Module = _build_vision_tower(architecture["embed_dim"], vision_cfg, _quick_gelu(architecture))
    return visual


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
    weights = "" if config.weights is None else f"@{config.weights}"
    return f"open_clip:{config.model or 'architecture'}{weights}"


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


def _image_size(visual: nn.Module, architecture: Mapping[str, Any]) -> int | tuple[int, int]:
    """The size that a model's positions are for.

    A ViT from timm has its own, whatever open_clip's config says: that of ViTamin-XL-384 says 256.
    """
    if isinstance(visual, TimmModel) and hasattr(visual.trunk, "patch_embed"):
        height, width = getattr(visual.trunk.patch_embed, "img_size", None) or visual.image_size
    else:
        size = architecture["vision_cfg"].get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
    return height if height == width else (height, width)


def _preprocess(config: OpenClipConfig, side: int | tuple[int, int]) -> PreprocessConfig:
    """Settings of the weights over open_clip's defaults, at the model's image size.

    Raises:
        ConfigError: `preprocess` of another size than the model's.
    """
    if config.preprocess is not None:
        if config.preprocess.image_size != side:
            raise ConfigError(
                f"{_origin(config)}: preprocess.image_size is {config.preprocess.image_size}, "
                f"the model's is {side}"
            )
        return config.preprocess
    record, defaults = _record(config), PreprocessConfig(image_size=side)
    beside = Path(str(config.weights)) / PREPROCESSOR_FILE
    if not record and beside.is_file():  # a folder of transformers
        return read_preprocess(beside).at_size(side)
    resize = record.get("resize_mode") or defaults.resize
    interpolation = record.get("interpolation") or defaults.interpolation
    if resize == "shortest" and not isinstance(side, int):
        interpolation = "bicubic"  # open_clip's transform leaves out the setting there
    return defaults.model_copy(
        update={
            "mean": tuple(record.get("mean") or defaults.mean),
            "std": tuple(record.get("std") or defaults.std),
            "interpolation": interpolation,
            "resize": resize,
            "fill": record.get("fill_color") or defaults.fill,
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
    state, quick_gelu = read_converted(_weights_path(config, architecture), "open_clip")
    if quick_gelu is not None:
        _check_activation(config, architecture, quick_gelu)
    strange = [name for name in state if not name.startswith(KNOWN)]
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
