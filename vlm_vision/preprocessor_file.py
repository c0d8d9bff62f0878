"""`preprocessor_config.json`: the settings of an image processor, in transformers' words and in ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlm_vision.config import validate
from vlm_vision.errors import ConfigError, DataError, nearest
from vlm_vision.tower_config import PreprocessConfig

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # where transformers 5 puts what its processors consist of
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class _Defaults(NamedTuple):
    """What a class of transformers does where the file is silent."""

    resample: Image.Resampling
    crops: bool
    int_is_square: bool  # a size that is one number: both sides, or the shorter one


_CROPS = _Defaults(Image.Resampling.BICUBIC, crops=True, int_is_square=False)
_CLASSES = {
    "CLIPImageProcessor": _CROPS,
    "LlavaImageProcessor": _CROPS,
    "LlavaNextImageProcessor": _CROPS,
    "BitImageProcessor": _CROPS,  # DINOv2's
    "DeiTImageProcessor": _Defaults(Image.Resampling.BICUBIC, crops=True, int_is_square=True),
    "SiglipImageProcessor": _Defaults(Image.Resampling.BICUBIC, crops=False, int_is_square=False),
    "ViTImageProcessor": _Defaults(Image.Resampling.BILINEAR, crops=False, int_is_square=True),
    "DINOv3ViTImageProcessor": _Defaults(Image.Resampling.BILINEAR, crops=False, int_is_square=True),
    "Siglip2ImageProcessor": _Defaults(Image.Resampling.BILINEAR, crops=False, int_is_square=True),
}


def read_preprocess(path: Path) -> PreprocessConfig:
    """A `preprocessor_config.json`, ours or transformers', as our settings; or a `processor_config.json`.

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
    if isinstance(content, dict):
        content = content.get("image_processor", content)
    if isinstance(content, dict) and "vlm_vision" in content:
        return validate(PreprocessConfig, content["vlm_vision"], str(path))
    try:
        settings = _from_transformers(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: is not understood ({error!r}); set `backbone.preprocess` by hand"
        ) from error
    return validate(PreprocessConfig, settings, str(path))


def write_preprocess(config: PreprocessConfig, path: Path) -> None:
    """Write our settings, and the class and keys with which transformers does the same.

    The same pixels with its PIL backend: `squash` and `flexible`; `shortest` where `crop_rounding` is `down`
    (with `even`, as open_clip rounds, half of the odd margins move the crop by one pixel); `longest` where
    `fill` is the mean colour, cut to whole levels. For the rest transformers has no class: what is written
    then loads, and raises when it is called.
    """
    rows, columns = config.height, config.width
    content: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": max(rows, columns)},
        "resample": int(RESAMPLING[config.interpolation]),
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        **_in_transformers_words(config),
        "vlm_vision": config.model_dump(mode="json"),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_in_transformers(config: PreprocessConfig) -> bool:
    """Whether transformers has a class for these settings, so that what `write_preprocess` writes can run."""
    return config.resize == "flexible" or "size" in _in_transformers_words(config)


def _in_transformers_words(config: PreprocessConfig) -> dict[str, Any]:
    target = config.resize_to or config.image_size
    rows, columns = (target, target) if isinstance(target, int) else target
    square = rows == columns
    window = {"height": config.height, "width": config.width}
    words: dict[str, Any] = {}
    if config.resize == "flexible":
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            "patch_size": config.patch_size,
            "max_num_patches": config.max_patches,
        }
    if config.resize == "longest":
        mean_colour = tuple(int(value * 255) for value in config.mean)
        fill = (config.fill,) * 3 if isinstance(config.fill, int) else config.fill
        if not (square and window == {"height": rows, "width": columns} and fill == mean_colour):
            return {}
        words = {
            "image_processor_type": "DeepseekVLImageProcessor",
            "do_pad": True,
            "min_size": 1,
            "size": window,
        }
    elif config.resize == "squash":
        size = {"height": rows, "width": columns}
        words = {"size": size, "do_center_crop": size != window, "crop_size": window}
    elif square:
        words = {"size": {"shortest_edge": rows}, "do_center_crop": True, "crop_size": window}
    if config.resize_in == "floats":
        words["image_processor_type"] = "DINOv3ViTImageProcessor"
    return words


def _from_transformers(content: Any) -> dict[str, Any]:
    name = content.get("image_processor_type") or content.get("feature_extractor_type")
    if name is None:
        raise ValueError("image_processor_type is missing")
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in _CLASSES:
        raise ValueError(f"image_processor_type {name!r} is not known here{nearest(name, _CLASSES)}")
    defaults = _CLASSES[name]
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if content.get(step) is False:
            raise ValueError(f"{step} is false")
    if content.get("do_pad") and name != "LlavaNextImageProcessor":  # which fills up the number of tiles
        raise ValueError("do_pad is true")
    if not math.isclose(content.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor is {content['rescale_factor']}, not 1/255")
    resampling = {int(value): key for key, value in RESAMPLING.items()}
    settings = {
        "interpolation": resampling[int(content.get("resample", defaults.resample))],
        "mean": content["image_mean"],
        "std": content["image_std"],
        "crop_rounding": "down",
        "resize_in": "floats" if name == "DINOv3ViTImageProcessor" else "bytes",
    }
    if name == "Siglip2ImageProcessor":
        patch_size, max_patches = content.get("patch_size", 16), content.get("max_num_patches", 256)
        return {
            **settings,
            "image_size": patch_size * math.isqrt(max_patches),
            "resize": "flexible",
            "patch_size": patch_size,
            "max_patches": max_patches,
        }
    size = content["size"]
    if isinstance(size, int):
        size = {"height": size, "width": size} if defaults.int_is_square else {"shortest_edge": size}
    crops = content.get("do_center_crop", defaults.crops)
    window = _height_and_width(content["crop_size"] if crops else size)
    if set(size) == {"shortest_edge"}:
        return {**settings, "image_size": window, "resize": "shortest", "resize_to": size["shortest_edge"]}
    target = _height_and_width(size)
    return {**settings, "image_size": window, "resize": "squash", "resize_to": target if crops else None}


def _height_and_width(size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    if set(size) == {"shortest_edge"}:
        raise ValueError("shortest_edge without do_center_crop does not give one size")
    if set(size) != {"height", "width"}:
        raise ValueError(f"a size of {', '.join(sorted(size))} is not known here")
    height, width = size["height"], size["width"]
    return height if height == width else (height, width)
