"""Every parameter of a trunk is of one layer or of its stem, so that the last layers can learn whole."""

from __future__ import annotations

import pytest

from vlm_vision import load_tower
from vlm_vision.adapters.lora import add_lora
from vlm_vision.adapters.lora_config import LoraConfig
from vlm_vision.tower import describe_tower

STAGED = (
    "hiera_tiny_224",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "twins_svt_small",
    "test_convnext",
    "test_vit",
)
STEMS = ("stem", "conv_stem", "bn1", "patch_embed", "pos_embed", "cls_token", "reg_token")


@pytest.mark.parametrize("name", STAGED)
def test_layers_and_stem_are_all_that_a_trunk_has(name: str) -> None:
    for layer in (-1, 2):
        tower = describe_tower(f"timm:{name}", layer=layer)
        layers = tower.backbone.layer_modules()
        assert len(layers) >= min(tower.layers[0], 5)
        of_layers = {parameter for module in layers for parameter in module.parameters()}
        rest = {
            path for path, parameter in tower.backbone.trunk.named_parameters() if parameter not in of_layers
        }
        assert all(path.split(".")[0] in STEMS for path in rest), rest
        counts = [sum(1 for _ in module.parameters()) for module in layers]
        assert sum(counts) == len(of_layers), "a parameter is of two layers"


def test_the_last_layers_learn_whole() -> None:
    tower = describe_tower("timm:hiera_tiny_224", layer=-1)
    blocks = dict(tower.backbone.trunk.blocks.named_children())
    assert [len(list(module.children())) for module in tower.backbone.layer_modules()[1:]] == [2, 7, 2]
    tower.train_only(2)
    learning = [name for name, block in blocks.items() if all(p.requires_grad for p in block.parameters())]
    assert learning == [str(number) for number in range(3, 12)]
    assert not any(p.requires_grad for name in "012" for p in blocks[name].parameters())


def test_layers_have_the_adapters_put_into_them() -> None:
    pytest.importorskip("peft", minversion="0.17")
    tower = load_tower("timm:test_efficientnet@none", layer=-1)
    names = [name for name, _ in tower.named_parameters() if ".blocks.4." in name and "conv_pw" in name]
    add_lora(tower, names, LoraConfig(rank=2))
    last = tower.backbone.layer_modules()[-1]
    assert any("lora_A" in name for name, _ in last.named_parameters())
