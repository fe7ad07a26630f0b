"""The chunks of a PNG file: those that would end its decoding without being needed for it, and what is wrong with them.

Pillow refuses a file for a compressed text or colour profile that is longer than 1 MiB. Workflows of image generators,
XMP histories and profiles of screens are. None of them changes a pixel here, so such chunks are left out.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ANCILLARY = 0x20
"""Set in the first letter of chunks that a decoder may do without."""
_MAX_CHUNKS = 1_000_000
"""That are looked at. A file of half a gigabyte may have forty million."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where a chunk lies in its file."""

    kind: bytes
    start: int
    """Of its length field."""
    length: int
    """Of its body."""

    @property
    def body(self) -> slice:
        """Place of its body."""
        return slice(self.start + 8, self.start + 8 + self.length)

    @property
    def end(self) -> int:
        """Behind its checksum; beyond the file's end when the file is truncated."""
        return self.start + 12 + self.length


def chunks_of(data: bytes) -> Iterator[Chunk]:
    """Chunks in their order, up to IEND or the file's end; the last one may be cut off."""
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
    """A PNG file without the texts and profiles that Pillow would refuse it for; any other file as it is.

    At most 64 MiB are decompressed to find out; what comes after these is left out unseen.
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
    """Bytes of a text or profile; None when it is compressed and longer than `limit`, or than can be told."""
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
        return len(body)  # Pillow passes over these
    return None if unpacker.unconsumed_tail else size


def is_cut(data: bytes) -> bool:
    """Whether a file that begins as a PNG ends before its last chunk does."""
    last = None
    for last in chunks_of(data):
        if last.end > len(data):
            return True
    return last is None or last.kind != b"IEND"


def broken_chunk(data: bytes) -> Chunk | None:
    """The first chunk whose checksum is wrong; None when there is none."""
    for chunk in chunks_of(data):
        checksum = data[chunk.end - 4 : chunk.end]
        if len(checksum) == 4 and zlib.crc32(data[chunk.start + 4 : chunk.end - 4]) != int.from_bytes(checksum, "big"):
            return chunk
    return None


def is_ancillary(kind: bytes) -> bool:
    """Whether a decoder may do without chunks of this kind."""
    return bool(kind[0] & _ANCILLARY)
