"""Functions of LLaVA, LLaVA-NeXT and scaling_on_scales, run from checkouts that environment variables name.

VLM_VISION_LLAVA, VLM_VISION_LLAVA_NEXT and VLM_VISION_S2 are folders of haotian-liu/LLaVA,
LLaVA-VL/LLaVA-NeXT and bfshi/scaling_on_scales; VLM_VISION_PROJECTOR_REFERENCES is a folder of checkouts that
have projectors (LLaVA, LLaVA-NeXT, MobileVLM, VILA, honeybee, nanoVLM, prismatic-vlms); VLM_VISION_PHOTOS is
a folder of photographs. What is not named is not compared.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vlm_vision import open_image
from vlm_vision.preprocess import find_pictures

LLAVA, LLAVA_NEXT, S2 = "VLM_VISION_LLAVA", "VLM_VISION_LLAVA_NEXT", "VLM_VISION_S2"
PHOTOS = "VLM_VISION_PHOTOS"
PROJECTORS = "VLM_VISION_PROJECTOR_REFERENCES"
# What is recorded holds threads of pictures, which Pillow 12 (the last for Python 3.10) resizes otherwise.
of_this_pillow = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason="recorded with Pillow 13, which resizes threads anew"
)

# (width, height) of 50 pictures: single pixels, threads of up to 200:1, exact tiles, and every kind between.
ODD_SIZES = [
    *[(1, 1), (2, 1), (1, 7), (13, 13), (7, 31), (33, 32), (32, 33), (28, 28), (56, 28), (28, 84)],
    *[(1, 200), (200, 1), (2, 400), (400, 2), (3, 500), (900, 5), (6, 1100), (1500, 9), (16, 700), (700, 16)],
    *[(336, 336), (672, 336), (336, 672), (672, 672), (1008, 336), (336, 1008), (335, 337), (673, 671)],
    *[(500, 333), (333, 500), (640, 427), (481, 640), (1024, 6), (57, 2000), (2016, 2016), (1999, 1501)],
    *[(1200, 300), (300, 1201), (1345, 672), (671, 1343), (97, 389), (389, 97), (150, 149), (224, 448)],
    *[(800, 799), (1280, 720), (720, 1281), (999, 111), (111, 998), (1777, 250)],
]


def drawn(width: int, height: int) -> Image.Image:
    """A picture from arithmetic alone, rough and smooth in places: the same bytes everywhere."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [x * 3 + y * 5, (x * x + 7 * y) // 3, (x ^ y) * 11 + x]
    return Image.fromarray((np.stack(channels, axis=-1) % 256).astype(np.uint8))


def odd_sizes(side: int) -> list[tuple[int, int]]:
    """Those that tiles of this side can show: of thinner ones less than a pixel would be left."""
    return [size for size in ODD_SIZES if max(size) < side * min(size)]


def odd_pictures(side: int) -> list[Image.Image]:
    """Of odd_sizes: photographs cropped and scaled where a folder of them is named, else drawn ones."""
    sizes, folder = odd_sizes(side), os.environ.get(PHOTOS)
    if folder is None:
        return [drawn(*size) for size in sizes]
    photographs = [open_image(path) for path in find_pictures(Path(folder))[: len(sizes)]]
    return [ImageOps.fit(photograph, size) for photograph, size in zip(photographs, sizes, strict=True)]


def checkout(variable: str) -> Path:
    """The folder that a variable names; without it the test is skipped."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout")
    return Path(os.environ[variable])


@contextmanager
def _in_place_of(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Modules under names of a package that is not installed, for as long as something is imported."""
    top = {name.partition(".")[0] for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in top]:
            del sys.modules[name]


def _package(name: str, folder: Path | None = None, **content: Any) -> ModuleType:
    module = ModuleType(name)
    if folder is not None:
        module.__path__ = [str(folder)]
    vars(module).update(content)
    return module


def module_of(folder: Path, name: str, **beside: Mapping[str, Any]) -> ModuleType:
    """A module by its name within a folder of a checkout, whose packages' own imports are left out.

    Args:
        beside: what modules hold from which it imports.
    """
    modules = {"checkout": _package("checkout", folder)}
    for part in name.split(".")[:-1]:
        modules[f"checkout.{part}"] = _package(f"checkout.{part}", folder / part)
    for module, content in beside.items():
        path = f"checkout.{module}"
        vars(modules.setdefault(path, _package(path))).update(content)
    with _in_place_of(modules):
        return importlib.import_module(f"checkout.{name}")


def llava(variable: str) -> SimpleNamespace:
    """`mm_utils` and `llava_arch` of a checkout; what they import beside, and we leave unused, is empty."""
    root = checkout(variable) / "llava"
    nothing = {"build_vision_tower": None, "build_vision_resampler": None, "build_vision_projector": None}
    modules = {"llava": _package("llava", root), "llava.model": _package("llava.model", root / "model")}
    modules["llava.utils"] = _package("llava.utils", rank0_print=print, rank_print=print)
    for part in ("encoder", "resampler", "projector"):
        name = f"llava.model.multimodal_{part}"
        modules[name] = _package(name, Path())
        modules[f"{name}.builder"] = _package(f"{name}.builder", **nothing)
    with _in_place_of(modules):
        return SimpleNamespace(
            mm_utils=importlib.import_module("llava.mm_utils"),
            arch=importlib.import_module("llava.model.llava_arch"),
        )


