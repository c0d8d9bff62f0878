"""Pictures with captions, and how training changes them. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlm_vision.config import Config

Share = Annotated[float, Field(ge=0, le=1)]


class PairsConfig(Config):
    """One source of pictures with captions.

    Attributes:
        path: a CSV, TSV, JSONL or parquet file, several parquet files (`data/*.parquet`, or their folder), a
            folder of class folders (`folder/cat/1.jpg`), tars as webdataset packs them
            (`shards/{0..9}.tar`, `s3://bucket/shards/*.tar`, or their folder), or a data set of the hub or a
            folder like one (`hub:owner/name@split`, `hub:owner/name:subset@split`).
        image_column: paths (relative to `image_folder`) or encoded bytes. Tars have their picture files.
        caption_column: captions, or class names where `templates` are given. Rows that share a picture give
            it several captions, one of which is drawn each time; so does a list. In tars `caption` is the
            .txt file, a caption per line; where there is none, or for another name, a key of the .json file.
        negative_column: a caption for each caption that does not fit its picture; in tars a key of the .json
            file. None has none.
        image_folder: None means the folder of the file.
        templates: one is drawn per picture and epoch; `{}` takes the caption.
        missing_captions: words that a missing cell turned into, in lower case: they are no captions.
        max_bad_share: rows without a caption, and pictures that cannot be read, are left out or replaced,
            counted and listed, each up to this share; beyond it they are an error.
        weight: how often an epoch shows each picture: 2 is twice, 0.5 one half in one epoch and the other in
            the next.
        lanes: tars are read in so many rows beside each other, and a process reads only the tars of its own:
            as many processes can share them as divide this number.
        cache_gb: local copies of remote tars take up to so many gigabytes; `lanes` tars are read at once.
    """

    path: str
    image_column: str = "image"
    caption_column: str = "caption"
    negative_column: str | None = None
    image_folder: str | None = None
    templates: tuple[str, ...] = ("{}",)
    missing_captions: tuple[str, ...] = ("nan", "none", "null", "<na>")
    max_bad_share: Share = 0.01
    weight: PositiveFloat = 1.0
    lanes: PositiveInt = 64
    cache_gb: PositiveFloat = 100.0

    @model_validator(mode="after")
    def _templates_take_a_caption(self) -> PairsConfig:
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong or not self.templates:
            raise ValueError(f"templates must each hold one {{}}, but {wrong or 'there are none'}")
        return self

    def is_caption(self, text: str) -> bool:
        """Whether a text says anything."""
        stripped = text.strip()
        return bool(stripped) and stripped.lower() not in self.missing_captions


DataConfig = PairsConfig | Annotated[tuple[PairsConfig, ...], Field(min_length=1)]


class DataNode(Config):
    """What of a run's config is its data: one source, or several that are mixed by their weights."""

    data: DataConfig


def source_nodes(config: DataConfig) -> tuple[PairsConfig, ...]:
    """The sources of a run's data."""
    return (config,) if isinstance(config, PairsConfig) else config


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
