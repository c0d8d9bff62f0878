"""Training-time changes to pictures, each drawn from the sample's own random generator.

Nothing reads a global random state, so a resumed run, or one with other workers, sees the same pictures.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance

from vlm_vision.train.pairs_config import AugmentConfig


def augment(
    image: Image.Image,
    size: int | tuple[int, int],
    config: AugmentConfig,
    random: np.random.Generator,
) -> Image.Image:
    """Random resized crop, flip and colour jitter of an RGB picture, to a side, or to (rows, columns)."""
    height, width = (size, size) if isinstance(size, int) else size
    box = crop_box(image.width, image.height, config, random)
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if config.flip and random.random() < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return jitter(image, config, random)


def crop_box(
    width: int, height: int, config: AugmentConfig, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random rectangle, as torchvision's RandomResizedCrop draws it: share of the area, log-uniform aspect.

    Ten tries, then the largest centred rectangle within the aspect limits.
    """
    low, high = math.log(config.aspect[0]), math.log(config.aspect[1])
    for _ in range(10):
        area = width * height * random.uniform(*config.crop_area)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * config.aspect[1]))
    h = min(height, round(width / config.aspect[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jitter(image: Image.Image, config: AugmentConfig, random: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation by factors of 1 +- their amount, in random order; hue by a shift."""
    enhancers = (
        (ImageEnhance.Brightness, config.brightness),
        (ImageEnhance.Contrast, config.contrast),
        (ImageEnhance.Color, config.saturation),
    )
    for index in random.permutation(len(enhancers)):
        enhancer, amount = enhancers[index]
        if amount:
            image = enhancer(image).enhance(random.uniform(max(0.0, 1 - amount), 1 + amount))
    if config.hue:
        shift = round(255 * random.uniform(-config.hue, config.hue))
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image
