"""Pictures as they come, to RGB by one rule for training, evaluation and serving; bad ones are refused."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from vlm_vision.errors import DataError

Picture = Image.Image | str | Path | bytes | IO[bytes] | np.ndarray[Any, Any] | Tensor

PICTURE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200
_ORIENTATION = 0x0112
_TURNS = {  # EXIF's orientation to what puts the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTERS = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]  # rows become columns
# A JPEG is decoded at 1/8, 1/4 or 1/2 as long as it stays this many times larger than what it is resized to,
# which is Pillow's own choice for thumbnails.
_DECODING_GAP = 2.0
_JPEG, _SCAN = b"\xff\xd8", 0xFFDA  # how a file starts, and what follows its header
_FRAMES = {0xFFC0, 0xFFC1, 0xFFC2}  # baseline, extended, progressive
_PLAIN = {0xFFC4, 0xFFDB, 0xFFDD, 0xFFE0, 0xFFFE}  # tables, JFIF, comments
_PNG, _CHUNK = b"\x89PNG\r\n\x1a\n", struct.Struct(">I4s").unpack  # its start; length and kind
_PNG_METADATA, _PNG_END = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}, b"IEND"
_SEGMENT = struct.Struct(">HH").unpack_from  # marker, length
_FRAME = struct.Struct(">BHHB").unpack_from  # bits, rows, columns, channels
_BYTE_OF_DEEP_GREY = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 0..65535 to 0..255, rounded


def open_image(source: Picture) -> Image.Image:
    """Open a picture as RGB.

    EXIF orientation is applied where it can be read; transparency is put on white; 16-bit greys are scaled;
    the first of several frames or pages is taken; colour profiles are left aside, as every reference does.
    Size limits are checked from the header, before anything is decoded.

    Args:
        source: a path, a file's bytes, a file open for reading, a Pillow image; or pixels as a uint8 array
            [h, w, 3] (also [h, w] and [h, w, 4]) or a uint8 tensor [3, h, w] on the CPU.

    Raises:
        DataError: no such file, not a picture, truncated, of floats (their scale is not known), or beyond the
            limits on pixels and aspect ratio.
    """
    with _reading(source) as (image, name):
        return _decode(image, name)


def picture_size(source: Picture) -> tuple[int, int]:
    """Width and height of what `open_image` gives, told by the file's header.

    Pixels are decoded of TIFF files alone, and of PNG files with metadata, where an orientation may lie.

    Raises:
        DataError: as `open_image`, but for what only decoding shows.
    """
    with _reading(source) as (image, name):
        if image.format == "TIFF":  # which Pillow turns itself, before or after it tells the size
            return _decode(image, name).size
        upright = isinstance(image, PngImageFile) and not _tells_more(image)
        turned = not upright and _TURNS.get(_orientation(image)) in _QUARTERS
        return (image.height, image.width) if turned else image.size


def open_quickly(
    source: Picture, resized: Callable[[int, int], tuple[int, int]]
) -> tuple[UInt8[Tensor, "h w c"], tuple[int, int], tuple[float, float]]:
    """`open_image` for pixels that are to be resized, without decoding more of a JPEG than that needs.

    Args:
        resized: from rows and columns of the whole picture to those it is resized to.

    Returns:
        The pixels, with a fourth channel of no meaning where the decoder adds one; rows and columns to resize
        them to; how much of their rows and columns the picture covers: less than all where a scaled JPEG ends
        within a pixel.

    Raises:
        DataError: as `open_image`.
    """
    plain = _open_plain_jpeg(source, resized)
    if plain is not None:
        return plain
    with _reading(source) as (image, name):
        if isinstance(source, Image.Image) or not isinstance(image, JpegImageFile) or image.mode != "RGB":
            upright = _decode(image, name)
            pixels = _pixels(upright)
            return pixels, resized(upright.height, upright.width), (upright.height, upright.width)
        turn = _TURNS.get(_orientation(image))
        size = (image.width, image.height) if turn in _QUARTERS else (image.height, image.width)
        wanted = resized(*size)
        scale = _decoding_scale(size, wanted)
        if scale == 1 and turn is None:
            whole = _decode_whole(_content(image))
            if whole is not None:
                return whole, wanted, size
        image.draft("RGB", (image.width // scale, image.height // scale))
        return _pixels(_decode(image, name)), wanted, (size[0] / scale, size[1] / scale)


def find_pictures(folder: Path) -> list[Path]:
    """Picture files of a folder and its subfolders by their suffix, in the order of their names.

    Raises:
        DataError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise DataError(f"folder {str(folder)!r} does not exist")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise DataError(f"{folder}: no picture in it ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return found


def check_size(width: int, height: int, name: str) -> None:
    """Refuse what would take minutes or gigabytes.

    Raises:
        DataError: beyond the limits on pixels and aspect ratio, or without pixels.
    """
    if width * height == 0:
        raise DataError(f"{name}: {width}x{height} holds no pixels")
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width}x{height} is over the limit of {MAX_PIXELS:,} pixels; scale it down first"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{name}: {width}x{height} is over the aspect limit of {MAX_ASPECT}:1; crop it first")


