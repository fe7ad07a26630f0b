"""Decode bytes to RGB pixels: whatever the bytes are, the outcome is an image or an `ImageError`.

Colours: grey, palette, CMYK and other modes are converted to RGB by Pillow; transparency is dropped, not composited, as
in COCO's own tools; 16-bit grey is scaled to 8 bits (see `grey16`); colour profiles are not applied. Of an animation or
a multi-image file, the first image is decoded.

Orientation: if the source states a size that equals the file's raw size, EXIF orientation is not applied (COCO's
convention: its boxes refer to raw pixels); otherwise it is. This holds for every format.
"""

import ctypes
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from owlsam_ray.config.inference import Grey16
from owlsam_ray.errors import ImageError
from owlsam_ray.inference.file_kinds import other_kind
from owlsam_ray.inference.png_chunks import without_long_texts
from owlsam_ray.inference.tiff_tags import split_orientation
from owlsam_ray.inference.why_unidentified import NO_IMAGE, why_unidentified

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Raster formats only, none that runs an interpreter as EPS does. Multi-picture JPEGs are included in JPEG."""

# Our own limit is checked from the header before any pixel is read; Pillow's would only warn.
Image.MAX_IMAGE_PIXELS = None
# Ignore metadata warnings. The filter is global because a filter per call is not thread-safe.
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
_WIDE_WHITE = 65535
_DARK_BITS = 12
"""16-bit grey images that use at most this many bits are nearly black when white is 65535."""
_EXIF_ORIENTATION = 0x0112
_TILE_WIDTH, _TILE_HEIGHT = 322, 323

# Limits on features that let a small file cost minutes or gigabytes, beyond the pixels in its header.
_SLOW_DECODERS = {"bmp_rle", "ppm", "ppm_plain"}
"""Decoders that Pillow implements in Python: up to a microsecond per pixel, whatever the file's length."""
_SLOW_MAX_PIXELS = 32_000_000
_MAX_COMMENTS = 1000
"""Maximum number of comments in a plain PPM file; each costs a copy of a megabyte."""
_MAX_SCANNED = 5 * 10**10
"""Maximum of a JPEG's pixels × scans, a few seconds. Progressive files have about ten scans; one may be a few bytes."""
_MAX_TILE = 2**26
"""Maximum pixels of a TIFF tile, unless four times the image's pixels is more: tiles are decoded whole."""
_STRIP_PIXELS = 2**20
"""Pixels converted at a time, so that no second copy of the image is in memory."""


def _silence_libtiff() -> None:
    """Turn off libtiff's messages on stderr: they do not name the file, and real errors also raise exceptions."""
    if not features.check("libtiff") or not Path("/proc/self/maps").exists():
        return
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libtiff" in line}
    for path in loaded:
        ctypes.CDLL(path).TIFFSetErrorHandler(None)


_silence_libtiff()
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # for the same reason


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded image."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB, contiguous."""
    note: str | None = None
    """Remarks: `stated_size_differs: …` if the file contradicts the stated size, `grey16: …` if the values of 16-bit
    grey do not match the range they are scaled from; both are joined by a semicolon."""

    @property
    def size_differs(self) -> bool:
        """Whether the file contradicts the stated size."""
        return self.note is not None and self.note.startswith(_SIZE_DIFFERS)


_SIZE_DIFFERS = "stated_size_differs"


def decode_image(
    data: bytes | memoryview, *, stated_hw: tuple[int, int] | None, max_pixels: int, grey16: Grey16 = "full"
) -> Decoded:
    """Decode one file.

    Args:
        data: the file's bytes.
        stated_hw: (H, W) that the source states; None if it states none.
        max_pixels: maximum number of pixels; larger images are refused before their pixels are read.
        grey16: white in 16-bit grey: 65535 (`full`), the largest value of this number of bits (an integer), or of as
            many bits as the image uses, at least 8 (`auto`).

    Raises:
        ImageError: `empty_file`, `not_an_image`, `truncated`, `too_large`, `unsupported_mode` or `decode_error`.
    """
    if len(data) == 0:
        raise ImageError("empty_file")
    data = bytes(data)
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":  # its decoder allocates the canvas immediately
        sides = [1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27)]
        _check_size(sides[0], sides[1], max_pixels)
    data = without_long_texts(data)
    data, tiff_orientation = split_orientation(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_cost(image, data, max_pixels)
            return _read(image, stated_hw, tiff_orientation, grey16)
    except UnidentifiedImageError:
        why, kind = why_unidentified(data), other_kind(data)
        raise ImageError(f"{why}: {kind}" if why == NO_IMAGE and kind else why) from None
    except _DECODER_ERRORS as error:
        raise ImageError(_reason(error)) from None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"too_large: {width}x{height}")


