"""A tower's image processor by the calls and attributes of transformers' CLIP one, in any version of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature

from vlm_vision.errors import DataError
from vlm_vision.preprocess import ImageProcessor, Picture


class ClipProcessor:
    """What code around CLIP, LLaVA's above all, reads from its image processor.

    Attributes:
        image_mean, image_std: per channel, on the 0..1 scale.
        size: `{"shortest_edge": side}`, the shorter side of what comes out.
        crop_size: `{"height": rows, "width": columns}`, in pixels.

    Raises:
        ConfigError: a tower that keeps the shapes of pictures.
    """

    def __init__(self, processor: ImageProcessor) -> None:
        processor.check_one_size("code around CLIP's image processor")
        config = processor.config
        self.processor = processor
        self.image_mean, self.image_std = list(config.mean), list(config.std)
        self.size = {"shortest_edge": min(config.height, config.width)}
        self.crop_size = {"height": config.height, "width": config.width}

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Pictures to `pixel_values` [B,3,H,W].

        Args:
            images: a picture (Pillow's, a path, a file's bytes, bytes [H,W,3] in numpy), a list of them, or
                the frames of a video as bytes [T,H,W,3].
            return_tensors: `"pt"`, `"np"`, or None for a list of arrays, as in transformers.

        Raises:
            DataError: something that is no picture, one that cannot be read, or none.
        """
        pixels = self.processor([_picture(image) for image in _each(images)])
        if return_tensors == "pt":
            return BatchFeature({"pixel_values": pixels})
        return BatchFeature({"pixel_values": list(pixels.numpy())}, tensor_type=return_tensors)

    __call__ = preprocess

    def __repr__(self) -> str:
        return f"ClipProcessor({self.processor!r})"


def _each(images: Any) -> Sequence[Any]:
    several = isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4)
    return images if several else [images]


def _picture(image: Any) -> Picture:
    """The same, if it is a picture: what is not is told here, where its kind is known."""
    if isinstance(image, (Image.Image, str, Path, bytes)) or hasattr(image, "read"):
        return image  # type: ignore[no-any-return]
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3:
        return image
    shape = f" of {getattr(image, 'dtype', '')} {tuple(image.shape)}" if hasattr(image, "shape") else ""
    raise DataError(
        f"a {type(image).__name__}{shape} is no picture: give Pillow's, a path, or numpy's bytes [H, W, 3]"
    )
