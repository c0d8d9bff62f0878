"""Tiny dual encoders of every library, random but with embeddings that differ; the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from tiny import CLIP_VISION, RESNET, TOWER, clip_tokenizer_files
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from vlm_vision import DualEncoder, load_dual_encoder

TEXTS = ["a red square", "two cats", "Ünïcode, 你好 & 🎉 " * 9, "x"]
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "vocab_size": 520,
}
CLIP_TEXT = {**TEXT, "eos_token_id": 519, "bos_token_id": 518, "pad_token_id": 519}
VISION = {**CLIP_VISION, "hidden_size": 48, "num_attention_heads": 3}
# Models of transformers: class, and its config.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIPModel", {"text_config": CLIP_TEXT, "vision_config": VISION, "projection_dim": 24}),
    "CLIP, highest id, GELU": (
        "CLIPModel",
        {
            "text_config": {**CLIP_TEXT, "eos_token_id": 2, "hidden_act": "gelu"},
            "vision_config": {**VISION, "hidden_act": "gelu"},
            "projection_dim": 40,
        },
    ),
    "SigLIP": ("SiglipModel", {"text_config": TEXT, "vision_config": VISION}),
    "SigLIP2 NaFlex": (
        "Siglip2Model",
        {"text_config": TEXT, "vision_config": {**VISION, "num_patches": 16}},
    ),
}
HERE = [kind for kind, (name, _) in KINDS.items() if hasattr(transformers, name)]
# Of open_clip's SigLIP, whose trunk is one of timm's; of the size that `SIGLIP_SIZE` says.
SIGLIP_TRUNK = "vit_base_patch16_siglip_32"
SIGLIP_SIZE = (48, 2, 3, 100)
OPEN_CLIP: Any = TOWER["backbone"]
SIGLIP: dict[str, Any] = {
    "name": "open_clip",
    "weights": "none",
    "architecture": {
        "embed_dim": 48,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": SIGLIP_TRUNK,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 520,
            "hf_tokenizer_name": "nobody/siglip",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 48,
            "heads": 3,
            "layers": 2,
            "mlp_ratio": 2.0834,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    },
}
COCA: dict[str, Any] = {
    **OPEN_CLIP,
    "architecture": {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {
            **OPEN_CLIP["architecture"]["vision_cfg"],
            "attentional_pool": True,
            "attn_pooler_heads": 4,
            "attn_pooler_queries": 6,
            "output_tokens": True,
        },
        "text_cfg": {**OPEN_CLIP["architecture"]["text_cfg"], "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
}
EVERY = ["open_clip", "open_clip, ResNet", "open_clip, SigLIP of timm", "open_clip, CoCa", *HERE]


def _siglip_trunk(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    width, layers, heads, mlp = SIGLIP_SIZE
    fixed = {"patch_size": 16, "embed_dim": width, "depth": layers, "num_heads": heads}
    defaults = {"img_size": 32, "class_token": False, "global_pool": "map"}
    settings.pop("cache_dir", None)
    settings.pop("pretrained_cfg", None)
    settings.pop("pretrained_cfg_overlay", None)
    return VisionTransformer(mlp_ratio=mlp / width, **{**defaults, **settings, **fixed})


def library_model(kind: str) -> Any:
    """A model of transformers whose biases and temperature are not zero."""
    name, config = KINDS[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return stirred(model_class(model_class.config_class(**config)).eval())


def stirred(model: Any) -> Any:
    """Numbers of its own in every parameter, those that start at 0 or 1 too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def saved(kind: str, folder: Path) -> tuple[Any, Path]:
    """A model as transformers saves it, with its tokenizer and its image processor."""
    model = library_model(kind)
    model.save_pretrained(folder)
    clip_tokenizer_files(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    return model, folder


def dual(kind: str, folder: Path, **overrides: Any) -> DualEncoder:
    """Of a kind in `EVERY`; `folder` gets the files that it is loaded from, if it is loaded from files."""
    if kind in KINDS:
        return load_dual_encoder(f"transformers:{saved(kind, folder / 'library')[1]}", **overrides)
    nodes = {"open_clip": OPEN_CLIP, "open_clip, ResNet": RESNET["backbone"], "open_clip, CoCa": COCA}
    if kind not in nodes:
        if not timm.is_model(SIGLIP_TRUNK):
            _siglip_trunk.__name__ = SIGLIP_TRUNK
            _siglip_trunk.__module__ = "timm.models.vision_transformer"
            register_model(_siglip_trunk)
        clip_tokenizer_files(folder / "tokenizer")
        nodes[kind] = {**SIGLIP, "tokenizer": str(folder / "tokenizer")}
    torch.manual_seed(0)
    model: DualEncoder = stirred(load_dual_encoder({"backbone": nodes[kind]}, **overrides))
    return model


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def embeddings(model: DualEncoder) -> tuple[Tensor, Tensor]:
    return model.encode_image(pixels()), model.encode_text(model.tokenizer(TEXTS))


def worst(found: Any, expected: Any) -> float:
    """Largest difference of pairs of tensors that vary from row to row."""
    differences = []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float(theirs.detach().std(dim=0).max()) > 1e-3
        differences.append(float((ours - theirs).detach().abs().max()))
    return max(differences)


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
