"""Parse the first directory of a TIFF file: its orientation, and whether the file holds all its pixels."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_SIZES = 273, 274, 277, 279
TILE_OFFSETS, TILE_SIZES, SAMPLE_FORMAT = 324, 325, 339
HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FORMATS = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""`struct` format characters by TIFF type, for the types of the numbers that are read."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MAX_ENTRIES = 4096
_MAX_NUMBERS = 2**22
"""Maximum count of numbers read for one tag; a gigapixel image in strips of one row has fewer."""


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: int
    count: int
    place: int
    """Offset of its first value in the file."""


@dataclass(frozen=True, slots=True)
class Directory:
    """Tags of the first image in a file."""

    data: bytes
    order: str
    """Byte order in the notation of `struct`: `<` or `>`."""
    entries: dict[int, _Entry]

    def numbers(self, tag: int) -> tuple[int, ...]:
        """Integers of a tag; empty if the file lacks the tag or it does not hold integers.

        Raises:
            EOFError: the file ends before the numbers do.
        """
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in _FORMATS or entry.count > _MAX_NUMBERS:
            return ()
        try:
            return struct.unpack_from(f"{self.order}{entry.count}{_FORMATS[entry.kind]}", self.data, entry.place)
        except struct.error:
            raise EOFError from None

    def number(self, tag: int, default: int) -> int:
        """First integer of a tag; `default` if there is none.

        Raises:
            EOFError: the file ends before the numbers do.
        """
        return next(iter(self.numbers(tag)), default)

    @property
    def is_cut(self) -> bool:
        """Whether the file is truncated: it ends before its pixels do."""
        try:
            for places, sizes in ((STRIP_OFFSETS, STRIP_SIZES), (TILE_OFFSETS, TILE_SIZES)):
                if _end(self.numbers(places), self.numbers(sizes)) > len(self.data):
                    return True
        except EOFError:
            return True
        return False


def _end(places: Sequence[int], sizes: Sequence[int]) -> int:
    padded = [*sizes, *[1] * (len(places) - len(sizes))]
    return max((place + size for place, size in zip(places, padded, strict=False)), default=0)


def read_directory(data: bytes) -> Directory | None:
    """Read the first directory of a TIFF or BigTIFF file; None for any other file.

    Raises:
        EOFError: the file ends before its directory does.
    """
    if data[:4] not in HEADS:
        return None
    order = "<" if data[:1] == b"I" else ">"
    big = b"+" in data[:4]
    offset_letter, count_letter, entry_size = ("Q", "Q", 20) if big else ("I", "H", 12)
    room = struct.calcsize(f"{order}{offset_letter}")
    entries = {}
    try:
        (at,) = struct.unpack_from(f"{order}{offset_letter}", data, 8 if big else 4)
        (count,) = struct.unpack_from(f"{order}{count_letter}", data, at)
        at += struct.calcsize(f"{order}{count_letter}")
        for number in range(min(count, _MAX_ENTRIES)):
            start = at + number * entry_size
            tag, kind, length = struct.unpack_from(f"{order}HH{offset_letter}", data, start)
            place = start + entry_size - room
            (far,) = struct.unpack_from(f"{order}{offset_letter}", data, place)
            entries[tag] = _Entry(kind, length, place if _SIZES.get(kind, 1) * length <= room else far)
    except struct.error:
        raise EOFError from None
    return Directory(data, order, entries)


def split_orientation(data: bytes) -> tuple[bytes, int]:
    """Set the orientation of a TIFF file to 1; return the file and its original orientation, 1…8.

    Any other file is returned unchanged, with 1. This is needed because Pillow applies the orientation of TIFF files,
    and only of these, when it loads the pixels.
    """
    try:
        directory = read_directory(data)
        found = 1 if directory is None else directory.number(ORIENTATION, 1)
    except EOFError:
        return data, 1
    if directory is None or not 2 <= found <= 8:
        return data, 1
    entry = directory.entries[ORIENTATION]
    value = struct.pack(f"{directory.order}{_FORMATS[entry.kind]}", 1)
    return data[: entry.place] + value + data[entry.place + len(value) :], found
