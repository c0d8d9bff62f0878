"""Vision models of transformers: CLIP's vision part and DINOv2, under transformers 4.37 and today's alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PretrainedConfig,
)
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention
from transformers.utils import cached_file, logging

from vlm_vision.backbone import Backbone, BackboneInfo
from vlm_vision.backbones.config import PUBLISHED, TransformersConfig
from vlm_vision.backbones.encoder import PlainBlock, quick_gelu_, run_blocks
from vlm_vision.errors import ConfigError, DataError, WeightsError, first_line
from vlm_vision.preprocess import PREPROCESSOR_FILE, read_preprocess
from vlm_vision.tower_config import PreprocessConfig

RANDOM = "none"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Tensors of a whole CLIP checkpoint that are no part of its vision model.
_TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def build(config: TransformersConfig, *, load_weights: bool = True) -> Backbone:
    """A CLIP or DINOv2 vision model.

    Raises:
        ConfigError: the model's config cannot be had, or is of another family.
        WeightsError: missing, unexpected or misshapen tensors.
    """
    random = config.weights == RANDOM or not load_weights
    model_config = _model_config(config, random)
    weights = None if random else (config.weights or config.model)
    if weights is None and not random:
        raise WeightsError(
            f"an `architecture` alone has no weights; name a folder or hub id, or {RANDOM!r} for random ones"
        )
    preprocess = config.preprocess or _preprocess(weights, model_config)
    if isinstance(model_config, CLIPVisionConfig):
        return ClipBackbone(_load(CLIPVisionModel, model_config, weights), config, model_config, preprocess)
    return Dinov2Backbone(_load(Dinov2Model, model_config, weights), config, model_config, preprocess)


class _TransformersBackbone(Backbone):
    """What both families share: embeddings, a list of blocks, a final norm that only the pooled head uses."""

    embeddings: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(
        self,
        model: nn.Module,
        config: TransformersConfig,
        model_config: PretrainedConfig,
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__()
        self._config, self._model_config = config, model_config
        self._checkpointing = False
        layers, side = model_config.num_hidden_layers, model_config.image_size // model_config.patch_size
        if preprocess.image_size != model_config.image_size:
            # DINOv2 was trained at 518 and its processor crops 224.
            preprocess = preprocess.at_size(model_config.image_size)
        self.info = BackboneInfo(
            widths=(model_config.hidden_size,) * layers,
            grids=((side, side),) * layers,
            prefix_tokens=1,
            default_layer=-2 if layers > 1 else -1,
            embed_dim=model_config.hidden_size,
            preprocess=preprocess,
        )

    def forward_layers(
        self, pixels: Float[Tensor, "b 3 h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b tokens d"]]:
        return run_blocks(
            self.blocks,
            self.embeddings(pixels),
            layers,
            run=_run_block,
            plain=_plain_block,
            checkpointing=self._checkpointing,
        )

    def layer_modules(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def checkpoint_activations(self, enabled: bool) -> None:
        self._checkpointing = enabled

    def portable_config(self) -> TransformersConfig:
        architecture = self._model_config.to_dict()
        return self._config.model_copy(
            update={"architecture": architecture, "preprocess": self.info.preprocess}
        )


class ClipBackbone(_TransformersBackbone):
    """CLIP's vision model; the pooled head is the class token after `post_layernorm`, not projected."""

    def __init__(self, model: Any, *facts: Any) -> None:
        super().__init__(model, *facts)
        model = getattr(model, "vision_model", model)  # transformers 5 dropped the inner level
        self.embeddings = nn.Sequential(model.embeddings, model.pre_layrnorm)
        self.blocks = model.encoder.layers
        self.norm = model.post_layernorm

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        embedding: Tensor = self.norm(self.forward_layers(pixels, [len(self.blocks)])[0][:, 0])
        return embedding

    def truncate(self, layer: int) -> None:
        self.blocks = self.blocks[:layer]
        self.norm = nn.Identity()


class Dinov2Backbone(_TransformersBackbone):
    """DINOv2; the pooled head is the class token after the final norm."""

    def __init__(self, model: Any, *facts: Any) -> None:
        super().__init__(model, *facts)
        # Only masked pre-training uses it; as a parameter without gradient it would make DDP wait.
        model.embeddings.mask_token.requires_grad_(False)
        self.embeddings = model.embeddings
        self.blocks = getattr(model.encoder, "layer", None) or model.encoder.layers
        self.norm = model.layernorm

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        tokens: Tensor = self.norm(self.forward_layers(pixels, [len(self.blocks)])[0])
        return tokens[:, 0]

    def truncate(self, layer: int) -> None:
        self.blocks = self.blocks[:layer]
        self.norm = nn.Identity()


