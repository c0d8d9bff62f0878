"""Random crops as torchvision draws them, colour jitter within its bounds, and the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from tiny import captioned_pictures, tiny_dual_encoder
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop

from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError
from vlm_vision.train.augment import augment, crop_box, jitter
from vlm_vision.train.pairs import EpochBatches, Pairs, TrainingPairs
from vlm_vision.train.pairs_config import AugmentConfig, PairsConfig

DRAWS = 6000


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(generator().integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "area", "aspect"),
    [
        ((200, 120), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((120, 150), (0.8, 1.0), (3 / 4, 4 / 3)),  # some draws need several tries
        ((400, 40), (0.5, 1.0), (3 / 4, 4 / 3)),  # none ever does
        ((40, 400), (0.5, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_crops_are_distributed_as_torchvisions(
    size: tuple[int, int], area: tuple[float, float], aspect: tuple[float, float]
) -> None:
    width, height = size
    random, config = generator(), AugmentConfig(crop_area=area, aspect=aspect)
    boxes = np.array([crop_box(width, height, config, random) for _ in range(DRAWS)])
    ours = np.stack([boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]])
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    drawn = np.array([RandomResizedCrop.get_params(picture, list(area), list(aspect)) for _ in range(DRAWS)])
    theirs = drawn[:, [1, 0, 3, 2]].T  # top, left, height, width

    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= width
    assert boxes[:, 3].max() <= height
    for mine, other in zip(ours, theirs, strict=True):
        # In standard errors of a mean; worst measured: 0.94.
        error = np.sqrt((mine.var() + other.var()) / DRAWS)
        assert abs(mine.mean() - other.mean()) <= 3 * error
        assert mine.std() == pytest.approx(other.std(), rel=0.06)  # worst measured: 0.031


def test_the_whole_picture_when_nothing_is_asked() -> None:
    picture = noise(32, 32)
    config = AugmentConfig(crop_area=(1.0, 1.0), aspect=(1.0, 1.0))
    assert augment(picture, 32, config, generator()).tobytes() == picture.tobytes()


def test_flips_are_as_frequent_as_asked() -> None:
    picture, random = noise(16, 16), generator()
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    config = AugmentConfig(crop_area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.25)
    count = sum(augment(picture, 16, config, random).tobytes() == mirrored for _ in range(2000))
    assert count == pytest.approx(500, abs=80)  # four standard deviations
    always = config.model_copy(update={"flip": 1.0})
    assert all(augment(picture, 16, always, random).tobytes() == mirrored for _ in range(20))


@pytest.mark.parametrize("amount", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_stays_within_its_bounds_and_uses_them(amount: str) -> None:
    """On a plain colour each factor shows in one number."""
    random, config = generator(), AugmentConfig(**{amount: 0.4})
    colour = (150, 90, 60)
    picture = Image.new("RGB", (4, 4), colour)
    if amount == "contrast":  # half of it darker: a plain picture has no contrast
        picture.paste((50, 50, 50), (0, 0, 2, 4))
    drawn = [np.asarray(jitter(picture, config, random), dtype=float) for _ in range(400)]
    if amount == "brightness":
        factors = [pixels[0, 0, 0] / 150 for pixels in drawn]
        low, high = 0.6, 1.4
    elif amount == "contrast":
        factors = [(pixels[0, 3, 0] - pixels[0, 0, 0]) / 100 for pixels in drawn]
        low, high = 0.6, 1.4
    elif amount == "saturation":
        factors = [np.ptp(pixels[0, 0]) / 90 for pixels in drawn]
        low, high = 0.6, 1.4
    else:
        start = Image.new("RGB", (1, 1), colour).convert("HSV").getpixel((0, 0))[0]
        hues = [
            Image.fromarray(pixels.astype(np.uint8)).convert("HSV").getpixel((0, 0))[0] for pixels in drawn
        ]
        factors = [((hue - start + 128) % 256 - 128) / 255 for hue in hues]
        low, high = -0.4, 0.4
    assert low - 0.03 <= min(factors) <= low + 0.08
    assert high - 0.08 <= max(factors) <= high + 0.03
    assert np.mean(factors) == pytest.approx((low + high) / 2, abs=0.06)


def test_no_jitter_is_no_change() -> None:
    picture = noise()
    assert ImageChops.difference(jitter(picture, AugmentConfig(), generator()), picture).getbbox() is None


def test_the_global_random_state_is_not_read() -> None:
    picture = noise()
    config = AugmentConfig(
        crop_area=(0.2, 1.0), brightness=0.5, contrast=0.5, saturation=0.5, hue=0.2, flip=0.5
    )
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        results.append(augment(picture, 24, config, generator(5)).tobytes())
    assert results[0] == results[1]
    assert augment(picture, 24, config, generator(6)).tobytes() != results[0]


def test_workers_change_no_byte(tmp_path: Path) -> None:
    pairs, model = Pairs(PairsConfig(path=str(captioned_pictures(tmp_path, 10)))), tiny_dual_encoder()
    config = AugmentConfig(crop_area=(0.3, 1.0), brightness=0.5, flip=0.5)
    data = TrainingPairs(pairs, model.image_processor, model.tokenizer, config, seed=3)
    found = []
    for workers in (0, 2):
        batches = EpochBatches(len(pairs), 4, 3, 0, 5, 0, 1)
        loader = DataLoader(data, batch_sampler=batches, collate_fn=lambda batch: batch, num_workers=workers)
        found.append([(batch.squares, batch.tokens[batch.captions]) for batch in loader])
    for (pixels, tokens), (other_pixels, other_tokens) in zip(*found, strict=True):
        assert torch.equal(pixels, other_pixels)
        assert torch.equal(tokens, other_tokens)


@pytest.mark.parametrize(
    "wrong",
    [
        {"aspect": [0, 1]},
        {"aspect": [2, 1]},
        {"crop_area": [1.0, 0.5]},
        {"crop_area": [0.5, 1.5]},
        {"hue": 0.6},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        load_config(AugmentConfig, wrong)
