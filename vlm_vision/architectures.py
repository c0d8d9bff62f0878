"""Architectures of CLIP and SigLIP between open_clip's `model_cfg` and the `config.json` of transformers.

What the two compute is the same number by number, or it is a `ConfigError` that names the difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from vlm_vision.errors import ConfigError

# What transformers assumes where a config.json is silent (configuration_clip.py, configuration_siglip.py).
_CLIP_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_SIGLIP_VISION = {**_SIGLIP, "num_channels": 3, "image_size": 224, "patch_size": 16, "vision_use_head": True}
_SIGLIP_TEXT = {**_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64}
_CLIP_LOGIT_SCALE = 2.6592

_DEFAULT_EPS = 1e-5  # of torch's LayerNorm, which open_clip uses unless `norm_kwargs` say otherwise
_ARGMAX = 2  # `eos_token_id` by which transformers pools CLIP's text at its highest token id
_SIGLIP_TRUNK = re.compile(r"vit_(base|large|so400m|giantopt)_patch(14|16|32)_siglip_(\d+)")
# Width, layers, heads, width of the MLP of timm's SigLIP trunks (vision_transformer.py).
_SIGLIP_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# timm computes tanh's GELU in the trunks that came with SigLIP 2, and the exact one in those before.
_TANH_TRUNK = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt)")
# Tokenizers of open_clip's SigLIPs by vocabulary: the one part of theirs that config.json does not tell.
_SIGLIP_TOKENIZERS = {
    32000: "timm/ViT-B-16-SigLIP",
    250000: "timm/ViT-B-16-SigLIP-i18n-256",
    256000: "timm/ViT-B-16-SigLIP2",
}
# Keys of open_clip that change nothing of what is computed in evaluation.
_WITHOUT_EFFECT = {
    "attn_pooler_heads",
    "attn_pooler_queries",
    "hf_model_pretrained",
    "hf_pooler_type",
    "hf_proj_type",
    "hf_tokenizer_name",
    "output_tokens",
    "pad_id",
    "patch_dropout",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "tokenizer_kwargs",
    "tokenizer_mode",
}
_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
_TEXT = {"context_length", "vocab_size", "layers", "width", "heads", "mlp_ratio"}
_COMMON = {"act_kwargs", "norm_kwargs"}
_NEUTRAL = {"pool_type": "tok", "pos_embed_type": "learnable", "block_type": "default"}
_REASONS = {
    "attentional_pool": "it pools by attention (CoCa)",
    "multimodal_cfg": "it is a CoCa, with a decoder",
    "pool_type": "it pools its tokens otherwise than by the class token (CLIPA averages)",
    "global_average_pool": "it averages its patches",
    "no_ln_pre": "it has no norm before its layers",
    "final_ln_after_pool": "its last norm comes after pooling",
    "pos_embed_type": "its position embeddings are not learnt",
    "ls_init_value": "it scales its layers",
    "hf_model_name": "its text tower is another model of transformers",
    "embed_cls": "its text has a class token (CoCa)",
    "no_causal_mask": "its text attends in both directions",
    "proj_bias": "its text projection has a bias",
    "proj_type": "its text has no projection",
    "timm_model_name": "its trunk is another model of timm",
}


def transformers_config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the transformers model that computes what this open_clip model does.

    Args:
        architecture: open_clip's `model_cfg`: `embed_dim`, `vision_cfg`, and `text_cfg` of a whole model.

    Returns:
        Of a `CLIPModel` or `SiglipModel`; without `text_cfg` of a `CLIPVisionModel` or `SiglipVisionModel`.

    Raises:
        ConfigError: no model of transformers computes this; names the key and the reason.
    """
    top = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
    _refuse_others(architecture, top | {"init_logit_scale", "init_logit_bias"}, {}, "")
    if architecture["vision_cfg"].get("timm_model_name"):
        return _siglip_config(architecture)
    quick_gelu, embed_dim = bool(architecture.get("quick_gelu", False)), int(architecture["embed_dim"])
    vision = architecture["vision_cfg"]
    _refuse_others(vision, _VISION | _COMMON, _NEUTRAL, "vision_cfg.")
    if not isinstance(vision.get("layers", 12), int):
        raise ConfigError("vision_cfg.layers: a ModifiedResNet has no counterpart in transformers")
    width = vision.get("width", 768)
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": vision.get("layers", 12),
        "num_attention_heads": width // vision.get("head_width", 64),
        "num_channels": 3,
        "image_size": _one_side(vision, "image_size", 224),
        "patch_size": _one_side(vision, "patch_size", 16),
        "projection_dim": embed_dim,
        "hidden_act": _activation(vision, quick_gelu),
        "layer_norm_eps": _eps(vision),
    }
    if "text_cfg" not in architecture:
        return {"architectures": ["CLIPVisionModel"], **vision_config}
    text = architecture["text_cfg"]
    _refuse_others(text, _TEXT | _COMMON | {"pool_type", "eos_id"}, {"proj_type": "linear"}, "text_cfg.")
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": embed_dim,
        "logit_scale_init_value": float(architecture.get("init_logit_scale", math.log(1 / 0.07))),
        "vision_config": vision_config,
        "text_config": {
            "model_type": "clip_text_model",
            **_text_sizes(text),
            "projection_dim": embed_dim,
            "hidden_act": _activation(text, quick_gelu),
            "layer_norm_eps": _eps(text),
            "eos_token_id": _eos_token_id(text),
        },
    }


