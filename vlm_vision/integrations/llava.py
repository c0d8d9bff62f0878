"""Our towers in LLaVA and LLaVA-NeXT, both unmodified: importing this module is all it takes.

Their `mm_vision_tower` (`--vision_tower` on their command line) then also takes `vlm_vision:SOURCE`, where
SOURCE is whatever `vlm_vision.load_tower` takes: `vlm_vision:open_clip:ViT-L-14-336-quickgelu@openai`,
`vlm_vision:runs/adapted/model`, `vlm_vision:tower.yaml`. Every other name goes to their own towers. Either
add the import to a launch script, or start theirs through this module:

    python   -m vlm_vision.integrations.llava -m llava.train.train --vision_tower vlm_vision:my-tower ...
    torchrun --nproc-per-node 8 -m vlm_vision.integrations.llava llava/train/train_mem.py ...
    deepspeed --module vlm_vision.integrations.llava llava/train/train_mem.py --deepspeed zero3.json ...

The interface is that of their `CLIPVisionTower`, in `llava/model/multimodal_encoder/clip_encoder.py` of
haotian-liu/LLaVA c121f0432 and LLaVA-VL/LLaVA-NeXT df179663.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from vlm_vision.compat import before_load_state_dict
from vlm_vision.device_map import DeviceMap, place
from vlm_vision.errors import ConfigError
from vlm_vision.export import LIBRARY_NAMES
from vlm_vision.features import SLICE_M25811_F6, slice_four
from vlm_vision.integrations.clip_processor import ClipProcessor
from vlm_vision.tower import VisionTower, describe_tower, load_tower
from vlm_vision.weights import load_strict, read_state_dict

PREFIX = "vlm_vision:"
# The registry, and the module that imports it by name.
SITES = ("llava.model.multimodal_encoder.builder", "llava.model.llava_arch")
# LLaVA-NeXT's selections of several layers, joined along the channels.
FOUR_EVENLY, FIVE_NAMED = "slicefour_", "slice_m25811_f6_"
# How LLaVA's checkpoints name the tower's tensors.
_IN_CHECKPOINT = "vision_tower.vision_tower."
_INITIALISERS = {
    name: getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"
}
_REGISTER_PARAMETER = nn.Module.register_parameter
_State = dict[str, Tensor]


@dataclass(frozen=True)
class LlavaVisionConfig:
    """Facts of a tower that are known before its weights are read.

    Attributes:
        image_size: side of the square in pixels.
        patch_size: pixels between patches.
        hidden_size: channels of one layer; the tower's own `hidden_size` is that of all selected ones.
        num_hidden_layers: layers of the whole backbone.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    model_type: str = "vlm_vision_tower"


