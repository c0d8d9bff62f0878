"""Pictures with captions, and how training changes them. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, model_validator

from vlm_vision.config import Config

Share = Annotated[float, Field(ge=0, le=1)]


class PairsConfig(Config):
    """Pictures with captions.

    Attributes:
        path: CSV, TSV, JSONL or parquet file, or a folder of class folders (`folder/cat/1.jpg`).
        image_column: paths (relative to `image_folder`) or encoded bytes.
        caption_column: captions, or class names where `templates` are given. Rows that share a picture give
            it several captions, one of which is drawn each epoch.
        image_folder: None means the folder of the file.
        templates: one is drawn per picture and epoch; `{}` takes the caption.
        max_bad_share: pictures that cannot be read are replaced, counted and listed up to this share.
    """

    path: str
    image_column: str = "image"
    caption_column: str = "caption"
    image_folder: str | None = None
    templates: tuple[str, ...] = ("{}",)
    max_bad_share: Share = 0.0

    @model_validator(mode="after")
    def _templates_take_a_caption(self) -> PairsConfig:
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong or not self.templates:
            raise ValueError(f"templates must each hold one {{}}, but {wrong or 'there are none'}")
        return self


class AugmentConfig(Config):
    """Training-time changes to pictures.

    Attributes:
        crop_area: share of the picture's area that a random crop keeps, drawn between the two.
        aspect: width / height of the crop, log-uniform between the two.
        brightness, contrast, saturation: factors are drawn from 1 - amount to 1 + amount.
        hue: shift of at most this share of the colour circle.
        flip: how often a picture is mirrored; 0 where captions speak of left and right.
    """

    crop_area: tuple[Share, Share] = (0.9, 1.0)
    aspect: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    flip: Share = 0.0

    @property
    def is_fixed(self) -> bool:
        """Whether nothing is drawn, so that a picture is the same in every epoch."""
        low, high = self.crop_area
        jitter = (self.brightness, self.contrast, self.saturation, self.hue, self.flip)
        return low == high == 1 and self.aspect[0] == self.aspect[1] and not any(jitter)

    @model_validator(mode="after")
    def _ranges_ascend(self) -> AugmentConfig:
        for name, (low, high) in (("crop_area", self.crop_area), ("aspect", self.aspect)):
            if low > high:
                raise ValueError(f"{name} must be a range from low to high, but is {low:g} to {high:g}")
        return self
