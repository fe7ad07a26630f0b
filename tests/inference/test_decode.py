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
from owlsam_ray.inference import decode as decode_module
from owlsam_ray.inference.decode import FORMATS, Decoded, decode_image
from tests.crafted_images import many_scans
from tests.drawn_images import draw_image
from tests.image_files import chunk, originals, png, save, tiff

MAX_PIXELS = 10**6


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


def grey_file(values: list[int], kind: str = "TIFF") -> bytes:
    return save(Image.fromarray(np.array([values], np.uint16)), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("values", "grey16", "expected", "note"),
    [
        ([0, 4095, 4096], "full", [0, 16, 16], None),
        ([0, 2048, 4095], "full", [0, 8, 16], "grey16: the largest value is 4095 of 65535"),
        ([0, 0, 0], "full", [0, 0, 0], None),
        ([0, 2048, 4095], "auto", [0, 128, 255], "grey16: read as 12 bits"),
        ([0, 100, 255], "auto", [0, 100, 255], "grey16: read as 8 bits"),
        ([0, 1, 3], "auto", [0, 1, 3], "grey16: read as 8 bits"),
        ([0, 32768, 65535], "auto", [0, 128, 255], None),
        ([0, 512, 1023], 10, [0, 128, 255], None),
        ([0, 1023, 1024], 10, [0, 255, 255], "grey16: values up to 1024 are cut at 1023"),
        ([0, 32768, 65535], 16, [0, 128, 255], None),
        ([7, 255, 65535], 8, [7, 255, 255], "grey16: values up to 65535 are cut at 255"),
    ],
)
def test_16_bit_grey_by_the_bits_that_it_uses(
    kind: str, values: list[int], grey16: Any, expected: list[int], note: str | None
) -> None:
    decoded = decode_image(grey_file(values, kind), stated_hw=(1, 3), max_pixels=MAX_PIXELS, grey16=grey16)
    assert decoded.pixels[0].tolist() == [[value] * 3 for value in expected]
    assert decoded.note == note
    assert not decoded.size_differs


def test_full_and_16_bits_are_the_same_for_every_value() -> None:
    every = save(Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256)))
    full, sixteen = (
        decode_image(every, stated_hw=None, max_pixels=MAX_PIXELS, grey16=bits).pixels for bits in ("full", 16)
    )
    np.testing.assert_array_equal(full, sixteen)
    assert full[..., 0].ravel().tolist() == [(value + 128) // 257 for value in range(65536)]


def test_two_remarks_stand_in_one_note() -> None:
    decoded = decode(grey_file([0, 255]), (5, 5))
    assert decoded.note == "stated_size_differs: stated 5x5, file 1x2; grey16: the largest value is 255 of 65535"
    assert decoded.size_differs


def test_8_bit_and_scaled_grey_need_no_remark() -> None:
    for data in (save(Image.new("L", (3, 2), 9)), b"P5 2 1 4095\n\x0f\xff\x00\x00", b"P5 2 1 255\n\x09\x00"):
        assert decode_image(data, stated_hw=None, max_pixels=MAX_PIXELS, grey16="auto").note is None


def test_16_bit_colour_keeps_its_high_bytes() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 256 * 7, 0) * 2 for _ in range(2))
    assert decode(png(2, 2, zlib.compress(rows), depth=16, colour=2)).pixels[0, 0].tolist() == [255, 7, 0]


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


