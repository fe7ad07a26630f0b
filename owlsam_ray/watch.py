"""What the threads of a process work on, and since when: known to a watchdog inside, and to others after its death.

Each piece of work takes a slot. Slots live in a small file on this machine that is mapped into memory, so that what
stood in them can be read after the process was killed, whatever killed it; a machine that goes away takes it along. A
watchdog thread looks for work that takes too long, and for a process that takes too much memory.

C code that hangs while it holds the interpreter's lock stops the watchdog as well. Then a timer of `faulthandler`,
which needs no lock, ends the process some seconds later.
"""

import contextlib
import faulthandler
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

KINDS = ("decode", "encode", "model")
_MOST_IDS = 64
_SLOTS = 256
_HEADER = struct.Struct("<BB")  # number of ids, kind (0: free, else 1 + place in KINDS)
_IDS = struct.Struct(f"<{_MOST_IDS}q")
_SLOT_BYTES = _HEADER.size + _IDS.size
_LOOK_S = 0.2
_LAST_RESORT_S = 10.0
"""So much later than the deadline a process ends even when the watchdog cannot run."""
BREADCRUMBS = "owlsam-watch-"
"""How the names of these files begin."""


@dataclass(slots=True)
class _Slot:
    kind: str
    image_ids: Sequence[int]
    since: float


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a process has to end."""

    kind: str
    """`hang` or `out_of_memory`."""
    image_ids: tuple[int, ...]
    """What was worked on for too long; for memory everything that was worked on."""
    text: str
    """The reason of a failed row."""


class Watch:
    """Slots for the threads of a process."""

    def __init__(self, folder: Path | None = None) -> None:
        """Make the file.

        Args:
            folder: for the file; default: the system's for temporary files.
        """
        self._folder = folder
        self.renew()
        self._slots: dict[int, _Slot] = {}
        self._free = list(range(_SLOTS - 1, -1, -1))
        self._lock = threading.Lock()

    def renew(self) -> None:
        """Make another file, for the work that begins from now on."""
        descriptor, name = tempfile.mkstemp(prefix=BREADCRUMBS, dir=self._folder)
        self.path = Path(name)
        with os.fdopen(descriptor, "r+b") as file:
            file.truncate(_SLOTS * _SLOT_BYTES)
            self._map = mmap.mmap(file.fileno(), _SLOTS * _SLOT_BYTES)

    def remove_file(self) -> None:
        """Remove the file: nothing is worked on, and the process may be ended at any time from now on."""
        self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def busy(self, kind: str, image_ids: Sequence[int]) -> Iterator[None]:
        """While this context lasts the calling thread works on some images.

        Args:
            kind: one of `KINDS`.
            image_ids: of the images; of more than 64 the first ones are noted in the file.
        """
        work = _Slot(kind, image_ids, time.monotonic())
        with self._lock:
            slot = self._free.pop() if self._free else -1
            self._slots[slot] = work
        noted = self._map  # a later file may take its place meanwhile
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
        """Ids of the images of work that began more than so many seconds ago, rising."""
        latest = time.monotonic() - deadline_s
        with self._lock:
            found = {image_id for slot in self._slots.values() if slot.since < latest for image_id in slot.image_ids}
        return tuple(sorted(found))

    def close(self) -> None:
        """Remove the file."""
        self._map.close()
        self.path.unlink(missing_ok=True)


def _note(notes: mmap.mmap, slot: int, kind: str, image_ids: Sequence[int]) -> None:
    """Write the ids first and the kind last: a slot that is half written counts as free."""
    start = slot * _SLOT_BYTES
    struct.pack_into(f"<{len(image_ids)}q", notes, start + _HEADER.size, *image_ids)
    _HEADER.pack_into(notes, start, len(image_ids), 1 + KINDS.index(kind))


def read_breadcrumbs(path: Path) -> list[tuple[str, list[int]]]:
    """What a process, dead or alive, had in its slots: kind and image ids.

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


def remove_old_breadcrumbs(*, older_than_s: float = 86400.0) -> None:
    """Delete the files of processes that died long ago on this machine."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            with contextlib.suppress(OSError):
                if entry.name.startswith(BREADCRUMBS) and time.time() - entry.stat().st_mtime > older_than_s:
                    os.unlink(entry.path)


class Watchdog:
    """A thread that tells when a process has to end."""

    def __init__(
        self,
        watch: Watch,
        *,
        deadline_s: float,
        memory_bytes: int | None,
        on_trouble: Callable[[Trouble], None],
        last_resort: bool = True,
    ) -> None:
        """Prepare.

        Args:
            watch: of this process.
            deadline_s: seconds that one piece of work may take.
            memory_bytes: that the process may hold; None: any.
            on_trouble: called once, and should end the process.
            last_resort: end the process without a word when the watchdog itself is kept from running.
        """
        self._watch, self._deadline_s, self._memory_bytes = watch, deadline_s, memory_bytes
        self._on_trouble, self._last_resort = on_trouble, last_resort
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="owlsam-watchdog", daemon=True)
        self._silent: IO[str] | None = None

    def start(self) -> "Watchdog":
        """Begin to look."""
        if self._last_resort:
            self._silent = open(os.devnull, "w", encoding="ascii")  # noqa: SIM115 (open as long as the process)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()
        if self._silent is not None:
            faulthandler.cancel_dump_traceback_later()
            self._silent.close()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            if self._silent is not None:
                faulthandler.dump_traceback_later(self._deadline_s + _LAST_RESORT_S, exit=True, file=self._silent)
            trouble = self.look()
            if trouble is not None:
                self._on_trouble(trouble)
                return

    def look(self) -> Trouble | None:
        """What is wrong at the moment; None when nothing is."""
        late = self._watch.overdue(self._deadline_s)
        if late:
            return Trouble("hang", late, hang_text(self._deadline_s))
        if self._memory_bytes is not None and resident_bytes() > self._memory_bytes:
            return Trouble("out_of_memory", self._watch.in_hand(), memory_text(self._memory_bytes))
        return None


def hang_text(deadline_s: float) -> str:
    """The reason of an image that does not come to an end."""
    return f"hang: no end within {deadline_s:g} s"


def memory_text(memory_bytes: int) -> str:
    """The reason of an image that takes too much memory."""
    return f"out_of_memory: above {memory_bytes / 1e9:.3g} GB"


def resident_bytes(pid: int | str = "self") -> int:
    """Memory that a process holds for itself; 0 where nobody can tell.

    What it shares does not count: blocks of Ray's object store, and files that are mapped.
    """
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * mmap.PAGESIZE