def open_clip_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's `model_cfg` of the model that a `config.json` of transformers describes.

    Args:
        config: of a CLIP or SigLIP, the whole model or its vision part; what it leaves out is as transformers
            fills it in.

    Returns:
        `embed_dim`, `vision_cfg`, `text_cfg` (of a whole model), and `quick_gelu` where it is used.

    Raises:
        ConfigError: another family, or a setting that open_clip has not.
    """
    kind = config.get("model_type")
    if kind in ("siglip", "siglip_vision_model"):
        return _siglip_architecture(config)
    if kind not in ("clip", "clip_vision_model"):
        raise ConfigError(f"model_type {kind!r} has no counterpart in open_clip; CLIP and SigLIP have one")
    vision = {**_CLIP_VISION, **(config.get("vision_config") or {} if kind == "clip" else config)}
    text = {**_CLIP_TEXT, **(config.get("text_config") or {})} if kind == "clip" else None
    quick_gelu = vision["hidden_act"] == "quick_gelu"
    if text is not None and (text["hidden_act"] == "quick_gelu") != quick_gelu:
        raise ConfigError(
            f"hidden_act is {vision['hidden_act']!r} in pictures and {text['hidden_act']!r} in text; in "
            "open_clip both towers are QuickGELU, or neither is"
        )
    if vision["num_channels"] != 3:
        raise ConfigError(f"num_channels is {vision['num_channels']}; open_clip takes pictures of 3")
    width, heads = vision["hidden_size"], vision["num_attention_heads"]
    architecture: dict[str, Any] = {
        "embed_dim": (config if kind == "clip" else vision).get("projection_dim", 512),
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": width,
            **_unless(64, head_width=width // heads),
            "patch_size": vision["patch_size"],
            **_unless(4.0, mlp_ratio=_ratio(width, vision["intermediate_size"])),
            **_kwargs(vision),
        },
    }
    if text is not None:
        scale = config.get("logit_scale_init_value", _CLIP_LOGIT_SCALE)
        if abs(scale - math.log(1 / 0.07)) > 1e-4:
            architecture["init_logit_scale"] = scale
        eos = text["eos_token_id"]
        # The highest id of a text is its end, where the end is the last of the vocabulary.
        pooled = {} if eos in (_ARGMAX, text["vocab_size"] - 1) else {"pool_type": "eos", "eos_id": eos}
        architecture["text_cfg"] = {**_text_cfg(text), **pooled, **_kwargs(text)}
    return {**architecture, **({"quick_gelu": True} if quick_gelu else {})}


def _siglip_config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    vision, embed_dim = architecture["vision_cfg"], int(architecture["embed_dim"])
    found = _SIGLIP_TRUNK.fullmatch(vision["timm_model_name"])
    if found is None or vision.get("timm_pool") != "map" or vision.get("timm_proj") not in (None, "", "none"):
        raise ConfigError(
            f"vision_cfg.timm_model_name {vision['timm_model_name']!r} has no counterpart in transformers: "
            "of timm's trunks only SigLIP's with its own pooling have one"
        )
    trunk = {"timm_model_name", "timm_pool", "timm_proj", "image_size"}
    _refuse_others(vision, trunk | _COMMON, {}, "vision_cfg.")
    size, patch, native = found[1], int(found[2]), int(found[3])
    width, layers, heads, intermediate = _SIGLIP_SIZES[size]
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_channels": 3,
        "image_size": _one_side(vision, "image_size", native),
        "patch_size": patch,
        "hidden_act": _trunk_activation(vision["timm_model_name"]),
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    }
    if "text_cfg" not in architecture:
        return {"architectures": ["SiglipVisionModel"], **vision_config}
    text = architecture["text_cfg"]
    theirs = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    _refuse_others(text, _TEXT | _COMMON | theirs.keys(), {"proj_type": "linear"}, "text_cfg.")
    for key, value in theirs.items():
        if text.get(key) != value:
            raise ConfigError(
                f"text_cfg.{key} is {text.get(key)!r}; transformers' SigLIP computes text with {value!r}"
            )
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": vision_config,
        "text_config": {
            "model_type": "siglip_text_model",
            **_text_sizes(text),
            "projection_size": embed_dim,
            "hidden_act": _activation(text, quick_gelu=False),
            "layer_norm_eps": _eps(text),
        },
    }


def _siglip_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    whole = config["model_type"] == "siglip"
    vision = {**_SIGLIP_VISION, **(config.get("vision_config") or {} if whole else config)}
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    found = [name for name, facts in _SIGLIP_SIZES.items() if facts == tuple(vision[key] for key in sizes)]
    patch, side = vision["patch_size"], vision["image_size"]
    trunk = f"vit_{found[0] if found else 'unknown'}_patch{patch}_siglip_{side}"
    if (
        not _SIGLIP_TRUNK.fullmatch(trunk)
        or vision["layer_norm_eps"] != 1e-6
        or not vision["vision_use_head"]
    ):
        raise ConfigError(
            f"no SigLIP trunk of timm is {vision['hidden_size']} wide with {vision['num_hidden_layers']} "
            f"layers, patches of {patch}, layer_norm_eps {vision['layer_norm_eps']} and a head"
        )
    if vision["hidden_act"] != _trunk_activation(trunk):
        raise ConfigError(
            f"hidden_act is {vision['hidden_act']!r}, and timm's {trunk} computes "
            f"{_trunk_activation(trunk)!r}: their features differ; keep these weights in "
            "transformers"
        )
    architecture: dict[str, Any] = {
        "embed_dim": vision["hidden_size"],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": side,
            "timm_model_name": trunk,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
    }
    if not whole:
        return architecture
    text = {**_SIGLIP_TEXT, **(config.get("text_config") or {})}
    if text["vocab_size"] not in _SIGLIP_TOKENIZERS:
        raise ConfigError(
            f"text_config.vocab_size is {text['vocab_size']}: no tokenizer of open_clip's SigLIPs has it "
            f"({', '.join(map(str, _SIGLIP_TOKENIZERS))})"
        )
    architecture["text_cfg"] = {
        **_text_cfg(text),
        "hf_tokenizer_name": _SIGLIP_TOKENIZERS[text["vocab_size"]],
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        **_kwargs(text),
    }
    return architecture


def _trunk_activation(trunk: str) -> str:
    return "gelu_pytorch_tanh" if _TANH_TRUNK.match(trunk) else "gelu"


def _refuse_others(
    given: Mapping[str, Any], understood: set[str], neutral: Mapping[str, Any], prefix: str
) -> None:
    for key, value in given.items():
        if key in understood | _WITHOUT_EFFECT or not value or value == neutral.get(key):
            continue
        reason = _REASONS.get(key, "this setting is unknown there")
        raise ConfigError(f"{prefix}{key}: {value!r} has no counterpart in transformers: {reason}")


def _one_side(given: Mapping[str, Any], key: str, default: int) -> int:
    value = given.get(key, default)
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) > 1:
        raise ConfigError(f"vision_cfg.{key}: {value!r} is not square, as transformers needs it")
    return int(sides.pop())


def _activation(given: Mapping[str, Any], quick_gelu: bool) -> str:
    kwargs = given.get("act_kwargs") or {}
    if kwargs not in ({}, {"approximate": "none"}, {"approximate": "tanh"}) or (kwargs and quick_gelu):
        raise ConfigError(f"act_kwargs: {kwargs!r} is no activation of transformers")
    if kwargs == {"approximate": "tanh"}:
        return "gelu_pytorch_tanh"
    return "quick_gelu" if quick_gelu else "gelu"


def _eps(given: Mapping[str, Any]) -> float:
    kwargs = dict(given.get("norm_kwargs") or {})
    eps = float(kwargs.pop("eps", _DEFAULT_EPS))
    if kwargs:
        raise ConfigError(f"norm_kwargs: {kwargs!r} has no counterpart in transformers")
    return eps


def _eos_token_id(text: Mapping[str, Any]) -> int:
    pool = text.get("pool_type", "argmax")
    if pool == "argmax":
        return _ARGMAX
    eos = int(text.get("eos_id", 2))
    if pool != "eos" or eos == _ARGMAX:
        raise ConfigError(
            f"text_cfg.pool_type: {pool!r} has no counterpart in transformers: its CLIP pools a text at its "
            f"highest token id, or at an eos_id other than {_ARGMAX}"
        )
    return eos


def _text_sizes(text: Mapping[str, Any]) -> dict[str, Any]:
    width = text.get("width", 512)
    return {
        "vocab_size": text.get("vocab_size", 49408),
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
    }


def _text_cfg(text: Mapping[str, Any]) -> dict[str, Any]:
    width = text["hidden_size"]
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": width,
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        **_unless(4.0, mlp_ratio=_ratio(width, text["intermediate_size"])),
    }


def _kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """`act_kwargs` and `norm_kwargs` of open_clip where they are not its defaults."""
    act, eps = given["hidden_act"], given["layer_norm_eps"]
    if act not in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        raise ConfigError(f"hidden_act {act!r} has no counterpart in open_clip")
    return {
        **({"norm_kwargs": {"eps": eps}} if eps != _DEFAULT_EPS else {}),
        **({"act_kwargs": {"approximate": "tanh"}} if act == "gelu_pytorch_tanh" else {}),
    }


def _ratio(width: int, intermediate: int) -> float:
    """A ratio that open_clip, which truncates, multiplies to this width of the MLP; of few digits."""
    for digits in range(1, 9):
        ratio: float = math.ceil(intermediate / width * 10**digits) / 10**digits
        if int(width * ratio) == intermediate:
            return ratio
    return math.nextafter(intermediate / width, math.inf)


def _unless(default: Any, **setting: Any) -> dict[str, Any]:
    return {key: value for key, value in setting.items() if value != default}
