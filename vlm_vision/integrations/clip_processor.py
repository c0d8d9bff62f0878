"""A tower's image processor by the calls and attributes of transformers' CLIP one, in any version of it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import BatchFeature

from vlm_vision.preprocess import ImageProcessor, Picture


class ClipProcessor:
    """What code around CLIP reads from its image processor.

    Attributes:
        image_mean, image_std: per channel, on the 0..1 scale.
        size: `{"shortest_edge": side}`, the shorter side of what comes out.
        crop_size: `{"height": rows, "width": columns}`, in pixels.
    """

    def __init__(self, processor: ImageProcessor) -> None:
        config = processor.config
        self._processor = processor
        self.image_mean, self.image_std = list(config.mean), list(config.std)
        self.size = {"shortest_edge": min(config.height, config.width)}
        self.crop_size = {"height": config.height, "width": config.width}

    def preprocess(
        self, images: Picture | Sequence[Picture], return_tensors: str | None = None
    ) -> BatchFeature:
        """Pictures to `pixel_values`, [B,3,H,W] with `return_tensors="pt"`, else a list of arrays.

        Raises:
            DataError: a picture cannot be read, or there is none.
        """
        pixels = self._processor(images)
        return BatchFeature({"pixel_values": list(pixels.numpy())}, tensor_type=return_tensors)

    __call__ = preprocess