@contextmanager
def _reading(source: Picture) -> Iterator[tuple[Image.Image, str]]:
    """The picture, its size checked and its pixels still in the file; whatever goes wrong is a DataError."""
    path = source if isinstance(source, (str, Path)) else getattr(source, "filename", None)
    name = str(path or "picture")
    try:
        with ExitStack() as opened:
            if isinstance(source, Image.Image):
                image = source
            elif isinstance(source, (np.ndarray, Tensor)):
                image = _from_pixels(source, name)
            else:
                if isinstance(source, (str, Path)):
                    source = opened.enter_context(open(source, "rb"))
                elif not (isinstance(source, bytes) or hasattr(source, "read")):
                    raise DataError(
                        "a picture is a path, a file's bytes, a file open for reading, a Pillow image, an "
                        f"array or a tensor; this is a {type(source).__name__}"
                    )
                image = _read_header(io.BytesIO(source) if isinstance(source, bytes) else source, name)
            check_size(image.width, image.height, name)
            if image.format == "EPS":
                raise DataError(f"{name}: is a PostScript program, which only an interpreter could draw")
            yield image, name
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"picture {name!r} does not exist") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: is not a picture that can be read") from None
    except Exception as error:  # each of Pillow's decoders has its own family of errors
        raise DataError(f"{name}: the picture cannot be decoded: {error}") from error


def _read_header(file: IO[bytes], name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns of what lies between its limit and twice that; ours is lower than both.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{name}: is over the limit of {MAX_PIXELS:,} pixels; scale it down first ({error})"
        ) from None


def _from_pixels(pixels: np.ndarray[Any, Any] | Tensor, name: str) -> Image.Image:
    if isinstance(pixels, Tensor):
        if pixels.dtype != torch.uint8 or pixels.device.type != "cpu" or pixels.ndim != 3 or len(pixels) != 3:
            raise DataError(
                f"{name}: a tensor of {pixels.dtype} {list(pixels.shape)} on {pixels.device}; "
                "give bytes (torch.uint8) as [3, h, w]"
            )
        pixels = pixels.permute(1, 2, 0).contiguous().numpy()
    if pixels.dtype != np.uint8 or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))
    ):
        raise DataError(
            f"{name}: an array of {pixels.dtype} {list(pixels.shape)}; give bytes (numpy.uint8) as [h, w, 3]"
        )
    return Image.fromarray(pixels)


def _decode(image: Image.Image, name: str) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = _to_rgb(image, name)
    if turn is None:
        return rgb
    upright = rgb.transpose(turn)
    upright.info.clear()  # its EXIF would turn it once more
    return upright


def _open_plain_jpeg(
    source: Picture, resized: Callable[[int, int], tuple[int, int]]
) -> tuple[UInt8[Tensor, "h w c"], tuple[int, int], tuple[float, float]] | None:
    """`open_quickly` of a JPEG of which no more than the size need be known; None of all else.

    Pillow's reading of the header takes a tenth of the time that all the rest does.
    """
    content = _bytes_of_jpeg(source)
    size = _size_of_plain_jpeg(content)
    if size is None:
        return None
    wanted = resized(*size)
    pixels = _decode_whole(content) if _decoding_scale(size, wanted) == 1 else None
    return None if pixels is None else (pixels, wanted, size)


