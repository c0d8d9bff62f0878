"""LoRA: the fused attention split and joined exactly, adapters everywhere, live dropout, exact merging."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from duals import EVERY, TEXTS, dual, embeddings, pixels, worst
from tiny import RESNET, TOWER, tiny_dual_encoder
from torch import Tensor, nn

from vlm_vision import DualEncoder, load_dual_encoder
from vlm_vision.adapters.lora import SplitAttention, add_lora, check_lora_gradients, kind_of, merge_lora
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.errors import ConfigError, MissingExtraError
from vlm_vision.train.losses import info_nce_loss
from vlm_vision.train.optim import apply_rules
from vlm_vision.train.recipes import RECIPES, applicable_rules
from vlm_vision.train.rules import Rule, base_name, matching_rule

WIDTH, HEADS, TOKENS = 16, 4, 5


def fused_attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return attention.eval()


def batch(pairs: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(pairs, 3, 32, 32, generator=generator), torch.randint(
        1, 1000, (pairs, 16), generator=generator
    )


def with_lora(model: nn.Module, rules: Sequence[Rule] | None = None, **config: Any) -> list[str]:
    """Put adapters where a recipe's or the given rules say, as the contrastive loop does, but not at zero."""
    names = [name for name, _ in model.named_parameters()]
    rules = rules or applicable_rules(RECIPES["lora"].rules, names)
    targets = [name for name in names if (rule := matching_rule(name, rules)) and rule.learn == "lora"]
    layers = add_lora(model, targets, LoraConfig(rank=2, **config))
    apply_rules(model, rules)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    return layers


@pytest.mark.parametrize("bias", [True, False])
def test_split_and_fuse_keep_every_bit(bias: bool) -> None:
    attention = fused_attention(bias=bias)
    fused = SplitAttention(attention).fuse()
    assert fused.state_dict().keys() == attention.state_dict().keys()
    for name, tensor in attention.state_dict().items():
        assert torch.equal(fused.state_dict()[name], tensor)


MASKS = {
    "none": None,
    "causal": torch.full((TOKENS, TOKENS), -torch.inf).triu(1),
    "bool": torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1),
    "per head": torch.randn(3 * HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(5)),
}


@pytest.mark.parametrize("mask", MASKS)
def test_split_attention_computes_what_the_fused_one_does(mask: str) -> None:
    attention, tokens = fused_attention(), torch.randn(3, TOKENS, WIDTH)
    with torch.no_grad():
        expected, _ = attention(tokens, tokens, tokens, need_weights=False, attn_mask=MASKS[mask])
        found, _ = SplitAttention(attention)(
            tokens, tokens, tokens, need_weights=False, attn_mask=MASKS[mask]
        )
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_other_widths(bias: bool) -> None:
    """CoCa's pooling: queries of one width look at patches of another."""
    attention = fused_attention(kdim=8, vdim=12, bias=bias)
    query, key, value = torch.randn(3, 2, WIDTH), torch.randn(3, TOKENS, 8), torch.randn(3, TOKENS, 12)
    split = SplitAttention(attention)
    with torch.no_grad():
        expected, _ = attention(query, key, value, need_weights=False)
        found, _ = split(query, key, value, need_weights=False)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    fused = split.fuse()
    assert fused.state_dict().keys() == attention.state_dict().keys()
    for name, tensor in attention.state_dict().items():
        assert torch.equal(fused.state_dict()[name], tensor)


def test_attention_that_is_no_sum_over_its_tokens_is_refused() -> None:
    for options in ({"add_zero_attn": True}, {"add_bias_kv": True}, {"batch_first": False}):
        with pytest.raises(ConfigError, match="not batch first, or adds keys of its own"):
            SplitAttention(nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options}))


def test_adapters_reach_every_layer_of_both_towers() -> None:
    model = tiny_dual_encoder()
    layers = with_lora(model)
    kinds = ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")
    for side, blocks in (("tower", 3), ("text", 2)):
        for kind in kinds:
            found = [name for name in layers if name.startswith(side) and name.endswith(kind)]
            assert len(found) == blocks, (side, kind)
    assert len(layers) == 5 * len(kinds)


