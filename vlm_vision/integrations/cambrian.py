"""Our towers in Cambrian-1, unmodified: importing this module is all it takes.

Its `--vision_tower_aux_list` then also takes `vlm_vision:SOURCE`, where SOURCE is what `load_tower` takes in
one line. Features are resized to the tower's entry of `--vision_tower_aux_token_len_list`.

The interface is that of `BaseVisionTower` in `cambrian/model/multimodal_encoder/base_encoder.py`, the
resizing that of `clip_encoder.py` beside it, both of cambrian-mllm/cambrian 539ffc3.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_vision.device_map import DeviceMap
from vlm_vision.errors import ConfigError, MissingExtraError
from vlm_vision.features import on_grid
from vlm_vision.integrations.clip_processor import ClipProcessor
from vlm_vision.tower import describe_tower, load_tower

try:
    from cambrian.model import cambrian_arch
    from cambrian.model.multimodal_encoder import builder
    from cambrian.model.multimodal_encoder.base_encoder import BaseVisionTower
except ImportError as error:
    raise MissingExtraError(
        "vlm_vision.integrations.cambrian needs Cambrian, and what it imports: `pip install -e .` in its "
        f"checkout ({error})"
    ) from error

PREFIX = "vlm_vision:"


class TowerEncoder(BaseVisionTower):  # type: ignore[misc]
    """A tower as one of Cambrian's vision encoders.

    Attributes:
        vision_tower: the `VisionTower`; there once loaded.
        image_processor: pictures to pixels; there once loaded.
    """

    is_loaded: bool

    def __init__(self, vision_tower_name: str, args: Any, delay_load: bool = False) -> None:
        """Read the facts, and unless `delay_load` the weights too.

        Args:
            vision_tower_name: `vlm_vision:SOURCE`, then `-interpN` for N tokens.
            args: `mm_vision_select_layer`, `mm_vision_select_feature` and `unfreeze_mm_vision_tower` count.

        Raises:
            ConfigError: an unknown source, a layer that is not there, or tokens to be resized that are in no
                square or are not patches.
        """
        super().__init__(vision_tower_name, args, delay_load)
        source, *length = re.split(r"-interp(\d+)$", vision_tower_name.removeprefix(PREFIX))
        self._source = source
        self._interp_size = int(length[0]) if length else None
        self._overrides = {"layer": self.select_layer, "select": self.select_feature}
        facts = describe_tower(source, **self._overrides)
        self._grid = facts.grid
        self._num_patches = facts.num_patches
        self._config = SimpleNamespace(
            hidden_size=facts.hidden_size, image_size=facts.image_size, patch_size=facts.patch_size
        )
        if length and (self.select_feature != "patch" or self.num_patches_per_side**2 != self._interp_size):
            raise ConfigError(
                f"{vision_tower_name}: {self.select_feature!r} cannot be resized to {length[0]} tokens; take "
                "'patch' and a square number"
            )
        if not delay_load or self.unfreeze_mm_vision_tower:
            self.load_model()

    @property
    def config(self) -> SimpleNamespace:
        """The facts that Cambrian reads: `hidden_size`, `image_size`, `patch_size`."""
        return self._config

    def load_model(self, device_map: DeviceMap | None = None) -> None:
        """Read the weights; nothing happens when they are there.

        Args:
            device_map: as of `load_tower`.

        Raises:
            ConfigError: a `device_map` that cannot be done.
            WeightsError: weights that are missing or do not fit.
        """
        if self.is_loaded:
            return
        self.vision_tower = load_tower(self._source, device_map=device_map, **self._overrides)
        self.vision_tower.requires_grad_(self.unfreeze_mm_vision_tower)
        self.image_processor = ClipProcessor(self.vision_tower.image_processor)
        self.is_loaded = True

    def _forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        with torch.set_grad_enabled(self.unfreeze_mm_vision_tower):
            features: Tensor = self.vision_tower(images).to(images.dtype)
            if self._interp_size in (None, self._num_patches):
                return features
            side = self.num_patches_per_side
            return on_grid(features, self._grid, (side, side))


def install() -> None:
    """Let Cambrian's builder take our names; done again, it changes nothing."""
    for module in (builder, cambrian_arch):
        build = module.build_vision_tower_aux_list
        if not hasattr(build, "takes_vlm_vision"):
            module.build_vision_tower_aux_list = _taking_ours(build)


def _taking_ours(build: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    @functools.wraps(build)
    def build_vision_tower_aux_list(vision_tower_cfg: Any, **kwargs: Any) -> list[Any]:
        names, lengths = (
            getattr(vision_tower_cfg, f"mm_{field}", None) or getattr(vision_tower_cfg, field)
            for field in ("vision_tower_aux_list", "vision_tower_aux_token_len_list")
        )
        towers = []
        for name, length in zip(names, lengths, strict=True):
            if name.startswith(PREFIX):
                towers.append(TowerEncoder(f"{name}-interp{length}", vision_tower_cfg, **kwargs))
                continue
            one = copy.deepcopy(vision_tower_cfg)
            one.mm_vision_tower_aux_list, one.mm_vision_tower_aux_token_len_list = [name], [length]
            towers += build(one, **kwargs)
        return towers

    build_vision_tower_aux_list.takes_vlm_vision = True  # type: ignore[attr-defined]
    return build_vision_tower_aux_list


install()
