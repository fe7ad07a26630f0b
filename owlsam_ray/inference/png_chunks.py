"""Parse the chunks of PNG files: remove long texts that Pillow refuses, and find truncated or damaged chunks.

Pillow refuses a file with a compressed text or colour profile longer than 1 MiB. Workflows of image generators, XMP
histories and display profiles can be longer. None of them changes a pixel here, so such chunks are removed.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ANCILLARY = 0x20
"""Bit of the first letter of a chunk's type that marks chunks a decoder may ignore."""
_MAX_CHUNKS = 1_000_000
"""Maximum number of chunks that are read. A file of half a gigabyte may have forty million."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Position of a chunk in its file, in bytes."""

    kind: bytes
    start: int
    """Offset of its length field."""
    length: int
    """Length of its body."""

    @property
    def body(self) -> slice:
        """Slice of its body."""
        return slice(self.start + 8, self.start + 8 + self.length)

    @property
    def end(self) -> int:
        """Offset just after its checksum; beyond the end of the file if the file is truncated."""
        return self.start + 12 + self.length


def chunks_of(data: bytes) -> Iterator[Chunk]:
    """Iterate over chunks in order, up to IEND or the end of the file; the last one may be truncated."""
    at = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = Chunk(kind, at, length)
        yield chunk
        at = chunk.end
        if kind == b"IEND":
            return


def without_long_texts(data: bytes) -> bytes:
    """Remove the texts and profiles for which Pillow would refuse a PNG file; return any other file unchanged.

    At most 64 MiB are decompressed to find them; texts and profiles beyond that are removed without a check.
    """
    if not data.startswith(SIGNATURE):
        return data
    left = PngImagePlugin.MAX_TEXT_MEMORY
    kept, begin = [], 0
    for chunk in chunks_of(data):
        if chunk.kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or chunk.end > len(data):
            continue
        size = _text_size(chunk.kind, data[chunk.body], min(left, PngImagePlugin.MAX_TEXT_CHUNK))
        if size is not None and size <= left:
            left -= size
        else:
            kept.append(data[begin : chunk.start])
            begin = chunk.end
    return b"".join([*kept, data[begin:]]) if kept else data


def _text_size(kind: bytes, body: bytes, limit: int) -> int | None:
    """Number of bytes of a text or profile, decompressed; None if it is compressed and longer than `limit`."""
    _, separator, rest = body.partition(b"\0")
    if kind == b"tEXt" or not separator:
        return len(body)
    if kind == b"iTXt":
        flags, _, rest = rest[:2], None, rest[2:]
        packed = rest.split(b"\0", 2)
        if len(packed) < 3 or flags != b"\1\0":
            return len(body)
        rest = packed[2]
    else:
        rest = rest[1:]
    unpacker = zlib.decompressobj()
    try:
        size = len(unpacker.decompress(rest, max(1, limit)))
    except zlib.error:
        return len(body)  # Pillow ignores these
    return None if unpacker.unconsumed_tail else size


def is_cut(data: bytes) -> bool:
    """Whether a PNG file is truncated: it ends before its last chunk does, or without IEND."""
    last = None
    for last in chunks_of(data):
        if last.end > len(data):
            return True
    return last is None or last.kind != b"IEND"


def broken_chunk(data: bytes) -> Chunk | None:
    """First chunk with a wrong checksum; None if there is none."""
    for chunk in chunks_of(data):
        checksum = data[chunk.end - 4 : chunk.end]
        if len(checksum) == 4 and zlib.crc32(data[chunk.start + 4 : chunk.end - 4]) != int.from_bytes(checksum, "big"):
            return chunk
    return None


def is_ancillary(kind: bytes) -> bool:
    """Whether a decoder may ignore chunks of this kind."""
    return bool(kind[0] & _ANCILLARY)