class LlavaVisionTower(nn.Module):
    """A tower of ours with the members of LLaVA's `CLIPVisionTower`.

    Layers after the selected one are not run. Gradients follow `requires_grad`; once loaded it is frozen.
    Weights are taken from the LLaVA checkpoint that is being loaded, where that has them, else from the
    source: a tower that was trained inside LLaVA comes back as it was trained.

    Attributes:
        is_loaded: whether the weights are there.
        vision_tower_name: the name with its prefix.
        select_layer, select_feature: as asked for.
        image_processor: pictures to pixels; there once loaded.
        vision_tower: our `VisionTower`; there once loaded.
        cfg_only: the facts, the same as `config`.
    """

    vision_tower: VisionTower
    image_processor: ClipProcessor

    def __init__(
        self,
        vision_tower: str,
        args: Any = None,
        vision_tower_cfg: Any = None,
        delay_load: bool = False,
    ) -> None:
        """Read the facts, and the weights too unless `delay_load`.

        A checkpoint whose config says that its tower was trained loads it at once, as in LLaVA.

        Args:
            vision_tower: `vlm_vision:SOURCE`; the prefix may be left out.
            args, vision_tower_cfg: two names of the same; `mm_vision_select_layer` and
                `mm_vision_select_feature` are read. None leaves the layer to the tower.

        Raises:
            ConfigError: an unknown source or selection, a layer that is not there, pictures that are not
                square, or S2.
            WeightsError: as `load_model`.
        """
        super().__init__()
        args = vision_tower_cfg if args is None else args
        if getattr(args, "s2", False):
            raise ConfigError(f"{vision_tower}: LLaVA's `s2` runs its own CLIP tower; set s2 to False")
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = getattr(args, "mm_vision_select_layer", None)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self._source = vision_tower.removeprefix(PREFIX)
        self._checkpoint = getattr(args, "_name_or_path", None)
        self._waiting: _State = {}
        with _as_outside_a_model():
            self._overrides = _selection(self._source, self.select_layer, self.select_feature)
            facts = describe_tower(self._source, **self._overrides)
        if not isinstance(facts.image_size, int):
            raise ConfigError(f"{vision_tower}: takes {facts.image_size}; LLaVA's pictures are squares")
        info = facts.backbone.info
        self.cfg_only = LlavaVisionConfig(
            image_size=facts.image_size,
            patch_size=facts.patch_size,
            hidden_size=info.widths[facts.layers[0] - 1],
            num_hidden_layers=info.num_layers,
        )
        self._hidden_size, self._side, self._tokens = facts.hidden_size, facts.grid[0], facts.num_tokens
        before_load_state_dict(self, self._read_given)
        trained = getattr(args, "unfreeze_mm_vision_tower", False) or "mm_vision_tower" in (
            getattr(args, "mm_tunable_parts", None) or ""
        )
        if trained or not delay_load:
            self.load_model()

    def load_model(self, device_map: DeviceMap | None = None) -> None:
        """Read the weights, frozen, in evaluation mode; nothing happens when they are there.

        Args:
            device_map: None for the CPU, or as of `load_tower`; modules are named as in `self.vision_tower`.

        Raises:
            WeightsError: weights that are missing or do not fit, those of the LLaVA checkpoint included.
            ConfigError: a `device_map` that cannot be done.
        """
        if self.is_loaded:
            return
        asked_dtype = torch.get_default_dtype()
        with _as_outside_a_model():
            tower = load_tower(self._source, **self._overrides)
            trained = _tower_of_checkpoint(self._checkpoint)
            if trained:
                load_strict(tower, _our_names(trained, tower), f"the tower in {self._checkpoint}")
            if self._waiting:
                load_strict(
                    tower, {**tower.state_dict(), **_our_names(self._waiting, tower)}, "the tower given"
                )
            self._waiting = {}
        for module in tower.modules():
            # Else transformers draws anew what its checkpoint does not hold.
            setattr(module, "_is_hf_initialized", True)  # noqa: B010 - nn.Module's types have tensors alone
        # Inside transformers' `from_pretrained` the default dtype is the one that the whole model will have.
        tower.to(tower.dtype if asked_dtype == torch.float32 else asked_dtype)
        place(tower, "cpu" if device_map is None else device_map)
        self.vision_tower = tower.requires_grad_(False)
        self.image_processor = ClipProcessor(tower.image_processor)
        self.is_loaded = True

    def _read_given(self, state: _State, prefix: str) -> None:
        """Before a state dict is loaded: our names; weights for a tower that is not there yet wait."""
        inner = f"{prefix}vision_tower."
        given = {name[len(inner) :]: state.pop(name) for name in list(state) if name.startswith(inner)}
        if self.is_loaded:
            state.update(
                {inner + name: value for name, value in _our_names(given, self.vision_tower).items()}
            )
        else:
            self._waiting.update(given)

    def train(self, mode: bool = True) -> LlavaVisionTower:
        """A frozen tower stays in evaluation mode: dropout and batch norms of some trunks would change it."""
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))

    def forward(
        self, images: Float[Tensor, "b 3 h w"] | Sequence[Float[Tensor, "3 h w"]]
    ) -> Float[Tensor, "b n d"] | list[Float[Tensor, "1 n d"]]:
        """Features in the dtype of the pictures; a list runs as one batch and gives a list.

        Raises:
            ConfigError: not loaded yet, or pixels of another size than the tower's.
        """
        tower = self._loaded()
        if isinstance(images, Tensor):
            features: Tensor = tower(images).to(images.dtype)
            return features
        rows = tower(images).split(1)
        return [row.to(image.dtype) for row, image in zip(rows, images, strict=True)]

    def _loaded(self) -> VisionTower:
        if not self.is_loaded:
            raise ConfigError(f"{self.vision_tower_name} is not loaded yet: call its load_model() first")
        return self.vision_tower

    @property
    def dummy_feature(self) -> Float[Tensor, "1 d"]:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self._loaded().dtype

    @property
    def device(self) -> torch.device:
        return self._loaded().device

    @property
    def config(self) -> LlavaVisionConfig:
        return self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self._hidden_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        return self._side

    @property
    def num_patches(self) -> int:
        """Tokens that a picture gives: with `cls_patch` one more than patches, as in LLaVA-NeXT."""
        return self._tokens


def _selection(source: str, select_layer: Any, select_feature: str) -> dict[str, Any]:
    """LLaVA's two settings as fields of a `TowerConfig`.

    Raises:
        ConfigError: an unknown `select_feature`.
    """
    layer, kind = select_layer, select_feature
    if select_feature.startswith(FOUR_EVENLY):
        num_layers = describe_tower(source).backbone.info.num_layers
        layer, kind = slice_four(num_layers, select_layer), kind.removeprefix(FOUR_EVENLY)
    elif select_feature.startswith(FIVE_NAMED):
        layer, kind = SLICE_M25811_F6, kind.removeprefix(FIVE_NAMED)
    if kind not in ("patch", "cls_patch"):
        raise ConfigError(
            f"mm_vision_select_feature {select_feature!r}: give patch or cls_patch, either alone or after "
            f"{FOUR_EVENLY} or {FIVE_NAMED}"
        )
    overrides = {"select": kind, "pooled_head": False}
    return overrides if layer is None else {"layer": layer, **overrides}


