"""Every kind of file becomes a picture or an error with a stable reason."""

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from owlsam_ray.errors import FailureClass, ImageError
from owlsam_ray.stages.decode import FORMATS, Decoded, decode_image
from tests.drawn_images import draw_image

MAX_PIXELS = 10**6


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes, stated_hw: tuple[int, int] | None = None) -> Decoded:
    return decode_image(data, stated_hw=stated_hw, max_pixels=MAX_PIXELS)


def reason(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.failure_class is FailureClass.PERMANENT
    return caught.value.reason


def picture(height: int = 6, width: int = 9) -> Image.Image:
    random_ = np.random.default_rng(0)
    return Image.fromarray(random_.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind: str) -> None:
    pixels = decode(save(picture(), kind)).pixels
    assert pixels.shape == (6, 9, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    if kind in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(pixels, np.array(picture()))


def test_real_images(shared: Any) -> None:
    for path in sorted((shared / "data" / "coco_mini" / "images").iterdir())[:10]:
        expected = np.array(Image.open(path).convert("RGB"))
        decoded = decode(path.read_bytes(), (expected.shape[0], expected.shape[1]))
        np.testing.assert_array_equal(decoded.pixels, expected)
        assert decoded.note is None


# Colours


def test_grey_is_repeated() -> None:
    grey = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9))
    np.testing.assert_array_equal(decode(save(grey)).pixels, np.repeat(np.array(grey)[:, :, None], 3, axis=2))
    bilevel = Image.new("1", (2, 1))
    bilevel.putpixel((1, 0), 1)
    assert decode(save(bilevel)).pixels.tolist() == [[[0] * 3, [255] * 3]]


def test_cmyk_becomes_rgb() -> None:
    pixels = decode(save(Image.new("CMYK", (4, 3), (0, 255, 255, 0)), "JPEG", quality=100)).pixels
    assert pixels.shape == (3, 4, 3)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 10


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_dropped(mode: str) -> None:
    image = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    image.putpixel((0, 0), (200, 100, 50, 128))
    palette: dict[str, Any] = {"transparency": 0} if mode == "PA" else {}
    data = save(image.convert("RGB").quantize(4) if mode == "PA" else image.convert(mode), **palette)
    pixels = decode(data).pixels
    expected = image.convert("RGB") if mode != "LA" else image.convert("LA").convert("RGB")
    np.testing.assert_array_equal(pixels, np.array(expected))


def test_palette_with_a_list_of_alphas() -> None:
    image = picture().quantize(8)
    pixels = decode(save(image, transparency=bytes(range(0, 240, 30)))).pixels
    np.testing.assert_array_equal(pixels, np.array(image.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    wide = np.array([[0, 128, 129, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = decode(save(Image.fromarray(wide), kind)).pixels
        assert pixels[0, :, 0].tolist() == [round(value / 257) for value in wide[0].tolist()]


def test_16_bit_colour_keeps_its_high_bytes() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 256 * 7, 0) * 2 for _ in range(2))
    assert decode(png(2, 2, rows, depth=16, colour=2)).pixels[0, 0].tolist() == [255, 7, 0]


def test_floating_point_is_refused() -> None:
    assert reason(save(Image.new("F", (3, 3), 0.5), "TIFF")) == "unsupported_mode: F"
    assert reason(save(Image.new("I", (3, 3), 70_000), "TIFF")) == "unsupported_mode: I beyond 16 bits"


def test_animations_give_their_first_picture() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = save(
            frames[0], kind, save_all=True, append_images=frames[1:], **({} if kind != "WEBP" else {"lossless": True})
        )
        assert decode(data).pixels[0, 0].tolist() == [255, 0, 0]
    assert decode(save(frames[0], "MPO", save_all=True, append_images=frames[1:])).pixels[0, 0, 0] > 240


# Sizes and orientation


def rotated(orientation: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(picture(6, 9), "PNG", exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_like_pillow_does(orientation: int) -> None:
    from PIL import ImageOps

    data = rotated(orientation)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    for stated in (None, expected.shape[:2] if orientation > 4 else None):
        decoded = decode(data, stated)
        np.testing.assert_array_equal(decoded.pixels, expected)
        assert decoded.note is None


def test_exif_orientation_is_left_alone_when_the_raw_size_is_stated() -> None:
    decoded = decode(rotated(6), (6, 9))
    np.testing.assert_array_equal(decoded.pixels, np.array(picture(6, 9)))
    assert decoded.note is None


def test_a_stated_size_that_fits_neither_is_flagged() -> None:
    decoded = decode(rotated(6), (7, 9))
    assert decoded.pixels.shape == (9, 6, 3)
    assert decoded.note == "stated_size_differs: stated 7x9, file 9x6"


@pytest.mark.parametrize("value", [0, 9, 1000])
def test_odd_orientations_are_ignored(value: int) -> None:
    np.testing.assert_array_equal(decode(rotated(value)).pixels, np.array(picture(6, 9)))


def test_one_pixel() -> None:
    assert decode(save(Image.new("RGB", (1, 1), "red"))).pixels.tolist() == [[[255, 0, 0]]]


def test_108_megapixels_are_refused_from_the_header_or_read() -> None:
    data = save(Image.new("1", (12_000, 9_000)))
    assert reason(data) == "too_large: 12000x9000"
    assert decode_image(data, stated_hw=None, max_pixels=200_000_000).pixels.shape == (9000, 12_000, 3)


def test_a_decompression_bomb_costs_nothing() -> None:
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    assert reason(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")).startswith("too_large")


# Damage


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty_file"),
        (b"<html>404 not found</html>", "not_an_image"),
        (b"\0" * 1000, "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not_an_image"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n", "truncated"),
    ],
)
def test_no_picture(data: bytes, expected: str) -> None:
    assert reason(data) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_cut_off_files(kind: str, share: float) -> None:
    data = save(draw_image(1), kind)
    found = reason(data[: int(len(data) * share)])
    assert found == "truncated" or found.startswith("decode_error: "), found


def test_fuzz() -> None:
    """Whatever the bytes are: a picture or an ImageError, and nothing else."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    originals = [save(draw_image(2), kind) for kind in FORMATS] + [rotated(6)]
    outcomes = set()
    for _ in range(600):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(64, len(data)))] = rng.randrange(
                256
            )
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            decoded = decode(bytes(data))
        except ImageError as error:
            outcomes.add(error.reason.split(":")[0])
        else:
            assert decoded.pixels.shape[2] == 3
            outcomes.add("ok")
    assert outcomes >= {"ok", "truncated", "decode_error"}
