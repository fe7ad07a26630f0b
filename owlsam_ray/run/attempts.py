"""Attempts and the fence: one attempt at a time works on a slice of a run.

Every attempt keeps a small file under `RUN/attempts/` with a counter that it raises again and again. Another one that
wants an overlapping slice watches that counter on its own monotonic clock, never on two hosts' clocks: when it moves,
the attempt lives, and the other refuses; when it stands still for `takeover_s`, or its process is known to be dead
because it ran on this very machine, the attempt is fenced and its slice is taken over. `takeover` fences one that
lives.

A fence is a file as well. The attempt looks for it with each sign of life, its processes before each shard that they
write. Nothing depends on it: attempts that overlap all the same write the same rows to the same names (law 2). What it
saves is work done twice.
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
from owlsam_ray.storage.secrets import masked

ATTEMPTS = "attempts"
LABEL, SETUP = "label", "setup"
"""What an attempt excludes others from: labelling a slice; planning, embedding and writing run.json."""
ENDED = ".ended.json"
LIVE = ".json"
_FENCED = ".fenced"
OF_SETUP = "-setup"
"""How their ids end, so that a listing tells them apart."""
_CLAIMING_BEAT_S = 1.0
"""An attempt that waits for others shows life more often, so that these need not wait long for it."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Slice:
    """Every `count`-th shard, from the `index`-th on: a part of a run that one of several attempts works on."""

    index: int = 1
    """1…count."""
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """`2/8` → the second of eight.

        Raises:
            ConfigError: it is not of that form.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"--slice {shown(text)} is not of the form i/n with 1 ≤ i ≤ n, such as 2/8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole run."""
        return self.count == 1

    def shards(self, num_shards: int) -> range:
        """The shards of a run that belong to it, rising."""
        return range(self.index - 1, num_shards, self.count)

    def overlaps(self, other: "Slice") -> bool:
        """Whether some shard could belong to both."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0


class AttemptRecord(BaseModel):
    """What an attempt tells about itself."""

    model_config = ConfigDict(extra="ignore")

    id: str
    scope: str
    """`LABEL` or `SETUP`."""
    slice: str
    host: str
    pid: int
    process: str | None = None
    """Names the process for good on a machine that runs since its last start; None where that cannot be told."""
    started: str
    """Its host's clock, for people."""
    beat: int = 0
    """Rises while it lives."""
    heartbeat_s: float = 0.0
    """Seconds between two of them."""
    state: str = "claiming"
    """`claiming`: it looks for others; `waiting`: it has seen some; `running`."""
    progress: dict[str, Any] | None = None
    """Of its slice, as in progress.json."""
    last_error: str | None = None
    ended: str | None = None
    exit_code: int | None = None
    """None: it was found dead."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.id} (process {self.pid} on {self.host}, slice {self.slice}, since {self.started})"


class Attempt:
    """The attempt of this process: a context that shows life until it is left."""

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
        """Once this file exists the attempt must write nothing any more."""
        return storage.join(self.run_url, ATTEMPTS, f"{self.id}{_FENCED}")

    @property
    def stop_url(self) -> str:
        """Once this file exists the attempt begins no shard any more."""
        return storage.join(self.run_url, ATTEMPTS, f"{self.id}.stop")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sign_off(error)

    def sign_off(self, error: BaseException | None) -> None:
        """Show no life any more, and tell how the attempt ended; storage that refuses is only logged."""
        self._stop.set()
        self._thread.join()
        if self.record.state != "running" or self.record.scope != LABEL:  # nothing to remember
            storage.remove(attempt_url(self.run_url, self.id, LIVE))
            return
        self.record.ended, self.record.exit_code = now_utc(), _exit_code(error)
        if error is not None:
            # Our own errors may carry counts as a second argument.
            said = error.args[0] if isinstance(error, OwlsamError) and error.args else error
            self.record.last_error = masked(str(said)) or type(error).__name__
        try:
            write_attempt(self.run_url, self.record, ENDED)
            storage.remove(attempt_url(self.run_url, self.id, LIVE))
        except OSError as trouble:
            _log.warning("cannot sign off: %s. The next attempt waits until this one is certainly gone.", trouble)

    def tell(self, *, progress: dict[str, Any] | None = None, last_error: str | None = None) -> None:
        """What the next sign of life is to say."""
        with self._lock:
            if progress is not None:
                self.record.progress = progress
            if last_error is not None:
                self.record.last_error = masked(last_error)

    def raise_if_taken_over(self) -> None:
        """Nothing while the attempt holds its slice.

        Raises:
            AttemptLiveError: another attempt took it over.
        """
        with contextlib.suppress(OSError):  # that storage is gone is told where it matters
            self._look_at_the_fence()
        if self._fenced_by is not None:
            raise AttemptLiveError(
                f"the attempt {self.id} was taken over by {self._fenced_by} and stopped: finished shards are kept, and "
                "the other one goes on"
            )

    def save(self) -> None:
        """Show life.

        Raises:
            OSError: storage refused.
        """
        with self._lock:
            self.record.beat += 1
            write_attempt(self.run_url, self.record, LIVE)

    def _look_at_the_fence(self) -> None:
        if self._fenced_by is None and storage.exists(self.fence_url):
            self._fenced_by = storage.read_bytes(self.fence_url).decode(errors="replace")
            _log.warning("taken over by %s: nothing is written any more", self._fenced_by)

    def _beat(self) -> None:
        """Show life until the end, or until the attempt is fenced: should it hang then, its silence lets others in."""
        while self._fenced_by is None and not self._stop.wait(
            self._heartbeat_s if self.record.state == "running" else min(_CLAIMING_BEAT_S, self._heartbeat_s)
        ):
            try:
                self.save()
                self._look_at_the_fence()
            except (OSError, OwlsamError) as error:
                # One that cannot show life may be taken over, and notices it as soon as storage answers again.
                _log.warning("cannot show life: %s", error)


def fence(run_url: str, attempt_id: str, *, by: str) -> None:
    """Stop an attempt: it writes nothing any more once it has seen this."""
    url = attempt_url(run_url, attempt_id, _FENCED)
    if not storage.exists(url):
        storage.write_atomic(url, by.encode())


def live_attempts(run_url: str, *, scope: str | None = None) -> list[AttemptRecord]:
    """Attempts that have not ended in an orderly way, by rising id: they live, or were killed.

    Args:
        run_url: the run directory.
        scope: `LABEL` or `SETUP`; None: both.
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
    """Attempts that have ended, or were found dead, by rising id."""
    names = storage.list_names(storage.join(run_url, ATTEMPTS))
    return read_attempts(run_url, [name for name in names if name.endswith(ENDED)])


