"""`owlsam status`: how far a run is, told by its directory alone, from any machine that sees the storage.

Nothing is written, and nobody is asked: shard files say what is done, attempts tell about themselves under
`RUN/attempts`. Whether an attempt lives is told by its counter, which must move while one looks; clocks of two hosts
are never compared.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.errors import IncompleteError, InputError
from owlsam_ray.run.attempts import AttemptRecord, ended_attempts, is_dead_here, live_attempts
from owlsam_ray.run.counts import RunCounts
from owlsam_ray.run.failures import find_failures
from owlsam_ray.run.in_hand import list_markers
from owlsam_ray.run.manifest import load_manifest
from owlsam_ray.run.paths import RUN_FILE
from owlsam_ray.run.progress import duration
from owlsam_ray.run.record import load_record
from owlsam_ray.terminal import safe_text

_NAMED = 20
"""Attempts that have ended of which the state tells more than the number."""
_ERRORS = 5
_LOOK_S = 0.25
"""Seconds between two looks at counters that have not moved yet."""


@dataclass(slots=True)
class _Watched:
    """An attempt that has not signed off, as seen from here."""

    record: AttemptRecord
    since: float
    """On this process's monotonic clock: when it was first seen with this counter."""
    moved: bool = False

    def state(self, now: float, patience_s: float) -> str:
        """What is known of it by now.

        `dead` (its process ran on this machine and is gone), `live`, `silent` (for longer than an attempt that lives),
        or `unknown` (not looked at for long enough).
        """
        if is_dead_here(self.record):
            return "dead"
        if now - self.since > patience_s:
            return "silent"
        return "live" if self.moved else "unknown"


class RunStatus:
    """A run that is looked at once, or again and again: each finished shard is read once."""

    def __init__(self, run_url: str) -> None:
        """Read what was planned.

        Args:
            run_url: the run directory.

        Raises:
            InputError: there is no run.
            GuardError: `run.json` or the manifest is damaged.
        """
        record = load_record(run_url)
        manifest = load_manifest(run_url, verify=False, num_parts=record.num_parts) if record is not None else None
        if record is None or manifest is None:
            raise InputError(f"{run_url} holds no run (no {RUN_FILE}, or no manifest)")
        self._run_url, self._manifest = run_url, manifest
        self._tally = RunCounts(run_url, manifest, record.fingerprint)
        beat_s = record.config.get("resources", {}).get("heartbeat_s", ResourcesConfig().heartbeat_s)
        self.patience_s = 1.2 * float(beat_s) + 1.0
        """Seconds after which an attempt that lives has shown it, as far as the run file that planned the run tells."""
        self._watched: dict[str, _Watched] = {}

    def look(self, *, wait_s: float | None = None) -> dict[str, Any]:
        """The state of the run by now.

        Args:
            wait_s: seconds, at most, to wait for signs of life of attempts that have not signed off; None: as long as
                it takes to tell. Whoever has shown one is not waited for.

        Returns:
            `images`, `done`, `ok`, `empty`, `failed`, `left`, `shards`, `shards_done`, `detections`, `masks`;
            `failed_by_class`, `failed_by_reason`; `quarantined`: the first such images; `in_hand`: shards that are, or
            were when a process died, being worked on; `images_per_s` and `eta_s` of the attempts that live, None
            without one; `attempts`: those that have not signed off, then the last that have; `attempts_ended`;
            `last_errors`; `problems`: sentences about shard files that cannot be trusted.

        Raises:
            IncompleteError: there are files of shards that the run does not have.
            OSError: storage gave up.
        """
        start = time.monotonic()
        self._look_for_life()
        problems = []
        self._tally.refresh_listing()
        self._tally.forget(self._tally.failed_shards)  # which may have been tried again meanwhile
        try:
            self._tally.read_footers()
        except IncompleteError as error:
            problems.append(f"{self._tally.unread} shard files cannot be trusted (see `owlsam verify`): {error}")
        failures = find_failures(self._manifest, self._tally.failed_shards)
        wait_s = self.patience_s + _LOOK_S if wait_s is None else wait_s
        while self._anyone_unknown() and time.monotonic() - start < wait_s:
            time.sleep(_LOOK_S)
            self._look_for_life()
        counts = self._tally.summary()
        return (
            {"run": self._run_url}
            | counts
            | {
                "failed_by_class": dict(sorted(failures.by_class.items())),
                "failed_by_reason": dict(sorted(failures.by_reason.items())),
                "quarantined": failures.quarantined,
                "in_hand": len(list_markers(self._run_url)),
                "problems": problems,
            }
            | self._attempts(counts["left"])
        )

    def _look_for_life(self) -> None:
        now = time.monotonic()
        before, self._watched = self._watched, {}
        for record in live_attempts(self._run_url):
            watched = before.get(record.id)
            if watched is None or watched.record.beat != record.beat:
                watched = _Watched(record, now, moved=watched is not None)
            self._watched[record.id] = watched

    def _anyone_unknown(self) -> bool:
        now = time.monotonic()
        return any(watched.state(now, self.patience_s) == "unknown" for watched in self._watched.values())

    def _attempts(self, left: int) -> dict[str, Any]:
        """Rate, time left, and what the attempts tell about themselves."""
        now = time.monotonic()
        ended = sorted(ended_attempts(self._run_url), key=lambda record: (record.ended or "", record.id))
        signed_off = {record.id for record in ended}
        alive = [
            (watched.record, watched.state(now, self.patience_s))
            for watched in self._watched.values()
            if watched.record.id not in signed_off
        ]
        rates = [
            record.progress["images_per_s"]
            for record, state in alive
            if state not in ("silent", "dead") and record.scope == "label" and record.progress
        ]
        rate = sum(rates) if rates else None
        errors = [record for record in [*ended, *(record for record, _ in alive)] if record.last_error]
        return {
            "images_per_s": None if rate is None else round(rate, 3),
            "eta_s": round(left / rate) if rate else None,
            "attempts": [
                *(_told(record, state) for record, state in alive),
                *(_told(record, "ended") for record in reversed(ended[-_NAMED:])),
            ],
            "attempts_ended": len(ended),
            "last_errors": [
                {"attempt": record.id, "at": record.ended, "error": record.last_error}
                for record in reversed(errors[-_ERRORS:])
            ],
        }


