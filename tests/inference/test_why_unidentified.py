"""Files that no decoder takes: what is whole is not called truncated, and what is truncated is."""

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from owlsam_ray.errors import ImageError
from owlsam_ray.inference.decode import decode_image
from owlsam_ray.inference.why_unidentified import why_unidentified
from tests.drawn_images import draw_image
from tests.image_files import chunk, png, save

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def reason(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, stated_hw=None, max_pixels=10**6)
    return caught.value.reason


def bands(pixels: NDArray[np.generic], photometric: int, sample_format: int, *, order: str = "<") -> bytes:
    """A TIFF in one strip, its tags behind the pixels; (H, W, bands)."""
    height, width, count = pixels.shape
    body = pixels.astype(pixels.dtype.newbyteorder("<" if order == "<" else ">")).tobytes()
    lists = struct.pack(f"{order}{2 * count}H", *[8 * pixels.itemsize] * count, *[sample_format] * count)
    at = 8 + len(body)

    def short(value: int) -> int:
        return value if order == "<" else value << 16

    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, count, at),
        (259, 3, 1, short(1)),
        (262, 3, 1, short(photometric)),
        (273, 4, 1, 8),
        (277, 3, 1, short(count)),
        (278, 4, 1, height),
        (279, 4, 1, len(body)),
        (339, 3, count, at + 2 * count),
    ]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at + len(lists))
    packed = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    return head + body + lists + struct.pack(f"{order}H", len(entries)) + packed + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("count", "kind", "photometric", "sample_format", "told"),
    [
        (8, np.uint16, BLACK_IS_ZERO, UNSIGNED, "a TIFF of 8 x 16 bits, unsigned, BlackIsZero"),
        (3, np.uint8, BLACK_IS_ZERO, UNSIGNED, "a TIFF of 3 x 8 bits, unsigned, BlackIsZero"),
        (5, np.uint8, WHITE_IS_ZERO, UNSIGNED, "a TIFF of 5 x 8 bits, unsigned, WhiteIsZero"),
        (3, np.float32, RGB, FLOAT, "a TIFF of 3 x 32 bits, float, RGB"),
        (3, np.int16, RGB, SIGNED, "a TIFF of 3 x 16 bits, signed, RGB"),
        (12, np.uint16, RGB, UNSIGNED, "a TIFF of 12 x 16 bits, unsigned, RGB"),
    ],
)
def test_tiff_of_bands_that_pillow_lacks(
    order: str, count: int, kind: type[np.generic], photometric: int, sample_format: int, told: str
) -> None:
    data = bands(np.ones((7, 5, count), kind), photometric, sample_format, order=order)
    assert reason(data) == f"unsupported_mode: {told}"


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_such_bands_that_is_cut_is_truncated(order: str) -> None:
    pixels = np.ones((7, 5, 8), np.uint16)
    whole = bands(pixels, BLACK_IS_ZERO, UNSIGNED, order=order)
    for length in (9, 100, len(whole) - 130, len(whole) - 20):
        assert reason(whole[:length]) == "truncated", length
    # The tags come first in most files: all there, and the pixels are not.
    tags_first = bytearray(whole)
    at = whole.index(struct.pack(f"{order}HHII", 273, 4, 1, 8)) + 8
    tags_first[at : at + 4] = struct.pack(f"{order}I", len(whole))
    assert reason(bytes(tags_first)) == "truncated"


def test_tiff_with_an_unknown_compression() -> None:
    whole = save(draw_image(1), "TIFF")
    at = whole.index(struct.pack("<HHI", 259, 3, 1)) + 8
    assert reason(whole[:at] + struct.pack("<H", 9999) + whole[at + 2 :]) == (
        "unsupported_mode: a TIFF with compression 9999"
    )


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (b"WAVEfmt ", "not_an_image: WAV"),
        (b"AVI LIST", "not_an_image: AVI"),
        (b"ACONanih", "not_an_image: ANI"),
        (b"what is ", "not_an_image"),
    ],
)
def test_riff_files_that_are_no_webp(form: bytes, expected: str) -> None:
    body = form + bytes(40)
    assert reason(b"RIFF" + struct.pack("<I", len(body)) + body) == expected


def in_jpeg_frame(offset: int, new: bytes) -> bytes:
    data = save(draw_image(4), "JPEG")
    at = data.index(b"\xff\xc0") + offset
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: png(0, 2, zlib.compress(b"\0\0")), "decode_error: 0x2"),
        (lambda: png(3, 0, zlib.compress(b"")), "decode_error: 3x0"),
        (lambda: in_jpeg_frame(7, b"\0\0"), "decode_error: 0x"),
        (lambda: in_jpeg_frame(4, b"\x0c"), "unsupported_mode: a JPEG of 12 bits"),
        (lambda: in_jpeg_frame(9, b"\2"), "unsupported_mode: a JPEG of 2 components"),
        (lambda: png(1, 1, zlib.compress(b"\0\0"), depth=3), "decode_error: a PNG of colour type 2 with 3 bits"),
    ],
)
def test_whole_files_with_an_odd_header(make: Callable[[], bytes], expected: str) -> None:
    assert reason(make()).startswith(expected)


def test_tiff_without_width() -> None:
    whole = save(Image.new("L", (6, 4)), "TIFF")
    at = whole.index(struct.pack("<HHI", 256, 4, 1)) + 8
    assert reason(whole[:at] + bytes(4) + whole[at + 4 :]) == "decode_error: 0x4"


@pytest.mark.parametrize("kind", [b"gAMA", b"tEXt", b"pHYs"])
def test_a_wrong_checksum_of_a_chunk_is_named(kind: bytes) -> None:
    bodies = {b"gAMA": bytes(4), b"tEXt": b"a\0b", b"pHYs": bytes(9)}
    extra = bytearray(chunk(kind, bodies[kind]))
    extra[-1] ^= 1
    whole = png(1, 1, zlib.compress(bytes(4)), before=bytes(extra))
    assert reason(whole) == f"decode_error: the checksum of the ancillary chunk {kind.decode()} is wrong"
    assert reason(whole[:-30]) == "truncated"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_beginnings_of_files_are_truncated(kind: str) -> None:
    whole = save(draw_image(5), kind)
    for length in (3, 4, 6, 8, 10):
        assert why_unidentified(whole[:length]) == "truncated", length


@pytest.mark.parametrize("data", [b"x", b"GI", b"<svg/>", b"RIP", b"PNG\r\n", bytes(50)])
def test_what_is_no_image(data: bytes) -> None:
    assert reason(data) == "not_an_image"
