from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_vision import ImageProcessor, open_image
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.pictures import MAX_ASPECT
from vlm_vision.tower_config import PreprocessConfig

RED = (220, 20, 30)


def colour_of(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    found = image.getpixel((image.width // 2, image.height // 2))
    assert isinstance(found, tuple)
    return tuple(int(value) for value in found)


def test_a_picture_opens_from_path_string_bytes_stream_and_itself(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 6), RED)
    path = tmp_path / "red.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), image):
        opened = open_image(source)
        assert (opened.size, colour_of(opened)) == ((8, 6), RED)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5)) == (255, 255, 255)
    assert opened.getpixel((10, 35)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB with a transparent colour", "L with one"])
def test_transparency_lies_on_white(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    if mode == "RGBA":
        Image.new("RGBA", (8, 8), (*RED, 0)).save(path)
    elif mode == "LA":
        Image.new("LA", (8, 8), (0, 0)).save(path)
    elif mode == "PA":
        path = path.with_suffix(".tiff")
        Image.new("RGBA", (8, 8), (*RED, 0)).convert("PA").save(path)
        assert Image.open(path).mode == "PA"
    elif mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, *RED])
        palette.save(path, transparency=1)
    else:
        own = mode.split()[0]
        Image.new(own, (8, 8), RED if own == "RGB" else 20).save(
            path, transparency=RED if own == "RGB" else 20
        )
    assert colour_of(open_image(path)) == (255, 255, 255)


