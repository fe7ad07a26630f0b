"""Attempts: their files, heartbeats and fences, so that one attempt at a time works on a slice of a run.

Every attempt keeps a small file under `RUN/attempts/` with a heartbeat counter that it keeps incrementing. An attempt
that wants an overlapping slice watches that counter on its own monotonic clock; clocks of two hosts are never compared.
If the counter moves, the other attempt is alive and the new one refuses to start. If the counter does not move for
`takeover_s`, or if the other process ran on this machine and is known to be dead, the other attempt is fenced and its
slice is taken over. With `takeover`, a live attempt is fenced too.

A fence is also a file. An attempt checks for its fence at each heartbeat, and its processes check before they write a
shard. Correctness does not depend on it: attempts that overlap anyway write the same rows to the same names (law 2).
The fence only saves duplicate work.
"""

import contextlib
import json
import logging
import math
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from owlsam_ray import storage
from owlsam_ray.errors import AttemptLiveError, ConfigError, ExitCode, OwlsamError, shown
from owlsam_ray.run.paths import ATTEMPTS
from owlsam_ray.storage.secrets import masked

LABEL, SETUP = "label", "setup"
"""Scopes of an attempt: labelling a slice, or setup (planning, embedding and writing run.json)."""
ENDED = ".ended.json"
LIVE = ".json"
_FENCED = ".fenced"
OF_SETUP = "-setup"
"""Suffix of the ids of setup attempts, so that a listing shows their scope."""
_CLAIMING_BEAT_S = 1.0
"""Heartbeat interval while an attempt waits to claim its slice: shorter, so that others detect it sooner."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Slice:
    """Every `count`-th shard, starting at the `index`-th: the part of a run that one of several attempts works on."""

    index: int = 1
    """1…count."""
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Parse `i/n`: `2/8` is the second of eight slices.

        Raises:
            ConfigError: the text does not have this form, or not 1 ≤ i ≤ n.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"--slice {shown(text)} is not of the form i/n with 1 ≤ i ≤ n, such as 2/8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def is_whole(self) -> bool:
        """Whether the slice is the whole run."""
        return self.count == 1

    def shards(self, num_shards: int) -> range:
        """Numbers of the run's shards in this slice, ascending."""
        return range(self.index - 1, num_shards, self.count)

    def overlaps(self, other: "Slice") -> bool:
        """Whether a shard could belong to both slices."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0


class AttemptRecord(BaseModel):
    """What an attempt reports about itself: the content of its file."""

    model_config = ConfigDict(extra="ignore")

    id: str
    scope: str
    """`LABEL` or `SETUP`."""
    slice: str
    host: str
    pid: int
    process: str | None = None
    """Unique name of the process (see `process_name`); None if it cannot be determined."""
    started: str
    """Start time by its host's clock, for display only."""
    beat: int = 0
    """Heartbeat counter; increases while the attempt is alive."""
    heartbeat_s: float = 0.0
    """Seconds between two heartbeats."""
    state: str = "claiming"
    """`claiming` (checking for other attempts), `waiting` (has seen some) or `running`."""
    progress: dict[str, Any] | None = None
    """Progress of its slice, as in progress.json."""
    last_error: str | None = None
    ended: str | None = None
    exit_code: int | None = None
    """None in an ended record: the attempt was found dead."""

    @property
    def where(self) -> str:
        """Description for messages."""
        return f"{self.id} (process {self.pid} on {self.host}, slice {self.slice}, since {self.started})"


