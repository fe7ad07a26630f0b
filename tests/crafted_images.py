"""Files that are made to hurt whoever decodes them, or that are something else than their name says."""

import functools
import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from PIL import Image

from tests.bad_images import BadImage
from tests.image_files import bmp, chunk, originals, png, save, tiff


def crafted(side: int) -> Iterator[BadImage]:
    """All of them; every call gives the same. `side`: of those that are large and yet within limits."""
    yield from _no_images()
    yield from _png_bombs(side)
    yield from _jpeg_bombs(side)
    yield from _tiff_bombs(side)
    yield from _other_bombs(side)
    yield from _nested()


def _no_images() -> Iterator[BadImage]:
    contents = {
        "empty": b"",
        "one-byte": b"\xff",
        "zeros": bytes(1_000_000),
        "ones": b"\xff" * 1_000_000,
        "html": b"<!doctype html><html><body>404</body></html>",
        "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n/x { x } def x\n",
        "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "json": b'{"error": "slow down"}',
        "elf": b"\x7fELF\x02\x01\x01" + bytes(900),
        "mp4": struct.pack(">I4s4sI", 24, b"ftyp", b"isom", 512) + bytes(900),
        "heic": struct.pack(">I4s4sI", 24, b"ftyp", b"heic", 0) + bytes(900),
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3),
        "ico": b"\0\0\1\0\1\0" + bytes(16),
        "icns": b"icns" + struct.pack(">I", 2**31),
        "fits": b"SIMPLE  =                    T" + b" " * 2850,
    }
    for name, data in contents.items():
        yield BadImage(f"{name}.jpg", data)
    jpeg, buffer = originals()["rgb.jpeg"], io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", jpeg)
        archive.writestr("bomb", bytes(20_000_000))
    yield BadImage("zip.jpg", buffer.getvalue())
    yield BadImage("gzip.jpg", gzip.compress(jpeg, mtime=0))
    tar_buffer = io.BytesIO()
    with tarfile.open(fileobj=tar_buffer, mode="w") as tar:
        entry = tarfile.TarInfo("a.jpg")
        entry.size = len(jpeg)
        tar.addfile(entry, io.BytesIO(jpeg))
    yield BadImage("tar.jpg", tar_buffer.getvalue())
    for kind in ("AVIF", "JPEG2000", "TGA", "PCX", "ICO", "SGI", "DDS", "PDF", "EPS"):
        yield BadImage(f"{kind.lower()}.jpg", save(Image.new("RGB", (16, 16), "red"), kind))


@functools.cache
def zeros(count: int) -> bytes:
    """So many zero bytes, compressed by a factor of about a thousand."""
    packer = zlib.compressobj(1)
    block = bytes(2**20)
    parts = [packer.compress(block[: min(len(block), count - start)]) for start in range(0, count, len(block))]
    return b"".join([*parts, packer.flush()])


