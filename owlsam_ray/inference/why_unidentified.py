"""Explain why no decoder accepts a file: truncated, of a kind that Pillow lacks, damaged, or not an image."""

import io
import struct
from collections.abc import Callable
from typing import Any

from PIL import GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from owlsam_ray.inference import png_chunks, tiff_tags

_TRUNCATED, NO_IMAGE = "truncated", "not_an_image"
_RIFF_KINDS = {b"WAVE": "WAV", b"AVI ": "AVI", b"ACON": "ANI", b"RMID": "MIDI", b"CDR ": "CorelDRAW"}
_PHOTOMETRIC = {0: "WhiteIsZero", 1: "BlackIsZero", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "float", 5: "complex", 6: "complex float"}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""JPEG markers whose segments begin with precision, height, width and number of components."""

_BARE = {0x00, 0x01, *range(0xD0, 0xD8)}
"""JPEG markers without a segment."""
_MAX_SEGMENTS = 100_000
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Valid bit depths by colour type."""
_SHORTEST = 3
"""Minimum number of bytes for a file to be taken as the beginning of a signature."""


def why_unidentified(data: bytes) -> str:
    """Return the reason of the `ImageError` for a file that no format of `decode` accepts.

    Returns:
        `truncated`, `not_an_image`, `unsupported_mode: …` or `decode_error: …`.
    """
    for heads, why in _WHY:
        if any(data.startswith(head) or (len(data) >= _SHORTEST and head.startswith(data)) for head in heads):
            return why(data)
    return NO_IMAGE


def _png(data: bytes) -> str:
    header = data[16:24]
    if len(header) == 8 and 0 in struct.unpack(">II", header):
        return _empty(*struct.unpack(">II", header))
    if png_chunks.is_cut(data):
        return _TRUNCATED
    broken = png_chunks.broken_chunk(data)
    if broken is not None:
        kind = "ancillary chunk" if png_chunks.is_ancillary(broken.kind) else "chunk"
        return f"decode_error: the checksum of the {kind} {broken.kind.decode('ascii', 'backslashreplace')} is wrong"
    depth, colour = data[24:26]
    if data[12:16] == b"IHDR" and depth not in _PNG_DEPTHS.get(colour, ()):
        return f"decode_error: a PNG of colour type {colour} with {depth} bits"
    return _damaged(PngImagePlugin.PngImageFile, data)


def _jpeg(data: bytes) -> str:
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if at + 4 > len(data):
            return _TRUNCATED
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xDA:
            break
        if marker == 0xFF:
            at += 1
            continue
        if marker in _BARE:
            at += 2
            continue
        if marker in _FRAMES and at + 10 <= len(data):
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            if precision != 8:
                return f"unsupported_mode: a JPEG of {precision} bits"
            if width == 0 or height == 0:
                return _empty(width, height)
            if components not in (1, 3, 4):
                return f"unsupported_mode: a JPEG of {components} components"
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return _damaged(JpegImagePlugin.JpegImageFile, data)


def _gif(data: bytes) -> str:
    return _TRUNCATED if len(data) < 13 else _damaged(GifImagePlugin.GifImageFile, data)


def _riff(data: bytes) -> str:
    form = data[8:12]
    if len(form) < 4:
        return _TRUNCATED
    if form != b"WEBP":
        return f"{NO_IMAGE}: {_RIFF_KINDS[form]}" if form in _RIFF_KINDS else NO_IMAGE
    cut = 8 + int.from_bytes(data[4:8], "little") > len(data)
    return _TRUNCATED if cut else _damaged(WebPImagePlugin.WebPImageFile, data)


def _tiff(data: bytes) -> str:
    try:
        directory = tiff_tags.read_directory(data)
        if directory is None:
            return _TRUNCATED  # the four bytes of the signature are incomplete
        width, height = directory.number(tiff_tags.WIDTH, -1), directory.number(tiff_tags.HEIGHT, -1)
        compression = directory.number(tiff_tags.COMPRESSION, 1)
        mode = _tiff_mode(directory)
    except EOFError:
        return _TRUNCATED
    if 0 in (width, height):
        return _empty(width, height)
    if directory.is_cut:
        return _TRUNCATED
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        return f"unsupported_mode: a TIFF with compression {compression}"
    why = _damaged(TiffImagePlugin.TiffImageFile, data)
    unknown = "unknown pixel mode" in why or "unknown data organization" in why or "samples per pixel" in why
    return f"unsupported_mode: {mode}" if unknown else why


def _tiff_mode(directory: tiff_tags.Directory) -> str:
    """Describe the pixel mode, such as `a TIFF of 8 x 16 bits, unsigned, BlackIsZero`.

    Raises:
        EOFError: the file ends before its tags do.
    """
    bits = directory.numbers(tiff_tags.BITS) or (1,)
    samples = directory.number(tiff_tags.SAMPLES, len(bits))
    photometric = directory.number(tiff_tags.PHOTOMETRIC, 0)
    of_sample = directory.number(tiff_tags.SAMPLE_FORMAT, 1)
    names = sorted(set(bits))[:4]
    return (
        f"a TIFF of {samples} x {'/'.join(map(str, names))} bits, {_SAMPLE_FORMATS.get(of_sample, of_sample)}, "
        f"{_PHOTOMETRIC.get(photometric, photometric)}"
    )


def _empty(width: int, height: int) -> str:
    return f"decode_error: {width}x{height}"


def _damaged(opener: Callable[[Any], object], data: bytes) -> str:
    """Return a reason with the decoder's error for a file that is not truncated."""
    try:
        opener(io.BytesIO(data))
    except Exception as error:  # noqa: BLE001 (any error becomes that image's row)
        line = str(error).strip().splitlines()[:1] or [type(error).__name__]
        if line[0] != "not identified by this driver":
            return f"decode_error: {line[0][:200]}"
    return "decode_error: its header is damaged"


_WHY: tuple[tuple[tuple[bytes, ...], Callable[[bytes], str]], ...] = (
    ((png_chunks.SIGNATURE,), _png),
    ((b"\xff\xd8\xff",), _jpeg),
    ((b"GIF87a", b"GIF89a"), _gif),
    ((b"RIFF",), _riff),
    (tiff_tags.HEADS, _tiff),
)
"""Functions by signature (first bytes of a file). A shorter file is taken as the beginning of a signature."""
