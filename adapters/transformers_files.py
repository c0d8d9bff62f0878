"""Projectors out of models of transformers, and back into them.

A model's connector becomes the projector that computes the same, and a projector's weights go by the names
that the model knows them by. The rest of such a model is never read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig

from vlm_vision.adapters.build import build_projector
from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.projector import Projector
from vlm_vision.errors import ConfigError, WeightsError, first_line, nearest
from vlm_vision.weights import check_whole, find_weights_file, load_strict, read_state_dict

State = dict[str, Tensor]
Described = tuple[dict[str, Any], int, int, Grid]
"""A projector's options, its widths D and L, and the patches of a picture."""
NEWLINE = "image_newline"
TOKENIZER_FOLDER = "qformer_tokenizer"
BY_HAND = "or build the projector that it is like, and fill it by load_state_dict"


@dataclass(frozen=True)
class Family:
    """How one kind of model holds its connector.

    Attributes:
        projector: the name of ours that computes the same.
        describe: options, widths and grid from the model's config.
        names: how names of tensors begin, theirs and ours; without the `model.` that some versions put first.
        endings: how they end, where that differs too.
        joined: theirs that are one tensor of ours, one's rows below the other's: first, second, ours.
        prefix: what their names begin with in files on the hub.
        has_newline: whether it has a vector that ends a row of tiles, which is no part of a projector.
    """

    projector: str
    describe: Callable[[Any], Described]
    names: tuple[tuple[str, str], ...]
    endings: tuple[tuple[str, str], ...] = ()
    joined: tuple[str, str, str] | None = None
    prefix: str = ""
    has_newline: bool = False

    def holds(self, name: str) -> bool:
        """Whether a tensor of the model is the connector's."""
        if name.endswith("position_ids"):  # a buffer in old files
            return False
        return name.startswith(tuple(theirs.partition(".")[0] for theirs, _ in self.names))

    def ours(self, state: Mapping[str, Tensor]) -> State:
        """The connector's tensors by our names; what has none there keeps its own."""
        named = {
            _renamed(name, self.names, self.endings): tensor
            for name, tensor in state.items()
            if self.holds(name)
        }
        if self.joined is not None:
            first, second, joined = self.joined
            for name in [name for name in named if first in name and name.replace(first, second) in named]:
                halves = named.pop(name), named.pop(name.replace(first, second))
                named[name.replace(first, joined)] = torch.cat(halves)
        return named

    def theirs(self, state: Mapping[str, Tensor]) -> State:
        """A projector's tensors by the connector's names; what has none there keeps its own."""
        parts = dict(state)
        if self.joined is not None:
            *both, joined = self.joined
            for name in [name for name in parts if joined in name]:
                halves = parts.pop(name).chunk(2)
                parts |= {name.replace(joined, part): half for part, half in zip(both, halves, strict=True)}
        names, endings = (
            tuple((ours, theirs) for theirs, ours in pairs) for pairs in (self.names, self.endings)
        )
        return {_renamed(name, names, endings): tensor for name, tensor in parts.items()}


def from_transformers(source: str | Path | nn.Module) -> Projector:
    """The projector of a model of transformers, with its weights, in fp32 and in evaluation mode.

    It takes what the model gives its connector: in `blip-2`, `instructblip` and `idefics` with the class
    token, after the last norm of the tower.

    Args:
        source: a model; or its folder, of whose safetensors only the connector's tensors are read, and whose
            torch files are read with `weights_only=True`.

    Raises:
        ConfigError: a kind of model, or a setting of it, that no projector here stands for.
        WeightsError: tensors of the connector are missing, unexpected or misshapen.
    """
    family, config, state = _open(source)
    options, in_features, out_features, grid = family.describe(config)
    if not isinstance(source, nn.Module) and (Path(source) / TOKENIZER_FOLDER).is_dir():
        options["tokenizer"] = str(Path(source) / TOKENIZER_FOLDER)
    projector = build_projector({"name": family.projector, **options}, in_features, out_features, grid)
    newline = state.pop(NEWLINE, None)
    load_strict(projector, family.ours(state), _name(source))
    if newline is not None:
        warnings.warn(
            f"{_name(source)}: {NEWLINE}, which ends a row of tiles, is no part of the projector; "
            "transformers_files.image_newline gives it to merge_tiles, and to_transformers takes it back",
            stacklevel=2,
        )
    return projector.eval()


