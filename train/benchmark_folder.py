"""Held-out data in the folder layout of CLIP_benchmark (LAION-AI/CLIP_benchmark, `webdataset_builder.py`)."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlm_vision.errors import DataError
from vlm_vision.preprocess import open_image

SHARDS, CLASSES, TEMPLATES, KIND = (
    "nshards.txt",
    "classnames.txt",
    "zeroshot_classification_templates.txt",
    "dataset_type.txt",
)
_PICTURES = (".webp", ".png", ".jpg", ".jpeg")
_LABEL, _CAPTIONS = ".cls", ".txt"


class _Item(NamedTuple):
    name: str
    shard: Path
    offset: int
    size: int
    text: str


class BenchmarkFolder:
    """One split of a folder `root/{train,test}/nshards.txt, 0.tar, ...`.

    Only the headers of the tars and their texts are read beforehand; pictures are read one by one.

    Attributes:
        is_retrieval: pictures have captions (`dataset_type.txt` says retrieval); else each has one class.
        classes: of `classnames.txt`, by number; None where there is none.
        templates: the file with templates, in which `{c}` stands for the class; None where there is none.
        labels: number of each picture's class; empty where pictures have captions.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the headers of every shard.

        Args:
            folder: a split, or the root, whose `test` split is taken then.

        Raises:
            DataError: a file of the layout is missing, a shard is damaged, a picture has no class or caption,
                or the pictures have several classes each (multilabel).
        """
        folder = Path(folder)
        self.folder = folder if (folder / SHARDS).is_file() else folder / "test"
        root = self.folder.parent
        kind = _read(root / KIND).strip().lower() if (root / KIND).is_file() else "classification"
        if kind not in ("classification", "retrieval"):
            raise DataError(f"{root / KIND}: {kind!r} data are not scored here, only classes and captions")
        self.is_retrieval = kind == "retrieval"
        self._suffix = _CAPTIONS if self.is_retrieval else _LABEL
        count = _read(self.folder / SHARDS).strip()
        if not count.isdecimal() or int(count) == 0:
            raise DataError(f"{self.folder / SHARDS}: {count!r} is no number of shards")
        self._items = [
            item for number in range(int(count)) for item in self._items_of(self.folder / f"{number}.tar")
        ]
        has_classes, has_templates = (root / CLASSES).is_file(), (root / TEMPLATES).is_file()
        self.templates = str(root / TEMPLATES) if has_templates else None
        self.classes = None
        self.labels: list[int] = []
        if not self.is_retrieval:
            self.classes = (
                [line.strip() for line in _read(root / CLASSES).splitlines()] if has_classes else None
            )
            self.labels = [self._label(item) for item in self._items]

    def __len__(self) -> int:
        return len(self._items)

    def captions(self, index: int) -> list[str]:
        """Every caption of a picture, or the name of its class (its number where classes have no names)."""
        if self.is_retrieval:
            return self._items[index].text.splitlines()
        label = self.labels[index]
        return [str(label) if self.classes is None else self.classes[label]]

    def open(self, index: int) -> Image.Image:
        """Decode a picture.

        Raises:
            DataError: names the shard and the picture.
        """
        item = self._items[index]
        with item.shard.open("rb") as file:
            file.seek(item.offset)
            content = file.read(item.size)
        try:
            return open_image(content)
        except DataError as error:
            raise DataError(f"{item.shard}: {item.name}: {error}") from error

    def name(self, index: int) -> str:
        """A picture's shard and its name there."""
        return f"{self._items[index].shard.name}/{self._items[index].name}"

    def _items_of(self, shard: Path) -> list[_Item]:
        texts: dict[str, str] = {}
        pictures: dict[str, tuple[str, int, int]] = {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    # A key ends at the first dot of the file's own name, as webdataset splits it.
                    key, suffix = re.fullmatch(r"((?:.*/)?[^./]*)(.*)", member.name).groups()  # type: ignore[union-attr]
                    if suffix.lower() in _PICTURES:
                        pictures[key] = (member.name, member.offset_data, member.size)
                    elif suffix.lower() == self._suffix:
                        texts[key] = tar.extractfile(member).read().decode()  # type: ignore[union-attr]
                end = tar.offset
        except FileNotFoundError:
            raise DataError(f"{shard} is missing: {self.folder / SHARDS} counts it") from None
        except (tarfile.TarError, UnicodeDecodeError) as error:
            raise DataError(f"{shard}: is damaged, or no tar of pictures and texts: {error}") from error
        # tarfile takes the end of the file between two members for the end of the tar.
        with shard.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(f"{shard}: is cut off or damaged at byte {end:,}: fetch it again")
        alone = sorted(pictures.keys() ^ texts.keys())
        if alone or not pictures:
            kind = f"picture ({', '.join(_PICTURES)}) and {self._suffix}"
            raise DataError(f"{shard}: {alone[0] if alone else 'nothing in it'} has not both, {kind}")
        return [
            _Item(name, shard, offset, size, texts[key].strip())
            for key, (name, offset, size) in pictures.items()
        ]

    def _label(self, item: _Item) -> int:
        if not item.text.isdecimal():
            raise DataError(f"{item.shard}: {item.name}: class {item.text!r} is no number")
        label = int(item.text)
        if self.classes is not None and label >= len(self.classes):
            raise DataError(
                f"{item.shard}: {item.name}: class {label}, but {CLASSES} names {len(self.classes)}"
            )
        return label


def is_benchmark_folder(path: str | Path) -> bool:
    """Whether a path is a folder in this layout, or one split of it."""
    return (Path(path) / SHARDS).is_file() or (Path(path) / "test" / SHARDS).is_file()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
