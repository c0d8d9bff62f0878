"""Tars in CLIP_benchmark's folder layout, as its exporter writes them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["zebra", "traffic light", "10"]  # by number, in no order; one is called like a number


def picture(number: int) -> Image.Image:
    random = np.random.default_rng(number)
    return Image.fromarray(random.integers(0, 256, (24, 30, 3), dtype=np.uint8))


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def sample(number: int, text: str, kind: str, suffix: str = "png") -> tuple[str, dict[str, bytes]]:
    buffer = io.BytesIO()
    options = {"lossless": True} if suffix == "webp" else {}
    picture(number).save(buffer, format={"jpg": "jpeg"}.get(suffix, suffix), **options)
    return f"s{number:07d}", {suffix: buffer.getvalue(), kind: text.encode()}