class Attempt:
    """The attempt of this process: a context manager that sends heartbeats until it exits."""

    def __init__(self, run_url: str, record: AttemptRecord, heartbeat_s: float) -> None:
        self.run_url = run_url
        self.record = record
        self._heartbeat_s = heartbeat_s
        self._fenced_by: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owlsam-heartbeat", daemon=True)

    @property
    def id(self) -> str:
        """Name of the attempt."""
        return self.record.id

    @property
    def fence_url(self) -> str:
        """File whose existence forbids the attempt to write anything more."""
        return storage.join(self.run_url, ATTEMPTS, f"{self.id}{_FENCED}")

    @property
    def stop_url(self) -> str:
        """File whose existence keeps the attempt from starting another shard."""
        return storage.join(self.run_url, ATTEMPTS, f"{self.id}.stop")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sign_off(error)

    def sign_off(self, error: BaseException | None) -> None:
        """Stop the heartbeat and record how the attempt ended; a storage failure is only logged."""
        self._stop.set()
        self._thread.join()
        if self.record.state != "running" or self.record.scope != LABEL:  # nothing to remember
            storage.remove(attempt_url(self.run_url, self.id, LIVE))
            return
        self.record.ended, self.record.exit_code = now_utc(), _exit_code(error)
        if error is not None:
            # Our own errors may carry counts as a second argument.
            message = error.args[0] if isinstance(error, OwlsamError) and error.args else error
            self.record.last_error = masked(str(message)) or type(error).__name__
        try:
            write_attempt(self.run_url, self.record, ENDED)
            storage.remove(attempt_url(self.run_url, self.id, LIVE))
        except OSError as failure:
            _log.warning(
                "cannot record the end of this attempt: %s. The next attempt waits until this one counts as dead.",
                failure,
            )

    def set_report(self, *, progress: dict[str, Any] | None = None, last_error: str | None = None) -> None:
        """Set what the next heartbeat reports."""
        with self._lock:
            if progress is not None:
                self.record.progress = progress
            if last_error is not None:
                self.record.last_error = masked(last_error)

    def raise_if_taken_over(self) -> None:
        """Check that the attempt still holds its slice.

        Raises:
            AttemptLiveError: another attempt took the slice over.
        """
        with contextlib.suppress(OSError):  # unreachable storage is reported where it matters
            self._look_at_the_fence()
        if self._fenced_by is not None:
            raise AttemptLiveError(
                f"the attempt {self.id} was taken over by {self._fenced_by} and stopped: finished shards are kept, and "
                "the other attempt continues"
            )

    def save(self) -> None:
        """Send a heartbeat.

        Raises:
            OSError: the write failed.
        """
        with self._lock:
            self.record.beat += 1
            write_attempt(self.run_url, self.record, LIVE)

    def _look_at_the_fence(self) -> None:
        if self._fenced_by is None and storage.exists(self.fence_url):
            self._fenced_by = storage.read_bytes(self.fence_url).decode(errors="replace")
            _log.warning("taken over by %s: this attempt writes nothing more", self._fenced_by)

    def _beat(self) -> None:
        """Send heartbeats until the attempt ends or is fenced.

        If a fenced attempt hangs, others can enter because its heartbeat has stopped.
        """
        while self._fenced_by is None and not self._stop.wait(
            self._heartbeat_s if self.record.state == "running" else min(_CLAIMING_BEAT_S, self._heartbeat_s)
        ):
            try:
                self.save()
                self._look_at_the_fence()
            except (OSError, OwlsamError) as error:
                # Without heartbeats the attempt may be taken over; it notices once storage responds again.
                _log.warning("cannot write the heartbeat: %s", error)


def fence(run_url: str, attempt_id: str, *, by: str) -> None:
    """Fence an attempt: it stops writing once it has seen the fence."""
    url = attempt_url(run_url, attempt_id, _FENCED)
    if not storage.exists(url):
        storage.write_atomic(url, by.encode())


def live_attempts(run_url: str, *, scope: str | None = None) -> list[AttemptRecord]:
    """Attempts that have not signed off, by ascending id: they are alive or were killed.

    Args:
        run_url: the run directory.
        scope: `LABEL` or `SETUP`; None means both.
    """
    names = storage.list_names(storage.join(run_url, ATTEMPTS))
    return read_attempts(
        run_url,
        [
            name
            for name in names
            if name.endswith(LIVE)
            and not name.endswith(ENDED)
            and (scope is None or name.endswith(f"{OF_SETUP}{LIVE}") == (scope == SETUP))
        ],
    )


def ended_attempts(run_url: str) -> list[AttemptRecord]:
    """Attempts that have ended or were found dead, by ascending id."""
    names = storage.list_names(storage.join(run_url, ATTEMPTS))
    return read_attempts(run_url, [name for name in names if name.endswith(ENDED)])


def read_attempts(run_url: str, names: list[str]) -> list[AttemptRecord]:
    """Read attempts from files with these names; skip files that have vanished since or are invalid."""

    def read(name: str) -> AttemptRecord | None:
        try:
            return AttemptRecord.model_validate_json(storage.read_bytes(storage.join(run_url, ATTEMPTS, name)))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            _log.warning("ignoring %s, which is not an attempt's file: %s", name, str(error).splitlines()[0])
            return None

    if not names:
        return []
    with ThreadPoolExecutor(min(32, len(names))) as pool:
        return [record for record in pool.map(read, names) if record is not None]


def attempt_url(run_url: str, attempt_id: str, suffix: str) -> str:
    """Path or URL of an attempt's file with this suffix."""
    return storage.join(run_url, ATTEMPTS, f"{attempt_id}{suffix}")


def write_attempt(run_url: str, record: AttemptRecord, suffix: str) -> None:
    """Write an attempt's file atomically."""
    text = json.dumps(record.model_dump(mode="json"), indent=1)
    storage.write_atomic(attempt_url(run_url, record.id, suffix), text.encode())


def now_utc() -> str:
    """Current time in UTC as ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def safe_file_name(text: str) -> str:
    """Make text safe in a file name: all but ASCII letters, digits, `.` and `-` become `_`; at most 64 characters."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", text)[:64]


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return int(ExitCode.COMPLETE)
    if isinstance(error, OwlsamError):
        return int(error.exit_code)
    return int(ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.INCOMPLETE)


def process_name(pid: int) -> str | None:
    """Name a process uniquely: boot id of the machine, PID namespace, pid and start time of the process.

    None if it cannot be determined; empty for a process that has ended and only waits to be reaped.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else f"{boot} {space} {pid} {rest[18]}"


def is_dead_here(record: AttemptRecord) -> bool:
    """Whether an attempt ran on this machine, in this container, and its process is known to be gone."""
    mine = process_name(os.getpid())
    if not mine or record.process is None or record.process.split()[:2] != mine.split()[:2]:
        return False
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's process, and alive
        return False
    found = process_name(record.pid)
    return found is not None and found != record.process