@contextmanager
def _as_outside_a_model() -> Iterator[None]:
    """Build a tower as if no other model were being built around it.

    Inside transformers' `from_pretrained` parameters may go to the meta device, random initialisation may be
    switched off, new tensors may be of half precision, and DeepSpeed may split every module as it is made.
    """
    dtype, register = torch.get_default_dtype(), nn.Module.register_parameter
    initialisers = {name: getattr(nn.init, name) for name in _INITIALISERS}
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if zero is not None:
        zero.shutdown_init_context()
    torch.set_default_dtype(torch.float32)
    _set_modules_of_torch(_REGISTER_PARAMETER, _INITIALISERS)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        _set_modules_of_torch(register, initialisers)
        if zero is not None:
            zero.restore_init_context()


def _set_modules_of_torch(register_parameter: Any, initialisers: Mapping[str, Any]) -> None:
    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    for name, initialiser in initialisers.items():
        setattr(nn.init, name, initialiser)


def _our_names(state: Mapping[str, Tensor], tower: VisionTower) -> _State:
    """The tower's tensors under our names.

    LLaVA's released checkpoints name those of CLIP as transformers does, and hold all layers: those that the
    tower freed are left out.
    """
    if not any(name.startswith("vision_model.") for name in state):
        return dict(state)
    ours = {}
    for name, value in state.items():
        for own, theirs in LIBRARY_NAMES["transformers"].items():
            if name.startswith(theirs):
                name = own + name.removeprefix(theirs)
                break
        ours[name] = value
    last = max(tower.layers)
    return {
        name: value
        for name, value in ours.items()
        if not name.startswith("backbone.norm.")
        and not name.endswith("position_ids")
        and not ((block := re.match(r"backbone\.blocks\.(\d+)\.", name)) and int(block[1]) >= last)
    }


def _tower_of_checkpoint(name: str | None) -> _State:
    """The tower's tensors in a LLaVA model's folder, or its copy in the hub's cache; often there are none."""
    state: _State = {}
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = _file_of(name, f"{kind}.index.json")
        if index is not None:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({file for tensor, file in places.items() if _IN_CHECKPOINT in tensor})
        else:
            files = [kind]
        for path in (_file_of(name, file) for file in files):
            if path is not None:
                state |= _tower_of_file(path)
        if state:
            break
    return state


def _tower_of_file(path: Path) -> _State:
    if path.suffix != ".safetensors":
        found = read_state_dict(path)
    else:
        with safe_open(path, "pt") as file:  # of a shard of many gigabytes, the tower alone is read
            found = {name: file.get_tensor(name) for name in file.keys() if _IN_CHECKPOINT in name}  # noqa: SIM118
    return {
        name.partition(_IN_CHECKPOINT)[2]: value for name, value in found.items() if _IN_CHECKPOINT in name
    }


def _file_of(name: str | None, file: str) -> Path | None:
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):  # the cache takes nothing but ids
        return None
    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def install() -> tuple[str, ...]:
    """Let both registries' `build_vision_tower` take our names; done again, it changes nothing.

    Returns:
        The modules whose `build_vision_tower` was replaced now.

    Raises:
        ImportError: neither LLaVA nor LLaVA-NeXT can be imported.
    """
    if importlib.util.find_spec("llava") is None:
        raise ImportError(
            "vlm_vision.integrations.llava needs LLaVA or LLaVA-NeXT: put a checkout on PYTHONPATH, or run "
            "`pip install --no-deps -e .` in it"
        )
    modules = [importlib.import_module(site) for site in SITES]
    changed = [module for module in modules if not hasattr(module.build_vision_tower, "takes_vlm_vision")]
    for module in changed:
        module.build_vision_tower = _taking_ours(module.build_vision_tower)  # type: ignore[attr-defined]
    names = tuple(module.__name__ for module in changed)
    if names and os.environ.get("RANK", "0") == "0":
        place = Path(str(modules[0].__file__)).parents[2]
        print(f"vlm_vision: {' and '.join(names)} of {place} now take {PREFIX}SOURCE", file=sys.stderr)
    return names


def _taking_ours(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> Any:
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if isinstance(name, str) and name.startswith(PREFIX):
            return LlavaVisionTower(name, args=vision_tower_cfg, **kwargs)
        return build(vision_tower_cfg, **kwargs)

    build_vision_tower.takes_vlm_vision = True  # type: ignore[attr-defined]
    return build_vision_tower


def launch(arguments: Sequence[str]) -> None:
    """Run a script, or a module after `-m`, as Python itself would, with our names known to LLaVA.

    Raises:
        ConfigError: no script or module is named.
    """
    waiting = list(arguments)
    options = []
    while waiting and waiting[0].startswith("--local_rank"):  # the deepspeed launcher puts it first
        options.append(waiting.pop(0))
    is_module = waiting[:1] == ["-m"]
    waiting = waiting[is_module:]
    if not waiting:
        raise ConfigError("give a script, or -m and a module, and its arguments")
    target, *rest = waiting
    sys.argv = [target, *options, *rest]
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    from vlm_vision.integrations import llava  # by its own name: what is pickled must be found again

    llava.launch(sys.argv[1:])
else:
    install()