def test_half_transparency_is_mixed_with_white() -> None:
    assert colour_of(open_image(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))) == (127, 127, 127)


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (257, 1), (32768, 128), (65535, 255)])
def test_sixteen_bit_greys_are_scaled_not_clipped(value: int, grey: int, tmp_path: Path) -> None:
    pixels = np.full((6, 6), value, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    Image.fromarray(pixels).save(tmp_path / "deep.tiff")
    for path in (tmp_path / "deep.png", tmp_path / "deep.tiff"):
        assert Image.open(path).mode != "L"
        assert colour_of(open_image(path)) == (grey, grey, grey)
    assert colour_of(open_image(Image.fromarray(pixels.astype(np.int32)))) == (grey, grey, grey)


def test_cmyk_palette_grey_and_bilevel_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    red, green, blue = colour_of(open_image(tmp_path / "print.jpg"))
    assert red > 250
    assert max(green, blue) < 6
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert colour_of(open_image(palette)) == RED
    assert colour_of(open_image(Image.new("L", (8, 8), 77))) == (77, 77, 77)
    assert colour_of(open_image(Image.new("1", (8, 8), 1))) == (255, 255, 255)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for name in ("moving.gif", "moving.webp", "moving.png"):
        options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert colour_of(open_image(tmp_path / name)) == (255, 0, 0)


def png_header(width: int, height: int) -> bytes:
    """A PNG that tells a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a picture"),
        (b"<html><body>404 Not Found</body></html>", "is not a picture"),
        (png_header(20_000, 20_000), "exceeds limit|over the limit"),
        (png_header(9_000, 8_000), "9000x8000 is over the limit of 64,000,000 pixels"),
        (png_header(1, 20_000), "over the aspect limit of 200:1"),
        (png_header(20_000, 1), "over the aspect limit of 200:1"),
        (png_header(64, 64), "cannot be decoded"),
    ],
    ids=["empty", "web page", "400 MP", "72 MP", "1xN", "Nx1", "no pixels"],
)
def test_a_broken_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_image(path)
    assert "photo.jpg" in str(caught.value)


def test_a_cut_file_is_named_wherever_it_is_cut(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("photo.jpg", "photo.png", "photo.tiff", "photo.gif", "photo.webp", "photo.bmp"):
        path = tmp_path / name
        Image.fromarray(noise).save(path)
        whole = path.read_bytes()
        assert open_image(path).size == (64, 64)
        for share in (0.02, 0.3, 0.7):
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(DataError, match=name):
                open_image(path)


@pytest.mark.filterwarnings("ignore")
def test_bytes_flipped_anywhere_give_a_picture_or_a_data_error(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in ("photo.jpg", "photo.png", "photo.tiff"):
        path = tmp_path / name
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path, exif=exif)
        whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        refused = 0
        for _ in range(60):
            broken = whole.copy()
            broken[generator.integers(0, min(len(whole), 400), size=4)] = generator.integers(0, 256, size=4)
            try:
                assert open_image(broken.tobytes()).mode == "RGB"
            except DataError:
                refused += 1
        assert refused > 0


def test_missing_files_folders_and_addresses_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.jpg' does not exist"):
        open_image(tmp_path / "absent.jpg")
    with pytest.raises(DataError, match="cannot be decoded"):
        open_image(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_image("http://127.0.0.1:9/picture.jpg")


def test_floats_are_refused_because_their_scale_is_not_known() -> None:
    with pytest.raises(DataError, match="holds floats"):
        open_image(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)))


def test_the_aspect_limit_is_the_last_size_taken() -> None:
    assert open_image(Image.new("RGB", (MAX_ASPECT, 1))).size == (MAX_ASPECT, 1)
    with pytest.raises(DataError):
        open_image(Image.new("RGB", (MAX_ASPECT + 1, 1)))


def test_pictures_of_mixed_sizes_and_kinds_are_one_batch(tmp_path: Path) -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=16))
    Image.new("RGB", (30, 20), RED).save(tmp_path / "red.png")
    pictures: list[Any] = [Image.new("L", (9, 50), 3), tmp_path / "red.png", str(tmp_path / "red.png")]
    pixels = processor(pictures)
    assert pixels.shape == (3, 3, 16, 16)
    assert torch.equal(pixels[1:2], processor(tmp_path / "red.png"))
    assert torch.equal(pixels, processor(tuple(pictures)))
    with pytest.raises(DataError, match="no picture"):
        processor([])


def test_longest_pads_with_the_fill_colour() -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=16, resize="longest", fill=127))
    square = processor.to_square(Image.new("RGB", (32, 16), RED))
    assert bool((square[:4] == 127).all())
    assert square[8, 8].tolist() == list(RED)


def test_denormalise_shows_what_the_backbone_sees() -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=16))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert torch.equal(processor.denormalise(processor(picture))[0], torch.from_numpy(np.array(picture)))


def test_settings_survive_saving(tmp_path: Path) -> None:
    settings = PreprocessConfig(
        image_size=20, resize="longest", interpolation="lanczos", mean=(0, 0.5, 1), fill=9
    )
    ImageProcessor(settings).save_pretrained(tmp_path / "new" / "folder")
    assert ImageProcessor.from_pretrained(tmp_path / "new" / "folder").config == settings


CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": None}, "is not understood"),
        ({"size": {"longest_edge": 3}}, "is not understood"),
        ({"do_center_crop": False}, "does not give one size"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"image_mean": None}, "mean: input should be a valid tuple"),
        ({"resample": 4}, "is not understood"),
        ({"size": {"max_height": 256, "max_width": 256}}, "a size of max_height, max_width is not known"),
        ({"image_processor_type": None}, "image_processor_type is missing"),
        ({"image_processor_type": "SiglipImageProcesor"}, "did you mean 'SiglipImageProcessor'"),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, "do_pad is true"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is"),
    ],
    ids=str,
)
def test_a_preprocessor_file_that_asks_for_more_than_is_known_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(CLIP), encoding="utf-8")
    assert ImageProcessor.from_pretrained(tmp_path).config.image_size == 224
    path.write_text(json.dumps({**CLIP, **changes}), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        ImageProcessor.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_a_preprocessor_file_that_is_missing_or_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        ImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not understood"):
        ImageProcessor.from_pretrained(tmp_path)
