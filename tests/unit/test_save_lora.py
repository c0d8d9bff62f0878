"""Adapters in peft's format: read onto the same base by us, and by peft onto transformers' model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from duals import EVERY, TEXTS, dual, embeddings, pixels, worst
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_dual_encoder
from torch import nn
from torch.nn.functional import normalize

from vlm_vision import DualEncoder
from vlm_vision.adapters import load_adapter, save_lora
from vlm_vision.adapters.lora import add_lora, merge_lora
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.errors import ConfigError
from vlm_vision.export import export_transformers
from vlm_vision.train.optim import apply_rules
from vlm_vision.train.recipes import RECIPES, applicable_rules
from vlm_vision.train.rules import Rule, matching_rule

ATTENTION_OF_THE_HEAD = Rule(match="*.head.attention.*", learn="frozen")
POOLING = Rule(match="*.attn_pool.*", learn="frozen")


def trained(model: DualEncoder, *more: Rule, **config: Any) -> DualEncoder:
    """With the adapters of the recipe `lora`, all that learns at numbers of its own."""
    names = [name for name, _ in model.named_parameters()]
    rules = applicable_rules((*RECIPES["lora"].rules, *more), names)
    targets = [name for name in names if (rule := matching_rule(name, rules)) and rule.learn == "lora"]
    add_lora(model, targets, LoraConfig(**{"rank": 2, "alpha": 5.0, **config}))
    apply_rules(model, rules)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if ".lora_" in name else 0.05)
    return model


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_saved_adapters_go_onto_the_same_base(kind: str, variant: str, tmp_path: Path) -> None:
    model = trained(dual(kind, tmp_path), Rule(match="*.ln_*"), variant=variant)
    adapted = embeddings(model)
    saved = save_lora(model, tmp_path / "lora", base="somewhere/base")
    again = dual(kind, tmp_path)
    base = embeddings(again)
    done = load_adapter(again, tmp_path / "lora")
    assert worst(adapted, base) > 1e-3
    assert worst(embeddings(again), adapted) < 1e-6  # 5.8e-7
    assert torch.equal(again.logit_scale, model.logit_scale)
    assert "logit_scale" in done.replaced
    assert not done.left_out
    tower = dual(kind, tmp_path).tower
    load_adapter(tower, tmp_path / "lora")
    merged = merge_lora(model).state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(merged[name], tensor), name
    for name, tensor in tower.state_dict().items():
        assert torch.equal(merged[f"tower.{name}"], tensor), name
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 5.0, "LORA")
    assert (config["use_rslora"], config["use_dora"]) == (variant == "rslora", variant == "dora")
    assert config["target_modules"] == list(saved.adapted)


LIBRARY = [
    ("open_clip", "CLIPModel", ()),
    ("CLIP", "CLIPModel", ()),
    ("CLIP, highest id, GELU", "CLIPModel", ()),
    ("SigLIP", "SiglipModel", (ATTENTION_OF_THE_HEAD,)),
    ("open_clip, SigLIP of timm", "SiglipModel", (POOLING,)),
]


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize(("kind", "name", "rules"), LIBRARY)
@torch.no_grad()
def test_peft_reads_them_onto_transformers_model(
    kind: str,
    name: str,
    rules: tuple[Rule, ...],
    variant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an open_clip model it is the exported base."""
    from duals import SIGLIP_SIZE

    from vlm_vision import architectures

    monkeypatch.setitem(architectures._SIGLIP_SIZES, "base", SIGLIP_SIZE)
    norms = (Rule(match="*.ln_*"), Rule(match="*layer_norm*"), Rule(match="*.out_proj.bias"))
    base = dual(kind, tmp_path)
    export_transformers(base, tmp_path / "base")
    model = trained(base, *norms, *rules, variant=variant)
    saved = save_lora(model, tmp_path / "lora", base=str(tmp_path / "base"))
    assert (saved.layout, saved.only_here) == ("transformers", ())
    library = getattr(transformers, name).from_pretrained(tmp_path / "base")
    tokens = model.tokenizer(TEXTS)
    peft_model = PeftModel.from_pretrained(library, str(tmp_path / "lora")).eval()
    output = peft_model(input_ids=tokens, pixel_values=pixels())
    found = normalize(output.image_embeds, dim=-1), normalize(output.text_embeds, dim=-1)
    assert worst(found, embeddings(model)) < 1e-5  # 8.9e-8
    logits = model.logit_scale.exp() * embeddings(model)[0] @ embeddings(model)[1].T
    if model.logit_bias is not None:
        logits = logits + model.logit_bias
    assert float((output.logits_per_image - logits).abs().max()) < 1e-5  # 9.5e-7, largest 11
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any(key.endswith("q_proj.lora_A.weight") for key in keys)
    state = peft_model.state_dict()
    learnt = [key for key in keys if ".lora_" not in key]
    assert learnt
    for key in learnt:  # nothing in the file is passed over
        assert torch.equal(state[key], keys[key].to(state[key].dtype)), key


def test_what_peft_cannot_find_is_told(tmp_path: Path) -> None:
    saved = save_lora(trained(dual("SigLIP", tmp_path)), tmp_path / "lora")
    attention = "vision_model.head.attention"
    parts = ("in_proj.k_proj", "in_proj.q_proj", "in_proj.v_proj", "out_proj")
    assert saved.only_here == tuple(f"{attention}.{part}" for part in parts)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "library")
    timm = save_lora(trained(dual("open_clip, SigLIP of timm", tmp_path)), tmp_path / "timm")
    assert timm.layout == "open_clip"
    assert "visual.trunk.attn_pool.kv.k_proj" in timm.only_here == timm.adapted
    config = json.loads((tmp_path / "timm" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "open_clip:architecture@none"


def test_a_tower_alone(tmp_path: Path) -> None:
    model = tiny_dual_encoder().tower
    names = [name for name, _ in model.named_parameters() if "resblocks" in name]
    add_lora(model, names, LoraConfig(rank=2))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    with torch.no_grad():
        features = model(pixels())
        save_lora(model, tmp_path / "lora")
        whole = tiny_dual_encoder()
        load_adapter(whole, tmp_path / "lora")
        assert worst([whole.tower(pixels())], [features]) < 1e-5  # 1e-6


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no adapters: put them on with add_lora, and save before"):
        save_lora(tiny_dual_encoder(), tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"has no adapters"):
        save_lora(merge_lora(trained(tiny_dual_encoder())), tmp_path / "lora")  # type: ignore[arg-type]
    assert not (tmp_path / "lora").exists()
