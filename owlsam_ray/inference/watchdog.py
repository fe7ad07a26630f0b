"""What the threads of a process work on, and since when: known to a watchdog inside, and to others after its death.

Each piece of work takes a slot. Slots live in a small file on this machine that is mapped into memory, so that what
stood in them can be read after the process was killed, whatever killed it; a machine that goes away takes it along. A
watchdog thread looks for work that takes too long, and for a process that takes too much memory.

C code that hangs while it holds the interpreter's lock stops the watchdog as well. Then a timer of `faulthandler`,
which needs no lock, ends the process some seconds later.
"""

import faulthandler
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from owlsam_ray.parallel.work_slots import WorkSlots

_LOOK_S = 0.2
_LAST_RESORT_S = 10.0
"""So much later than the deadline a process ends even when the watchdog cannot run."""


@dataclass(frozen=True, slots=True)
class Overrun:
    """Why a process has to end."""

    kind: str
    """`hang` or `out_of_memory`."""
    image_ids: tuple[int, ...]
    """What was worked on for too long; for memory everything that was worked on."""
    text: str
    """The reason of a failed row."""


class Watchdog:
    """A thread that tells when a process has to end."""

    def __init__(
        self,
        watch: WorkSlots,
        *,
        deadline_s: float,
        memory_bytes: int | None,
        on_overrun: Callable[[Overrun], None],
        last_resort: bool = True,
    ) -> None:
        """Prepare.

        Args:
            watch: of this process.
            deadline_s: seconds that one piece of work may take.
            memory_bytes: that the process may hold; None: any.
            on_overrun: called once, and should end the process.
            last_resort: end the process without a word when the watchdog itself is kept from running.
        """
        self._watch, self._deadline_s, self._memory_bytes = watch, deadline_s, memory_bytes
        self._on_trouble, self._last_resort = on_overrun, last_resort
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

    def look(self) -> Overrun | None:
        """What is wrong at the moment; None when nothing is."""
        late = self._watch.overdue(self._deadline_s)
        if late:
            return Overrun("hang", late, hang_text(self._deadline_s))
        if self._memory_bytes is not None and resident_bytes() > self._memory_bytes:
            return Overrun("out_of_memory", self._watch.in_hand(), memory_text(self._memory_bytes))
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