def image_newline(source: str | Path | nn.Module) -> Float[Tensor, " l"]:
    """The vector of a model of transformers that ends a row of tiles; for `vlm_vision.tiling.merge_tiles`.

    Raises:
        ConfigError: as `from_transformers`.
        WeightsError: the model has none.
    """
    _, _, state = _open(source)
    if NEWLINE not in state:
        raise WeightsError(f"{_name(source)} has no {NEWLINE}; {_listed(lambda f: f.has_newline)} have")
    return state[NEWLINE].float()


def to_transformers(
    projector: Projector, target: str | nn.Module, newline: Float[Tensor, " l"] | None = None
) -> dict[str, Tensor]:
    """A projector's weights by the names of a model of transformers.

    Args:
        target: a model that is to have them, by `model.load_state_dict(weights, strict=False)`; or its kind,
            such as `llava`, for the names in files on the hub, which `from_pretrained` reads.
        newline: the model's `image_newline`, if it is to change.

    Raises:
        ConfigError: an unknown kind, or one with another connector; names those that have this one.
        WeightsError: shapes are not the model's, or the values are not here (`check_whole`).
    """
    kind = target if isinstance(target, str) else _kind(target.config)
    family, name = _family(kind), projector.config.name
    state = projector.state_dict()
    check_whole(state, "nothing is given to transformers")
    weights = family.theirs(state)
    if family.projector != name or not all(map(family.holds, weights)):
        others = _listed(lambda other: other.projector == name)
        raise ConfigError(
            f"{kind}: its connector is a {family.projector!r} of another make than this projector, "
            f"{projector.config!r}; models with a {name!r}: {others or 'none, use save_projector'}"
        )
    if newline is not None:
        if not family.has_newline:
            raise ConfigError(f"{kind} has no {NEWLINE}; {_listed(lambda f: f.has_newline)} have")
        weights[NEWLINE] = newline
    if isinstance(target, str):
        return {family.prefix + name: tensor for name, tensor in weights.items()}
    wanted = family.describe(target.config)[0]
    own = {name.removeprefix("model."): (name, tensor.shape) for name, tensor in target.state_dict().items()}
    wrong = [
        f"{option} {getattr(projector.config, option)!r}, the model has {value!r}"
        for option, value in wanted.items()
        if option != "dropout" and getattr(projector.config, option) != value
    ] + [
        f"{name}: {tuple(tensor.shape)}, the model has {tuple(own[name][1])}"
        for name, tensor in weights.items()
        if own[name][1] != tensor.shape
    ]
    if wrong:
        raise WeightsError(f"{type(target).__name__} has another connector: {'; '.join(wrong[:5])}")
    return {own[name][0]: tensor for name, tensor in weights.items()}


def _open(source: str | Path | nn.Module) -> tuple[Family, Any, State]:
    """A model's family, its config, and the tensors of its connector and newline."""
    if isinstance(source, nn.Module):
        config: Any = source.config
    else:
        try:
            config = AutoConfig.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{_name(source)}: no config.json that transformers knows: {first_line(error)}"
            ) from error
    family = _family(_kind(config))

    def wanted(name: str) -> bool:
        short = name.removeprefix("model.")
        return short == NEWLINE or family.holds(short)

    if isinstance(source, nn.Module):
        state = {name: value.detach().clone() for name, value in source.state_dict().items() if wanted(name)}
    else:
        state = read_state_dict(find_weights_file(source), wanted)
    return family, config, {name.removeprefix("model."): tensor for name, tensor in state.items()}


