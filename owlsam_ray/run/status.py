"""`owlsam status`: show a run's state from its directory alone, on any machine that sees the storage.

Nothing is written and no process is contacted: shard files show what is done, and attempts report about themselves in
`RUN/attempts`. An attempt is alive if its heartbeat counter changes while it is watched; clocks of two hosts are never
compared.
"""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Group
from rich.table import Table

from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.errors import IncompleteError
from owlsam_ray.run.attempts import AttemptRecord, ended_attempts, live_attempts
from owlsam_ray.run.counts import RunCounts
from owlsam_ray.run.failure_counts import find_failures
from owlsam_ray.run.heartbeats import HeartbeatWatch, Life
from owlsam_ray.run.in_hand import list_markers
from owlsam_ray.run.progress import duration
from owlsam_ray.run.run import open_stored_run
from owlsam_ray.terminal import safe_text

_NAMED = 20
"""Maximum number of ended attempts that the state lists."""
_ERRORS = 5
_LOOK_S = 0.25
"""Seconds between two reads of counters that have not changed yet."""


class RunStatus:
    """State of a run, read once or repeatedly; footers of shards without failed rows are read only once."""

    def __init__(self, run_url: str) -> None:
        """Read the run's record and manifest.

        Raises:
            InputError: the directory holds no run.
            GuardError: `run.json` or the manifest is damaged, or the manifest is missing.
        """
        self._run = open_stored_run(run_url, verify=False)
        self._tally = RunCounts(self._run)
        beat_s = self._run.record.config.get("resources", {}).get("heartbeat_s", ResourcesConfig().heartbeat_s)
        self.patience_s = 1.2 * float(beat_s) + 1.0
        """Seconds within which a live attempt sends a heartbeat, by the heartbeat interval of the planned config."""
        self._heartbeats = HeartbeatWatch()
        self._not_signed_off: list[AttemptRecord] = []

    def look(self, *, wait_s: float | None = None) -> dict[str, Any]:
        """Return the current state of the run.

        Args:
            wait_s: maximum seconds to wait for heartbeats of attempts that have not signed off; None waits as long as
                it takes to know. Attempts that have already sent one are not waited for.

        Returns:
            `images`, `done`, `ok`, `empty`, `failed`, `left`, `shards`, `shards_done`, `detections`, `masks`;
            `failed_by_class`, `failed_by_reason`; `quarantined`: the first quarantined images; `in_hand`: number of
            shards being worked on now or when a process died; `images_per_s` and `eta_s` of the live attempts, None if
            there are none; `attempts`: attempts that have not signed off, then the last ended ones; `attempts_ended`;
            `last_errors`; `problems`: sentences about shard files that cannot be trusted.

        Raises:
            IncompleteError: there are files for shards that the run does not have.
            OSError: storage failed.
        """
        start = time.monotonic()
        self._look_for_life()
        problems = []
        self._tally.refresh_listing()
        self._tally.forget(self._tally.failed_shards)  # they may have been retried meanwhile
        try:
            self._tally.read_footers()
        except IncompleteError as error:
            problems.append(f"{self._tally.unread} shard files cannot be trusted (see `owlsam verify`): {error}")
        failures = find_failures(self._run.manifest, self._tally.failed_shards)
        wait_s = self.patience_s + _LOOK_S if wait_s is None else wait_s
        while self._anyone_unknown() and time.monotonic() - start < wait_s:
            time.sleep(_LOOK_S)
            self._look_for_life()
        counts = self._tally.summary()
        return (
            {"run": self._run.url}
            | counts
            | {
                "failed_by_class": dict(sorted(failures.by_class.items())),
                "failed_by_reason": dict(sorted(failures.by_reason.items())),
                "quarantined": failures.quarantined,
                "in_hand": len(list_markers(self._run.url)),
                "problems": problems,
            }
            | self._attempts(counts["left"])
        )

    def _look_for_life(self) -> None:
        self._not_signed_off = live_attempts(self._run.url)
        for record in self._not_signed_off:
            self._heartbeats.look(record)

    def _life_of(self, record: AttemptRecord) -> Life:
        return self._heartbeats.life_of(record, self.patience_s)

    def _anyone_unknown(self) -> bool:
        return any(self._life_of(record) == "unknown" for record in self._not_signed_off)

    def _attempts(self, left: int) -> dict[str, Any]:
        """Rate, time left, and what the attempts report about themselves."""
        ended = sorted(ended_attempts(self._run.url), key=lambda record: (record.ended or "", record.id))
        signed_off = {record.id for record in ended}
        alive = [(record, self._life_of(record)) for record in self._not_signed_off if record.id not in signed_off]
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
                *(_described(record, state) for record, state in alive),
                *(_described(record, "ended") for record in reversed(ended[-_NAMED:])),
            ],
            "attempts_ended": len(ended),
            "last_errors": [
                {"attempt": record.id, "at": record.ended, "error": record.last_error}
                for record in reversed(errors[-_ERRORS:])
            ],
        }


def _described(record: AttemptRecord, state: str) -> dict[str, Any]:
    """Describe an attempt for the state of the run."""
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
    """Show the state of a run, once or repeatedly until nothing is left to do and no attempt is alive.

    Args:
        run_url: the run directory.
        show: called with each state.
        every_s: seconds between two states; None shows one state only.
        wait_s: see `RunStatus.look`; applies to the first state only.

    Returns:
        The last state. An interrupt (Ctrl-C) only ends the watching.

    Raises:
        OwlsamError, OSError: the same as for `RunStatus`.
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
    """Format a state as a table for the terminal."""
    counts = Table.grid(padding=(0, 2))
    done = f"{state['done']:,} of {state['images']:,} images, {state['shards_done']:,} of {state['shards']:,} shards"
    rate = state["images_per_s"]
    speed = "rate unknown" if rate is None else f"{rate:,.2f} images/s · ETA {duration(state['eta_s'])}"
    for name, value in (
        ("done", done),
        ("left", f"{state['left']:,} · {speed} · {state['in_hand']:,} shards in progress"),
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
