from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from vlm_vision import ImageProcessor, open_image, pictures
from vlm_vision.config import validate
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.pictures import MAX_ASPECT, open_quickly, picture_size
from vlm_vision.preprocess import _interpolate
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


UPRIGHT = {  # EXIF's orientation to the way in which a camera that writes it has turned its picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0},
}


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def corners() -> Image.Image:
    """Another colour in each corner."""
    image = Image.new("RGB", (40, 24))
    for place, colour in (((0, 0), (255, 0, 0)), ((30, 0), (0, 255, 0)), ((0, 16), (0, 0, 255))):
        image.paste(colour, (*place, place[0] + 10, place[1] + 8))
    return image


def metadata_last(content: bytes) -> bytes:
    """A PNG whose metadata come after its pixels."""
    chunks, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big") + 12
        chunks.append(content[at : at + length])
        at += length
    late = [chunk for chunk in chunks if chunk[4:8] == b"eXIf"]
    assert late
    kept = [chunk for chunk in chunks[:-1] if chunk not in late]
    return content[:8] + b"".join([*kept, *late, chunks[-1]])


@pytest.mark.parametrize("orientation", [None, *UPRIGHT])
@pytest.mark.parametrize("kind", [*LOSSLESS, "PNG, late"])
def test_the_size_that_a_header_tells_is_that_of_the_picture(kind: str, orientation: int | None) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    name = kind.partition(",")[0]
    content = saved(
        Image.new("RGB", (31, 17)), name, **({"exif": exif} if orientation else {}), **LOSSLESS[name]
    )
    if name != kind and orientation:
        content = metadata_last(content)
    assert picture_size(content) == open_image(content).size
    opened = Image.open(io.BytesIO(content))
    assert picture_size(opened) == open_image(content).size
    file = io.BytesIO(content)
    assert picture_size(file) == open_image(content).size
    assert picture_size(Image.new("L", (31, 17))) == (31, 17)