def _told(record: AttemptRecord, state: str) -> dict[str, Any]:
    """An attempt, for the state of the run."""
    named = record.model_dump(
        mode="json", include={"id", "scope", "slice", "host", "pid", "started", "beat", "ended", "exit_code"}
    )
    return named | {"state": state}


def watch_run(
    run_url: str,
    show: Callable[[dict[str, Any]], None],
    *,
    every_s: float | None = None,
    wait_s: float | None = None,
) -> dict[str, Any]:
    """Look at a run, again and again if that is asked for, until nothing is left to do and nobody works on it.

    Args:
        run_url: the run directory.
        show: called with each state.
        every_s: seconds between two looks; None: one look.
        wait_s: see `RunStatus.look`; of the first look, when there are more.

    Returns:
        The last state. An interrupt (Ctrl-C) ends the watching, no more.

    Raises:
        OwlsamError, OSError: as `RunStatus`.
    """
    status = RunStatus(run_url)
    state = status.look(wait_s=wait_s)
    show(state)
    try:
        while every_s is not None and (state["left"] or any(each["state"] == "live" for each in state["attempts"])):
            time.sleep(every_s)
            state = status.look(wait_s=0.0)
            show(state)
    except KeyboardInterrupt:
        return state
    return state


def status_table(state: dict[str, Any]) -> Group:
    """The same for people."""
    counts = Table.grid(padding=(0, 2))
    done = f"{state['done']:,} of {state['images']:,} images, {state['shards_done']:,} of {state['shards']:,} shards"
    rate = state["images_per_s"]
    speed = "no attempt tells a rate" if rate is None else f"{rate:,.2f} images/s · ETA {duration(state['eta_s'])}"
    for name, value in (
        ("done", done),
        ("left", f"{state['left']:,} · {speed} · {state['in_hand']:,} shards in hand"),
        ("rows", f"{state['ok']:,} ok · {state['empty']:,} empty · {state['failed']:,} failed"),
        ("failed", f"{_by_number(state['failed_by_reason'])} ({_by_number(state['failed_by_class'])})"),
        *(("quarantined", f"{each['file_name']}: {each['reason']}") for each in state["quarantined"]),
        *(("problem", problem) for problem in state["problems"]),
        *(("last error", f"{each['attempt']}: {each['error']}") for each in state["last_errors"]),
    ):
        if name != "failed" or state["failed"]:
            counts.add_row(safe_text(name), safe_text(value))
    parts: list[Any] = [safe_text(state["run"]), counts]
    if state["attempts"]:
        table = Table("attempt", "host", "process", "slice", "state", "beat", "exit code", "since", "ended")
        for each in state["attempts"]:
            cells = [each[key] for key in ("id", "host", "pid", "slice", "state", "beat")]
            cells += [each["exit_code"], each["started"], each["ended"]]
            table.add_row(*(safe_text("–" if cell is None else str(cell)) for cell in cells))
        parts.append(table)
    return Group(*parts)


def _by_number(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{number:,} {name}" for name, number in ordered)
