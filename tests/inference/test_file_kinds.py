"""Files that are no pictures that are decoded: their kind stands in the reason."""

import io

import pytest
from PIL import Image

from owlsam_ray.errors import ImageError
from owlsam_ray.inference.decode import decode_image

FTYP = b"\0\0\0\x18ftyp"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (FTYP + b"heic\0\0\0\0mif1heic", "a HEIC file"),
        (FTYP + b"mif1\0\0\0\0mif1heic", "a HEIC file"),
        (FTYP + b"isom\0\0\x02\0isomiso2", "a video (MP4 or QuickTime)"),
        (FTYP + b"qt  \0\0\x02\0qt  ", "a video (MP4 or QuickTime)"),
        (FTYP + b"avif\0\0\0\0avifmif1", "an AVIF file that is damaged or truncated"),
        (b"\xff\x0a\xfa\x1f\x41", "a JPEG XL file"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0", "a JPEG XL file"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns='x' width='5'></svg>", "an SVG drawing"),
        (b"  <svg>", "an SVG drawing"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81", "a video (Matroska or WebM)"),
        (b"%PDF-1.7\n", "a PDF document"),
    ],
)
def test_the_reason_names_the_kind(data: bytes, kind: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data, stated_hw=None, max_pixels=10**6)
    assert caught.value.reason == f"not_an_image: {kind}"


def test_nothing_is_said_of_what_is_not_known() -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(b"hello <svg> world", stated_hw=None, max_pixels=10**6)
    assert caught.value.reason == "not_an_image"


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "PPM", "MPO"])
def test_formats_of_the_new_endings_are_decoded(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 24), (250, 10, 10)).save(file, kind)
    pixels = decode_image(file.getvalue(), stated_hw=None, max_pixels=10**6).pixels
    assert pixels.shape == (24, 40, 3)
    assert pixels[12, 20, 0] > 230 > 40 > pixels[12, 20, 1]
    with pytest.raises(ImageError, match="too_large"):
        decode_image(file.getvalue(), stated_hw=None, max_pixels=500)