def test_the_size_of_a_plain_png_is_told_without_its_pixels() -> None:
    content = saved(Image.effect_noise((300, 200), 90).convert("RGB"), "PNG")
    assert picture_size(content[: len(content) // 2]) == (300, 200)
    with pytest.raises(DataError):
        open_image(content[: len(content) // 2])
    with pytest.raises(DataError, match="over the aspect limit"):
        picture_size(saved(Image.new("L", (3000, 2)), "PNG"))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    turn = UPRIGHT[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    taken = corners() if turn is None else corners().transpose(turn)
    content = saved(taken, kind, exif=exif, **LOSSLESS[kind])
    expected = np.asarray(corners(), dtype=np.int64)
    for source in (content, Image.open(io.BytesIO(content)), open_image(content)):
        opened = np.asarray(open_image(source), dtype=np.int64)
        assert opened.shape == expected.shape
        assert np.abs(opened - expected).max() <= (40 if kind in ("JPEG", "MPO") else 0)
    quick, size, _ = open_quickly(content, lambda rows, columns: (rows, columns))
    assert size == expected.shape[:2]
    assert np.abs(quick[..., :3].numpy() - expected).max() <= (40 if kind in ("JPEG", "MPO") else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File", "ignore:Metadata Warning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\0\x10\0\0\0\0\0\0",
    ],
    ids=["garbage", "cut", "past its end", "orientation 9", "of letters", "of fractions"],
)
def test_a_picture_with_damaged_exif_is_upright(exif: bytes, kind: str) -> None:
    content = saved(corners(), kind, exif=exif, **LOSSLESS[kind])
    assert np.array_equal(
        np.asarray(open_image(content)), np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    )


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


def test_transparency_premultiplied_or_of_deep_greys_lies_on_white() -> None:
    for mode in ("La", "RGBa"):
        assert colour_of(open_image(Image.new(mode, (4, 4)))) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16))
    assert colour_of(open_image(saved(deep, "PNG"))) == (16, 16, 16)
    clear = saved(deep, "PNG", transparency=4000)
    assert Image.open(io.BytesIO(clear)).mode.startswith("I")
    assert colour_of(open_image(clear)) == (255, 255, 255)


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
    swapped = Image.frombytes("I;16B", (6, 6), pixels.astype(">u2").tobytes())
    assert colour_of(open_image(swapped)) == (grey, grey, grey)


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_sixteen_bits_are_refused(value: int) -> None:
    with pytest.raises(DataError, match=f"holds integers from {value} to {value}, whose scale is not known"):
        open_image(Image.fromarray(np.full((4, 4), value, dtype=np.int32)))


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


def test_inks_are_read_with_and_without_adobes_marker() -> None:
    """JPEG files hold 255 for no ink, as Adobe's do; the marker is often lost."""
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    marked = saved(inks, "JPEG", quality=100)
    start = marked.index(b"\xff\xee")
    assert marked[start + 4 : start + 9] == b"Adobe"
    unmarked = marked[:start] + marked[start + 2 + int.from_bytes(marked[start + 2 : start + 4], "big") :]
    for content in (marked, unmarked, saved(inks, "TIFF")):
        assert Image.open(io.BytesIO(content)).mode == "CMYK"
        red, green, blue = colour_of(open_image(content))
        assert red > 250
        assert max(green, blue) < 6


def test_of_several_pages_the_first_is_taken(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("TIFF", "MPO"):
        path = tmp_path / f"pages.{kind.lower()}"
        pages[0].save(path, kind, save_all=True, append_images=pages[1:])
        assert getattr(Image.open(path), "n_frames", 1) == 2
        red, green, _ = colour_of(open_image(path))
        assert red > 250
        assert green < 5
        opened = open_image(path)
        path.unlink()  # and nothing is read any more
        assert opened.resize((8, 8)).size == (8, 8)


def test_progressive_files_and_large_colour_profiles_are_read() -> None:
    content = saved(corners(), "JPEG", progressive=True, icc_profile=bytes(2_000_000), **LOSSLESS["JPEG"])
    assert len(content) > 2_000_000
    plain = saved(corners(), "JPEG", **LOSSLESS["JPEG"])
    assert np.array_equal(np.asarray(open_image(content)), np.asarray(open_image(plain)))


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


def bmp_header(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a picture"),
        (b"<html><body>404 Not Found</body></html>", "is not a picture"),
        (png_header(20_000, 20_000), "is over the limit of 64,000,000 pixels"),
        (png_header(10_000, 10_000), "is over the limit of 64,000,000 pixels"),
        (bmp_header(60_000, 60_000), "is over the limit of 64,000,000 pixels"),
        (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";", "over the limit|not a picture"),
        (png_header(9_000, 8_000), "9000x8000 is over the limit of 64,000,000 pixels"),
        (png_header(1, 20_000), "over the aspect limit of 200:1"),
        (png_header(20_000, 1), "over the aspect limit of 200:1"),
        (png_header(64, 64), "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is a PostScript program"),
    ],
    ids=["empty", "web page", "400 MP", "100 MP", "BMP", "GIF", "72 MP", "1xN", "Nx1", "no pixels", "EPS"],
)
def test_a_broken_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for open_it in (open_image, ImageProcessor(PreprocessConfig(image_size=8), fast=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(DataError, match=message) as caught:
                open_it(path)
        assert "photo.jpg" in str(caught.value)


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_000, 8_000), (1, 20_000)], ids=str)
def test_what_is_too_large_is_refused_before_it_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(image: Image.Image) -> None:
        raise AssertionError("was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(DataError, match="over the"):
        open_image(png_header(*size))
    with pytest.raises(DataError, match="was decoded"):  # and the patch is what decodes
        open_image(png_header(8, 8))


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
    floats = Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32))
    for source in (floats, saved(floats, "TIFF")):
        with pytest.raises(DataError, match="holds floats"):
            open_image(source)


def test_the_aspect_limit_is_the_last_size_taken() -> None:
    assert open_image(Image.new("RGB", (MAX_ASPECT, 1))).size == (MAX_ASPECT, 1)
    with pytest.raises(DataError):
        open_image(Image.new("RGB", (MAX_ASPECT + 1, 1)))
    with pytest.raises(DataError, match="holds no pixels"):
        open_image(Image.new("RGB", (0, 0)))


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
    with pytest.raises(DataError, match="picture 2 of 3: picture: is not a picture"):
        processor([tmp_path / "red.png", b"no", tmp_path / "red.png"])


