"""Features of a data set as a folder of shards, and any picture's read back by its name.

The folder holds `features.json` (what it was made of), the shards, `index.jsonl` (shard and row of every
picture) and `bad_pictures.jsonl` (those left out, with the reason). A shard is whole by itself: one tensor
`features` and the names of its rows, as safetensors or as parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_vision.config import Config, validate
from vlm_vision.errors import ConfigError, DataError, require
from vlm_vision.files import whole_file
from vlm_vision.tower_config import DType, Select

MANIFEST_FILE, INDEX_FILE, BAD_FILE = "features.json", "index.jsonl", "bad_pictures.jsonl"
ShardFormat = Literal["safetensors", "parquet"]
GROUP_ROWS = 64  # of a parquet file, which is read a group at a time
OPEN_SHARDS = 64  # that a reader keeps


class Bad(NamedTuple):
    """A picture that was left out, and why."""

    name: str
    reason: str


class Manifest(Config):
    """What a folder of features was made of, and how it is laid out.

    Attributes:
        tower: the source it was loaded from, as it was typed.
        weights: fingerprint of the tower's weights and preprocessing.
        layers: counted from 1; none for the pooled embedding.
        select: as in `TowerConfig`.
        dtype: of the weights and of the features.
        shape: of one picture's features, [N,D], or [E] when pooled.
        shard_size: pictures of a shard, those left out included; the last may have fewer.
        pictures: how many there are.
        names: hash of their names, in order.
    """

    type: Literal["vlm_vision_features"] = "vlm_vision_features"
    tower: str
    weights: str
    layers: tuple[int, ...]
    select: Select
    dtype: DType
    shape: tuple[int, ...]
    format: ShardFormat
    shard_size: int
    pictures: int
    names: str

    @property
    def shards(self) -> int:
        return -(-self.pictures // self.shard_size)

    def rows(self, shard: int) -> slice:
        """Which pictures of the list a shard is made of."""
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, self.pictures))

    def file(self, shard: int) -> str:
        return f"shard-{shard:0{max(5, len(str(self.shards - 1)))}}.{self.format}"

    def save(self, folder: Path) -> None:
        with whole_file(folder / MANIFEST_FILE) as partial:
            partial.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            ConfigError: the folder is none of features.
        """
        path = folder / MANIFEST_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder} is no folder of features ({error}): make one with `vlm-vision features`"
            ) from error
        return validate(cls, content, str(path))


class FeatureShards(Mapping[str, Tensor]):
    """Features by the name of the picture, read from a folder that `vlm-vision features` wrote.

    A mapping in the order of the pictures: `FeatureShards(folder)["a/photo.jpg"]` is [N,D], on the CPU. It
    can be sent to other processes, such as the workers of a `DataLoader`.

    Attributes:
        manifest: what the features were made of.
        bad: pictures that were left out, with the reason.

    Raises:
        ConfigError: the folder is none of features.
        DataError: it is not finished, or is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if not (self.folder / INDEX_FILE).is_file():
            raise DataError(f"{folder} is not finished: run the command that made it again")
        self.bad = {line["picture"]: line["reason"] for line in read_lines(self.folder / BAD_FILE)}
        self._rows = {
            line["picture"]: (line["shard"], line["row"]) for line in read_lines(self.folder / INDEX_FILE)
        }
        self._open: dict[str, _SafetensorsRows | _ParquetRows] = {}

    def __getitem__(self, name: str) -> Float[Tensor, "n d"] | Float[Tensor, " e"]:
        if name not in self._rows:
            raise KeyError(f"{name}: {self.bad.get(name, f'no such picture in {self.folder}')}")
        shard, row = self._rows[name]
        if shard not in self._open:
            if len(self._open) == OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[shard] = _open_shard(self.folder / shard)
        return self._open[shard][row]

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __repr__(self) -> str:
        facts = self.manifest
        return (
            f"FeatureShards({str(self.folder)!r}: {len(self):,} pictures, {list(facts.shape)} {facts.dtype})"
        )


def write_shard(path: Path, features: Tensor, names: Sequence[str], bad: Sequence[Bad]) -> None:
    """Write one shard, complete or absent; the same bytes for the same content.

    Args:
        path: its suffix tells the format.
        features: [n,...] on the CPU, a row for each name.
    """
    with whole_file(path) as partial:
        if path.suffix == ".parquet":
            _write_parquet(partial, features, names, bad)
        else:
            # One entry of metadata: safetensors gives several an order of its own every time.
            facts = json.dumps({"names": list(names), "bad": list(bad)})
            save_file({"features": features}, partial, {"shard": facts})


def read_facts(path: Path) -> tuple[list[str], list[Bad]]:
    """Names of the rows of a shard, and the pictures left out of it; no features are read.

    Raises:
        DataError: the shard is damaged.
    """
    shard = _open_shard(path)
    try:
        return shard.facts()
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file.

    Raises:
        DataError: it is absent or damaged.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


class _SafetensorsRows:
    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")
        self._features: Any = self._file.get_slice("features")  # type: ignore[no-untyped-call]

    def __getitem__(self, row: int) -> Tensor:
        features: Tensor = self._features[row : row + 1][0]
        return features

    def facts(self) -> tuple[list[str], list[Bad]]:
        facts = json.loads(self._file.metadata()["shard"])
        if self._features.get_shape()[0] != len(facts["names"]):
            raise ValueError("rows and names are not as many")
        return facts["names"], [Bad(*entry) for entry in facts["bad"]]


class _ParquetRows:
    def __init__(self, path: Path) -> None:
        require("train", "pyarrow")
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(path)
        self._number, self._group = -1, torch.empty(0)

    def __getitem__(self, row: int) -> Tensor:
        number, place = divmod(row, GROUP_ROWS)
        if number != self._number:
            column = self._file.read_row_group(number, columns=["features"])["features"].combine_chunks()
            # A copy: torch must own what may be changed.
            self._number, self._group = number, torch.from_numpy(column.to_numpy_ndarray().copy())
        return self._group[place].clone()

    def facts(self) -> tuple[list[str], list[Bad]]:
        names = self._file.read(columns=["picture"])["picture"].to_pylist()
        return names, [Bad(*entry) for entry in json.loads(self._file.schema_arrow.metadata[b"bad"])]


def _open_shard(path: Path) -> _SafetensorsRows | _ParquetRows:
    try:
        return _ParquetRows(path) if path.suffix == ".parquet" else _SafetensorsRows(path)
    except (OSError, ValueError, SafetensorError) as error:  # pyarrow's errors are ValueErrors
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged ({error}): delete it and run the command that made it again")


def _write_parquet(path: Path, features: Tensor, names: Sequence[str], bad: Sequence[Bad]) -> None:
    require("train", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    shape = features.shape[1:]
    values = pyarrow.array(features.reshape(-1).numpy())
    storage = pyarrow.FixedSizeListArray.from_arrays(values, shape.numel())
    tensors = pyarrow.ExtensionArray.from_storage(
        pyarrow.fixed_shape_tensor(values.type, list(shape)), storage
    )
    table = pyarrow.table({"picture": pyarrow.array(names, pyarrow.string()), "features": tensors})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"bad": json.dumps(list(bad))}),
        path,
        row_group_size=GROUP_ROWS,
        compression="none",  # floats do not shrink
        use_dictionary=False,
    )
