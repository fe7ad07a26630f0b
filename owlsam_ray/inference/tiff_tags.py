"""The first directory of a TIFF file: its orientation before Pillow applies it, and whether all pixels are there."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_SIZES = 273, 274, 277, 279
TILE_OFFSETS, TILE_SIZES, SAMPLE_FORMAT = 324, 325, 339
HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FORMATS = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""Letters of `struct` by type, of the types that numbers of interest have."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MAX_ENTRIES = 4096
_MAX_NUMBERS = 2**22
"""Of one tag that are read: a gigapixel picture in strips of one row has fewer."""


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: int
    count: int
    place: int
    """Of its first value in the file."""


@dataclass(frozen=True, slots=True)
class Directory:
    """Tags of a file's first picture."""

    data: bytes
    order: str
    """`<` or `>`, as `struct` has it."""
    entries: dict[int, _Entry]

    def numbers(self, tag: int) -> tuple[int, ...]:
        """Whole numbers of a tag; none when the file lacks it, or it holds something else.

        Raises:
            EOFError: the file ends before they do.
        """
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in _FORMATS or entry.count > _MAX_NUMBERS:
            return ()
        try:
            return struct.unpack_from(f"{self.order}{entry.count}{_FORMATS[entry.kind]}", self.data, entry.place)
        except struct.error:
            raise EOFError from None

    def number(self, tag: int, default: int) -> int:
        """The first number of a tag.

        Raises:
            EOFError: the file ends before it does.
        """
        return next(iter(self.numbers(tag)), default)

    @property
    def is_cut(self) -> bool:
        """Whether the file ends before its pixels do."""
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
    """The first directory of a TIFF or BigTIFF file; None for another file.

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
    """A TIFF file with the orientation 1, and the one that it had, 1…8; any other file as it is, and 1.

    Pillow turns the pixels of TIFF files, and of no others, as it reads them, which leaves no choice.
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
