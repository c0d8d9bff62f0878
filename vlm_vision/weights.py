"""Reading weights safely and loading them without leaving anything out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from vlm_vision.compat import under_names
from vlm_vision.errors import WeightsError, first_line
from vlm_vision.files import is_inside
from vlm_vision.torchscript import is_torchscript, read_torchscript

SHARDS_SUFFIX = ".index.json"
RANDOM_FILLS = ("normal_", "uniform_")


def read_state_dict(path: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a torch file read with `weights_only=True`, TorchScript's too.

    A training checkpoint of open_clip (`state_dict` inside, `module.` prefixes) gives its model's tensors, an
    index of shards (`model.safetensors.index.json`) those of all its files.

    Args:
        wanted: of an index, only shards that hold a tensor of such a name are read.

    Raises:
        WeightsError: a file is missing, unreadable, or holds anything but tensors; shards that do not hold
            what their index says.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights file {str(path)!r} does not exist")
    if path.name.endswith(SHARDS_SUFFIX):
        return _read_shards(path, wanted)
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise WeightsError(f"{path}: not a complete safetensors file: {error}") from error
    try:
        loaded: Any
        if is_torchscript(path):
            loaded = read_torchscript(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path}: refused, because it is damaged or holds more than tensors (a pickle can run code). "
            f"Save it again as safetensors. torch says: {first_line(error)}"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path}: must hold a mapping of names to tensors")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def _read_shards(index: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{index}: has no `weight_map` of tensors to files: {error!r}") from error
    state: dict[str, Tensor] = {}
    read = {str(shard) for name, shard in shard_of.items() if wanted(name)}
    shard_of = {name: shard for name, shard in shard_of.items() if shard in read}
    for name in sorted(read):
        shard = index.parent / name
        if not is_inside(str(shard.absolute().parent), os.path.realpath(index.parent)):
            raise WeightsError(f"{index}: {name!r} lies outside of its folder")
        state |= read_state_dict(shard)
    strange = sorted(state.keys() ^ shard_of.keys())
    if strange:
        raise WeightsError(
            f"{index}: {len(strange)} tensor(s) are in the index or in its files only: "
            f"{', '.join(strange[:5])}; the folder is not complete, or mixes two models"
        )
    return state


def find_weights_file(folder: str | Path) -> Path:
    """The one weights file of a folder, or the index of its shards; safetensors preferred.

    Raises:
        WeightsError: none is there, or the choice is not clear.
    """
    folder = Path(folder)
    for pattern in (
        "model.safetensors",
        "open_clip_model.safetensors",
        f"*.safetensors{SHARDS_SUFFIX}",
        "*.safetensors",
        f"*.bin{SHARDS_SUFFIX}",
        "*.bin",
        "*.pt",
        "*.pth",
    ):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise WeightsError(
                f"{folder}: several weights files ({', '.join(p.name for p in found)}); name one of them"
            )
        if found:
            return found[0]
    raise WeightsError(f"{folder}: no weights file (*.safetensors, *.bin, *.pt, *.pth) in this folder")


def load_strict(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load weights into a module; every tensor must be there, fit, and be wanted.

    They may have been saved under another version of transformers, whose names differ.

    Raises:
        WeightsError: lists all missing, unexpected and misshapen tensors.
    """
    wanted = module.state_dict()
    state = under_names(state, wanted)
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    misshapen = [
        f"{name}: file has {tuple(state[name].shape)}, model needs {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    lines = [
        f"  {len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if lines:
        raise WeightsError(f"{origin}: these weights are not for this model\n" + "\n".join(lines))
    own = {name: tensor.to(wanted[name].dtype, copy=False) for name, tensor in state.items()}
    # The file's own memory becomes the module's: no second copy is made.
    module.load_state_dict(own, assign=True)


def check_whole(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse to write, or to tell from others, tensors whose values are not here.

    Raises:
        WeightsError: some are shards, empty in this process, or were left elsewhere by a `device_map`.
    """
    absent = [name for name, tensor in state.items() if tensor.numel() == 0 or tensor.is_meta]
    if absent:
        raise WeightsError(
            f"{what}: the values of {len(absent)} tensor(s) are not here ({', '.join(absent[:3])}); gather "
            "ZeRO-3's shards first, or load without a device_map that has layers wait elsewhere"
        )


def fingerprint(module: nn.Module, settings: str) -> str:
    """A hash of a module's tensors, by name, and of the settings that belong to them.

    Raises:
        WeightsError: as `check_whole`.
    """
    digest, state = sha256(settings.encode()), module.state_dict()
    check_whole(state, "no fingerprint")
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def without_init(skip: bool = True) -> Iterator[None]:
    """Build modules whose parameters all come from a file.

    Filling them with random numbers is skipped, and memory that is never written is never taken; at the end
    they are on the meta device, until `load_strict` assigns the file's own memory to them. Buffers are
    computed as ever, and models may run while they are built, as some do to learn their shapes.
    """
    if not skip:
        yield
        return
    owners: list[nn.Module] = []
    hook = register_module_parameter_registration_hook(lambda module, *_: owners.append(module))
    # The function of torch draws again until nothing lies outside: without its draws it might never end.
    truncated = patch.object(nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor)
    try:
        with _WithoutInit(), truncated:
            yield
    finally:
        hook.remove()
    for module in owners:
        for name, parameter in module.named_parameters(recurse=False):
            unread = torch.empty_like(parameter, device="meta")
            setattr(module, name, nn.Parameter(unread, requires_grad=parameter.requires_grad))


class _WithoutInit(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        changes = name.endswith("_") and not name.startswith("_") and name != "requires_grad_"
        target = args[0] if args else kwargs.get("tensor")  # as torch.nn.init names it
        # `parameter.data`, which older models fill, is no parameter; but only parameters are drawn at random.
        if changes and (isinstance(target, nn.Parameter) or name in RANDOM_FILLS):
            return target
        return func(*args, **kwargs)
