"""Image files in all formats and many kinds, and the builders of those that Pillow reads and does not write."""

import functools
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from tests.drawn_images import draw_image


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    if "append_images" in options:
        options["append_images"] = [each.copy() for each in options["append_images"]]
    image.copy().save(buffer, kind, **options)  # saving leaves settings of the format behind
    return buffer.getvalue()


@functools.cache
def originals() -> dict[str, bytes]:
    """Sound files in all formats and many kinds, by names that end in the format."""
    rgb, grey = draw_image(11), draw_image(12).convert("L")
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    palette = rgb.quantize(32)
    frames = [draw_image(20 + n).resize((48, 40)) for n in range(4)]
    more: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112], turned[0x010F] = 6, "x" * 300
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # without the time of day
    files = {
        "rgb.jpeg": save(rgb, "JPEG"),
        "progressive.jpeg": save(rgb, "JPEG", progressive=True, quality=90, subsampling=0),
        "restarts.jpeg": save(rgb, "JPEG", restart_marker_rows=1),
        "grey.jpeg": save(grey, "JPEG"),
        "cmyk.jpeg": save(rgb.convert("CMYK"), "JPEG"),
        "exif.jpeg": save(rgb, "JPEG", exif=turned, icc_profile=profile, comment=b"c" * 50),
        "mpo.jpeg": save(frames[0], "MPO", **more),
        "rgb.png": save(rgb, "PNG"),
        "rgba.png": save(alpha, "PNG", exif=turned),
        "la.png": save(alpha.convert("LA"), "PNG"),
        "grey.png": save(grey, "PNG"),
        "bits.png": save(grey.convert("1"), "PNG"),
        "wide.png": save(wide, "PNG", icc_profile=profile),
        "palette.png": save(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "interlaced.png": interlaced_png(rgb),
        "animated.png": save(frames[0], "PNG", **more),
        "palette.gif": save(palette, "GIF", transparency=3),
        "animated.gif": save(frames[0], "GIF", duration=50, loop=0, **more),
        "lossy.webp": save(rgb, "WEBP"),
        "lossless.webp": save(alpha, "WEBP", lossless=True),
        "exif.webp": save(rgb, "WEBP", exif=turned, icc_profile=profile),
        "animated.webp": save(frames[0], "WEBP", **more),
        "rgb.bmp": save(rgb, "BMP"),
        "palette.bmp": save(palette, "BMP"),
        "bits.bmp": save(grey.convert("1"), "BMP"),
        "rle.bmp": rle_bmp(grey),
        "pages.tiff": save(frames[0], "TIFF", **more),
        "wide.tiff": save(wide, "TIFF"),
        "float.tiff": save(grey.convert("F"), "TIFF"),
        "bits.tiff": save(grey.convert("1"), "TIFF", compression="group4"),
        "cmyk.tiff": save(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "rgba.tiff": save(alpha, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tiff": save(rgb, "TIFF", compression="jpeg"),
        "packbits.tiff": save(palette, "TIFF", compression="packbits", exif=turned),
        "lzw.tiff": save(rgb, "TIFF", compression="tiff_lzw"),
        "tiles.tiff": tiled_tiff(grey, 32),
        "grey.ppm": save(grey, "PPM"),
        "plain.ppm": b"P3 # words\n4 3\n255\n" + b" ".join(str(n * 7).encode() for n in range(36)),
    }
    return files


def interlaced_png(image: Image.Image) -> bytes:
    """A PNG in Adam7's seven passes, which Pillow reads and does not write."""
    pixels = np.asarray(image)
    raw = b""
    for x0, y0, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        raw += b"".join(b"\0" + row.tobytes() for row in pixels[y0::dy, x0::dx])
    return png(image.width, image.height, zlib.compress(raw), interlace=1)


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, packed: bytes, *, depth: int = 8, colour: int = 2, interlace: int = 0, before: bytes = b""
) -> bytes:
    """A PNG file; `packed`: its rows, compressed; `before`: chunks that come first."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before
    return head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def rle_bmp(image: Image.Image) -> bytes:
    """An 8-bit grey BMP with runs of equal bytes, which Pillow reads and does not write."""
    body = b""
    for row in np.asarray(image)[::-1]:
        changes = np.flatnonzero(np.diff(row)) + 1
        starts, ends = [0, *changes.tolist()], [*changes.tolist(), len(row)]
        for start, end in zip(starts, ends, strict=True):
            for at in range(start, end, 255):
                body += bytes([min(255, end - at), row[start]])
        body += b"\0\0"
    return bmp(image.width, image.height, body + b"\0\1", compression=1)


def bmp(width: int, height: int, body: bytes, *, compression: int = 0, bits: int = 8, colours: int = 256) -> bytes:
    """A BMP file with grey colours."""
    table = b"".join(bytes([n, n, n, 0]) for n in range(256)) if bits <= 8 else b""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, colours, 0)
    start = 14 + len(header) + len(table)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + table + body


def tiff(entries: dict[int, tuple[int, int, int]], *, after: bytes = b"", following: int = 0) -> bytes:
    """A TIFF file: tag → (type, count, value), then `after`, which begins at 14 + 12 · entries."""
    packed = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + struct.pack("<I", following) + after


def tiled_tiff(image: Image.Image, side: int) -> bytes:
    """A grey TIFF in compressed tiles, which Pillow reads and does not write."""
    across, down = -(-image.width // side), -(-image.height // side)
    pixels = np.zeros((down * side, across * side), np.uint8)
    pixels[: image.height, : image.width] = np.asarray(image)
    tiles = [
        zlib.compress(pixels[y : y + side, x : x + side].tobytes())
        for y in range(0, down * side, side)
        for x in range(0, across * side, side)
    ]
    tables = 14 + 12 * 10
    offsets = [tables + 8 * len(tiles) + sum(map(len, tiles[:number])) for number in range(len(tiles))]
    entries = {256: (4, 1, image.width), 257: (4, 1, image.height), 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1)}
    entries |= {277: (3, 1, 1), 322: (4, 1, side), 323: (4, 1, side)}
    entries |= {324: (4, len(tiles), tables), 325: (4, len(tiles), tables + 4 * len(tiles))}
    numbers = struct.pack(f"<{2 * len(tiles)}I", *offsets, *map(len, tiles))
    return tiff(entries, after=numbers + b"".join(tiles))