def _bytes_of_jpeg(source: Picture) -> bytes:
    """A JPEG file's content; nothing where it is none or cannot be read: the long way says so."""
    if isinstance(source, bytes):
        return source
    if not isinstance(source, (str, Path)):
        return b""
    try:
        with open(source, "rb") as file:
            start = file.read(len(_JPEG))
            return start + file.read() if start == _JPEG else b""
    except (OSError, ValueError):
        return b""


def _size_of_plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG of three channels, within the limits and without EXIF or the like."""
    place, size = 2, None
    while content[:2] == _JPEG and place + 10 <= len(content):
        marker, length = _SEGMENT(content, place)
        if marker == _SCAN:
            return size
        if marker in _FRAMES:
            bits, height, width, channels = _FRAME(content, place + 4)
            fits = width * height <= MAX_PIXELS and 0 < max(height, width) <= MAX_ASPECT * min(height, width)
            size = (height, width) if bits == 8 and channels == 3 and fits else None
        elif marker not in _PLAIN:
            return None
        place += 2 + length
    return None


def _decoding_scale(size: tuple[int, int], resized: tuple[int, int]) -> int:
    most = min(size[0] / resized[0], size[1] / resized[1]) / _DECODING_GAP
    return next((scale for scale in (8, 4, 2) if scale <= most), 1)


def _decode_whole(content: bytes) -> UInt8[Tensor, "h w c"] | None:
    """Pillow's bytes without its copies; None where Pillow has to tell why not."""
    decode = _jpeg_decoder()
    if decode is None:
        return None
    try:
        return decode(content)
    except (RuntimeError, ValueError):
        return None


@cache
def _jpeg_decoder() -> Callable[[bytes], Tensor] | None:
    """simplejpeg where it is installed; else torchvision's, as long as it has one."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return _torchvision_decoder()
    # A fourth channel costs the decoder nothing, and torch would add it to resize, and take it away again.
    return lambda content: torch.from_numpy(decode_jpeg(content, "RGBX"))


def _torchvision_decoder() -> Callable[[bytes], Tensor] | None:
    """The operator, not its wrapper, which warns at each call that a later torchvision has neither."""
    import torchvision.io  # noqa: F401 (registers the operator)

    operator = getattr(torch.ops.image, "decode_jpeg", None)
    if operator is None:
        return None
    decode_jpeg, rgb = operator.default, 3
    return lambda content: decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), rgb).permute(
        1, 2, 0
    )


def _content(image: JpegImageFile) -> bytes:
    assert image.fp is not None
    image.fp.seek(0)
    return image.fp.read()


def _pixels(image: Image.Image) -> UInt8[Tensor, "h w c"]:
    return torch.from_numpy(np.array(image))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) where there is none or it makes no sense.

    A picture whose metadata alone are damaged is whole: Pillow takes it so in JPEG files, and raises one of
    many errors in PNG and WebP files.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _tells_more(image: PngImageFile) -> bool:
    """Whether a PNG has metadata, where Pillow looks for an orientation; it decodes all to reach them."""
    file = image.fp
    if file is None:
        return True
    place = file.tell()
    file.seek(len(_PNG))
    kind = b""
    while kind not in _PNG_METADATA | {_PNG_END} and len(head := file.read(8)) == 8:
        length, kind = _CHUNK(head)
        file.seek(length + 4, io.SEEK_CUR)  # and its checksum
    file.seek(place)
    return kind in _PNG_METADATA


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise DataError(
            f"{name}: holds floats, whose scale is not known; save it with 8 or 16 bits per channel"
        )
    if image.mode.startswith("I;16") or image.mode == "I":
        return _deep_grey_to_rgb(image, name)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # Pillow knows no way from La to RGBA but through LA.
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Greys of 16 bits scaled to 8: `convert("RGB")` would clip every grey above 255 to white."""
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise DataError(
            f"{name}: holds integers from {levels.min()} to {levels.max()}, whose scale is not known; "
            "save it with 8 or 16 bits per channel"
        )
    grey = _BYTE_OF_DEEP_GREY[levels]
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[levels == clear] = 255
    return Image.fromarray(grey).convert("RGB")
