"""The image processor against open_clip's transform and transformers' processors.

Equal to the bit to open_clip, to transformers' PIL processors, and to DINOv3's, which has no PIL twin.
Today's default processors of transformers resize bytes by torchvision, which rounds otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from einops import rearrange
from open_clip.pretrained import _PRETRAINED
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from pins import OLD_TRANSFORMERS

from vlm_vision import ImageProcessor
from vlm_vision.backbones.timm import _preprocess
from vlm_vision.preprocess import open_image, resized_size
from vlm_vision.tower_config import PreprocessConfig

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
    (200, 7),
]
STATISTICS = {
    "clip": {},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "half": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}


def drawn(width: int, height: int) -> Image.Image:
    """A gradient under noise: every rounding shows."""
    generator = np.random.default_rng(width * 1000 + height)
    columns, rows = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    base = np.stack([columns, rows, (columns + rows) / 2], axis=-1)
    return Image.fromarray((base + generator.integers(0, 56, base.shape)).astype(np.uint8))


def pictures() -> list[Image.Image]:
    photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))[:4] if PHOTOGRAPHS.is_dir() else []
    return [drawn(*size) for size in SIZES] + [open_image(path) for path in photographs]


PICTURES = pictures()
WIDE = [picture for picture in PICTURES if min(picture.size) > 3]  # transformers takes 1 and 3 for channels


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [32, 224, 337, (97, 31), (224, 336), (336, 224)], ids=str)
def test_equal_to_open_clip_to_the_bit(resize: Any, interpolation: Any, size: Any) -> None:
    if resize == "shortest" and not isinstance(size, int):
        interpolation = "bicubic"  # open_clip takes no other one there, whatever its settings say
    theirs = image_transform_v2(
        PreprocessCfg(size=size, resize_mode=resize, interpolation=interpolation, fill_color=127),
        is_train=False,
    )
    ours = ImageProcessor(
        PreprocessConfig(image_size=size, resize=resize, interpolation=interpolation, fill=127)
    )
    for picture in PICTURES:
        assert torch.equal(ours(picture)[0], theirs(picture)), picture.size


def open_clip_records() -> list[dict[str, Any]]:
    """The distinct settings of all weights that open_clip publishes."""
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color", "size")
    found = {
        json.dumps({key: record[key] for key in keys if key in record}, sort_keys=True)
        for tags in _PRETRAINED.values()
        for record in tags.values()
    }
    return [json.loads(record) for record in sorted(found)]


@pytest.mark.parametrize(
    "record", open_clip_records(), ids=lambda record: "-".join(map(str, record.values()))
)
def test_equal_to_open_clip_for_every_published_setting(record: dict[str, Any]) -> None:
    theirs = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(size=256), record))
    ours = PreprocessConfig(
        image_size=theirs.size,
        resize=theirs.resize_mode,
        interpolation=theirs.interpolation,
        mean=theirs.mean,
        std=theirs.std,
        fill=theirs.fill_color,
    )
    transform, processor = image_transform_v2(theirs, is_train=False), ImageProcessor(ours)
    for picture in PICTURES:
        assert torch.equal(processor(picture)[0], transform(picture)), picture.size


@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [160, (192, 128), (96, 176)], ids=str)
def test_equal_to_timm_to_the_bit(size: Any, crop_mode: str, crop_pct: float) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    own = {"input_size": (3, height, width), "crop_mode": crop_mode, "crop_pct": crop_pct}
    model = timm.create_model("test_vit", img_size=(height, width), pretrained_cfg_overlay=own)
    processor = ImageProcessor(_preprocess(model))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert processor.config.image_size == size
    for picture in PICTURES:
        assert torch.equal(processor(picture)[0], transform(picture)), picture.size


def processor_class(name: str) -> Any:
    """Of transformers: older ones lack some, and name a class without `Pil` what today is its PIL twin."""
    found = getattr(transformers, name, None)
    if found is None and not hasattr(transformers, "CLIPImageProcessorPil"):
        found = getattr(transformers, name.removesuffix("Pil"), None)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return found


def pixels_of(processor: Any, picture: Image.Image) -> torch.Tensor:
    """[3, h, w] of one picture, put together again where they come as patches."""
    output = processor(picture, return_tensors="pt")
    pixels = torch.as_tensor(np.asarray(output["pixel_values"][0]))
    if "spatial_shapes" not in output:
        return pixels
    rows, columns = (int(count) for count in output["spatial_shapes"][0])
    side = processor.patch_size
    patches: torch.Tensor = rearrange(
        pixels[: rows * columns], "(r c) (h w d) -> d (r h) (c w)", r=rows, c=columns, h=side, w=side, d=3
    )
    return patches


def crop(shorter: int, side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": shorter}, "crop_size": {"height": side, "width": side}}


def plain(height: int, width: int) -> dict[str, Any]:
    return {"size": {"height": height, "width": width}}


PADS = pytest.mark.skipif(
    OLD_TRANSFORMERS, reason="transformers 4.37 pads odd margins to one pixel less than it is told"
)

FAMILIES = [
    ("CLIPImageProcessor", crop(224, 224)),
    ("CLIPImageProcessor", crop(336, 336)),
    pytest.param("CLIPImageProcessor", crop(201, 224), marks=PADS),
    pytest.param(
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 97}},
        marks=PADS,
    ),
    ("CLIPImageProcessor", {**plain(224, 224), "do_center_crop": False, "resample": 2}),
    ("CLIPImageProcessor", {**plain(256, 260), "crop_size": {"height": 224, "width": 224}}),
    ("BitImageProcessor", crop(256, 224)),
    ("BitImageProcessor", crop(592, 518)),
    ("SiglipImageProcessor", plain(384, 384)),
    ("SiglipImageProcessor", {**plain(224, 336), "resample": 2}),
    ("ViTImageProcessor", plain(224, 224)),
    ("DeiTImageProcessor", {**plain(256, 256), "crop_size": {"height": 224, "width": 224}}),
    ("LlavaImageProcessor", crop(336, 336)),
    ("Siglip2ImageProcessor", {}),
    ("Siglip2ImageProcessor", {"patch_size": 14, "max_num_patches": 729}),
    ("Siglip2ImageProcessor", {"patch_size": 16, "max_num_patches": 7}),
]


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(str(each) for each in value.values())


@pytest.mark.parametrize(("name", "settings"), FAMILIES, ids=name_of)
def test_equal_to_transformers_with_pillow(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = processor_class(f"{name}Pil")(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(tmp_path)
    for picture in WIDE:
        expected = pixels_of(theirs, picture)
        assert float((ours(picture)[0] - expected).abs().max()) <= 1e-6, picture.size  # measured 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**plain(518, 518), "resample": 3},
        {**crop(256, 224), "do_center_crop": True},
        plain(224, 320),
    ],
    ids=name_of,
)
def test_equal_to_dinov3_which_resizes_floats(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = processor_class("DINOv3ViTImageProcessor")(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(tmp_path)
    assert ours.config.resize_in == "floats"
    for picture in WIDE:
        expected = pixels_of(theirs, picture)
        assert float((ours(picture)[0] - expected).abs().max()) <= 1e-6, picture.size  # measured 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("CLIPImageProcessor", crop(336, 336)),
        ("BitImageProcessor", crop(256, 224)),
        ("SiglipImageProcessor", plain(224, 224)),
        ("ViTImageProcessor", plain(224, 224)),
        ("Siglip2ImageProcessor", {}),
    ],
    ids=name_of,
)
def test_levels_by_which_todays_default_processors_differ(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = processor_class(name)(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(tmp_path)
    level = 1 / 255 / torch.tensor(ours.config.std)[:, None, None]
    for picture in WIDE:
        if picture.height > 10 * picture.width:
            continue  # Pillow resizes such strips along the columns first: up to 5 levels
        difference = (ours(picture)[0] - pixels_of(theirs, picture)).abs() / level
        assert float(difference.max()) <= 2.01, picture.size  # measured 2
        assert float(difference.mean()) <= 0.05, picture.size  # measured 0.043


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="needs the photographs of shared/data")
@pytest.mark.parametrize("side", [224, 336])
def test_levels_by_which_the_fast_path_differs_from_todays_default(side: int, tmp_path: Path) -> None:
    theirs = processor_class("CLIPImageProcessor")(**crop(side, side))
    theirs.save_pretrained(tmp_path)
    fast = ImageProcessor.from_pretrained(tmp_path, fast=True)
    level = 1 / 255 / torch.tensor(fast.config.std)[:, None, None]
    differences = []
    for path in sorted(PHOTOGRAPHS.glob("*.jpg"))[:24]:
        differences.append((fast(path)[0] - pixels_of(theirs, Image.open(path))).abs() / level)
    assert max(float(difference.max()) for difference in differences) <= 2.01  # measured 2
    assert float(torch.stack(differences).mean()) <= 0.01  # measured 0.002


SAVED = [
    PreprocessConfig(image_size=224, crop_rounding="down"),
    pytest.param(PreprocessConfig(image_size=(224, 300), resize_to=230, crop_rounding="down"), marks=PADS),
    PreprocessConfig(
        image_size=224,
        resize_to=256,
        crop_rounding="down",
        interpolation="bilinear",
        **STATISTICS["imagenet"],
    ),
    PreprocessConfig(image_size=224, crop_rounding="down", interpolation="lanczos"),
    PreprocessConfig(image_size=384, resize="squash", **STATISTICS["half"]),
    PreprocessConfig(image_size=(224, 336), resize="squash", interpolation="bilinear"),
    PreprocessConfig(image_size=224, resize="squash", resize_to=256, crop_rounding="down"),
    PreprocessConfig(image_size=336, resize="longest", fill=(122, 116, 104)),
    PreprocessConfig(image_size=336, resize="longest", fill=127, **STATISTICS["half"]),
    PreprocessConfig(image_size=256, resize="flexible", max_patches=256, patch_size=16),
    PreprocessConfig(
        image_size=224,
        resize="squash",
        resize_in="floats",
        interpolation="bilinear",
        **STATISTICS["imagenet"],
    ),
]


def saved_class(settings: PreprocessConfig, folder: Path) -> Any:
    ImageProcessor(settings).save_pretrained(folder)
    assert ImageProcessor.from_pretrained(folder).config == settings
    content = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    name = content["image_processor_type"]
    return processor_class(name if settings.resize_in == "floats" else f"{name}Pil")


@pytest.mark.parametrize("settings", SAVED, ids=lambda settings: f"{settings.resize}-{settings.image_size}")
def test_transformers_does_what_we_save(settings: PreprocessConfig, tmp_path: Path) -> None:
    theirs, ours = saved_class(settings, tmp_path).from_pretrained(tmp_path), ImageProcessor(settings)
    for picture in WIDE:
        expected = pixels_of(theirs, picture)
        assert float((ours(picture)[0] - expected).abs().max()) <= 1e-6, picture.size  # measured 0


@pytest.mark.parametrize(
    "settings",
    [
        PreprocessConfig(image_size=336, resize="longest"),
        PreprocessConfig(image_size=(224, 336), resize="longest", fill=(122, 116, 104)),
        PreprocessConfig(image_size=(224, 336)),
    ],
    ids=lambda settings: f"{settings.resize}-{settings.image_size}",
)
def test_transformers_refuses_what_it_cannot_do(settings: PreprocessConfig, tmp_path: Path) -> None:
    theirs = saved_class(settings, tmp_path).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must contain"):
        theirs(WIDE[0], return_tensors="pt")


def test_transformers_moves_the_crop_of_odd_margins_that_open_clip_rounds_up(tmp_path: Path) -> None:
    """With `crop_rounding: even` the file is the nearest that transformers has: at most a pixel aside."""
    settings = PreprocessConfig(image_size=32)
    theirs, ours = saved_class(settings, tmp_path).from_pretrained(tmp_path), ImageProcessor(settings)
    for width in range(32, 72):
        picture = drawn(width, 32)
        margin = width - 32
        moved = margin % 4 == 3  # half of it, rounded to even, is up
        same = torch.equal(ours(picture)[0], pixels_of(theirs, picture))
        assert same is not moved, width


@pytest.mark.skipif(OLD_TRANSFORMERS, reason="its AutoImageProcessor knows no backends")
@pytest.mark.parametrize("settings", SAVED, ids=lambda settings: f"{settings.resize}-{settings.image_size}")
def test_the_auto_class_finds_what_we_save(settings: PreprocessConfig, tmp_path: Path) -> None:
    expected = saved_class(settings, tmp_path)
    backend = "torchvision" if settings.resize_in == "floats" else "pil"
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(found) is expected


def test_the_longer_side_is_rounded_as_by_open_clip() -> None:
    """transformers' `DeepseekVLImageProcessor` multiplies by the inverse: one pixel apart, and rarely."""
    settings = PreprocessConfig(image_size=336, resize="longest")
    sizes = [(height, width) for height in range(2, 1400, 13) for width in range(2, 1400, 11)]
    apart = 0
    for height, width in sizes:
        ratio = 336 / max(height, width)
        theirs = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        ours = resized_size(settings, height, width)
        apart += theirs != ours
        assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) <= 1
    assert apart <= len(sizes) * 1e-3  # measured 1e-4