def _family(kind: str) -> Family:
    if kind not in FAMILIES:
        raise ConfigError(
            f"no connector of model_type {kind!r} is known{nearest(kind, FAMILIES)}; take one of "
            f"{', '.join(FAMILIES)}, {BY_HAND}"
        )
    return FAMILIES[kind]


def _listed(which: Callable[[Family], bool]) -> str:
    return ", ".join(kind for kind, family in FAMILIES.items() if which(family))


def _kind(config: Any) -> str:
    return str(config.model_type)


def _name(source: str | Path | nn.Module) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


def _renamed(name: str, names: tuple[tuple[str, str], ...], endings: tuple[tuple[str, str], ...]) -> str:
    begun = next((new + name.removeprefix(old) for old, new in names if name.startswith(old)), name)
    return next((begun.removesuffix(old) + new for old, new in endings if begun.endswith(old)), begun)


def _only(config: Any, option: str, *known: Any, default: Any = None) -> Any:
    """A setting of the model, if it is one of those that the projector can have."""
    value = getattr(config, option, default)
    if value not in known:
        raise ConfigError(
            f"{_kind(config)}: {option} {value!r} is not offered here, only "
            f"{', '.join(map(repr, known))}; use the model's own connector, {BY_HAND}"
        )
    return value


def _grid(vision: Any) -> Grid:
    sides = zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True)
    rows, columns = (size // patch for size, patch in sides)
    return rows, columns


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _with_class_token(vision: Any) -> Grid:
    rows, columns = _grid(vision)
    return 1, rows * columns + 1


def _llava(config: Any) -> Described:
    vision, layers = config.vision_config, config.vision_feature_layer
    _only(config, "multimodal_projector_bias", True, default=True)
    activation = _only(config, "projector_hidden_act", "gelu", "relu", "silu")
    strategy = _only(config, "vision_feature_select_strategy", "default", "full")
    has_class_token = vision.model_type == "clip_vision_model"
    grid = _with_class_token(vision) if has_class_token and strategy == "full" else _grid(vision)
    width = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return {"depth": 2, "activation": activation}, width, config.text_config.hidden_size, grid


def _qformer(config: Any) -> Described:
    vision, qformer = config.vision_config, config.qformer_config
    _only(config, "use_qformer_text_input", False, default=False)
    _only(qformer, "intermediate_size", 4 * qformer.hidden_size)
    _only(qformer, "hidden_act", "gelu")
    _only(qformer, "layer_norm_eps", 1e-12)
    options = {
        "num_queries": config.num_query_tokens,
        "layers": qformer.num_hidden_layers,
        "heads": qformer.num_attention_heads,
        "hidden_size": qformer.hidden_size,
        "cross_attention_frequency": qformer.cross_attention_frequency,
        "dropout": _only(qformer, "hidden_dropout_prob", qformer.attention_probs_dropout_prob),
    }
    return options, vision.hidden_size, config.text_config.hidden_size, _with_class_token(vision)


def _qformer_text(config: Any) -> Described:
    options, in_features, out_features, grid = _qformer(config)
    text = config.qformer_config
    options |= {"vocab_size": text.vocab_size, "max_text": text.max_position_embeddings}
    return options, in_features, out_features, grid


def _idefics(config: Any) -> Described:
    _only(config, "use_resampler", True)
    perceiver, vision = config.perceiver_config, config.vision_config
    options = {
        "num_latents": perceiver.resampler_n_latents,
        "layers": perceiver.resampler_depth,
        "heads": perceiver.resampler_n_heads,
        "head_width": perceiver.resampler_head_dim,
        "activation": "relu",
        "query_key_norm": perceiver.qk_layer_norms_perceiver,
        "project": "none",
    }
    return options, vision.embed_dim, vision.embed_dim, _with_class_token(vision)


def _idefics2(config: Any) -> Described:
    perceiver, vision, text = config.perceiver_config, config.vision_config, config.text_config
    for part in (perceiver, text):
        _only(part, "hidden_act", "silu")
    options = {
        "num_latents": perceiver.resampler_n_latents,
        "layers": perceiver.resampler_depth,
        "heads": perceiver.resampler_n_heads,
        "kv_heads": perceiver.num_key_value_heads,
        "head_width": perceiver.resampler_head_dim,
        "hidden_size": text.intermediate_size,
        "norm_eps": perceiver.rms_norm_eps,
    }
    return options, vision.hidden_size, text.hidden_size, _grid(vision)


def _pixel_shuffle(config: Any) -> Described:
    vision = config.vision_config
    options = {"factor": config.scale_factor}
    return options, vision.hidden_size, config.text_config.hidden_size, _grid(vision)


def _internvl(config: Any) -> Described:
    vision = config.vision_config
    _only(config, "downsample_ratio", 0.5)
    _only(config, "projector_hidden_act", "gelu")
    return {"variant": "2x2"}, vision.hidden_size, config.text_config.hidden_size, _grid(vision)


_LLAVA_NAMES = (("multi_modal_projector.linear_1.", "0."), ("multi_modal_projector.linear_2.", "2."))
_QFORMER_NAMES = (
    ("query_tokens", "query_tokens"),
    ("qformer.", "qformer."),
    ("language_projection.", "language_projection."),
)
_IDEFICS_NAMES = (
    ("perceiver_resampler.latents", "perceiver.latents"),
    ("perceiver_resampler.layer_norm.", "perceiver.norm."),
    ("perceiver_resampler.blocks.", "perceiver.layers."),
)
_IDEFICS_LAYER = {
    "0.context_layer_norm": "0.norm_media",
    "0.latents_layer_norm": "0.norm_latents",
    "0.q_layer_norm": "0.q_norm",
    "0.k_layer_norm": "0.k_norm",
    "0.q_proj": "0.to_q",
    "0.output_proj": "0.to_out",
    "1.ln": "1.0",
    "1.fc": "1.1",
    "1.c_proj": "1.3",
}
_IDEFICS_ENDINGS = tuple(
    (f".{theirs}.{kind}", f".{ours}.{kind}")
    for theirs, ours in _IDEFICS_LAYER.items()
    for kind in ("weight", "bias")
)
_IDEFICS_JOINED = (".0.k_proj.", ".0.v_proj.", ".0.to_kv.")
_SHUFFLE_NAMES = (("connector.modality_projection.", ""),)
_INTERNVL_NAMES = (
    ("multi_modal_projector.layer_norm.", "layers.1."),
    ("multi_modal_projector.linear_1.", "layers.2."),
    ("multi_modal_projector.linear_2.", "layers.4."),
)
FAMILIES = {
    "llava": Family("mlp", _llava, _LLAVA_NAMES),
    "llava_next": Family("mlp", _llava, _LLAVA_NAMES, has_newline=True),
    "llava_onevision": Family("mlp", _llava, _LLAVA_NAMES, has_newline=True),
    "blip-2": Family("qformer", _qformer, _QFORMER_NAMES),
    "instructblip": Family("qformer_text", _qformer_text, _QFORMER_NAMES),
    "idefics": Family(
        "perceiver_resampler", _idefics, _IDEFICS_NAMES, _IDEFICS_ENDINGS, _IDEFICS_JOINED, prefix="model."
    ),
    "idefics2": Family("idefics2_perceiver", _idefics2, (("connector.", "connector."),), prefix="model."),
    "idefics3": Family("pixel_shuffle", _pixel_shuffle, _SHUFFLE_NAMES, prefix="model."),
    "smolvlm": Family("pixel_shuffle", _pixel_shuffle, _SHUFFLE_NAMES, prefix="model."),
    "internvl": Family("mlp_downsample", _internvl, _INTERNVL_NAMES),
}
"""Kinds of models, as `model_type` in their configs."""
