"""Watchdog thread: reports work that takes too long, and a process that uses too much memory.

Each piece of work takes a slot (`parallel/work_slots`). Slots are in a small memory-mapped file on this machine, so
they can be read after the process was killed, whatever killed it; they are lost if the machine goes away.

C code that hangs while it holds the GIL also stops the watchdog. In that case a `faulthandler` timer, which does not
need the GIL, ends the process a few seconds later.
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
"""Seconds after the deadline when the process is ended even if the watchdog cannot run."""


@dataclass(frozen=True, slots=True)
class Overrun:
    """Why a process has to end."""

    image_ids: tuple[int, ...]
    """Images that took too long; if the process uses too much memory, all images being worked on."""
    reason: str
    """The reason of a failed row: `hang: …` or `out_of_memory: …`."""


class Watchdog:
    """A thread that reports when the process has to end."""

    def __init__(
        self,
        slots: WorkSlots,
        *,
        deadline_s: float,
        memory_bytes: int | None,
        on_overrun: Callable[[Overrun], None],
        last_resort: bool = True,
    ) -> None:
        """Prepare.

        Args:
            slots: work slots of this process.
            deadline_s: maximum seconds for one piece of work.
            memory_bytes: maximum private memory of the process; None means no limit.
            on_overrun: called once; should end the process.
            last_resort: end the process without a message if the watchdog thread cannot run.
        """
        self._slots, self._deadline_s, self._memory_bytes = slots, deadline_s, memory_bytes
        self._on_overrun, self._last_resort = on_overrun, last_resort
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="owlsam-watchdog", daemon=True)
        self._devnull: IO[str] | None = None

    def start(self) -> "Watchdog":
        """Start watching."""
        if self._last_resort:
            self._devnull = open(os.devnull, "w", encoding="ascii")  # noqa: SIM115 (open as long as the process)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()
        if self._devnull is not None:
            faulthandler.cancel_dump_traceback_later()
            self._devnull.close()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            if self._devnull is not None:
                faulthandler.dump_traceback_later(self._deadline_s + _LAST_RESORT_S, exit=True, file=self._devnull)
            overrun = self.look()
            if overrun is not None:
                self._on_overrun(overrun)
                return

    def look(self) -> Overrun | None:
        """Return the current overrun; None if there is none."""
        late = self._slots.overdue(self._deadline_s)
        if late:
            return Overrun(late, hang_text(self._deadline_s))
        if self._memory_bytes is not None and resident_bytes() > self._memory_bytes:
            return Overrun(self._slots.in_hand(), memory_text(self._memory_bytes))
        return None


def hang_text(deadline_s: float) -> str:
    """Failure reason for an image that does not finish; stored in rows, so earlier runs have the same words."""
    return f"hang: no end within {deadline_s:g} s"


def memory_text(memory_bytes: int) -> str:
    """Failure reason for an image that needs too much memory."""
    return f"out_of_memory: above {memory_bytes / 1e9:.3g} GB"


def resident_bytes(pid: int | str = "self") -> int:
    """Resident private memory of a process in bytes; 0 if it cannot be read.

    Shared memory does not count: blocks of Ray's object store, and mapped files.
    """
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * mmap.PAGESIZE
