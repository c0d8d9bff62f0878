from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlm_vision.adapters.config import PROJECTORS
from vlm_vision.config import Config
from vlm_vision.errors import ConfigError
from vlm_vision.registry import Registry
from vlm_vision.tower_config import BACKBONES

PLUGIN = '''
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vlm_vision.backbone import Backbone, BackboneInfo
from vlm_vision.tower_config import BackboneConfig, PreprocessConfig


class StripesConfig(BackboneConfig):
    """One convolution per layer."""

    name: Literal["stripes"] = "stripes"
    width: int = 8

    @classmethod
    def models(cls) -> list[str]:
        return ["two-layers"]

    def build(self, *, load_weights: bool = True) -> Backbone:
        return Stripes(self)


class Stripes(Backbone):
    def __init__(self, config: StripesConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.width, kernel_size=8, stride=8)
        self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(2))
        self.info = BackboneInfo(
            widths=(config.width,) * 2,
            grids=((4, 4),) * 2,
            prefix_tokens=0,
            default_layer=-1,
            embed_dim=None,
            preprocess=PreprocessConfig(image_size=32),
        )

    def forward_layers(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        tokens, outputs = self.stem(pixels).flatten(2).transpose(1, 2), []
        for number, layer in enumerate(self.layers[: layers[-1]], start=1):
            tokens = torch.tanh(layer(tokens))
            if number in layers:
                outputs.append(tokens)
        return outputs

    def pooled(self, pixels: Tensor) -> Tensor:
        raise AssertionError("embed_dim is None, so nobody asks")

    def truncate(self, layer: int) -> None:
        self.layers = self.layers[:layer]

    def portable_config(self) -> StripesConfig:
        return self.config
'''


def install(folder: Path, package: str, *entries: str, group: str = "vlm_vision.backbones") -> None:
    """What `pip install` leaves of a package: its module, and what it offers."""
    (folder / f"{package}.py").write_text(PLUGIN, encoding="utf-8")
    information = folder / f"{package}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8"
    )
    lines = [f"[{group}]", *entries]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(folder: Path, code: str) -> str:
    """Run code in a fresh interpreter that has what lies in `folder` installed."""
    script = f"import sys\nsys.path.insert(0, {str(folder)!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_backbone_of_another_package_is_found_built_checked_and_saved(tmp_path: Path) -> None:
    install(tmp_path, "vlm_stripes", "stripes = vlm_stripes:StripesConfig")
    printed = run(
        tmp_path,
        f"""
from vlm_vision import VisionTower, list_backbones, load_tower
from vlm_vision.testing import check_tower

assert "stripes:two-layers" in list_backbones()
check_tower(load_tower("stripes:two-layers"))
tower = load_tower({{"backbone": {{"name": "stripes", "width": 12}}}}, layer=[1, 2])
check_tower(tower)
tower.save_pretrained({str(tmp_path / "tower")!r})
print(VisionTower.from_pretrained({str(tmp_path / "tower")!r}).hidden_size)
""",
    )
    assert printed == "24"


def test_wrong_keys_of_a_plug_in_are_told_like_ours(tmp_path: Path) -> None:
    install(tmp_path, "vlm_stripes", "stripes = vlm_stripes:StripesConfig")
    printed = run(
        tmp_path,
        """
from vlm_vision import load_tower
from vlm_vision.errors import ConfigError
try:
    load_tower({"backbone": {"name": "stripes", "widht": 12}})
except ConfigError as error:
    print(error)
try:
    load_tower("stripe:two-layers")
except ConfigError as error:
    print(error)
""",
    )
    assert "backbone.widht: unknown key; did you mean 'width'?" in printed
    assert "unknown backbone 'stripe'; did you mean 'stripes'?" in printed


REFUSED = """
from vlm_vision import load_tower
from vlm_vision.errors import ConfigError
try:
    load_tower("stripes:two-layers")
except ConfigError as error:
    print(error)
"""


def test_two_owners_of_one_name_are_both_named(tmp_path: Path) -> None:
    install(tmp_path, "vlm_stripes", "stripes = vlm_stripes:StripesConfig")
    install(tmp_path, "other_stripes", "stripes = other_stripes:StripesConfig")
    printed = run(tmp_path, REFUSED)
    assert "backbone 'stripes' is offered by both 'other_stripes' and 'vlm_stripes': uninstall one" in printed


def test_a_plug_in_cannot_take_a_name_of_ours(tmp_path: Path) -> None:
    install(tmp_path, "vlm_stripes", "timm = vlm_stripes:StripesConfig")
    assert "backbone 'timm' is offered by both 'vlm_vision' and 'vlm_stripes'" in run(tmp_path, REFUSED)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("vlm_stripes:Absent", "its plug-in 'vlm_stripes:Absent' cannot be imported"),
        ("vlm_absent:StripesConfig", "its plug-in 'vlm_absent:StripesConfig' cannot be imported"),
        ("vlm_stripes:Stripes", "must name a subclass of vlm_vision.config.Config"),
    ],
)
def test_a_broken_plug_in_says_what_is_broken(target: str, message: str, tmp_path: Path) -> None:
    install(tmp_path, "vlm_stripes", f"stripes = {target}")
    assert message in run(tmp_path, REFUSED)


def test_a_projector_of_another_package_is_found(tmp_path: Path) -> None:
    install(tmp_path, "vlm_stripes", "stripes = vlm_stripes:StripesConfig", group="vlm_vision.projectors")
    printed = run(tmp_path, "from vlm_vision.adapters import list_projectors\nprint(list_projectors())")
    assert "'stripes'" in printed


@pytest.mark.parametrize("registry", [BACKBONES, PROJECTORS], ids=lambda registry: registry.kind)
def test_every_built_in_name_leads_to_its_config_class(registry: Registry) -> None:
    for name in registry.names():
        config_class = registry.config_class(name)
        assert issubclass(config_class, Config)
        assert config_class.model_fields["name"].default == name


def test_an_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown backbone 'opencip'; did you mean 'open_clip'\? \(known: open_clip"
    ):
        BACKBONES.config_class("opencip")
