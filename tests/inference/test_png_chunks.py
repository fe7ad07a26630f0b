"""Long texts and profiles of PNG files, which change no pixel."""

import zlib

import numpy as np
import pytest
from PIL import Image

from owlsam_ray.inference.decode import decode_image
from owlsam_ray.inference.png_chunks import without_long_texts
from tests.drawn_images import draw_image
from tests.image_files import chunk, save

PICTURE = draw_image(3)
SOUND = save(PICTURE)
HEADER_END, TRAILER = 33, len(SOUND) - 12
MEBIBYTE = 2**20


def text(kind: str, size: int) -> bytes:
    """A chunk whose text or profile has so many bytes."""
    if kind == "tEXt":
        return chunk(b"tEXt", b"history\0" + bytes(size))
    packed = zlib.compress(bytes(size))
    heads = {"zTXt": b"history\0\0", "iTXt": b"history\0\1\0en\0\0", "iCCP": b"profile\0\0"}
    return chunk(kind.encode(), heads[kind] + packed)


KINDS = ("zTXt", "iTXt", "iCCP", "tEXt")


def with_chunk(extra: bytes, at: int) -> bytes:
    return SOUND[:at] + extra + SOUND[at:]


@pytest.mark.parametrize("at", [HEADER_END, TRAILER], ids=["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [MEBIBYTE, MEBIBYTE + 1, 5 * MEBIBYTE])
def test_pictures_with_long_texts_decode(kind: str, at: int, size: int) -> None:
    decoded = decode_image(with_chunk(text(kind, size), at), stated_hw=None, max_pixels=10**6)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(PICTURE))
    assert decoded.note is None


def test_a_text_that_is_not_compressed_may_be_longer_than_all_that_pillow_takes() -> None:
    decoded = decode_image(with_chunk(text("tEXt", 65 * MEBIBYTE), HEADER_END), stated_hw=None, max_pixels=10**6)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(PICTURE))


def test_only_what_pillow_would_refuse_is_left_out() -> None:
    for kind in KINDS:
        data = with_chunk(text(kind, 1000), HEADER_END)
        assert without_long_texts(data) is data, kind
        long = without_long_texts(with_chunk(text(kind, MEBIBYTE + 1), HEADER_END))
        assert (long == SOUND) == (kind != "tEXt"), kind
    no_png = save(PICTURE, "JPEG")
    assert without_long_texts(no_png) is no_png


def test_many_texts_cost_no_more_than_64_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a hundred kilobytes may hold a hundred megabytes of texts."""
    unpacked = 0
    real = zlib.decompressobj

    class Counting:
        def __init__(self) -> None:
            self._real = real()

        def decompress(self, data: bytes, limit: int) -> bytes:
            nonlocal unpacked
            found = self._real.decompress(data, limit)
            unpacked += len(found)
            return found

        @property
        def unconsumed_tail(self) -> bytes:
            return self._real.unconsumed_tail

    data = with_chunk(text("zTXt", MEBIBYTE) * 100, HEADER_END)
    monkeypatch.setattr("owlsam_ray.inference.png_chunks.zlib.decompressobj", Counting)
    stripped = without_long_texts(data)
    monkeypatch.undo()
    assert unpacked <= 66 * MEBIBYTE
    assert len(stripped) < 0.7 * len(data)
    np.testing.assert_array_equal(decode_image(data, stated_hw=None, max_pixels=10**6).pixels, np.asarray(PICTURE))


def test_the_orientation_in_a_short_text_still_counts() -> None:
    """XMP, and profiles that ImageMagick writes as text, may hold it."""
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b'<x tiff:Orientation="6"/>'))
    data = with_chunk(xmp + text("zTXt", MEBIBYTE + 1), HEADER_END)
    turned = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(decode_image(data, stated_hw=None, max_pixels=10**6).pixels, turned)


@pytest.mark.parametrize("body", [b"", b"x", b"x\0", b"x\0\0", b"x\0\0not packed", b"x\0\1\0a", b"x\0\1\0a\0b\0zz"])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_damaged_texts_are_left_for_pillow(kind: bytes, body: bytes) -> None:
    data = with_chunk(chunk(kind, body), TRAILER)
    assert without_long_texts(data) is data
