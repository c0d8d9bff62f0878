"""Which pictures a data set has: files, folders, and tar shards as webdataset packs them.

Of a tar, Python's `tarfile` reads the headers, to learn where the bytes of each picture lie; from there they
are read later. So the pictures of a tar are like any others: counted beforehand, and decoded by any process,
in any order. Nothing is extracted, and nothing but pictures is decoded: `../x.jpg` is only a name.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from vlm_vision.errors import DataError
from vlm_vision.pictures import PICTURE_SUFFIXES, find_pictures, open_image

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class ListedPicture(NamedTuple):
    """Where a picture is.

    Attributes:
        name: what it is known by: its path in the folder that was given, or its name in the tar.
        file: the picture's own file, or the tar.
        offset, size: of its bytes in the tar; None for a file of its own.
    """

    name: str
    file: str
    offset: int | None = None
    size: int | None = None

    @property
    def place(self) -> str:
        return self.file if self.offset is None else f"{self.file}: {self.name}"


Opener = Callable[[Sequence[ListedPicture]], Iterator[Image.Image | DataError]]
"""Opens listed pictures as `open_pictures` does; worker processes get a copy."""


def list_pictures(sources: Sequence[str | Path]) -> list[ListedPicture]:
    """The pictures of files, folders (with subfolders) and tars, in the order given; of a folder, by name.

    Args:
        sources: as `expand_sources` takes them.

    Raises:
        DataError: none given, one that is not there, a folder or tar without pictures, a tar that is damaged.
    """
    return [picture for source in expand_sources(sources) for picture in _pictures_of(source)]


def list_files(sources: Sequence[str | Path]) -> list[Path]:
    """The pictures of files and folders, as `list_pictures` finds them, where each has to be a file.

    Raises:
        DataError: as `list_pictures`; a tar.
    """
    pictures = list_pictures(sources)
    for picture in pictures:
        if picture.offset is not None:
            raise DataError(
                f"{picture.file}: pictures in a tar are not taken here; unpack it, and name the folder"
            )
    return [Path(picture.file) for picture in pictures]


def expand_sources(sources: Sequence[str | Path]) -> list[str]:
    """Paths that are there; `shard-{0000..0099}.tar` and `{train,val}.tar` stand for several.

    Raises:
        DataError: none given, or one that is not there.
    """
    if not sources:
        raise DataError("no picture was given: name picture files, folders of them, or tar files")
    paths = [path for source in sources for path in expand_braces(str(source))]
    for path in paths:
        if not Path(path).exists():
            raise DataError(f"picture {path!r} does not exist")
    return paths


def members_of_tar(path: str, suffixes: Container[str]) -> Iterator[ListedPicture]:
    """Where the bytes of a tar's files with these suffixes lie, in their order; only headers are read.

    Raises:
        DataError: after the last whole member, a tar that is damaged or cut off; a link; a file with holes.
    """
    count = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if Path(member.name).suffix.lower() not in suffixes or member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{path}: {member.name!r} is a link or has holes, so its bytes are not in one place; "
                        "pack it with tar --dereference --hard-dereference, without --sparse"
                    )
                count += 1
                yield ListedPicture(member.name.removeprefix("./"), path, member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: is no tar, or is cut off: {error}") from error
    # tarfile takes a damaged header, and the end of the file between two members, for the end of the tar.
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(
                f"{path}: is cut off or damaged at byte {end:,}, after {count:,} of its files: "
                "there is neither another member nor the mark of the end; fetch or pack it again"
            )


def check_names(pictures: Sequence[ListedPicture]) -> None:
    """Names must tell pictures apart.

    Raises:
        DataError: two pictures have one name, or a name is not text.
    """
    seen: dict[str, ListedPicture] = {}
    for picture in pictures:
        first = seen.setdefault(picture.name, picture)
        if first is not picture:
            raise DataError(
                f"two pictures are called {picture.name!r}: {first.place} and {picture.place}. "
                "Give the folder above both, or write the features of each source into a folder of its own"
            )
        if not _is_text(picture.name):
            raise DataError(f"the name {picture.name!r} is not UTF-8 ({picture.place}): rename the picture")


def hash_of(pictures: Iterable[ListedPicture]) -> str:
    """What tells this list from another: the names in their order, and the sizes that are known."""
    digest = sha256()
    for picture in pictures:
        digest.update(f"{picture.name}\0{picture.size}\n".encode())
    return digest.hexdigest()


def open_pictures(pictures: Iterable[ListedPicture]) -> Iterator[Image.Image | DataError]:
    """Open one after another as RGB; in place of a picture that cannot be read, the reason.

    Raises:
        OSError: a tar cannot be read, which is no matter of one picture.
    """
    with ExitStack() as stack:
        tars: dict[str, IO[bytes]] = {}
        for picture in pictures:
            source: Path | IO[bytes] = Path(picture.file)
            if picture.offset is not None and picture.size is not None:
                if picture.file not in tars:
                    tars[picture.file] = stack.enter_context(open(picture.file, "rb"))
                tars[picture.file].seek(picture.offset)
                source = NamedBytes(tars[picture.file].read(picture.size), picture.place)
            opened: Image.Image | DataError
            try:
                opened = open_image(source)
            except DataError as error:
                opened = error
            yield opened


class NamedBytes(io.BytesIO):
    """Bytes of a picture, with the name that errors tell."""

    def __init__(self, content: bytes, filename: str) -> None:
        super().__init__(content)
        self.filename = filename


def expand_braces(source: str) -> list[str]:
    """`{0000..0099}` and `{a,b}` as the paths they stand for, unless a file is so called.

    Raises:
        DataError: an empty range.
    """
    braces = _BRACES.search(source)
    if braces is None or Path(source).exists():
        return [source]
    numbers = _RANGE.fullmatch(braces[1])
    if numbers is not None:
        first, last = numbers.groups()
        parts = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        if not parts:
            raise DataError(f"{source!r}: the range {braces[0]} is empty")
    else:
        parts = braces[1].split(",")
    before, after = source[: braces.start()], source[braces.end() :]
    return [whole for part in parts for whole in expand_braces(f"{before}{part}{after}")]


def _pictures_of(source: str) -> Iterator[ListedPicture]:
    path = Path(source)
    if path.is_dir():
        try:
            found = find_pictures(path)
        except DataError as error:
            hint = f"; its tar files are given as {path}/*.tar" if any(path.glob("*.tar")) else ""
            raise DataError(f"{error}{hint}") from None
        yield from (ListedPicture(file.relative_to(path).as_posix(), str(file)) for file in found)
    elif path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise DataError(f"{path}: a compressed tar has to be read from its start; unpack it to a .tar first")
    elif path.suffix.lower() == ".tar":
        yield from _pictures_of_tar(source)
    else:
        yield ListedPicture(source, source)


def _pictures_of_tar(path: str) -> list[ListedPicture]:
    found = list(members_of_tar(path, PICTURE_SUFFIXES))
    if not found:
        raise DataError(f"{path}: no picture in it ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return found


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