def read_attempts(run_url: str, names: list[str]) -> list[AttemptRecord]:
    """The attempts of these files; without those that are gone meanwhile, or that nobody can read."""

    def read(name: str) -> AttemptRecord | None:
        try:
            return AttemptRecord.model_validate_json(storage.read_bytes(storage.join(run_url, ATTEMPTS, name)))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            _log.warning("%s is no attempt's file: %s", name, str(error).splitlines()[0])
            return None

    if not names:
        return []
    with ThreadPoolExecutor(min(32, len(names))) as pool:
        return [record for record in pool.map(read, names) if record is not None]


def attempt_url(run_url: str, attempt_id: str, suffix: str) -> str:
    """Path or URL of a file of an attempt."""
    return storage.join(run_url, ATTEMPTS, f"{attempt_id}{suffix}")


def write_attempt(run_url: str, record: AttemptRecord, suffix: str) -> None:
    """Write the file of an attempt, whole."""
    text = json.dumps(record.model_dump(mode="json"), indent=1)
    storage.write_atomic(attempt_url(run_url, record.id, suffix), text.encode())


def now_utc() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def safe_file_name(text: str) -> str:
    """Text as part of a file name: other characters than letters, digits, `.` and `-` become `_`; at most 64."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", text)[:64]


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return int(ExitCode.COMPLETE)
    if isinstance(error, OwlsamError):
        return int(error.exit_code)
    return int(ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.INCOMPLETE)


def process_name(pid: int) -> str | None:
    """A name that no other process has, as long as this machine runs: its start, and the process's within it.

    None where that cannot be told; empty for a process that has ended, and only waits to be reaped.
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
    """Whether an attempt ran on this machine, in this container, and its process is certainly gone."""
    mine = process_name(os.getpid())
    if not mine or record.process is None or record.process.split()[:2] != mine.split()[:2]:
        return False
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, and alive
        return False
    found = process_name(record.pid)
    return found is not None and found != record.process
