"""Bytes → RGB pixels. Whatever the bytes are, the outcome is a picture or an `ImageError`.

Colours: grey, palette, CMYK and the like become RGB as Pillow converts them; transparency is dropped, not composited,
as COCO's own tools do; 16-bit grey is scaled to 8 bits, not clipped; colour profiles are not applied. Of an animation
or a multi-picture file the first picture counts.

Orientation: when the source states a size that equals the file's raw size, EXIF orientation is not applied (COCO's
convention, its boxes are drawn on raw pixels); otherwise it is.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from owlsam_ray.errors import ImageError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""Raster formats only: nothing that runs an interpreter, as EPS does. Multi-picture JPEGs come under JPEG."""

# Our own limit is checked from the header before any pixel is read; Pillow's would only warn.
Image.MAX_IMAGE_PIXELS = None
# Damaged metadata is no news: the pixels count. Once and for all, since a filter per call is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\..*")

_DECODER_ERRORS = (
    OSError,
    SyntaxError,  # what Pillow's PNG reader raises for a broken chunk
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    OverflowError,
    ZeroDivisionError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_WIDE_GREY = {"I;16", "I;16B", "I;16L", "I;16N", "I"}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB, contiguous."""
    note: str | None = None
    """A remark: a stated size that the file contradicts."""


def decode_image(data: bytes | memoryview, *, stated_hw: tuple[int, int] | None, max_pixels: int) -> Decoded:
    """Decode one file.

    Args:
        data: the file's bytes.
        stated_hw: (H, W) that the source states, if it does.
        max_pixels: larger pictures are refused before their pixels are read.

    Raises:
        ImageError: `empty_file`, `not_an_image`, `truncated`, `too_large`, `unsupported_mode` or `decode_error`.
    """
    if len(data) == 0:
        raise ImageError("empty_file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _read(image, stated_hw=stated_hw, max_pixels=max_pixels)
    except UnidentifiedImageError:
        raise ImageError(_unidentified(bytes(data[:4]))) from None
    except _DECODER_ERRORS as error:
        raise ImageError(_reason(error)) from None


def _read(image: Image.Image, *, stated_hw: tuple[int, int] | None, max_pixels: int) -> Decoded:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too_large: {width}x{height}")
    image.load()
    note = None
    if stated_hw != (height, width):
        orientation = _orientation(image)
        upright = _rotate(image, orientation)
        turned_hw = (upright.height, upright.width)
        if stated_hw is not None and stated_hw != turned_hw:
            note = f"stated_size_differs: stated {stated_hw[0]}x{stated_hw[1]}, file {turned_hw[0]}x{turned_hw[1]}"
        image = upright
    pixels = _to_rgb(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ImageError(f"decode_error: pixels of shape {pixels.shape}")
    return Decoded(np.ascontiguousarray(pixels), note)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F":
        # Floating point pictures state no range: any scaling would be a guess.
        raise ImageError("unsupported_mode: F")
    if image.mode in _WIDE_GREY:
        wide = np.asarray(image).astype(np.int64)
        if wide.min(initial=0) < 0 or wide.max(initial=0) > 65535:
            raise ImageError(f"unsupported_mode: {image.mode} beyond 16 bits")
        grey = ((wide + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))  # a copy: torch takes writable arrays only


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1…8; 1 when there is none, or when the EXIF block is damaged."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _rotate(image: Image.Image, orientation: int) -> Image.Image:
    methods = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    method = methods.get(orientation)
    return image if method is None else image.transpose(method)


def _unidentified(head: bytes) -> str:
    """A file that begins like a picture was cut off; anything else is none."""
    begins = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
    return "truncated" if head.startswith(begins) else "not_an_image"


def _reason(error: BaseException) -> str:
    text = str(error)
    if "truncated" in text.lower() or "unexpected end" in text.lower() or isinstance(error, EOFError):
        return "truncated"
    line = text.strip().splitlines()[0][:200] if text.strip() else ""
    return f"decode_error: {type(error).__name__}: {line}"
