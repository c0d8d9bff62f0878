"""From picture files to the normalised tensor a backbone was trained on."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlm_vision.config import validate
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.tower_config import PreprocessConfig

Picture = Image.Image | str | Path

PICTURE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
PREPROCESSOR_FILE = "preprocessor_config.json"


def open_image(source: Picture | bytes | IO[bytes]) -> Image.Image:
    """Open a picture as RGB by one rule for training, evaluation and serving.

    EXIF orientation is applied, transparency is put on white, 16-bit greys are scaled, the first frame of an
    animation is taken. Size limits are checked from the header, before anything is decoded.

    Raises:
        DataError: no such file, not a picture, truncated, of floats (their scale is not known), or beyond the
            limits on pixels and aspect ratio.
    """
    name = source if isinstance(source, (str, Path)) else getattr(source, "filename", None) or "picture"
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, bytes):
            image = Image.open(io.BytesIO(source))
        else:
            image = Image.open(source)
        _check_size(image, name)
        image.load()
        image = ImageOps.exif_transpose(image)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"picture {str(name)!r} does not exist") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: is not a picture that can be read") from None
    except Exception as error:  # each of Pillow's decoders has its own family of errors
        raise DataError(f"{name}: the picture cannot be decoded: {error}") from error
    return _to_rgb(image, name)


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


def _check_size(image: Image.Image, name: object) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width}x{height} is over the limit of {MAX_PIXELS:,} pixels; scale it down first"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{name}: {width}x{height} is over the aspect limit of {MAX_ASPECT}:1; crop it first")


def _to_rgb(image: Image.Image, name: object) -> Image.Image:
    if image.mode == "F":
        raise DataError(
            f"{name}: holds floats, whose scale is not known; save it with 8 or 16 bits per channel"
        )
    if (
        image.mode.startswith("I;16") or image.mode == "I"
    ):  # convert("RGB") would clip every grey above 255 to white
        grey = np.asarray(image, dtype=np.float64) / 257
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


class ImageProcessor:
    """Pictures of any size in, one normalised batch out; bit-equal to open_clip's transform on RGB pictures.

    Saved as a `preprocessor_config.json` that transformers reads too.
    """

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        # Named device, for towers that are built on the meta device: their processors work.
        self._mean = torch.tensor(config.mean, device="cpu")[:, None, None]
        self._std = torch.tensor(config.std, device="cpu")[:, None, None]

    def __call__(self, images: Picture | Sequence[Picture]) -> Float[Tensor, "b 3 h w"]:
        """Open, resize, crop and normalise one picture or a list of them.

        Raises:
            DataError: a picture cannot be read, or there is none.
        """
        several = [images] if isinstance(images, (Image.Image, str, Path)) else list(images)
        if not several:
            raise DataError("no picture was given")
        return self.normalise(torch.stack([self.to_square(open_image(image)) for image in several]))

    def to_square(self, image: Image.Image) -> UInt8[Tensor, "h w 3"]:
        """Resize and crop (or pad) one RGB picture to the square, still in bytes."""
        config, side = self.config, self.config.image_size
        resampling = _RESAMPLING[config.interpolation]
        width, height = image.size
        if config.resize == "squash":
            image = image.resize((side, side), resampling)
        elif config.resize == "shortest":
            target = config.resize_to or side
            # Truncation, not rounding: as torchvision and transformers compute the longer side.
            if width <= height:
                size = (target, int(target * height / width))
            else:
                size = (int(target * width / height), target)
            image = image.resize(size, resampling) if size != image.size else image
            image = self._centre_crop(image)
        else:
            scale = (config.resize_to or side) / max(width, height)
            image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resampling)
            square = Image.new("RGB", (side, side), (config.fill,) * 3)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return torch.from_numpy(np.array(image))

    def normalise(self, squares: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
        """Bytes to channels-first floats with the weights' mean and spread."""
        pixels: Tensor = rearrange(squares, "b h w c -> b c h w").to(torch.float32).div_(255)
        return pixels.sub_(self._mean).div_(self._std)

    def denormalise(self, pixels: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b h w 3"]:
        """Back to bytes, to show a picture as the backbone sees it."""
        scaled = (pixels.float().cpu() * self._std + self._mean).mul(255).round().clamp(0, 255)
        squares: Tensor = rearrange(scaled.to(torch.uint8), "b c h w -> b h w c")
        return squares

    def _centre_crop(self, image: Image.Image) -> Image.Image:
        side = self.config.image_size
        if (
            image.width < side or image.height < side
        ):  # resize_to below image_size: transformers pads with black
            padded = Image.new("RGB", (max(side, image.width), max(side, image.height)))
            padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
            image = padded
        if self.config.crop_rounding == "even":
            left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        else:
            left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`: transformers' keys, and our exact settings under `vlm_vision`."""
        config, side = self.config, self.config.image_size
        shortest = config.resize == "shortest"
        content = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": config.resize_to or side}
            if shortest
            else {"height": side, "width": side},
            "resample": int(_RESAMPLING[config.interpolation]),
            "do_center_crop": shortest,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config.mean),
            "image_std": list(config.std),
            "vlm_vision": config.model_dump(mode="json"),
        }
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / PREPROCESSOR_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageProcessor:
        """Read a folder's `preprocessor_config.json`, ours or transformers'.

        Raises:
            DataError: the file is missing or is not JSON.
        """
        return cls(read_preprocess(Path(folder) / PREPROCESSOR_FILE))

    def __repr__(self) -> str:
        return f"ImageProcessor({self.config!r})"


def read_preprocess(path: Path) -> PreprocessConfig:
    """A `preprocessor_config.json`, ours or transformers', as our settings.

    Raises:
        DataError: the file is missing or is not JSON.
        ConfigError: it asks for steps that are not known here.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist: without it the right preprocessing of these weights is unknown"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict) and "vlm_vision" in content:
        return validate(PreprocessConfig, content["vlm_vision"], str(path))
    return _from_transformers(content, path)


def _from_transformers(content: Any, path: Path) -> PreprocessConfig:
    try:
        skipped = [step for step in ("do_resize", "do_rescale", "do_normalize") if content.get(step) is False]
        if skipped:
            raise ValueError(f"{skipped[0]} is false")
        size = content["size"]
        shortest = size if isinstance(size, int) else size.get("shortest_edge")
        cropped = content.get("do_center_crop", shortest is not None)
        if shortest is not None and not cropped:
            raise ValueError("shortest_edge without do_center_crop does not give one size")
        names = {int(resampling): name for name, resampling in _RESAMPLING.items()}
        settings = {
            "image_size": _square(content["crop_size"] if cropped else size),
            "resize": "squash" if shortest is None else "shortest",
            "resize_to": shortest or (_square(size) if cropped else None),
            "interpolation": names[int(content.get("resample", Image.Resampling.BICUBIC))],
            "mean": content["image_mean"],
            "std": content["image_std"],
            "crop_rounding": "down",
        }
        if cropped and shortest is None and settings["resize_to"] != settings["image_size"]:
            raise ValueError("a crop after height and width is not known here")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: is not understood ({error!r}); set `backbone.preprocess` by hand"
        ) from error
    return validate(PreprocessConfig, settings, str(path))


def _square(size: Any) -> int:
    side = size if isinstance(size, int) else size["height"]
    if not isinstance(size, int) and size["width"] != side:
        raise ValueError(f"{size} is not square")
    return int(side)