def _check_cost(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse expensive files by their header, before memory or time is spent on pixels.

    Raises:
        ImageError: the image is too large, or cannot be decoded within the limits.
    """
    width, height = image.size
    _check_size(width, height, max_pixels)
    decoders = {tile[0] for tile in getattr(image, "tile", [])}
    if decoders & _SLOW_DECODERS and width * height > _SLOW_MAX_PIXELS:
        raise ImageError(f"too_large: {width}x{height} in a kind of {image.format} that is decoded slowly")
    if "ppm_plain" in decoders and data.count(b"#") > _MAX_COMMENTS:
        raise ImageError(f"decode_error: more than {_MAX_COMMENTS} comments")
    if "jpeg" in decoders and image.format != "TIFF":  # libtiff decodes these and has its own limit
        scans = data.count(b"\xff\xda")
        if scans * width * height > _MAX_SCANNED:
            raise ImageError(f"decode_error: {scans} scans of {width}x{height}")
    tags = getattr(image, "tag_v2", {})
    sides = [tags.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT)]
    if sides[0] * sides[1] > max(_MAX_TILE, 4 * width * height):
        raise ImageError(f"decode_error: tiles of {sides[0]}x{sides[1]} in a picture of {width}x{height}")


def _read(image: Image.Image, stated_hw: tuple[int, int] | None, tiff_orientation: int, grey16: Grey16) -> Decoded:
    """Read pixels and remarks of an open image; `tiff_orientation` is that of a TIFF file, 1 for other formats."""
    raw_hw = (image.height, image.width)
    if image.format == "TIFF":
        # Pillow would rotate the pixels on load, by the tag (which has been set to 1) or by the XMP data.
        orientation = max(tiff_orientation, _orientation(image))
        image.getexif()[_EXIF_ORIENTATION] = 1
        image.load()
    else:
        image.load()
        orientation = _orientation(image)
    if 0 in image.size:
        raise ImageError(f"decode_error: {image.width}x{image.height}")
    notes = []
    if stated_hw == raw_hw:
        orientation = 1
    turned_hw = raw_hw[::-1] if orientation > 4 else raw_hw
    if stated_hw is not None and stated_hw != turned_hw:
        notes.append(f"{_SIZE_DIFFERS}: stated {stated_hw[0]}x{stated_hw[1]}, file {turned_hw[0]}x{turned_hw[1]}")
    white = _WIDE_WHITE
    if image.mode in _WIDE_GREY:
        white, note = _white_of(image, grey16)
        notes += [note] if note is not None else []
    return Decoded(_to_rgb(image, orientation, white), "; ".join(notes) or None)


def _white_of(image: Image.Image, grey16: Grey16) -> tuple[int, str | None]:
    """White value of a loaded 16-bit grey image, and a remark if the range of its values is unusual."""
    largest = max(int(np.asarray(strip).max(initial=0)) for _, _, strip in _strips(image))
    bits = max(8, largest.bit_length())
    if grey16 == "full":
        dark = largest > 0 and bits <= _DARK_BITS
        return _WIDE_WHITE, f"grey16: the largest value is {largest} of {_WIDE_WHITE}" if dark else None
    if grey16 == "auto":
        return 2**bits - 1, f"grey16: read as {bits} bits" if bits < 16 else None
    white = 2**grey16 - 1
    return white, f"grey16: values up to {largest} are cut at {white}" if largest > white else None


def _strips(image: Image.Image) -> Iterator[tuple[int, int, Image.Image]]:
    """Iterate over (first row, row after the last, strip) of a loaded image, from top to bottom."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    for start in range(0, height, rows):
        end = min(start + rows, height)
        yield start, end, image if end - start == height else image.crop((0, start, width, end))


def _to_rgb(image: Image.Image, orientation: int, white: int) -> NDArray[np.uint8]:
    """Convert a loaded image to upright RGB pixels, strip by strip."""
    if image.mode == "F":
        # Floating point images state no range, so any scaling would be a guess.
        raise ImageError("unsupported_mode: F")
    width, height = image.size
    pixels = np.empty((width, height, 3) if orientation > 4 else (height, width, 3), np.uint8)
    raw = _raw_view(pixels, orientation)
    for start, end, strip in _strips(image):
        wide = image.mode in _WIDE_GREY
        raw[start:end] = _wide_to_rgb(strip, white) if wide else np.asarray(_convert(strip))
    return pixels


def _convert(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_to_rgb(image: Image.Image, white: int) -> NDArray[np.uint8]:
    """Scale 16-bit grey to 8 bits, rounded; values above white become white."""
    wide = np.asarray(image).astype(np.int64)
    if wide.min(initial=0) < 0 or wide.max(initial=0) > _WIDE_WHITE:
        raise ImageError(f"unsupported_mode: {image.mode} beyond 16 bits")
    grey = ((np.minimum(wide, white) * 255 + white // 2) // white).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1…8; 1 if there is none or the EXIF block is damaged."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _raw_view(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Writable view of upright pixels in the raw orientation of the file."""
    match orientation:
        case 2:
            return pixels[:, ::-1]
        case 3:
            return pixels[::-1, ::-1]
        case 4:
            return pixels[::-1]
        case 5:
            return pixels.transpose(1, 0, 2)
        case 6:
            return np.rot90(pixels, 1)
        case 7:
            return pixels[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            return np.rot90(pixels, -1)
        case _:
            return pixels


def _reason(error: BaseException) -> str:
    text = str(error)
    if "truncated" in text.lower() or "unexpected end" in text.lower() or isinstance(error, EOFError):
        return "truncated"
    line = text.strip().splitlines()[0][:200] if text.strip() else ""
    return f"decode_error: {type(error).__name__}: {line}"