def _png_bombs(side: int) -> Iterator[BadImage]:
    row, small = zeros(100 * 301), zeros(200_000_000)
    yield BadImage("bits-60000.png", png(60_000, 60_000, zeros(60_000 * 7501), depth=1, colour=0))
    yield BadImage("large-bits.png", png(side, side, zeros(side * (side // 8 + 1)), depth=1, colour=0))
    yield BadImage("large-rgb.png", png(side, side, zeros(side * (3 * side + 1))))
    yield BadImage("large-wide.png", png(side, side, zeros(side * (2 * side + 1)), depth=16, colour=0))
    yield BadImage("largest-sides.png", png(2**31 - 1, 2**31 - 1, row))
    yield BadImage("one-row.png", png(side**2, 1, zeros(side**2 + 1), colour=0))
    yield BadImage("one-column.png", png(1, side**2 // 8, zeros(side**2 // 4), colour=0))
    yield BadImage("more-rows-than-asked.png", png(100, 100, small))
    text = {
        "zTXt": chunk(b"zTXt", b"k\0\0" + small),
        "iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + small),
        "iCCP": chunk(b"iCCP", b"k\0\0" + small),
        "tEXt": chunk(b"tEXt", b"k\0" + bytes(20_000_000)),
        "many-zTXt": chunk(b"zTXt", b"k\0\0" + zeros(1_000_000)) * 100,
        "many-tEXt": b"".join(chunk(b"tEXt", b"%d\0x" % n) for n in range(50_000)),
        "acTL": chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        "PLTE": chunk(b"PLTE", bytes(3_000_000)),
        "tRNS": chunk(b"tRNS", bytes(1_000_000)),
        "eXIf": chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\1\3\0\1\0\0\0\6\0\0\0" * 65_535),
    }
    for name, before in text.items():
        yield BadImage(f"{name}.png", png(100, 100, row, before=before))
        yield BadImage(f"{name}-palette.png", png(100, 100, zeros(100 * 101), colour=3, before=before))
    header = struct.pack(">IIBBBBB", 2000, 2000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(2000 * 6001), 0)
    pieces = b"".join(chunk(b"IDAT", pixels[at : at + 60]) for at in range(0, len(pixels), 60))
    yield BadImage("tiny-idat.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pieces + chunk(b"IEND", b""))
    nothing = chunk(b"IDAT", b"") * 300_000
    yield BadImage("empty-idat.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + nothing + chunk(b"IEND", b""))


def _jpeg_bombs(side: int) -> Iterator[BadImage]:
    for name in ("rgb.jpeg", "progressive.jpeg", "cmyk.jpeg"):
        data = originals()[name]
        for sides in (side, 65_500):
            frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
            yield BadImage(f"{sides}-{name}", data[: frame + 5] + struct.pack(">HH", sides, sides) + data[frame + 9 :])
    yield BadImage("scans.jpeg", many_scans(4000, 4000, 5000))
    yield BadImage("scans-small.jpeg", many_scans(64, 64, 20_000))
    data = originals()["rgb.jpeg"]
    yield BadImage("segments.jpeg", data[:2] + b"\xff\xe1\x00\x04xx" * 200_000 + data[2:])
    yield BadImage("fill.jpeg", data[:2] + b"\xff" * 2_000_000 + data[2:])
    yield BadImage("app2.jpeg", data[:2] + (b"\xff\xe2\xff\xffICC_PROFILE\0\1\xff" + bytes(65_519)) * 300 + data[2:])
    mpf = struct.pack(">2sHI", b"MM", 42, 8) + struct.pack(">HHHII", 1, 0xB001, 4, 1, 2**31)
    yield BadImage("mpf.jpeg", data[:2] + b"\xff\xe2" + struct.pack(">H", 6 + len(mpf)) + b"MPF\0" + mpf + data[2:])
    loop = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + struct.pack("<I", 8)
    yield BadImage("exif-loop.jpeg", data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(loop)) + loop + data[2:])


def many_scans(width: int, height: int, count: int) -> bytes:
    """A progressive JPEG of few bytes whose every pixel is gone through `count` times."""
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    table = bytes([0x10]) + bytes([1]) + bytes(15) + b"\xe0"  # one code: 2¹⁴ blocks without coefficients, and more
    first = bytes([0x00]) + bytes([1]) + bytes(15) + b"\0"

    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body

    def scan(start: int, end: int, data: bytes) -> bytes:
        return segment(0xDA, bytes([1, 1, 0x00, start, end, 0x00])) + data

    blocks = ((width + 7) // 8) * ((height + 7) // 8)
    runs = -(-blocks // 2**14)
    bits = "0" + "1" * 14  # of one run: the code, and 14 bits of its length
    body = int((bits * runs).ljust(-(-15 * runs // 8) * 8, "1"), 2).to_bytes(-(-15 * runs // 8), "big")
    body = body.replace(b"\xff", b"\xff\0")
    head = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, frame) + segment(0xC4, first + table)
    return head + scan(0, 0, bytes(-(-blocks // 8))) + scan(1, 63, body) * count + b"\xff\xd9"


def _tiff_bombs(side: int) -> Iterator[BadImage]:
    def plain(width: int, height: int, **more: tuple[int, int, int]) -> dict[int, tuple[int, int, int]]:
        entries = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
        entries |= {273: (4, 1, 200), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, width * height % 2**32)}
        return entries | {int(tag[1:]): entry for tag, entry in more.items()}

    packed = zeros(200_000_000)
    files = {
        "large": plain(60_000, 60_000),
        "largest": plain(2**32 - 1, 2**32 - 1),
        "short": plain(side, side),
        "strips": plain(100, 100, _273=(4, 2**31, 8), _279=(4, 2**31, 8)),
        "many-strips": plain(side, side, _278=(4, 1, 1)),
        "bits": plain(100, 100, _258=(3, 65_535, 8)),
        "samples": plain(100, 100, _277=(3, 1, 65_535)),
        "text": plain(100, 100, _270=(2, 2**32 - 1, 8)),
        "doubles": plain(100, 100, _33550=(12, 2**29, 8)),
        "tiles": plain(100, 100, _322=(4, 1, 2**31 - 16), _323=(4, 1, 2**31 - 16), _324=(4, 1, 200), _325=(4, 1, 99)),
        "wide-tiles": plain(16, 16, _322=(4, 1, 32_768), _323=(4, 1, 32_768), _324=(4, 1, 200), _325=(4, 1, 99)),
        "exif-loop": plain(100, 100, _34665=(4, 1, 8)),
        "sub-loop": plain(100, 100, _330=(4, 1, 8)),
        "colour-map": plain(100, 100, _262=(3, 1, 3), _320=(3, 2**28, 8)),
    }
    for name, entries in files.items():
        yield BadImage(f"{name}.tiff", tiff(entries, after=bytes(20_000)))
        for compression in (5, 7, 8, 32_773, 50_000):
            other = entries | {259: (3, 1, compression)}
            yield BadImage(f"{name}-{compression}.tiff", tiff(other, after=packed[:20_000]))
    for sides, rows in ((100, 100), (side, side), (side, 1)):
        entries = plain(sides, sides, _259=(3, 1, 8), _278=(4, 1, rows), _279=(4, 1, len(packed)))
        entries[273] = (4, 1, 8 + 2 + 12 * len(entries) + 4)
        yield BadImage(f"deflate-{sides}-{rows}.tiff", tiff(entries, after=packed))
    yield BadImage("directory-loop.tiff", tiff(plain(100, 100), following=8, after=bytes(10_200)))
    yield BadImage(
        "old-jpeg.tiff", tiff(plain(64, 64, _259=(3, 1, 6), _513=(4, 1, 200)), after=originals()["rgb.jpeg"])
    )
    yield BadImage("big.tiff", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 8 + bytes(100))


def _other_bombs(side: int) -> Iterator[BadImage]:
    frames = [Image.new("P", (16, 16), n % 7) for n in range(3)]
    gif = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    body = gif[gif.index(b",") :].rstrip(b";")
    yield BadImage("frames.gif", gif.rstrip(b";") + body * 20_000 + b";")
    yield BadImage("screen.gif", gif[:6] + b"\xff\xff\xff\xff" + gif[10:])
    at = gif.index(b",")
    yield BadImage("large-frame.gif", gif[: at + 5] + struct.pack("<HH", side, side) + gif[at + 9 :])
    yield BadImage("comments.gif", gif[:13] + b"!\xfe" + b"\xff" + b"c" * 255 + b"\0" * 5_000_000 + gif[13:])
    yield BadImage("comment.gif", gif[:13] + b"!\xfe" + (b"\xff" + b"c" * 255) * 40_000 + b"\0" + gif[13:])

    for width, height in ((side, side), (2**24, 255), (65_535, 65_535)):
        canvas = (
            b"VP8X" + struct.pack("<II", 10, 2) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        )
        anim = b"ANIM" + struct.pack("<I", 6) + bytes(6)
        lossless = save(Image.new("RGB", (16, 16), "red"), "WEBP", lossless=True)[12:]
        frame = bytes(6) + struct.pack("<I", 15)[:3] + struct.pack("<I", 15)[:3] + b"\x10\0\0\0" + lossless
        content = b"WEBP" + canvas + anim + b"ANMF" + struct.pack("<I", len(frame)) + frame
        yield BadImage(f"canvas-{width}.webp", b"RIFF" + struct.pack("<I", len(content)) + content)
    yield BadImage("solid.webp", save(Image.new("RGB", (side, side), "red"), "WEBP", lossless=True, method=0))

    yield BadImage("ends-of-line.bmp", bmp(14_000, 14_000, b"\1\7\0\0" * 14_000, compression=1))
    yield BadImage("ends-of-line-4.bmp", bmp(14_000, 14_000, b"\1\7\0\0" * 14_000, compression=2, bits=4))
    yield BadImage("ends-of-line-2500.bmp", bmp(2500, 2500, b"\1\7\0\0" * 2500, compression=1))
    yield BadImage("deltas.bmp", bmp(14_000, 14_000, b"\0\2\xff\xff" * 200, compression=1))
    yield BadImage("nothing.bmp", bmp(5000, 5000, b"\0\0" * 1_000_000, compression=1))
    yield BadImage("upside-down.bmp", bmp(14_000, -(2**31), b""))
    yield BadImage("colours.bmp", bmp(100, 100, bytes(10_000), colours=2**32 - 1))

    yield BadImage("comments.ppm", b"P3 4 3 255\n" + b"#\n" * 500_000 + b"1 " * 36)
    yield BadImage("header-comments.ppm", b"P3\n" + b"#\n" * 1_000_000 + b"4 3 255 " + b"1 " * 36)
    yield BadImage("plain.ppm", b"P3 14000 14000 255\n" + b"1 " * 1_000_000)
    yield BadImage("plain-bits.ppm", b"P1 14000 14000\n" + b"1" * 5_000_000)
    yield BadImage("scaled.ppm", b"P6 800 800 99\n" + bytes(800 * 800 * 3))
    yield BadImage("digits.ppm", b"P6 " + b"9" * 5_000_000)
    yield BadImage("zeros.ppm", b"P6 " + b"0" * 5_000_000 + b"4 3 255\n" + bytes(36))


def _nested() -> Iterator[BadImage]:
    files = originals()
    yield BadImage("png-in-jpeg.jpg", files["rgb.jpeg"][:200] + files["rgb.png"])
    yield BadImage("jpeg-after-png.jpg", files["rgb.png"][:8] + files["rgb.jpeg"])
    yield BadImage("jpeg-in-bmp.jpg", bmp(64, 64, files["rgb.jpeg"], compression=4, bits=0))
    yield BadImage("png-in-bmp.jpg", bmp(64, 64, files["rgb.png"], compression=5, bits=0))
    for first in ("rgb.jpeg", "rgb.png", "palette.gif", "lossy.webp", "rgb.bmp", "wide.tiff"):
        for second in ("progressive.jpeg", "animated.gif"):
            yield BadImage(f"{first}-{second}", files[first] + files[second])
        yield BadImage(f"{first}-and-zeros.jpg", files[first] + bytes(1_000_000))
    yield BadImage("riff.jpg", b"RIFF\xff\xff\xff\xffWAVEfmt " + bytes(100))
