"""From pictures to the normalised tensor a backbone was trained on."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Num, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.pictures import Picture, check_size, find_pictures, open_image, open_quickly
from vlm_vision.preprocessor_file import (
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    RESAMPLING,
    read_preprocess,
    write_preprocess,
)
from vlm_vision.tower_config import PreprocessConfig

__all__ = [
    "PREPROCESSOR_FILE",
    "ImageProcessor",
    "Picture",
    "find_pictures",
    "open_image",
    "read_preprocess",
    "resized_size",
]
# Red, green and blue in four bytes that are read as one number.
_MASKS = [int.from_bytes(row, sys.byteorder) for row in (b"\xff\0\0\0", b"\0\xff\0\0", b"\0\0\xff\0")]
_MASKS_OF_PLANES = torch.tensor(_MASKS, dtype=torch.int32, device="cpu")[:, None, None]
_SHIFT = 1 / 256  # of a pixel, by which `fast` may move a picture to resize less of it


class ImageProcessor:
    """Pictures of any size in, one normalised batch out.

    Files, Pillow images and bytes on the CPU are resized by Pillow: equal to the bit to open_clip's transform
    on RGB pictures, and to transformers' processors with their PIL backend. Floats, and tensors on other
    devices, are resized by torch where they are. On photographs, bytes then differ from Pillow's by 2 levels
    at most, by 0.02 on average; floats by 1.2 and 0.3, as they are not rounded.

    Saved as a `preprocessor_config.json` that transformers reads too.

    Args:
        config: what the weights were trained with.
        fast: resize every picture by torch, and no more of it than is kept; decode a JPEG file at a half, a
            quarter or an eighth of its size while that leaves twice the size that is needed, and otherwise by
            simplejpeg (of the extra `fast`) or torchvision, whose bytes are Pillow's. Photographs decoded
            whole differ from the exact ones by 0.005 levels on average and 2 at most; scaled ones by 0.3 on
            average (noise, at an eighth, by 1), by 6 at most, by 11 along an edge where the scaled file ends
            within a pixel. `benchmarks/preprocess.py` measures difference and gain. What is refused is the
            same.

    Raises:
        ConfigError: `fast` with an interpolation that torch lacks.
    """

    def __init__(self, config: PreprocessConfig, *, fast: bool = False) -> None:
        if fast:
            _check_torch_knows(config)
        self.config = config
        self.fast = fast
        blacks = [-mean / std for mean, std in zip(config.mean, config.std, strict=True)]
        self._blacks = [torch.full((), black, dtype=torch.float32, device="cpu") for black in blacks]

    def __call__(self, images: Picture | Sequence[Picture]) -> Any:
        """Open, resize, crop and normalise one picture or several of any sizes.

        Args:
            images: what `open_image` takes, one or a list; or a tensor [3, h, w] or [b, 3, h, w] of bytes, or
                of floats from 0 to 1, whose device the result shares.

        Returns:
            One batch [b, 3, h, w]; a list of [3, h, w] where `resize: flexible` gives several sizes.

        Raises:
            DataError: a picture cannot be read, there is none, or they lie on several devices.
            ConfigError: a tensor, and an interpolation that torch lacks.
        """
        if isinstance(images, Tensor) and images.ndim == 4 and not _is_for_pillow(images):
            return self.normalise(self._resize_tensors(_checked(images)))
        several = _listed(images)
        squares = []
        for number, image in enumerate(several, start=1):
            try:
                squares.append(self._to_square(image))
            except DataError as error:
                place = f"picture {number} of {len(several)}: " if len(several) > 1 else ""
                raise DataError(f"{place}{error}") from error
        if not squares:
            raise DataError("no picture was given")
        devices = {square.device for square in squares}
        if len(devices) > 1:
            names = sorted(map(str, devices))
            raise DataError(f"pictures lie on several devices ({', '.join(names)}): move them to one")
        if len({square.shape[:2] for square in squares}) > 1:
            return [self.normalise([square])[0] for square in squares]
        return self.normalise(squares)

    def to_square(self, image: Picture) -> Num[Tensor, "h w 3"]:
        """Resize and crop (or pad) one picture to the rectangle.

        Returns:
            Bytes; floats from 0 to 1 of a tensor of floats, and with `resize_in: floats`.

        Raises:
            DataError: a picture that cannot be read.
        """
        return self._to_square(image)[..., :3]

    def _to_square(self, image: Picture) -> Num[Tensor, "h w c"]:
        """`to_square`, with a fourth channel of no meaning where the decoder adds one."""
        if isinstance(image, Tensor) and not _is_for_pillow(image):
            return self._resize_tensors(_checked(image[None]))[0]
        if self.fast:
            pixels, size, covered = open_quickly(image, lambda *size: resized_size(self.config, *size))
            # By its strides torch tells channels-last from planes, and resizes it in half the time. Only a
            # batch that is added before the channels move has the stride that says so.
            return self._resize_tensors(pixels[None].permute(0, 3, 1, 2), size, covered)[0]
        opened = open_image(image)
        if self.config.resize_in == "floats":
            return self._resize_tensors(rearrange(_levels(opened), "h w c -> 1 c h w"))[0]
        return _levels(self._resize(opened))

    def check_one_size(self, what: str) -> None:
        """Refuse settings that keep the shapes of pictures, for what needs them to be of one size.

        Raises:
            ConfigError: `resize: flexible`.
        """
        if self.config.resize == "flexible":
            raise ConfigError(
                f"{what}: pictures must be of one size, and this tower's keep their shapes (NaFlex). Write "
                "out `backbone.preprocess`: as it is, without max_patches and patch_size, with resize: squash"
            )

    def normalise(
        self, squares: Num[Tensor, "b h w c"] | Sequence[Num[Tensor, "h w c"]]
    ) -> Float[Tensor, "b 3 h w"]:
        """Bytes, or floats from 0 to 1, to channels-first floats with the weights' mean and spread.

        Args:
            squares: red, green and blue; bytes may have a fourth channel, which is passed over.

        Raises:
            ConfigError: squares of several sizes.
        """
        if not isinstance(squares, Tensor) and len({square.shape[:2] for square in squares}) > 1:
            self.check_one_size("a batch")
        height, width, _ = squares[0].shape
        pixels = torch.empty(len(squares), 3, height, width, dtype=torch.float32, device=squares[0].device)
        pairs = [(square, pixels[place]) for place, square in enumerate(squares)]
        if isinstance(squares, Tensor) and squares.device.type != "cpu":
            pairs = [(squares, pixels)]  # what a GPU wants are few calls
        for square, picture in pairs:  # one after another, each stays in the CPU's cache
            units = _split(square.detach(), picture)
            settings = zip(units, self.config.mean, self.config.std, self._blacks, strict=True)
            for plane, (unit, mean, std, black) in zip(picture.unbind(-3), settings, strict=True):
                if self.fast:  # one pass for three, and the last bit
                    black = black.to(plane.device, non_blocking=True)
                    torch.add(black, plane, alpha=1 / (unit * std), out=plane)
                else:
                    plane.div_(unit).sub_(mean).div_(std)
        return pixels

    def denormalise(self, pixels: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b h w 3"]:
        """Back to bytes, to show a picture as the backbone sees it."""
        # The device is named for those within torch.device("meta").
        mean = torch.tensor(self.config.mean, dtype=torch.float32, device="cpu")[:, None, None]
        std = torch.tensor(self.config.std, dtype=torch.float32, device="cpu")[:, None, None]
        scaled = (pixels.float().cpu() * std + mean).mul(255).round().clamp(0, 255)
        squares: Tensor = rearrange(scaled.to(torch.uint8), "b c h w -> b h w c")
        return squares

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`: transformers' keys, and our exact settings under `vlm_vision`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_preprocess(self.config, path / PREPROCESSOR_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, fast: bool = False) -> ImageProcessor:
        """Read a folder's `preprocessor_config.json`, ours or transformers', or its `processor_config.json`.

        Raises:
            DataError: the file is missing or is not JSON.
            ConfigError: it asks for steps that are not known here.
        """
        path = Path(folder) / PREPROCESSOR_FILE
        if not path.is_file() and (Path(folder) / PROCESSOR_FILE).is_file():
            path = Path(folder) / PROCESSOR_FILE
        return cls(read_preprocess(path), fast=fast)

    def __repr__(self) -> str:
        return f"ImageProcessor({self.config!r}{', fast=True' if self.fast else ''})"

    def _resize(self, image: Image.Image) -> Image.Image:
        config = self.config
        rows, columns = resized_size(config, image.height, image.width)
        height, width, top, left = _window(config, rows, columns)
        if (columns, rows) != image.size:
            image = image.resize((columns, rows), RESAMPLING[config.interpolation])
        if rows >= height and columns >= width:
            return image.crop((left, top, left + width, top + height))
        window = Image.new("RGB", (width, height), _fill(config))
        window.paste(image, (-left, -top))
        return window

    def _resize_tensors(
        self,
        pictures: Num[Tensor, "b c height width"],
        size: tuple[int, int] | None = None,
        covered: tuple[float, float] | None = None,
    ) -> Num[Tensor, "b h w c"]:
        """`_resize` by torch: bytes to bytes, floats from 0 to 1 to the like.

        Args:
            size: rows and columns before the crop; None follows from the picture's own.
            covered: of the picture's rows and columns, those that are picture; None takes all.
        """
        config = self.config
        given = tuple(pictures.shape[-2:])
        rows, columns = size or resized_size(config, *given)
        height, width, top, left = _window(config, rows, columns)
        in_bytes = pictures.dtype == torch.uint8 and config.resize_in == "bytes"
        if pictures.dtype != torch.uint8:
            pictures = pictures.float()
        elif not in_bytes:
            pictures = pictures.float() * (1 / 255)
        elif pictures.device.type != "cpu":  # torch resizes bytes on the CPU alone
            pictures = pictures.float()
        passes = [(rows, columns)] if (rows, columns) != given else []
        if passes and config.resize_in == "bytes" and pictures.is_floating_point():
            passes = [(given[0], columns), (rows, columns)]  # Pillow rounds and clips after each of its two
        fills = rows >= height and columns >= width
        ratios = (rows / covered[0], columns / covered[1]) if covered else None
        if ratios and fills and passes == [(rows, columns)]:
            tall, high, top = _needed(given[0], ratios[0], rows, top, height)
            wide, broad, left = _needed(given[1], ratios[1], columns, left, width)
            pictures, passes = pictures[..., tall, wide], [(high, broad)]
        for wanted in passes:
            pictures = _interpolate(pictures, wanted, ratios, config)
            if len(passes) > 1:
                pictures = pictures.round_().clamp_(0, 255) if in_bytes else pictures.clamp_(0, 1)
        resized = pictures.to(torch.uint8) if in_bytes and pictures.is_floating_point() else pictures
        if fills:
            return resized[..., top : top + height, left : left + width].permute(0, 2, 3, 1)
        edges = (-left, left + width - columns, -top, top + height - rows)
        levels = [level if in_bytes else level / 255 for level in _fill(config)]
        planes = zip(resized[:, :3].unbind(1), levels, strict=True)
        return torch.stack([functional.pad(plane, edges, value=level) for plane, level in planes], dim=-1)


def resized_size(config: PreprocessConfig, height: int, width: int) -> tuple[int, int]:
    """Rows and columns that a picture is resized to, before the crop or the padding."""
    if config.resize == "flexible":
        assert config.patch_size is not None
        assert config.max_patches is not None
        return _size_in_patches(height, width, config.patch_size, config.max_patches)
    target = config.resize_to or config.image_size
    rows, columns = (target, target) if isinstance(target, int) else target
    if config.resize == "squash":
        return rows, columns
    if config.resize == "shortest" and rows == columns:
        # Truncation, not rounding: as torchvision and transformers compute the longer side.
        return (int(rows * height / width), rows) if width <= height else (rows, int(rows * width / height))
    ratios = (height / rows, width / columns)
    ratio = max(ratios) if config.resize == "longest" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _size_in_patches(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Of the scales at which a picture's patches, the last ones filled up, are not too many: the largest.

    Searched in the steps of transformers' `Siglip2ImageProcessor`, whose sizes these are.
    """
    low, high = 1e-6, 100.0

    def patches(scale: float) -> tuple[int, int]:
        return (
            max(1, math.ceil(height * scale / patch_size)),
            max(1, math.ceil(width * scale / patch_size)),
        )

    while high - low >= 1e-5:
        scale = (low + high) / 2
        if math.prod(patches(scale)) <= max_patches:
            low = scale
        else:
            high = scale
    rows, columns = patches(low)
    return rows * patch_size, columns * patch_size


