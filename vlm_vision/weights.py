"""Reading weights safely and loading them without leaving anything out."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm_vision.errors import WeightsError, first_line


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a torch file read with `weights_only=True`.

    A training checkpoint of open_clip (`state_dict` inside, `module.` prefixes) gives its model's tensors.

    Raises:
        WeightsError: the file is missing, unreadable, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights file {str(path)!r} does not exist")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise WeightsError(f"{path}: not a complete safetensors file: {error}") from error
    try:
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


def find_weights_file(folder: str | Path) -> Path:
    """The one weights file of a folder, safetensors preferred.

    Raises:
        WeightsError: none is there, or the choice is not clear.
    """
    folder = Path(folder)
    for pattern in (
        "model.safetensors",
        "open_clip_model.safetensors",
        "*.safetensors",
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

    Raises:
        WeightsError: lists all missing, unexpected and misshapen tensors.
    """
    wanted = module.state_dict()
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
    module.load_state_dict(state)


def fingerprint(module: nn.Module, settings: str) -> str:
    """A hash of a module's tensors, by name, and of the settings that belong to them."""
    digest = sha256(settings.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