def noise(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_arrays_and_tensors_of_bytes_are_pictures() -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=16))
    array = noise(30, 20)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = processor(Image.fromarray(array))
    for images in (
        array,
        tensor,
        array[None],
        tensor[None],
        [array],
        [tensor],
        saved(Image.fromarray(array), "PNG"),
    ):
        assert torch.equal(processor(images), expected)
    grey, clear = array[..., 0], np.concatenate([array, np.zeros_like(array[..., :1])], axis=-1)
    assert torch.equal(processor([grey, clear]), processor([Image.fromarray(grey), Image.fromarray(clear)]))
    assert torch.equal(processor(io.BytesIO(saved(Image.fromarray(array), "PNG"))), expected)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (noise(4, 4).astype(np.float32), r"an array of float32 \[4, 4, 3\]; give bytes"),
        (noise(4, 4).astype(bool), "an array of bool"),
        (
            noise(5, 5).transpose(2, 0, 1),
            r"an array of uint8 \[3, 5, 5\]; give bytes \(numpy.uint8\) as \[h, w, 3\]",
        ),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"torch.uint8 \[4, 4, 3\] on cpu; give bytes"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "a tensor of torch.int64: give bytes"),
        (torch.zeros(4, 4), r"a tensor of pictures is \[3, h, w\] or \[b, 3, h, w\]"),
        (torch.full((3, 4, 4), 200.0), "floats from 200 to 200: give 0 to 1"),
        (torch.full((3, 4, 4), float("nan")), "floats from nan to nan"),
        (torch.zeros(3, 1, 900), "900x1 is over the aspect limit"),
        (torch.zeros(3, 0, 9), "9x0 holds no pixels"),
    ],
    ids=str,
)
def test_pixels_of_another_kind_are_refused(pixels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageProcessor(PreprocessConfig(image_size=8))(pixels)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (None, "NoneType"),
        (3, "int"),
        ({"image": "a.jpg"}, "dict"),
        ([["a.jpg"]], "list"),
        ([None], "NoneType"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_what_is_no_picture_is_refused(given: Any, kind: str, fast: bool) -> None:
    with pytest.raises(DataError, match=f"a picture is a path, a file.*; this is a {kind}"):
        ImageProcessor(PreprocessConfig(image_size=8), fast=fast)(given)


def smooth(height: int, width: int) -> np.ndarray[Any, Any]:
    """Waves with a little noise: like a photograph, not at the edge of what bytes can hold."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (9 + 4 * channel)) * np.cos(columns / 13) for channel in range(3)]
    shade = 128 + 90 * np.stack(waves, axis=-1)
    return (shade + np.random.default_rng(0).normal(0, 6, shade.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_tensors_are_resized_by_torch_nearly_as_by_pillow(resize: Any, interpolation: Any) -> None:
    settings = PreprocessConfig(image_size=48, resize=resize, interpolation=interpolation, fill=(9, 90, 200))
    processor = ImageProcessor(settings)
    for array in (smooth(200, 150), smooth(37, 61), noise(60, 90)):
        exact = processor.to_square(array).float()
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        floats = processor.to_square(tensor / 255)
        assert floats.dtype == torch.float32
        assert float((floats * 255 - exact).abs().max()) <= 1.5  # measured 1.17, and 0.28 on average
        halves = processor.to_square((tensor / 255).half())
        assert float((halves * 255 - exact).abs().max()) <= 2
        for in_bytes in (processor._resize_tensors(tensor[None])[0], as_on_a_gpu(processor, tensor)):
            assert in_bytes.dtype == torch.uint8
            difference = (in_bytes.float() - exact).abs()
            assert float(difference.max()) <= 2  # measured 2
            assert float(difference.mean()) <= 0.1  # measured 0.05


def as_on_a_gpu(processor: ImageProcessor, tensor: torch.Tensor) -> torch.Tensor:
    """The way of bytes that are not on the CPU, taken there."""

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    return processor._resize_tensors(tensor[None].as_subclass(Elsewhere)).as_subclass(torch.Tensor)[0]


def test_pixels_carry_no_gradient() -> None:
    pixels = ImageProcessor(PreprocessConfig(image_size=8))(torch.rand(2, 3, 9, 9, requires_grad=True))
    assert not pixels.requires_grad


def test_a_batch_of_tensors_is_its_pictures() -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=24, resize="longest", fill=7))
    batch = torch.rand(3, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(processor(batch), torch.cat([processor(picture) for picture in batch]))
    assert torch.equal(processor(batch), processor(list(batch)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 50, 40), (2, 3, 50, 40)], ids=str)
@pytest.mark.parametrize("fast", [False, True])
def test_pixels_lie_where_the_tensor_lies(dtype: torch.dtype, shape: tuple[int, ...], fast: bool) -> None:
    for settings in (
        PreprocessConfig(image_size=(16, 24)),
        PreprocessConfig(image_size=(16, 24), resize="longest", fill=(1, 2, 3)),
        PreprocessConfig(image_size=(16, 24), resize="squash", resize_in="floats"),
    ):
        pixels = ImageProcessor(settings, fast=fast)(torch.empty(shape, dtype=dtype, device="meta"))
        assert pixels.device.type == "meta"
        assert pixels.dtype == torch.float32
        assert pixels.shape == (len(shape) - 2 if len(shape) == 3 else 2, 3, 16, 24)
    with pytest.raises(DataError, match=r"several devices \(cpu, meta\)"):
        ImageProcessor(settings)([torch.zeros(3, 9, 9), torch.empty(3, 9, 9, device="meta")])


@pytest.mark.parametrize("fast", [False, True])
def test_tensors_never_pass_through_pillow_numpy_or_the_cpu(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU what a GPU's tensors go through, with every way off it shut."""

    def left(*_: Any, **__: Any) -> None:
        raise AssertionError("left its device")

    for name in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, left)
    monkeypatch.setattr("vlm_vision.preprocess.open_image", left)
    monkeypatch.setattr("vlm_vision.preprocess.open_quickly", left)
    processor = ImageProcessor(PreprocessConfig(image_size=(16, 24)), fast=fast)
    assert processor(torch.rand(2, 3, 40, 50)).shape == (2, 3, 16, 24)
    assert processor([torch.rand(3, 40, 50), torch.rand(3, 9, 30)]).shape == (2, 3, 16, 24)
    with pytest.raises(AssertionError, match="left its device"):  # and bytes on the CPU are Pillow's
        processor(torch.zeros(3, 40, 50, dtype=torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_pixels_of_a_gpu_are_those_of_the_cpu(resize: Any, fast: bool) -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=48, resize=resize, fill=9), fast=fast)
    levels = torch.from_numpy(smooth(200, 150)).permute(2, 0, 1)
    for picture in (levels, levels / 255, torch.stack([levels, levels])):
        torch.cuda.synchronize()
        pixels = processor(picture.cuda())
        assert pixels.device.type == "cuda"
        expected = processor(picture).expand_as(pixels)
        assert float((pixels.cpu() - expected).abs().max()) <= 2.1 / 255 / 0.26


@pytest.mark.parametrize("fast", [False, True])
def test_the_callers_default_dtype_and_device_change_nothing(fast: bool) -> None:
    picture = Image.fromarray(noise(30, 20))
    for settings in (PreprocessConfig(image_size=16), PreprocessConfig(image_size=16, resize_in="floats")):
        expected = ImageProcessor(settings, fast=fast)(picture)
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(ImageProcessor(settings, fast=fast)(picture), expected)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert torch.equal(ImageProcessor(settings, fast=fast)(picture), expected)


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_what_torch_cannot_do_is_said(interpolation: Any) -> None:
    settings = PreprocessConfig(image_size=8, interpolation=interpolation)
    assert ImageProcessor(settings)(noise(9, 9)).shape == (1, 3, 8, 8)
    with pytest.raises(ConfigError, match=f"torch has no '{interpolation}'"):
        ImageProcessor(settings, fast=True)
    with pytest.raises(ConfigError, match="give pictures, or bytes on the CPU"):
        ImageProcessor(settings)(torch.zeros(3, 9, 9))


def test_each_level_is_normalised_as_by_the_formula() -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=16))
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    mean, std = torch.tensor(processor.config.mean), torch.tensor(processor.config.std)
    expected = (levels.float() / 255 - mean) / std
    for squares in ([levels, levels], torch.stack([levels, levels])):
        pixels = processor.normalise(squares)
        assert torch.equal(pixels[1], expected.permute(2, 0, 1))
        assert pixels.is_contiguous()
    fast = ImageProcessor(processor.config, fast=True).normalise([levels])[0]
    assert float((fast - pixels[0]).abs().max()) <= 5e-7  # measured 2.4e-7