def llava_training(variable: str) -> ModuleType:
    """`train.train` of a checkout, for how it turns conversations into tokens; models and trainers are empty.

    LLaVA-NeXT's `conversation`, which asks a hub for a tokenizer, is empty too: its `preprocess_qwen` is
    without.
    """
    root = checkout(variable) / "llava"
    modules = {"llava": _package("llava", root), "llava.train": _package("llava.train", root / "train")}
    modules["llava.model"] = _package("llava.model")
    modules["llava.train.llava_trainer"] = _package("llava.train.llava_trainer", LLaVATrainer=None)
    if variable == LLAVA_NEXT:
        nothing = {"process_video_with_pyav": None, "process_video_with_decord": None}
        modules["llava.utils"] = _package("llava.utils", rank0_print=print, **nothing)
        modules["llava.conversation"] = _package("llava.conversation")
        vars(modules["llava"])["conversation"] = modules["llava.conversation"]
    with _in_place_of(modules):
        return importlib.import_module("llava.train.train")


def siglip_processor(variable: str) -> Any:
    """LLaVA-NeXT's own image processor of SigLIP."""
    folder = checkout(variable) / "llava" / "model" / "multimodal_encoder"
    modules = {
        "llava": _package("llava", Path()),
        "llava.utils": _package("llava.utils", rank0_print=print),
        "llava.encoders": _package("llava.encoders", folder),
    }
    with _in_place_of(modules):
        return importlib.import_module("llava.encoders.siglip_encoder").SigLipImageProcessor()


def clip_processor(side: int) -> Any:
    """CLIP's image processor as LLaVA uses it, on Pillow, with sizes as the dicts that LLaVA's pins have."""
    import transformers

    on_pillow = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    size, crop = {"shortest_edge": side}, {"height": side, "width": side}
    processor = on_pillow(size=size, crop_size=crop)

    class AsPinned:
        image_mean = processor.image_mean

        def __init__(self) -> None:
            self.size, self.crop_size = size, crop

        def preprocess(self, images: Any, return_tensors: str) -> Any:
            # Said, for it takes a side of 1 or 3 pixels for the channels.
            return processor(images, return_tensors=return_tensors, input_data_format="channels_last")

        __call__ = preprocess

    return AsPinned()


def llava_tokens(
    arch: ModuleType,
    features: Tensor,
    image_size: tuple[int, int],
    settings: Mapping[str, Any],
    *,
    side: int,
    newline: Tensor,
) -> Tensor:
    """What `prepare_inputs_labels_for_multimodal` puts in place of `<image>`, given the tiles' features."""

    class Tower:
        image_size = side
        num_patches_per_side = int(features.shape[1] ** 0.5)
        config = SimpleNamespace(image_size=side)

        def __call__(self, pixels: Tensor) -> Tensor:
            assert len(pixels) == len(features)
            return features

    tower = Tower()
    base: Any = arch.LlavaMetaForCausalLM

    class Model(base):  # type: ignore[misc]
        config = SimpleNamespace(**settings)
        device, training = features.device, False
        model = SimpleNamespace(
            image_newline=newline,
            get_vision_tower=lambda: tower,
            mm_projector=lambda values: values,
            embed_tokens=lambda ids: features.new_zeros(len(ids), features.shape[-1]),
        )

        def get_model(self) -> Any:
            return self.model

    pixels = [torch.zeros(len(features), 3, 1, 1)]
    prompt = torch.tensor([[5, -200]])
    outputs = Model().prepare_inputs_labels_for_multimodal(
        prompt, None, None, None, None, pixels, image_sizes=[image_size]
    )
    tokens: Tensor = outputs[4][0, 1:]
    return tokens


def s2wrapper() -> ModuleType:
    """scaling_on_scales' package."""
    root = checkout(S2) / "s2wrapper"
    with _in_place_of({"s2wrapper": _package("s2wrapper", root)}):
        return importlib.import_module("s2wrapper.core")


def llava_s2_tower(folder: Path, scales: str) -> Any:
    """LLaVA's CLIPVisionTowerS2, loaded the one way in which it loads, on S2's own functions."""
    encoders = checkout(LLAVA) / "llava" / "model" / "multimodal_encoder"
    modules = {"llava": _package("llava", encoders), "s2wrapper": _package("s2wrapper")}
    modules["s2wrapper"].forward = s2wrapper().forward  # type: ignore[attr-defined]
    settings = SimpleNamespace(mm_vision_select_layer=-2, s2_scales=scales)
    with _in_place_of(modules):
        tower = importlib.import_module("llava.clip_encoder").CLIPVisionTowerS2(
            str(folder), settings, delay_load=True
        )
    tower.load_model()
    return tower
