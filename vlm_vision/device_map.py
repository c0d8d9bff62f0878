"""Where a tower's weights lie: on one device, or its layers on several, in the CPU's memory, or on the disk.

Layers are placed whole, one by one. A hook brings tokens to a layer on another device; accelerate brings the
weights of a layer that waits on the CPU or the disk to the tokens. All that is no layer is small and read in
many ways, so it stays together, on the tower's device: pixels go there, and features come from there.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from vlm_vision.backbone import Backbone
from vlm_vision.errors import ConfigError, first_line, nearest

if TYPE_CHECKING:
    from vlm_vision.tower import VisionTower

Device = str | int | torch.device
DeviceMap = Device | Mapping[str, Device]
MaxMemory = Mapping[int | str, int | str]
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
CPU, DISK = "cpu", "disk"


def place(
    tower: VisionTower,
    device_map: DeviceMap | None,
    *,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
) -> None:
    """Move a tower's weights to where a map says; once for all.

    A tower that is then not on one device has `hf_device_map`, as transformers' models have: its own device
    under "", and the layers that are elsewhere. It cannot be moved any more. Where layers wait on the CPU or
    the disk it gives features alone: it does not learn, and is neither cast nor saved.

    Args:
        device_map: None changes nothing. A device; or names of modules to devices, "" being all that is not
            named, where "cpu" beside a GPU, and "disk", are where layers wait until they are run on the
            tower's device; or a strategy of accelerate. `balanced`, which `auto` is too, fills GPUs evenly,
            `balanced_low_0` all but the first, `sequential` one after another; what they have no room for
            waits on the CPU, then on the disk.
        max_memory: of each device, for a strategy: `{0: "10GiB", "cpu": "30GiB"}`.
        offload_folder: where layers on the disk lie, in a folder that goes with the tower.

    Raises:
        ConfigError: a device that cannot be used, a name that is no module's, a module without a device, a
            layer in pieces, all else in pieces or on the disk, or no folder for the disk.
    """
    by_strategy = isinstance(device_map, str) and device_map in STRATEGIES
    if max_memory is not None and not by_strategy:
        raise ConfigError(f"max_memory is for device_map='auto' and its kind, not for {device_map!r}")
    if device_map is None:
        return
    if not (by_strategy or isinstance(device_map, Mapping) or device_map == DISK):
        tower.to(_usable(device_map))
        return
    layers = _layers(tower)
    if by_strategy:
        places = _inferred(tower, layers, str(device_map), max_memory)
    else:
        places = _named(tower, layers, device_map if isinstance(device_map, Mapping) else {"": DISK})
    main = places.pop("")
    if main == DISK and by_strategy:
        raise ConfigError(
            f"device_map {device_map!r}: nothing has room for what is no layer and one layer beside"
        )
    if main == DISK:
        raise ConfigError(f"device_map {device_map!r}: only layers can be on the disk; {_example(layers)}")
    elsewhere = {name: where for name, where in places.items() if where != main}
    if not elsewhere:
        tower.to(main)
        return
    if DISK in elsewhere.values() and offload_folder is None:
        raise ConfigError(f"device_map {device_map!r} puts layers on the disk: name an offload_folder")
    _spread(tower, layers, main, elsewhere, offload_folder)
    tower.hf_device_map = {"": main, **elsewhere}


def _layers(tower: VisionTower) -> dict[str, nn.Module]:
    """The layers by name, or the modules that make one; without those that share weights with others.

    None of a backbone that does not tell its layers apart, and so stays whole.
    """
    found: list[nn.Module] = []
    for backbone in tower.modules():
        if isinstance(backbone, Backbone):
            try:
                found += [part for layer in backbone.layer_modules() for part in _parts(layer)]
            except ConfigError:
                continue
    names = {module: name for name, module in tower.named_modules()}
    uses = Counter(parameter for _, parameter in tower.named_parameters(remove_duplicate=False))
    return {
        names[layer]: layer
        for layer in found
        if not isinstance(layer, Backbone)  # a part of a fused one, whose layers are found too
        and all(uses[parameter] == 1 for parameter in layer.parameters())
    }


def _parts(layer: nn.Module) -> list[nn.Module]:
    """The layer, or the modules in it where it is a mere list of them, which has no call to hook."""
    return [part for one in layer for part in _parts(one)] if isinstance(layer, nn.ModuleList) else [layer]


def _example(layers: Mapping[str, nn.Module]) -> str:
    if not layers:
        return "this backbone does not tell its layers apart, so give one device"
    return f"name them, such as {{'': 'cpu', {list(layers)[-1]!r}: 'disk'}}"


def _level(name: str, named: Container[str]) -> str | None:
    """The name itself, or the nearest level above it, that is among some names; "" is above all."""
    while name not in named:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _tensors(tower: VisionTower) -> list[str]:
    return [name for kind in (tower.named_parameters(), tower.named_buffers()) for name, _ in kind]


def _usable(device: Device) -> str:
    """A device's full name, such as `cuda:0` for "cuda".

    Raises:
        ConfigError: it is not there.
    """
    try:
        found = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device_map: {device!r} cannot be used ({first_line(error)}). Give a device, such as 'cpu' or "
            f"'cuda:0', a mapping of names of modules to devices, or one of {', '.join(STRATEGIES)}"
        ) from error
    if found.type == "meta":
        raise ConfigError("device_map: 'meta' would drop the weights; describe_tower reads none")
    return str(found)


def _named(tower: VisionTower, layers: Container[str], device_map: Mapping[str, Device]) -> dict[str, str]:
    """Places of the layers, and under "" of all else, by names."""
    usable = {name: DISK if device == DISK else _usable(device) for name, device in device_map.items()}
    tensors, modules = _tensors(tower), [name for name, _ in tower.named_modules()]
    for name in usable:
        if name not in modules and name not in tensors:
            raise ConfigError(f"device_map: this tower has no module {name!r}{nearest(name, modules)}")
    places: dict[str, set[str]] = {}
    for tensor in tensors:
        level = _level(tensor, usable)
        if level is None:
            raise ConfigError(f"device_map names no device for {tensor!r}: name it, or '' for all the rest")
        places.setdefault(_level(tensor, layers) or "", set()).add(usable[level])
    if "" not in places:  # the layers are all there is
        places[""] = {usable.get("", next(iter(usable.values())))}
    for name, found in places.items():
        if len(found) > 1:
            what = f"layer {name!r}" if name else "all that is no layer"
            raise ConfigError(f"device_map: {what} stays together, not on {' and '.join(sorted(found))}")
    return {name: found.pop() for name, found in places.items()}


def _inferred(
    tower: VisionTower, layers: Mapping[str, nn.Module], strategy: str, max_memory: MaxMemory | None
) -> dict[str, str]:
    """Places as `_named` gives them, as accelerate would fill the devices."""
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    # What it sees is first all that is no layer, in one piece, and then the layers.
    seen = nn.Module()
    seen.rest = nn.ParameterList(
        value for name, value in tower.named_parameters() if _level(name, layers) is None
    )
    seen.layers = nn.ModuleList(layers.values())
    whole = sorted({"ParameterList", *(type(layer).__name__ for layer in layers.values())})
    memory = None if max_memory is None else dict(max_memory)
    try:
        if strategy == "sequential":
            memory = get_max_memory(memory)
        else:
            memory = get_balanced_memory(seen, memory, whole, low_zero=strategy == "balanced_low_0")
        found = infer_auto_device_map(seen, memory, whole)
    except ValueError as error:
        raise ConfigError(f"device_map {strategy!r} with max_memory {max_memory}: {error}") from error

    def where(name: str) -> str:
        device = found[_level(name, found)]
        return DISK if device == DISK else _usable(device)

    return {"": where("rest"), **{name: where(f"layers.{n}") for n, name in enumerate(layers)}}


def _spread(
    tower: VisionTower,
    layers: Mapping[str, nn.Module],
    main: str,
    elsewhere: Mapping[str, str],
    offload_folder: str | Path | None,
) -> None:
    from accelerate import cpu_offload, disk_offload

    folder = Path()
    if DISK in elsewhere.values() and offload_folder is not None:
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="tower-", dir=offload_folder))
        weakref.finalize(tower.backbone, shutil.rmtree, folder, ignore_errors=True)
    runs_elsewhere = any(where not in (CPU, DISK) for where in elsewhere.values())
    for number, (name, layer) in enumerate(layers.items()):
        where = elsewhere.get(name, main)
        # Its weights come all together: attention reads some of them without calling their modules.
        waiting = {"execution_device": torch.device(main), "preload_module_classes": [type(layer).__name__]}
        if where == DISK:
            disk_offload(layer, folder / str(number), **waiting)
        elif where == CPU != main:
            cpu_offload(layer, **waiting)
        else:
            layer.to(where)
        if runs_elsewhere:
            _bring_inputs(layer, main if where in (CPU, DISK) else where)
    above = {""}
    for name in layers:
        while name := name.rpartition(".")[0]:
            above.add(name)
    for name, module in tower.named_modules():
        if name in above:
            module._apply(lambda tensor: tensor.to(main), recurse=False)
        elif name not in layers and name.rpartition(".")[0] in above:
            module.to(main)
            if runs_elsewhere:
                _bring_inputs(module, main)


def _bring_inputs(module: nn.Module, device: str) -> None:
    """Have a module take its inputs to a device, whichever they are on."""
    from accelerate.utils import send_to_device

    module.register_forward_pre_hook(
        lambda _, args, kwargs: (send_to_device(args, device), send_to_device(kwargs, device)),
        with_kwargs=True,
    )