@pytest.mark.parametrize("fast", [False, True])
def test_a_decoders_fourth_channel_changes_nothing(fast: bool) -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=16), fast=fast)
    padded = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8))
    cropped = padded[2:18, 3:19]
    assert torch.equal(processor.normalise([cropped]), processor.normalise([cropped[..., :3]]))


@pytest.mark.parametrize("size", [(400, 600), (801, 1203), (1600, 1201)], ids=str)
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest", "flexible"])
def test_the_fast_path_is_near_the_exact_one(resize: Any, size: tuple[int, int]) -> None:
    flexible = {"max_patches": 20, "patch_size": 16} if resize == "flexible" else {}
    settings = PreprocessConfig(image_size=64, resize=resize, **flexible)
    content = saved(Image.fromarray(smooth(*size)), "JPEG", quality=90)
    exact, fast = ImageProcessor(settings), ImageProcessor(settings, fast=True)
    difference = (exact.to_square(content).float() - fast.to_square(content).float()).abs()
    assert float(difference[16:-16, 16:-16].max()) <= 6  # measured 5
    assert float(difference.max()) <= 12  # measured 11, where a scaled file ends within a pixel
    assert float(difference.mean()) <= 1.1  # measured 1.02 at an eighth, 0.31 at a half and a quarter
    assert torch.equal(fast(content), fast(io.BytesIO(content)))