def _window(config: PreprocessConfig, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Rows, columns, top and left of what is kept of a resized picture, which may lie within it or around."""
    if config.resize == "flexible":
        return rows, columns, 0, 0
    margins = (rows - config.height, columns - config.width)
    top, left = (_half(config, margin) for margin in margins)
    return config.height, config.width, top, left


def _half(config: PreprocessConfig, margin: int) -> int:
    if margin < 0 and (config.crop_rounding == "even" or config.resize == "longest"):
        return -(-margin // 2)
    return round(margin / 2) if config.crop_rounding == "even" else margin // 2


def _fill(config: PreprocessConfig) -> tuple[int, int, int]:
    if config.resize != "longest":
        return (0, 0, 0)
    return (config.fill,) * 3 if isinstance(config.fill, int) else config.fill


def _interpolate(
    pictures: Num[Tensor, "b c height width"],
    size: tuple[int, int],
    ratios: tuple[float, float] | None,
    config: PreprocessConfig,
) -> Num[Tensor, "b c rows columns"]:
    """`torch.nn.functional.interpolate`, which takes a size or ratios, but not both."""
    _check_torch_knows(config)
    resize = getattr(torch.ops.aten, f"_upsample_{config.interpolation}2d_aa").default
    resized: Tensor = resize(pictures, size, False, *(ratios or (None, None)))
    return resized


@lru_cache(maxsize=1024)
def _needed(given: int, ratio: float, resized: int, first: int, wanted: int) -> tuple[slice, int, int]:
    """What has to be resized of an axis for `wanted` pixels, from `first` on, of the resized one.

    torch counts from where the axis begins. So a cut lies where pixels of both axes end, to `_SHIFT` at most.

    Returns:
        The pixels; how many to make of them; the place of the first wanted one among these.
    """
    step = 1 / ratio
    reach = 2 * max(step, 1) + 1  # bicubic's, and a pixel for what is rounded
    stop = min(given, math.ceil((first + wanted) * step + reach))
    ends = range(int(first + 0.5 - reach / step), 0, -1)
    skipped = next((end for end in ends if abs(end * step - round(end * step)) <= _SHIFT), 0)
    start, made = round(skipped * step), first + wanted - skipped
    if made == stop - start and resized != given:
        return slice(given), resized, first  # torch takes equal sizes for the same axis, whatever the ratio
    return slice(start, stop), made, first - skipped


def _check_torch_knows(config: PreprocessConfig) -> None:
    if config.interpolation not in ("bicubic", "bilinear"):
        raise ConfigError(
            f"torch has no {config.interpolation!r} interpolation like Pillow's, which fast=True, floats and "
            "tensors on a GPU need: give pictures, or bytes on the CPU"
        )


def _checked(pictures: Tensor) -> Num[Tensor, "b 3 height width"]:
    pictures = pictures.detach()
    shape = list(pictures.shape)
    if pictures.ndim != 4 or shape[1] != 3:
        raise DataError(f"a tensor of pictures is [3, h, w] or [b, 3, h, w]; this one is {shape[-3:]}")
    check_size(shape[3], shape[2], "tensor")
    if not pictures.is_floating_point() and pictures.dtype != torch.uint8:
        raise DataError(f"a tensor of {pictures.dtype}: give bytes (torch.uint8), or floats from 0 to 1")
    if pictures.is_floating_point() and pictures.device.type != "meta":
        least, most = (float(bound) for bound in pictures.float().aminmax())
        if not (least >= 0 and most <= 1):  # so written, nan is refused too
            raise DataError(
                f"a tensor of floats from {least:g} to {most:g}: give 0 to 1, or bytes (torch.uint8)"
            )
    return pictures


def _split(square: Num[Tensor, "*b h w c"], planes: Float[Tensor, "*b 3 h w"]) -> Sequence[int]:
    """Write red, green and blue to planes of their own, and tell for each the number that stands for 1."""
    if square.shape[-1] == 3:
        planes.copy_(square.movedim(-1, -3))
        return [255 if square.dtype == torch.uint8 else 1] * 3
    # A mask picks from whole pixels in vectors what a stride picks one by one.
    pixels = square.view(torch.int32)[..., 0]
    picked = torch.bitwise_and(pixels, _MASKS_OF_PLANES, out=planes.view(torch.int32))
    planes.copy_(picked)  # number by number in its own place, which spares the cache other planes
    return _MASKS


def _is_for_pillow(pixels: Tensor) -> bool:
    return pixels.dtype == torch.uint8 and pixels.device.type == "cpu"


def _levels(image: Image.Image) -> UInt8[Tensor, "h w 3"]:
    return torch.from_numpy(np.array(image))


def _listed(images: Picture | Sequence[Picture]) -> list[Picture]:
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    is_one = isinstance(images, (Image.Image, str, Path, bytes, Mapping)) or hasattr(images, "read")
    if is_one or not isinstance(images, Iterable):
        return [cast(Picture, images)]
    return list(cast(Iterable[Picture], images))
