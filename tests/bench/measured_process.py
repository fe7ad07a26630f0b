"""A command in a process of its own, and what it took: lines with their moments, and peaks of memory."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

ROOT = Path(__file__).parents[2]
_PAUSE_S = 0.5
T = TypeVar("T")


class MeasuredProcess:
    """Starts a command at once, and looks at its memory now and then."""

    def __init__(self, command: Sequence[str]) -> None:
        self.start = time.monotonic()
        self.log: list[tuple[float, str]] = []
        """Lines of stderr, with the seconds since the start at which they came."""
        self.peak_bytes = 0
        """Resident memory of the process at its highest; pages that it shares with others count."""
        self.all_peak_bytes = 0
        """Memory of it and all processes below it; each page counts once."""
        self.store_peak_bytes = 0
        """Memory that Ray's object store took; part of the above."""
        self.output = ""
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            cwd=ROOT,
        )
        self.pid = self._process.pid
        self._threads = [threading.Thread(target=each) for each in (self._read_log, self._read_output, self._watch)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.wait()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def moment_of(self, words: str) -> float:
        """Seconds until the first line of the log with these words; waits for it."""
        return self.wait_for(lambda: next((at for at, line in self.log if words in line), None))

    def wait_for(self, condition: Callable[[], T | None]) -> T:
        """What the condition gives at last.

        Raises:
            RuntimeError: the process ended without that.
        """
        while True:
            ended = self._process.poll() is not None
            found = condition()
            if found is not None:
                return found
            if ended:
                raise RuntimeError(f"ended with {self.wait()}:\n{self.told()[-4000:]}")
            time.sleep(0.01)

    def told(self) -> str:
        """The log so far."""
        return "\n".join(line for _, line in self.log)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        """The exit code."""
        code = self._process.wait()
        for thread in self._threads:
            thread.join()
        return code

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            for line in pipe:
                self.log.append((self.seconds, line.rstrip("\n")))

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            self.output = pipe.read()

    def _watch(self) -> None:
        while self._process.poll() is None:
            everyone = family(self.pid)
            self.peak_bytes = max(self.peak_bytes, highest_bytes(self.pid))
            self.all_peak_bytes = max(self.all_peak_bytes, sum(map(proportional_bytes, everyone)))
            self.store_peak_bytes = max(self.store_peak_bytes, store_bytes(everyone))
            time.sleep(_PAUSE_S)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        below = [each for task in tasks for each in (task / "children").read_text().split()]
    except OSError:  # it has ended
        return []
    return [pid, *(each for child in below for each in family(int(child)))]


def highest_bytes(pid: int) -> int:
    """The most resident memory that a process has had so far; 0 when it has ended."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM:") * 1024


def proportional_bytes(pid: int) -> int:
    """Memory of one process, with its share of pages that others hold too; 0 when it has ended."""
    return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024


def _kilobytes(file: Path, key: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def store_bytes(pids: Sequence[int]) -> int:
    """Memory of the files of Ray's object store that these processes hold open; it never shrinks."""
    found: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                if "plasma" in os.readlink(entry):
                    status = entry.stat()
                    found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def tree_bytes(path: Path) -> tuple[int, int]:
    """Number of files below a directory, and their bytes."""
    sizes = [os.stat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names]
    return len(sizes), sum(sizes)
