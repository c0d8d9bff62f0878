"""Tensors of a TorchScript archive, as OpenAI publishes CLIP, without running anything that is in it."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STATE = re.compile(r'^  __(?:parameters|buffers)__ = \[((?:"\w+", )*)\]$', re.MULTILINE)


def is_torchscript(path: Path) -> bool:
    """Whether `torch.jit.save` wrote a file: torch tells it from `torch.save`'s by the same entry."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their names: what `torch.jit.load(path).state_dict()` gives.

    Raises:
        UnpicklingError: the archive names anything beside modules, tensors and plain values.
        KeyError, RuntimeError, BadZipFile: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        return dict(_state(_Reader(archive).load(), archive))


class _Module:
    """A module of an archive: its attributes."""

    origin: str  # its class, as the archive names it


class _Reader(pickle.Unpickler):
    """Reads the pickle of an archive, which may name nothing but what is listed here."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive, self._root = archive, _root(archive)
        self._storages: dict[str, Tensor] = {}
        super().__init__(archive.open(f"{self._root}data.pkl"))

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return type(name, (_Module,), {"origin": f"{module}.{name}"})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # lists and the like, whose types it tells beside them
            return _value
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"the archive names {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}data/{key}"))
            empty = torch.empty(0, dtype=dtype)
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else empty
        return self._storages[key]


def _root(archive: zipfile.ZipFile) -> str:
    """The folder that all entries lie in."""
    return archive.namelist()[0].partition("/")[0] + "/"


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _value(value: Any, *_: Any) -> Any:
    return value


def _state(module: _Module, archive: zipfile.ZipFile, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, which a module's code names, and not its other tensors."""
    path, _, name = module.origin.rpartition(".")
    code = archive.read(f"{_root(archive)}code/{path.replace('.', '/')}.py").decode("utf-8")
    own = code.partition(f"class {name}(Module):\n")[2].partition("\nclass ")[0]
    named = {word for line in _STATE.findall(own) for word in re.findall(r"\w+", line)}
    for attribute, value in vars(module).items():
        if isinstance(value, _Module):
            yield from _state(value, archive, f"{prefix}{attribute}.")
        elif attribute in named and isinstance(value, Tensor):
            yield f"{prefix}{attribute}", value