def _run_block(block: nn.Module, hidden: Tensor) -> Tensor:
    """Run an encoder layer of any supported transformers: older ones demand masks and return tuples."""
    masks = [name for name in inspect.signature(block.forward).parameters if name.endswith("attention_mask")]
    output = block(hidden, *[None] * len(masks))
    following: Tensor = output[0] if isinstance(output, tuple) else output
    return following


def _plain_block(block: Any) -> PlainBlock | None:
    """The parts of a block of CLIP's kind, without adapters and attention of another kind."""
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    if type(attention) is not CLIPAttention or type(mlp) is not CLIPMLP:
        return None
    linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2)
    if not all(type(layer) is nn.Linear for layer in linear) or (block.training and attention.dropout):
        return None
    return PlainBlock(
        norm_1=block.layer_norm1,
        projections=tuple((layer.weight, layer.bias) for layer in linear[:3]),
        out=attention.out_proj,
        norm_2=block.layer_norm2,
        up=mlp.fc1,
        activation=quick_gelu_ if isinstance(mlp.activation_fn, QuickGELUActivation) else mlp.activation_fn,
        down=mlp.fc2,
        heads=attention.num_heads,
    )


def _model_config(config: TransformersConfig, random: bool) -> PretrainedConfig:
    architecture = config.architecture
    if architecture is None and random and not Path(str(config.model)).exists():
        architecture = PUBLISHED.get(str(config.model))
    if architecture is not None:
        families = {"clip_vision_model": CLIPVisionConfig, "dinov2": Dinov2Config}
        family = families.get(str(architecture.get("model_type")))
        if family is None:
            raise ConfigError(f"`architecture.model_type` must be one of {', '.join(families)}")
        return family(**architecture)
    try:
        found = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"transformers:{config.model}: no config at this hub id or folder "
            f"({first_line(error)}). Offline, download it first and name the folder"
        ) from error
    found = getattr(found, "vision_config", found)
    if not isinstance(found, (CLIPVisionConfig, Dinov2Config)):
        raise ConfigError(
            f"transformers:{config.model}: is a {found.model_type!r}; this source reads CLIP and DINOv2"
        )
    return found


def _preprocess(weights: str | None, model_config: PretrainedConfig) -> PreprocessConfig:
    if weights is None:  # random weights have no settings of their own: take the family's
        if isinstance(model_config, CLIPVisionConfig):
            return PreprocessConfig(image_size=model_config.image_size, crop_rounding="down")
        return PreprocessConfig(
            image_size=model_config.image_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_rounding="down"
        )
    try:
        found = cached_file(weights, PREPROCESSOR_FILE)
    except OSError:
        found = None
    if found is None:
        raise DataError(
            f"{weights} has no {PREPROCESSOR_FILE}, so the right preprocessing of these weights is unknown; "
            "add the file, or set `backbone.preprocess`"
        )
    return read_preprocess(Path(found))


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load(model_class: Any, model_config: PretrainedConfig, weights: str | None) -> nn.Module:
    if weights is None:
        model: nn.Module = model_class(model_config)
        return model
    try:
        with _quiet():  # its report of what is wrong is raised below, and the text side is not wrong
            model, report = model_class.from_pretrained(
                weights, config=model_config, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # the hub, safetensors and torch each have their own family
        raise WeightsError(f"transformers:{weights}: weights cannot be loaded: {error}") from error
    wrong = {
        "missing": [name for name in report["missing_keys"] if not name.endswith("position_ids")],
        "unexpected": [
            name
            for name in report["unexpected_keys"]
            if not name.startswith(_TEXT_SIDE) and not name.endswith("position_ids")
        ],
        "of another shape": [
            f"{name}: file has {tuple(found)}, model needs {tuple(needed)}"
            for name, found, needed in report["mismatched_keys"]
        ],
    }
    lines = [
        f"  {len(names)} {kind}: {', '.join(sorted(names)[:5])}" for kind, names in wrong.items() if names
    ]
    if lines:
        raise WeightsError(
            f"transformers:{weights}: these weights are not for this model\n" + "\n".join(lines)
        )
    return model.to(torch.float32)
