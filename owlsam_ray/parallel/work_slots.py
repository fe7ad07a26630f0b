"""Record what the threads of a process work on, in a file that outlives the process."""

import contextlib
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("decode", "encode", "model")

_MOST_IDS = 64

_SLOTS = 256

_HEADER = struct.Struct("<BB")  # number of ids, kind (0: free, else 1 + place in KINDS)

_IDS = struct.Struct(f"<{_MOST_IDS}q")

_SLOT_BYTES = _HEADER.size + _IDS.size

SLOT_FILES = "owlsam-watch-"
"""Prefix of these files' names."""


@dataclass(slots=True)
class _Slot:
    kind: str
    image_ids: Sequence[int]
    since: float


class WorkSlots:
    """Slots in which the threads of a process note their work."""

    def __init__(self, folder: Path | None = None) -> None:
        """Create the file.

        Args:
            folder: folder of the file; default: the system's temporary folder.
        """
        self._folder = folder
        self.renew()
        self._slots: dict[int, _Slot] = {}
        self._free = list(range(_SLOTS - 1, -1, -1))
        self._lock = threading.Lock()

    def renew(self) -> None:
        """Create another file, for work that begins from now on."""
        descriptor, name = tempfile.mkstemp(prefix=SLOT_FILES, dir=self._folder)
        self.path = Path(name)
        with os.fdopen(descriptor, "r+b") as file:
            file.truncate(_SLOTS * _SLOT_BYTES)
            self._map = mmap.mmap(file.fileno(), _SLOTS * _SLOT_BYTES)

    def remove_file(self) -> None:
        """Remove the file: no work is in progress, and the process may be ended at any time from now on."""
        self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def busy(self, kind: str, image_ids: Sequence[int]) -> Iterator[None]:
        """Record, while this context lasts, that the calling thread works on some images.

        Args:
            kind: one of `KINDS`.
            image_ids: ids of the images; only the first 64 are noted in the file.
        """
        work = _Slot(kind, image_ids, time.monotonic())
        with self._lock:
            slot = self._free.pop() if self._free else -1
            self._slots[slot] = work
        noted = self._map  # `renew` may replace it meanwhile
        if slot >= 0:
            _note(noted, slot, kind, image_ids[:_MOST_IDS])
        try:
            yield
        finally:
            if slot >= 0:
                noted[slot * _SLOT_BYTES + 1] = 0
            with self._lock:
                if self._slots.get(slot) is work:
                    del self._slots[slot]
                if slot >= 0:
                    self._free.append(slot)

    def in_hand(self) -> tuple[int, ...]:
        """Ids of all images that are being worked on, rising."""
        with self._lock:
            return tuple(sorted({image_id for slot in self._slots.values() for image_id in slot.image_ids}))

    def overdue(self, deadline_s: float) -> tuple[int, ...]:
        """Ids of images whose work began more than `deadline_s` seconds ago, rising."""
        latest = time.monotonic() - deadline_s
        with self._lock:
            found = {image_id for slot in self._slots.values() if slot.since < latest for image_id in slot.image_ids}
        return tuple(sorted(found))

    def close(self) -> None:
        """Unmap and remove the file."""
        self._map.close()
        self.path.unlink(missing_ok=True)


def _note(notes: mmap.mmap, slot: int, kind: str, image_ids: Sequence[int]) -> None:
    """Write the ids first and the kind last: a half-written slot counts as free."""
    start = slot * _SLOT_BYTES
    struct.pack_into(f"<{len(image_ids)}q", notes, start + _HEADER.size, *image_ids)
    _HEADER.pack_into(notes, start, len(image_ids), 1 + KINDS.index(kind))


def read_slots(path: Path) -> list[tuple[str, list[int]]]:
    """Kind and image ids in each slot of a process, dead or alive.

    Raises:
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    found = []
    for start in range(0, len(data) - _SLOT_BYTES + 1, _SLOT_BYTES):
        count, kind = _HEADER.unpack_from(data, start)
        if 1 <= kind <= len(KINDS) and count <= _MOST_IDS:
            ids = struct.unpack_from(f"<{count}q", data, start + _HEADER.size)
            found.append((KINDS[kind - 1], list(ids)))
    return found


def remove_old_slot_files(*, older_than_s: float = 86400.0) -> None:
    """Delete the files of processes that died long ago on this machine."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            with contextlib.suppress(OSError):
                if entry.name.startswith(SLOT_FILES) and time.time() - entry.stat().st_mtime > older_than_s:
                    os.unlink(entry.path)