def test_every_adapter_gets_a_gradient_and_nothing_else_does() -> None:
    model = tiny_dual_encoder()
    layers = with_lora(model)
    info_nce_loss(*model(*batch())).backward()
    check_lora_gradients(model)
    learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    adapters = {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
    assert learnt == adapters | {"logit_scale"}
    for name, parameter in model.named_parameters():
        if name in adapters:
            assert parameter.grad.abs().max() > 0, name


def test_a_new_adapter_changes_nothing() -> None:
    model, pixels = tiny_dual_encoder().eval(), batch()[0]
    before = model.encode_image(pixels)
    names = [name for name, _ in model.named_parameters()]
    add_lora(model, names, LoraConfig())
    assert torch.allclose(model.encode_image(pixels), before, rtol=0, atol=1e-6)


def test_dropout_lives_in_training_only() -> None:
    model, (pixels, tokens) = tiny_dual_encoder(), batch()
    with_lora(model, dropout=0.5)
    model.train()
    for encode, inputs in ((model.encode_image, pixels), (model.encode_text, tokens)):
        assert not torch.equal(encode(inputs), encode(inputs))
    model.eval()
    for encode, inputs in ((model.encode_image, pixels), (model.encode_text, tokens)):
        assert torch.equal(encode(inputs), encode(inputs))


def test_training_leaves_the_base_weights_as_they_are() -> None:
    model = tiny_dual_encoder()
    with_lora(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = info_nce_loss(*model(*batch()))
    first.backward()
    optimizer.step()
    assert info_nce_loss(*model(*batch())) != first
    after = dict(model.named_parameters())
    assert frozen
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("source", [TOWER, RESNET], ids=["vit", "resnet"])
def test_merged_model_computes_the_same_in_its_original_layout(source: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, (pixels, tokens) = load_dual_encoder(source), batch()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    base = model.encode_image(pixels).detach()
    with_lora(model)
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(tokens)
        assert not torch.allclose(image, base, atol=1e-3)
        merge_lora(model).eval()
        worst = max(
            float((model.encode_image(pixels) - image).abs().max()),
            float((model.encode_text(tokens) - text).abs().max()),
        )
    assert worst < 1e-6  # worst measured: 2e-7
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_adapters_of_a_resnet_reach_its_convolutions_and_all_learn() -> None:
    model = load_dual_encoder(RESNET).train()
    layers = with_lora(model)
    tower = [name.removeprefix("tower.backbone.visual.") for name in layers if name.startswith("tower.")]
    convolutions = ["conv1", "conv2", "conv3", "downsample.0"]
    stages = [f"layer{stage}.0.{name}" for stage in (1, 2, 3, 4) for name in convolutions]
    assert sorted(tower) == sorted(["conv2", "conv3", *stages])
    info_nce_loss(*model(*batch())).backward()
    check_lora_gradients(model)


@pytest.mark.parametrize("trunk", ["test_convnext", "test_efficientnet"])
def test_adapters_leave_convolutions_in_groups_alone(trunk: str) -> None:
    """A depthwise kernel has no low rank to learn, and peft refuses most of them."""
    architecture = copy.deepcopy(TOWER["backbone"]["architecture"])
    architecture["vision_cfg"] = {
        "timm_model_name": trunk,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    }
    torch.manual_seed(0)
    model = load_dual_encoder({"backbone": {**TOWER["backbone"], "architecture": architecture}}).eval()
    images, tokens = batch()
    layers = with_lora(model)
    adapted = [layer for layer in layers if layer.startswith("tower.")]
    assert adapted
    assert all(getattr(model.get_submodule(layer), "groups", 1) == 1 for layer in adapted)
    loss = info_nce_loss(model.encode_image(images), model.encode_text(tokens), model.logit_scale)
    loss.backward()
    check_lora_gradients(model)
    with torch.no_grad():
        before = model.encode_image(images)
        assert float((merge_lora(model).encode_image(images) - before).abs().max()) <= 1e-5  # measured 5e-7


def test_adapters_under_bfloat16_autocast() -> None:
    model, (pixels, tokens) = tiny_dual_encoder(), batch()
    with_lora(model)
    with torch.no_grad():
        exact = model.encode_image(pixels), model.encode_text(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.encode_image(pixels), model.encode_text(tokens)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert float((ours.float() * theirs).sum(dim=-1).min()) > 0.995


def test_adapters_on_a_transformers_tower() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model, pixels = CLIPVisionModel(config).eval(), batch()[0]
    names = [name for name, _ in model.named_parameters()]
    layers = with_lora(model, [Rule(match="*encoder.layers*", learn="lora")])
    assert sorted({name.rpartition(".")[2] for name in layers}) == [
        "fc1",
        "fc2",
        "k_proj",
        "out_proj",
        "q_proj",
        "v_proj",
    ]
    assert len(layers) == 12
    output = model(pixels).last_hidden_state
    output.square().mean().backward()
    check_lora_gradients(model)
    merged = merge_lora(model)(pixels).last_hidden_state
    assert torch.allclose(merged, output, rtol=0, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize(
    ("match", "kinds"),
    [
        ("*.in_proj_weight", {"q_proj", "k_proj", "v_proj"}),
        ("*.attn.out_proj.weight", {"out_proj"}),
        ("*.c_fc.weight", {"c_fc"}),
        ("tower.*.resblocks.1.*", {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"}),
    ],
)
def test_a_rule_adapts_what_it_names_and_no_more(match: str, kinds: set[str]) -> None:
    model = tiny_dual_encoder()
    layers = with_lora(model, [Rule(match=match, learn="lora")])
    assert {name.rpartition(".")[2] for name in layers} == kinds
    learning = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == set(layers)
    info_nce_loss(*model(*batch())).backward()
    check_lora_gradients(model)


def test_a_rule_for_lora_beside_full_training() -> None:
    """A later rule for the same block wins over the adapters' rule, whatever the order of the names."""
    model = tiny_dual_encoder()
    with_lora(model, [Rule(match="tower.*", learn="lora"), Rule(match="text.*"), Rule(match="*ln_post*")])
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in learning if name.startswith("text.")} == {
        name for name, _ in model.named_parameters() if name.startswith("text.")
    }
    tower = {name for name in learning if name.startswith("tower.")}
    assert {name for name in tower if ".lora_" not in name} == {
        "tower.backbone.visual.ln_post.weight",
        "tower.backbone.visual.ln_post.bias",
    }


def test_rules_without_a_linear_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="name no linear layer or convolution"):
        with_lora(tiny_dual_encoder(), [Rule(match="*ln_*", learn="lora")])


def test_adapters_that_the_loss_does_not_use_are_named() -> None:
    model = tiny_dual_encoder()
    with_lora(model)
    model.encode_image(batch()[0]).sum().backward()
    with pytest.raises(ConfigError, match=r"24 adapter tensors get no gradient \(text\."):
        check_lora_gradients(model)


def test_a_model_without_adapters_is_left_alone() -> None:
    model = tiny_dual_encoder()
    modules = list(model.modules())
    assert list(merge_lora(model).modules()) == modules


# Every library ------------------------------------------------------------------------------------------

VARIANTS = ["lora", "rslora", "dora"]


def step(model: DualEncoder) -> None:
    """Gradients of a loss that every part of both towers has a share in."""
    image, text = model.encode_image(pixels()), model.encode_text(model.tokenizer(TEXTS[:3]))
    (8 * image.float() @ text.float().T).log_softmax(dim=1).diagonal().mean().neg().backward()


@pytest.mark.parametrize("kind", EVERY)
def test_attention_and_mlp_of_both_towers_in_every_library(kind: str, tmp_path: Path) -> None:
    model = dual(kind, tmp_path)
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    layers = with_lora(model)
    for side in ("tower.", "text."):
        kinds = {kind_of(layer) for layer in layers if layer.startswith(side)}
        if (side, kind) != ("tower.", "open_clip, ResNet"):
            assert {"q", "k", "v", "out", "mlp"} <= kinds, side
    step(model)
    check_lora_gradients(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name
    names = {base_name(name) for name, _ in model.named_parameters()}
    merge_lora(model)
    assert names == {name for name, _ in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_merging_is_exact_in_every_library(kind: str, variant: str, tmp_path: Path) -> None:
    model = dual(kind, tmp_path)
    base = embeddings(model)
    with_lora(model, variant=variant, alpha=4.0)
    if variant == "dora":
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.8, 1.2, parameter.numel()).view_as(parameter))
    adapted = embeddings(model)
    assert worst(adapted, base) > 1e-3
    merged = embeddings(merge_lora(model))  # type: ignore[arg-type]
    assert worst(merged, adapted) < 1e-6  # 4.2e-7


@pytest.mark.parametrize("kind", EVERY)
def test_dropout_is_live_in_training_in_every_library(kind: str, tmp_path: Path) -> None:
    for dropout, differs in ((0.5, True), (0.0, False)):
        model = dual(kind, tmp_path / str(dropout))
        with_lora(model, dropout=dropout)
        model.train()
        for module in model.modules():  # they average over batches, which is no dropout but differs too
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for first, second in zip(embeddings(model), embeddings(model), strict=True):
            assert torch.equal(first, second) != differs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["open_clip", "CLIP"])
def test_half_precision_does_not_drift(kind: str, variant: str, tmp_path: Path) -> None:
    """Base weights keep every bit while adapters learn in fp32, and are rounded once when merged."""
    model = dual(kind, tmp_path)
    model.to(torch.bfloat16)
    with_lora(model, variant=variant)
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert all(parameter.dtype == torch.float32 for parameter in adapters.values())
    base = {name: p.detach().clone() for name, p in model.named_parameters() if name not in adapters}
    start = {name: p.detach().clone() for name, p in adapters.items()}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-4, weight_decay=0.0)
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        step(model)
        optimizer.step()
    model.eval()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())
    assert all(not torch.equal(now[name], tensor) for name, tensor in start.items())
    first = {"open_clip": "tower.backbone.visual.transformer.resblocks.0.mlp.c_fc"}
    owner = first.get(kind, "tower.backbone.blocks.0.mlp.fc1")
    a, b = (now[f"{owner}.lora_{side}.default.weight"].double() for side in "AB")
    config = LoraConfig(rank=2, variant=variant)  # type: ignore[arg-type]
    expected = now[f"{owner}.base_layer.weight"].double() + config.scale * b @ a
    if variant == "dora":
        magnitude = now[f"{owner}.lora_magnitude_vector.default.weight"].double()
        expected = expected * (magnitude / expected.norm(dim=1))[:, None]
    merge_lora(model)
    found, rounded = model.get_submodule(owner).weight.double(), expected.to(torch.bfloat16).double()
    # Summed in fp32, a weight half way between two of bfloat16 may go to the other one.
    assert float((found != rounded).double().mean()) < 2e-3
    assert torch.allclose(found, rounded, rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", ["open_clip", "open_clip, SigLIP of timm", "SigLIP"])
@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (("q", "v"), {"q", "v"}),
        (("out",), {"out"}),
        (("mlp",), {"mlp"}),
        (("*.1.*",), {"q", "k", "v", "out", "mlp"}),
        (("text.*", "k"), {"q", "k", "v", "out", "mlp", None}),
    ],
)
def test_targets_choose_among_the_layers(
    kind: str, targets: tuple[str, ...], kinds: set[str | None], tmp_path: Path
) -> None:
    model = dual(kind, tmp_path)
    rules = [Rule(match="tower.*", learn="lora"), Rule(match="text.*", learn="lora")]
    layers = with_lora(model, rules, targets=targets)
    assert {kind_of(layer) for layer in layers} <= kinds
    assert {kind_of(layer) for layer in layers} >= kinds - {None}
    if targets == ("*.1.*",):
        assert all(".1." in layer for layer in layers)
    if targets == ("text.*", "k"):
        assert {kind_of(layer) for layer in layers if layer.startswith("tower.")} == {"k"}
    learning = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == set(layers)
    step(model)
    check_lora_gradients(model)


def test_targets_that_are_not_there_are_refused() -> None:
    for target, message in (
        ("qq", r"target 'qq' is none of the 31 layers .* \(kinds: q, k, v, out, mlp; or a pattern"),
        ("*.blocks.*", r"target '\*.blocks.\*' is none of"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_lora(
                tiny_dual_encoder(),
                [Rule(match="tower.*", learn="lora"), Rule(match="text.*", learn="lora")],
                targets=("q", target),
            )
    with pytest.raises(ConfigError, match="target 'q' is none of the 1 layers"):
        with_lora(tiny_dual_encoder(), [Rule(match="*conv1*", learn="lora")], targets=("q",))


def test_an_old_peft_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.0" if name == "peft" else version(name))
    message = r"this needs peft>=0.17, and 0.4.0 is installed: pip install 'vlm_vision\[train\]'"
    with pytest.raises(MissingExtraError, match=message):
        with_lora(tiny_dual_encoder())