def test_the_fast_path_decodes_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(Image.fromarray(smooth(1200, 1600)), "JPEG")
    pixels, size, covered = open_quickly(content, lambda rows, columns: (75, 100))
    assert (tuple(pixels.shape[:2]), size, covered) == ((150, 200), (75, 100), (150.0, 200.0))
    pixels, _, covered = open_quickly(content, lambda rows, columns: (200, 260))
    assert (tuple(pixels.shape[:2]), covered) == ((600, 800), (600.0, 800.0))


def test_the_fast_path_resizes_no_more_than_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    resized: list[Any] = []

    def interpolate(pictures: torch.Tensor, size: Any, *settings: Any) -> torch.Tensor:
        resized.append((tuple(pictures.shape[2:]), size))
        return _interpolate(pictures, size, *settings)

    monkeypatch.setattr("vlm_vision.preprocess._interpolate", interpolate)
    fast = ImageProcessor(PreprocessConfig(image_size=96), fast=True)
    fast(noise(160, 320))  # 96 of 192 columns, of which every third begins where a pixel does
    fast(noise(150, 90))  # 96 of 160 rows, of which every sixteenth does
    assert resized == [((160, 170), (96, 99)), ((108, 90), (112, 96))]


def whole(given: int, ratio: float, resized: int, first: int, wanted: int) -> tuple[slice, int, int]:
    return slice(given), resized, first


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_what_is_not_resized_is_not_missed(interpolation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for number in range(60):
        height, width = (int(side) for side in generator.integers(20, 300, size=2))
        settings = PreprocessConfig(
            image_size=96 if number % 2 else (80, 112),
            resize_to=110 if number % 3 else None,
            interpolation=interpolation,
        )
        fast, array = ImageProcessor(settings, fast=True), noise(height, width)
        square = fast.to_square(array).float()
        with monkeypatch.context() as patched:
            patched.setattr("vlm_vision.preprocess._needed", whole)
            difference = (fast.to_square(array).float() - square).abs()
        # On noise, moved by 1/256 of a pixel: measured 1 and 0.25. Where it is not moved, nothing differs.
        assert float(difference.max()) <= 2, (height, width)
        assert float(difference.mean()) <= 0.4, (height, width)


@pytest.fixture(params=["simplejpeg", "torchvision", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What decodes JPEG files on the fast path: the extra's, torchvision's, or none but Pillow."""
    name: str = request.param
    if name == "simplejpeg":
        pytest.importorskip("simplejpeg")
        found = pictures._jpeg_decoder()
    else:
        found = pictures._torchvision_decoder() if name == "torchvision" else None
    if name == "torchvision" and found is None:
        pytest.skip("this torchvision decodes no JPEG files")
    monkeypatch.setattr(pictures, "_jpeg_decoder", lambda: found)
    return name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"progressive": True},
        {"quality": 30, "restart_marker_blocks": 3, "comment": b"none"},
        {"icc_profile": bytes(100_000)},
        {"exif": Image.Exif()},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_every_decoder_gives_pillows_bytes(decoder: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(saved(Image.fromarray(smooth(75, 101)), "JPEG", **options))
    expected = np.asarray(open_image(path))
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        pixels, size, covered = open_quickly(source, lambda rows, columns: (rows, columns))
        assert np.array_equal(pixels[..., :3].numpy(), expected)
        assert size == covered == (75, 101)


def outcome(processor: ImageProcessor, content: bytes) -> torch.Tensor | str:
    try:
        pixels: torch.Tensor = processor(content)
        return pixels
    except DataError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("progressive", [False, True])
def test_the_fast_path_refuses_what_the_exact_one_refuses(decoder: str, progressive: bool) -> None:
    settings = PreprocessConfig(image_size=32)
    exact, fast = ImageProcessor(settings), ImageProcessor(settings, fast=True)
    whole = saved(Image.fromarray(smooth(44, 60)), "JPEG", progressive=progressive)
    broken = [whole[:length] for length in range(0, len(whole), 97)]
    broken += [
        whole[:-1],
        whole[:-2],
        whole[:-3],
        whole + b"more",
        b"\xff" + whole,
        whole[:2] + b"\xff" + whole[2:],
    ]
    generator = np.random.default_rng(2)
    for reach in (30, 400, len(whole)):  # the first markers, the header, everywhere
        for _ in range(80):
            content = np.frombuffer(whole, dtype=np.uint8).copy()
            content[generator.integers(2, reach, size=2)] = generator.integers(0, 256, size=2)
            broken.append(content.tobytes())
    refused = 0
    for content in broken:
        expected, found = outcome(exact, content), outcome(fast, content)
        if isinstance(expected, str) or isinstance(found, str):
            assert expected == found
            refused += 1
        else:
            assert float((expected - found).abs().max()) <= 5.1 / 255 / 0.26  # measured 4, on garbage
    assert len(broken) / 5 < refused < len(broken)


def with_size(content: bytes, width: int, height: int) -> bytes:
    """The same JPEG file, whose header tells another size."""
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + struct.pack(">HH", height, width) + content[frame + 9 :]


@pytest.mark.parametrize(
    "size", [(20_000, 20_000), (9_000, 8_000), (1, 20_000), (20_000, 1), (0, 9)], ids=str
)
def test_too_large_a_jpeg_is_refused_before_it_is_decoded(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(content: bytes) -> torch.Tensor:
        raise AssertionError("was decoded")

    monkeypatch.setattr(pictures, "_jpeg_decoder", lambda: decoded)
    path, content = tmp_path / "photo.jpg", saved(Image.fromarray(smooth(44, 60)), "JPEG")
    exact, fast = (ImageProcessor(PreprocessConfig(image_size=32), fast=quick) for quick in (False, True))
    path.write_bytes(with_size(content, *size))
    for source in (path, path.read_bytes()):
        with pytest.raises(DataError) as expected:
            exact(source)
        with pytest.raises(DataError) as found:
            fast(source)
        assert str(found.value) == str(expected.value)
    with pytest.raises(AssertionError, match="was decoded"):  # and the patch is what decodes
        fast(with_size(content, 60, 44))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["exif", "xmp"])
def test_the_fast_path_turns_pictures_as_the_exact_one(decoder: str, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    tag = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{orientation}"/>'
    options: dict[str, Any] = {"exif": exif} if kind == "exif" else {"xmp": tag.encode()}
    exact, fast = (ImageProcessor(PreprocessConfig(image_size=32), fast=quick) for quick in (False, True))
    for side in (48, 96):  # decoded whole, and scaled
        content = saved(Image.fromarray(smooth(side, 2 * side)), "JPEG", quality=95, **options)
        difference = (fast.to_square(content).float() - exact.to_square(content).float()).abs()
        assert float(difference.mean()) <= 0.4  # measured 0.3, scaled
        assert float(difference.max()) <= 6


def test_the_fast_path_takes_every_kind_of_picture() -> None:
    fast = ImageProcessor(PreprocessConfig(image_size=16), fast=True)
    exact = ImageProcessor(PreprocessConfig(image_size=16))
    array = smooth(40, 30)
    pictures: list[Any] = [Image.fromarray(array), array, saved(Image.fromarray(array), "PNG")]
    pictures += [saved(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG"), Image.new("RGBA", (9, 9))]
    pictures += [saved(Image.fromarray(array[..., 0]), "JPEG")]
    assert float((fast(pictures) - exact(pictures)).abs().max()) <= 2.1 / 255 / 0.26


def test_a_cut_jpeg_is_refused_by_the_fast_path_too() -> None:
    for side in (64, 640):  # decoded whole, and scaled
        content = saved(Image.fromarray(smooth(side, side)), "JPEG")
        fast = ImageProcessor(PreprocessConfig(image_size=32), fast=True)
        assert fast(content).shape == (1, 3, 32, 32)
        for share in (0.3, 0.7):
            with pytest.raises(DataError, match="cannot be decoded"):
                fast(content[: int(share * len(content))])


def test_a_callers_open_file_keeps_its_size() -> None:
    opened = Image.open(io.BytesIO(saved(Image.fromarray(smooth(640, 640)), "JPEG")))
    ImageProcessor(PreprocessConfig(image_size=32), fast=True)(opened)
    assert opened.size == (640, 640)


def test_pictures_of_flexible_size_are_a_list_or_a_batch() -> None:
    processor = ImageProcessor(
        PreprocessConfig(image_size=64, resize="flexible", max_patches=16, patch_size=16)
    )
    pixels = processor([Image.new("RGB", (100, 100)), Image.new("RGB", (400, 100))])
    assert [tuple(picture.shape) for picture in pixels] == [(3, 64, 64), (3, 32, 128)]
    assert processor([Image.new("RGB", (100, 100))] * 2).shape == (2, 3, 64, 64)
    for width, height in ((1, 1), (200, 1), (1, 200), (999, 1001)):
        rows, columns = processor.to_square(Image.new("RGB", (width, height))).shape[:2]
        assert rows % 16 == columns % 16 == 0
        assert 0 < (rows // 16) * (columns // 16) <= 16


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_a_rectangle_is_rows_by_columns(resize: Any) -> None:
    settings = PreprocessConfig(image_size=(16, 40), resize=resize)
    assert (settings.height, settings.width) == (16, 40)
    assert ImageProcessor(settings)(Image.new("RGB", (90, 70))).shape == (1, 3, 16, 40)
    assert (PreprocessConfig(image_size=9).height, PreprocessConfig(image_size=9).width) == (9, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": "flexible"}, "needs max_patches and patch_size"),
        ({"max_patches": 4, "patch_size": 8}, "no other mode takes them"),
        ({"resize": "flexible", "max_patches": 4, "patch_size": 8, "resize_to": 9}, "takes no resize_to"),
        ({"resize_in": "floats", "interpolation": "lanczos"}, "knows bicubic and bilinear alone"),
        ({"fill": 256}, "fill"),
        ({"image_size": (8, 0)}, "image_size"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(PreprocessConfig, {"image_size": 8, **settings}, "preprocess")


def test_longest_pads_with_the_fill_colour() -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=16, resize="longest", fill=127))
    square = processor.to_square(Image.new("RGB", (32, 16), RED))
    assert bool((square[:4] == 127).all())
    assert square[8, 8].tolist() == list(RED)


def test_denormalise_shows_what_the_backbone_sees() -> None:
    processor = ImageProcessor(PreprocessConfig(image_size=16))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert torch.equal(processor.denormalise(processor(picture))[0], torch.from_numpy(np.array(picture)))


@pytest.mark.parametrize(
    "settings",
    [
        PreprocessConfig(image_size=20, resize="longest", interpolation="lanczos", mean=(0, 0.5, 1), fill=9),
        PreprocessConfig(image_size=(20, 30), resize_to=(25, 36), fill=(1, 2, 3)),
        PreprocessConfig(image_size=20, resize="squash", resize_in="floats"),
        PreprocessConfig(image_size=64, resize="flexible", max_patches=16, patch_size=16),
    ],
    ids=lambda settings: settings.resize,
)
def test_settings_survive_saving(settings: PreprocessConfig, tmp_path: Path) -> None:
    ImageProcessor(settings).save_pretrained(tmp_path / "new" / "folder")
    assert ImageProcessor.from_pretrained(tmp_path / "new" / "folder").config == settings
    assert ImageProcessor.from_pretrained(
        tmp_path / "new" / "folder", fast=settings.interpolation != "lanczos"
    )


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


def test_settings_within_a_processor_file_of_transformers_5_are_read(tmp_path: Path) -> None:
    path = tmp_path / "processor_config.json"
    path.write_text(
        json.dumps({"image_processor": CLIP, "processor_class": "CLIPProcessor"}), encoding="utf-8"
    )
    assert ImageProcessor.from_pretrained(tmp_path).config.image_size == 224
    path.write_text(json.dumps({"processor_class": "CLIPProcessor"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"processor_config.json: is not understood"):
        ImageProcessor.from_pretrained(tmp_path)


def test_a_preprocessor_file_that_is_missing_or_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        ImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not understood"):
        ImageProcessor.from_pretrained(tmp_path)
