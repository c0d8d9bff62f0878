"""Text towers of transformers' CLIP, SigLIP and SigLIP2, with the projections of their models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from vlm_vision.backbones.config import TransformersConfig
from vlm_vision.backbones.transformers import (
    RANDOM,
    _class,
    _family_config,
    _load,
    read_whole_config,
)
from vlm_vision.compat import clip_text_trunk, config_fields
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.layouts import read_converted
from vlm_vision.text import TextSide, TransformersTokenizer
from vlm_vision.weights import find_weights_file, load_strict, without_init

# Beginnings of the names that a whole model has beside the text tower and the projections.
VISION_SIDE = ("vision_model.", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class TextFamily:
    """Classes of transformers, by name.

    Attributes:
        config, model: of the whole model.
        text: of its text tower.
        projects: whether a linear projection follows each tower; SigLIP's are the ends of its towers.
    """

    config: str
    model: str
    text: str
    projects: bool


TEXT_FAMILIES = {
    "clip": TextFamily("CLIPConfig", "CLIPModel", "CLIPTextModel", projects=True),
    "siglip": TextFamily("SiglipConfig", "SiglipModel", "SiglipTextModel", projects=False),
    "siglip2": TextFamily("Siglip2Config", "Siglip2Model", "Siglip2TextModel", projects=False),
}


class TextTower(nn.Module):
    """Token ids [B,T] to embeddings [B,E] as `get_text_features` gives them without a mask, as trained.

    Parameters have the names that they have in the library's whole model.
    """

    def __init__(self, text_model: nn.Module, text_projection: nn.Linear | None) -> None:
        super().__init__()
        self.text_model, self.text_projection = text_model, text_projection

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        pooled: Tensor = self.text_model(input_ids=tokens).pooler_output
        return pooled if self.text_projection is None else self.text_projection(pooled)


def build_text(config: TransformersConfig, *, load_weights: bool = True) -> TextSide:
    """The text side of a CLIP, SigLIP or SigLIP2 of transformers.

    Raises:
        ConfigError: the model has no text tower that is known here, or its config or tokenizer cannot be had.
        WeightsError: missing, unexpected or misshapen tensors.
    """
    content = config.text_architecture or config.architecture or read_whole_config(config)
    kind = str(content.get("model_type"))
    if kind not in TEXT_FAMILIES:
        raise ConfigError(
            f"transformers:{config.model or 'architecture'}: a model of type {kind!r} is not known to have a "
            f"text tower beside its vision tower; those that have are {', '.join(TEXT_FAMILIES)}. Name the "
            "whole model, not its vision part"
        )
    family = TEXT_FAMILIES[kind]
    whole: Any = _family_config(_class(family.config, kind), content)
    tokenizer = TransformersTokenizer(_tokenizer_source(config), whole.text_config.max_position_embeddings)
    weights = None if config.weights == RANDOM or not load_weights else (config.weights or config.model)
    if weights is None and load_weights and config.weights != RANDOM:
        raise WeightsError(
            f"an `architecture` alone has no weights; name a folder or hub id, or {RANDOM!r} for random ones"
        )
    state = None if weights is None else _read(weights, family, whole)
    with without_init(state is not None):
        encoder, image_projection = _build(family, whole)
    logit_scale, logit_bias = _initial(family, whole)
    if state is not None:
        origin = f"transformers:{weights}"
        own = {name: value for name, value in state.items() if name.startswith(("text_model.", "text_proj"))}
        load_strict(encoder, own, origin)
        if image_projection is not None:
            projection = {
                name.removeprefix("visual_projection."): value
                for name, value in state.items()
                if name.startswith("visual_projection.")
            }
            load_strict(image_projection, projection, f"{origin} (visual_projection)")
        if "logit_scale" not in state:
            raise WeightsError(f"{origin}: these weights have no logit_scale, so they are no dual encoder's")
        logit_scale = float(state["logit_scale"])
        logit_bias = float(state["logit_bias"]) if "logit_bias" in state else None
    return TextSide(
        encoder,
        tokenizer,
        logit_scale,
        logit_bias=logit_bias,
        image_projection=image_projection,
        fields={"text_architecture": _portable(whole), "tokenizer": None},
    )


def _tokenizer_source(config: TransformersConfig) -> str:
    """Where the tokenizer is: named, else beside the weights, else the model's."""
    weights = str(config.weights or "")
    beside = Path(weights).parent if Path(weights).is_file() else Path(weights)
    if config.tokenizer is not None:
        return config.tokenizer
    if weights and (beside / "tokenizer_config.json").is_file():
        return str(beside)
    if config.model is None:
        raise ConfigError(
            "an `architecture` alone has no tokenizer, which a dual encoder needs: name its folder or hub id "
            "as `backbone.tokenizer`"
        )
    return config.model


def _build(family: TextFamily, whole: Any) -> tuple[TextTower, nn.Linear | None]:
    """The text tower and the projection of pictures, with random weights as the library draws them."""
    text_model = clip_text_trunk(_class(family.text, whole.model_type)(whole.text_config))
    if not family.projects:
        return TextTower(text_model, None), None
    projections = [
        nn.Linear(side.hidden_size, whole.projection_dim, bias=False)
        for side in (whole.text_config, whole.vision_config)
    ]
    for projection in projections:
        std = projection.in_features**-0.5 * float(getattr(whole, "initializer_factor", 1.0))
        nn.init.normal_(projection.weight, std=std)
    return TextTower(text_model, projections[0]), projections[1]


def _initial(family: TextFamily, whole: Any) -> tuple[float, float | None]:
    """Temperature and bias before training: CLIP's config says it, SigLIP's paper (section 3.2)."""
    if family.projects:
        return float(whole.logit_scale_init_value), None
    return 2.302585092994046, -10.0  # log 10


def _read(weights: str, family: TextFamily, whole: Any) -> Mapping[str, Tensor]:
    """All tensors of a local file or folder in any layout of CLIP or SigLIP, or of a hub id."""
    path = Path(weights)
    if path.exists():
        return read_converted(find_weights_file(path) if path.is_dir() else path, "transformers")[0]
    model, _ = _load(_class(family.model, whole.model_type), whole, weights, ())
    state: dict[str, Tensor] = model.state_dict()
    return state


def _portable(whole: PretrainedConfig) -> dict[str, Any]:
    """The whole model's config as plain fields; its vision part is the tower's, which may be resized."""
    fields = config_fields(whole)
    return {**fields, "text_config": dict(sorted(fields["text_config"].items()))}
