"""The image processor against open_clip's transform (equal to the bit) and transformers' PIL processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from vlm_vision import ImageProcessor
from vlm_vision.preprocess import open_image
from vlm_vision.tower_config import PreprocessConfig

try:  # transformers 5 has two of each; in 4.37, which LLaVA pins, the only ones are those of Pillow
    from transformers import CLIPImageProcessorPil
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
except ImportError:
    from transformers import BitImageProcessor as BitImageProcessorPil
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "flickr8k-800" / "images"
SIZES = [
    (1, 1),
    (7, 31),
    (33, 32),
    (32, 33),
    (50, 201),
    (224, 224),
    (225, 223),
    (400, 301),
    (640, 427),
    (31, 500),
]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def drawn(width: int, height: int) -> Image.Image:
    """A gradient under noise: every rounding shows."""
    generator = np.random.default_rng(width * 1000 + height)
    columns, rows = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    base = np.stack([columns, rows, (columns + rows) / 2], axis=-1)
    return Image.fromarray((base + generator.integers(0, 56, base.shape)).astype(np.uint8))


def pictures() -> list[Image.Image]:
    photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))[:12] if PHOTOGRAPHS.is_dir() else []
    return [drawn(*size) for size in SIZES] + [open_image(path) for path in photographs]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("side", [32, 224, 337])
def test_equal_to_open_clip_to_the_bit(resize: Any, interpolation: Any, side: int) -> None:
    settings = PreprocessConfig(image_size=side, resize=resize, interpolation=interpolation, fill=127)
    theirs = image_transform(
        side, is_train=False, resize_mode=resize, interpolation=interpolation, fill_color=127
    )
    ours = ImageProcessor(settings)
    for picture in pictures():
        assert torch.equal(ours(picture)[0], theirs(picture)), picture.size


def test_equal_to_open_clip_with_other_statistics() -> None:
    ours = ImageProcessor(PreprocessConfig(image_size=224, **IMAGENET))  # type: ignore[arg-type]
    theirs = image_transform(224, is_train=False, **IMAGENET)
    for picture in pictures():
        assert torch.equal(ours(picture)[0], theirs(picture))


@pytest.mark.parametrize(
    ("processor_class", "settings"),
    [
        (CLIPImageProcessorPil, {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}),
        (CLIPImageProcessorPil, {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}),
        (BitImageProcessorPil, {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}),
        (BitImageProcessorPil, {"size": {"shortest_edge": 592}, "crop_size": {"height": 518, "width": 518}}),
        (
            CLIPImageProcessorPil,
            {"size": {"height": 224, "width": 224}, "do_center_crop": False, "resample": 2},
        ),
    ],
    ids=["CLIP 224", "CLIP 336", "DINOv2 224", "DINOv2 518", "squash bilinear"],
)
def test_equal_to_transformers(processor_class: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = processor_class(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(tmp_path)
    for picture in pictures():
        pixels = torch.as_tensor(
            theirs(picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
        )
        assert float((ours(picture)[0] - pixels).abs().max()) <= 1e-6, picture.size  # measured 0


def test_transformers_reads_what_we_save(tmp_path: Path) -> None:
    for settings in (
        PreprocessConfig(image_size=224, crop_rounding="down"),
        PreprocessConfig(image_size=224, resize_to=256, crop_rounding="down", interpolation="bilinear"),
        PreprocessConfig(image_size=224, resize="squash"),
    ):
        ours = ImageProcessor(settings)
        ours.save_pretrained(tmp_path)
        theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)
        for picture in pictures():
            pixels = torch.as_tensor(
                theirs(picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
            )
            assert float((ours(picture)[0] - pixels).abs().max()) <= 1e-6  # measured 0
        assert ImageProcessor.from_pretrained(tmp_path).config == settings
        content = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
        assert content["image_processor_type"] == "CLIPImageProcessor"
