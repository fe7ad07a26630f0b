"""Report a run's progress: on a terminal, in a log file, and as `progress.json` for dashboards."""

import json
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from owlsam_ray import storage
from owlsam_ray.errors import OwlsamError
from owlsam_ray.run.counts import RunCounts
from owlsam_ray.run.paths import PROGRESS_FILE

_FOOTERS_AT_ONCE = 256
"""Footers read between two checks of the stop flag; a fraction of a second on a disk."""
_CATCH_UP_PAUSE_S = 0.25
"""Pause between two such batches, so that the threads that schedule work get to run."""
_log = logging.getLogger(__name__)


class ProgressWatcher:
    """Reports the state of the shards at regular intervals.

    Footers of earlier attempts are read in batches in the background, so that work begins before they are all counted.
    """

    def __init__(
        self,
        run_counts: RunCounts,
        *,
        interval_s: float,
        show: Callable[[dict[str, Any]], None],
        file_name: str = PROGRESS_FILE,
    ) -> None:
        """Prepare to watch.

        Args:
            run_counts: counts of the run or of a slice; already listed once, so that the rate covers only this attempt.
            interval_s: seconds between two reports.
            show: called with the state at each report.
            file_name: name of the state file in the run directory.
        """
        self._run_counts, self._interval_s, self._show = run_counts, interval_s, show
        self._url = storage.join(run_counts.run_url, file_name)
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="owlsam-progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> RunCounts:
        """Refresh the counts completely, write the state file, and show the state.

        Raises:
            IncompleteError: a shard file is damaged.
            OSError: storage failed.
        """
        return self._look(None)

    def _look(self, limit: int | None) -> RunCounts:
        with self._lock:
            state = progress_state(self._run_counts.refresh(limit), seconds=time.monotonic() - self._start)
            storage.write_atomic(self._url, json.dumps(state, indent=1).encode())
            self._show(state)
        return self._run_counts

    def _watch(self) -> None:
        next_look = time.monotonic() + self._interval_s
        while not self._stop.wait(_CATCH_UP_PAUSE_S if self._run_counts.unread else next_look - time.monotonic()):
            try:
                if time.monotonic() < next_look:
                    self._run_counts.read_footers(_FOOTERS_AT_ONCE)
                    continue
                self._look(_FOOTERS_AT_ONCE)
            except (OSError, OwlsamError) as error:
                # A failed report is not worth stopping for; the main thread gets the same error where it matters.
                _log.warning("cannot report the progress: %s", error)
                self._stop.wait(self._interval_s)
            next_look = time.monotonic() + self._interval_s


def progress_state(run_counts: RunCounts, *, seconds: float) -> dict[str, Any]:
    """Counts, rate, time left and busy seconds by stage.

    Args:
        run_counts: counts of the run or of a slice.
        seconds: time since this attempt began.
    """
    rate = run_counts.images_fresh / seconds if seconds > 0 else 0.0
    left = run_counts.num_images - run_counts.images_done
    return run_counts.summary() | {
        "images_per_s": round(rate, 3),
        "eta_s": round(left / rate) if rate > 0 else None,
        "seconds": round(seconds, 1),
        "stage_s": {stage: round(value, 1) for stage, value in run_counts.stage_s.items()},
    }


def describe(state: dict[str, Any]) -> str:
    """Format a state as one line for display."""
    return (
        f"{state['done']}/{state['images']} images · {state['failed']} failed · {state['left']} left · "
        f"{state['images_per_s']:.2f} images/s · ETA {duration(state['eta_s'])}"
    )


def duration(seconds: float | None) -> str:
    """Format seconds as `1:02:03`; `?` if unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class LazyDisplay:
    """A live bar on a terminal, plain log lines elsewhere; nothing is drawn before the first state."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, state: dict[str, Any]) -> None:
        """Draw a state; a plain log line is written only if images were done or failed since the last one."""
        line = describe(state)
        if self._console.is_terminal:
            self._draw(state, line.split(" · ", 1)[1])
        elif self._last != (state["done"], state["failed"]):
            self._last = (state["done"], state["failed"])
            _log.info("%s", line)

    def _draw(self, state: dict[str, Any], line: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("annotate"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("annotate", total=state["images"], line=line)
            self._progress.start()
        self._progress.update(self._task, completed=state["done"], line=line)


class CountDisplay:
    """Counts of items in successive steps: bars on a terminal, a log line at intervals elsewhere."""

    def __init__(self, console: Console, *, interval_s: float, unit: str = "images") -> None:
        """Prepare to show.

        Args:
            console: the console to draw on.
            interval_s: seconds between two log lines.
            unit: plural noun for the items that are counted.
        """
        self._interval_s, self._unit = interval_s, unit
        self._bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{{task.fields[rate]}} {unit}/s"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self._tasks: dict[str, TaskID] = {}
        self._starts: dict[str, float] = {}
        self._last_logged = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, what: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` items are `what`, such as "verified"; `total` None is unknown."""
        now = time.monotonic()
        start = self._starts.setdefault(what, now)
        rate = done / (now - start) if now > start else 0.0
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total, rate="")
            self._bar.update(self._tasks[what], completed=done, total=total, rate=f"{rate:,.0f}")
        elif now - self._last_logged >= self._interval_s:
            self._last_logged = now
            left = f" of {total:,} · ETA {duration((total - done) / rate)}" if total is not None and rate > 0 else ""
            _log.info("%s %s%s · %s %s/s", what, f"{done:,}", left, f"{rate:,.0f}", self._unit)