def turned(kind: str, orientation: int) -> bytes:
    """A lossless file of the picture (6, 9) with an orientation; JPEG's is not lossless."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "BigTIFF":
        return save(picture(), "TIFF", tiffinfo={0x0112: orientation}, big_tiff=True)
    if kind == "TIFF, compressed":
        return save(picture(), "TIFF", tiffinfo={0x0112: orientation}, compression="tiff_lzw")
    if kind == "TIFF, XMP":
        xmp = f'<x tiff:Orientation="{orientation}"/>'.encode()
        return save(picture(), "TIFF", tiffinfo={700: xmp})
    if kind == "TIFF":
        return save(picture(), "TIFF", tiffinfo={0x0112: orientation})
    return save(picture(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF, compressed", "TIFF, XMP", "BigTIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_all_formats_by_the_stated_size(kind: str, orientation: int) -> None:
    from PIL import ImageOps

    raw = np.array(Image.open(io.BytesIO(save(picture(), kind))).convert("RGB")) if kind == "JPEG" else picture()
    upright = Image.fromarray(np.asarray(raw))
    upright.getexif()[0x0112] = orientation
    expected = np.array(ImageOps.exif_transpose(upright))
    data = turned(kind, orientation)
    as_stated = decode(data, (6, 9))
    np.testing.assert_array_equal(as_stated.pixels, np.asarray(raw))
    assert as_stated.note is None
    without = decode(data)
    np.testing.assert_array_equal(without.pixels, expected)
    assert without.note is None
    if orientation > 4:
        by_upright = decode(data, (9, 6))
        np.testing.assert_array_equal(by_upright.pixels, expected)
        assert by_upright.note is None
    wrong = decode(data, (5, 5))
    np.testing.assert_array_equal(wrong.pixels, expected)
    assert wrong.note == f"stated_size_differs: stated 5x5, file {'9x6' if orientation > 4 else '6x9'}"


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_pictures_are_converted_in_strips(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same pixels, in every mode and orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide = Image.fromarray(np.arange(70 * 90, dtype=np.uint16).reshape(70, 90) * 10)
    base = draw_image(3).resize((90, 70))
    modes = [base, base.convert("L"), base.convert("1"), base.quantize(9), base.convert("RGBA"), wide]
    files = [save(image, "PNG", exif=exif) for image in modes] + [save(base.convert("CMYK"), "JPEG", exif=exif)]
    whole = [decode(data) for data in files]
    monkeypatch.setattr(decode_module, "_STRIP_PIXELS", 300)
    for data, expected in zip(files, whole, strict=True):
        np.testing.assert_array_equal(decode(data).pixels, expected.pixels)
        assert decode(data).pixels.flags.c_contiguous
        assert decode(data).pixels.flags.writeable


# What would cost minutes or gigabytes


def test_what_pillow_decodes_in_python_has_a_smaller_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = {name: originals()[name] for name in ("rle.bmp", "plain.ppm")} | {"scaled.ppm": b"P6 3 3 99\n" + bytes(27)}
    for data in sound.values():
        decode(data)
    monkeypatch.setattr(decode_module, "_SLOW_MAX_PIXELS", 8)
    reasons = {name: reason(data) for name, data in sound.items()}
    assert reasons["plain.ppm"] == "too_large: 4x3 in a kind of PPM that is decoded slowly"
    assert reasons["rle.bmp"].endswith("in a kind of BMP that is decoded slowly")
    assert reasons["scaled.ppm"] == "too_large: 3x3 in a kind of PPM that is decoded slowly"
    assert decode(originals()["rgb.bmp"]).note is None


def test_many_scans_are_refused() -> None:
    assert decode(originals()["progressive.jpeg"]).note is None
    assert decode(many_scans(64, 64, 50)).pixels.shape == (64, 64, 3)
    data = many_scans(800, 800, 80_000)
    assert reason(data) == "decode_error: 80001 scans of 800x800"


def test_many_comments_are_refused() -> None:
    few, many = (b"P3 4 3 255\n" + b"#\n" * count + b"1 " * 36 for count in (1000, 1001))
    assert decode(few).pixels[0, 0].tolist() == [1, 1, 1]
    assert reason(many) == "decode_error: more than 1000 comments"


def test_tiles_much_larger_than_the_picture_are_refused() -> None:
    np.testing.assert_array_equal(decode(originals()["tiles.tiff"]).pixels, decode(originals()["grey.png"]).pixels)
    data = originals()["tiles.tiff"]
    at = data.index(struct.pack("<HHI", 322, 4, 1)) + 8
    huge = data[:at] + struct.pack("<I", 2**22) + data[at + 4 :]
    assert reason(huge).startswith("decode_error: tiles of 4194304x32 in a picture of ")


def test_the_size_of_a_webp_canvas_is_looked_at_first() -> None:
    data = bytearray(originals()["animated.webp"])
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xff" * 6
    assert reason(bytes(data)) == "too_large: 16777216x16777216"


def test_decoders_are_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """What libtiff and Pillow would tell stderr names no file."""
    tags = {256: (4, 1, 9), 257: (4, 1, 9), 258: (3, 1, 8), 259: (3, 1, 5), 273: (4, 1, 8), 279: (4, 1, 99)}
    for entries in (tags, tags | {277: (3, 1, 65_535)}):
        with pytest.raises(ImageError, match=r"decode_error|unsupported_mode|truncated"):
            decode(tiff(entries, after=b"\xff" * 200))
    assert capfd.readouterr() == ("", "")


# Damage


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty_file"),
        (b"<html>404 not found</html>", "not_an_image: an HTML page"),
        (b"\0" * 1000, "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not_an_image: a PostScript document"),
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
