"""What a tower relies on; `check_tower` names every clause of the contract that the backbone breaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlm_vision import load_tower
from vlm_vision.errors import WeightsError
from vlm_vision.scaffold.config import ViTConfig
from vlm_vision.testing import check_tower


@pytest.mark.parametrize("model", ViTConfig.models())
def test_the_backbone_keeps_the_contract(model: str) -> None:
    check_tower(load_tower(f"scaffold:{model}@none"))


def test_the_whole_backbone_keeps_it_at_another_size() -> None:
    check_tower(load_tower("scaffold:small@none", image_size=(64, 96), layer=[1, -1], pooled_head=True))


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    tower = load_tower("scaffold:small@none", pooled_head=True)
    path = tmp_path / "weights.safetensors"
    save_file(tower.backbone.state_dict(), path)
    loaded, pixels = load_tower(f"scaffold:small@{path}"), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), tower(pixels))
    with pytest.raises(WeightsError, match="no weights named"):
        load_tower("scaffold:small")


def test_checkpointing_changes_no_gradient() -> None:
    tower = load_tower("scaffold:small@none", image_size=64)
    pixels, gradients = torch.randn(1, 3, 64, 64), []
    for enabled in (False, True):
        tower.checkpoint_activations(enabled)
        tower.zero_grad()
        tower(pixels).square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
