"""Worker process that labels groups of a suspect shard; `isolate.py` starts it and sends requests as JSON lines.

It replies on its standard output: `ready` once the models are loaded, `alive` every second, `done` for each group, and
`trouble` or `error` before it ends itself.

Modules that take seconds to import are imported only after this process is bound to its parent, whose pid is its
argument.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owlsam_ray.errors import OwlsamError
from owlsam_ray.inference.watchdog import Overrun, Watchdog, hang_text
from owlsam_ray.parallel.logs import print_traceback
from owlsam_ray.parallel.work_slots import WorkSlots

if TYPE_CHECKING:
    from owlsam_ray.inference.engine import Engine
    from owlsam_ray.run.run import Run

_ALIVE_S = 1.0
_MARGIN_S = 10.0
"""Seconds allowed between two pieces of watched work, in addition to the deadline."""
_PR_SET_PDEATHSIG = 1


class _Replies:
    """Replies to the parent as lines; output of libraries goes to stderr instead, so it never mixes with them."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def say(self, kind: str, **fields: Any) -> None:
        with self._lock:
            self._out.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._out.flush()


class _ReportingSlots(WorkSlots):
    """Work slots that also record when a piece of work last ended, because unwatched work could hang too."""

    moved: float | None = None
    """Time of the last end, on the monotonic clock in seconds; None while there is nothing to label."""

    @contextlib.contextmanager
    def busy(self, kind: str, image_ids: Sequence[int]) -> Iterator[None]:
        """See `WorkSlots`."""
        try:
            with super().busy(kind, image_ids):
                yield
        finally:
            if self.moved is not None:
                self.moved = time.monotonic()


def main() -> int:
    """Process the requests on standard input; return the exit code."""
    _die_with_parent(int(sys.argv[1]))
    replies = _Replies()
    lines = _lines()
    setup = next(lines)
    try:
        _work(setup, lines, replies)
    except (OwlsamError, OSError) as error:
        replies.say("error", name=type(error).__name__, arguments=error_arguments(error))
        return 1
    except Exception as error:  # noqa: BLE001 (an image may make a model raise anything; it becomes the reason)
        print_traceback()
        cause = error.__cause__ or error  # the error that broke the engine
        line = (str(cause).strip().splitlines() or [""])[0][:200]
        replies.say("trouble", reason=f"model_error: {type(cause).__name__}: {line}", image_ids=[])
        return 1
    return 0


def error_arguments(error: OwlsamError | OSError) -> list[Any]:
    """Arguments, as JSON values, from which an equal error can be created."""
    if isinstance(error, OSError) and error.errno is not None:
        return [error.errno, error.strerror, *([error.filename] if isinstance(error.filename, str) else [])]
    return [str(error)]


def _lines() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def _work(setup: dict[str, Any], lines: Iterator[dict[str, Any]], replies: _Replies) -> None:
    import pyarrow as pa

    from owlsam_ray import storage
    from owlsam_ray.config.run import RunConfig
    from owlsam_ray.fetch.images import fetch_shard, to_images
    from owlsam_ray.parallel.allocation import actor_memory_bytes
    from owlsam_ray.run.record import RunRecord
    from owlsam_ray.run.run import reopen_run
    from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table

    config = RunConfig.model_validate(setup["config"])
    storage.configure(config.storage.policy())
    watch = _ReportingSlots(Path(setup["folder"]))

    def end(trouble: Overrun) -> None:
        replies.say("trouble", reason=trouble.text, image_ids=trouble.image_ids)
        os._exit(1)

    Watchdog(
        watch,
        deadline_s=config.resources.image_deadline_s,
        memory_bytes=actor_memory_bytes(config.resources),
        on_overrun=end,
    ).start()
    deadline_s = config.resources.image_deadline_s
    threading.Thread(target=_stay_alive, args=(replies, watch, deadline_s), daemon=True).start()
    # The driver has already checked that the dataset is where it moved to.
    run = reopen_run(config, RunRecord.model_validate(setup["record"])).with_moves()
    with _load(setup, run, watch) as engine:
        replies.say("ready")
        for group in lines:
            fetched = fetch_shard(
                run.manifest,
                setup["shard"],
                threads=config.resources.fetch_threads,
                max_file_mb=config.decode.max_file_mb,
                deadline_s=config.resources.fetch_deadline_s,
                positions=group["positions"],
            )
            watch.moved = time.monotonic()
            predictions, stage_s = engine.annotate(to_images(fetched))
            watch.moved = None
            rows = predictions_to_table(predictions).cast(PREDICTION_SCHEMA)
            with pa.OSFile(group["path"], "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
                writer.write_table(rows)
            replies.say("done", stage_s=stage_s)
    watch.close()


def _load(setup: dict[str, Any], run: "Run", watch: WorkSlots) -> "Engine":
    """Load the engine in the same way as an actor."""
    from owlsam_ray import storage
    from owlsam_ray.inference.load import open_engine
    from owlsam_ray.inference.queries import load_embeddings
    from owlsam_ray.models.weights import ModelPaths
    from owlsam_ray.parallel.allocation import Allocation
    from owlsam_ray.run.paths import QUERY_FILE

    return open_engine(
        run.config,
        Allocation(**setup["allocation"]),
        models=ModelPaths(**{role: Path(path) for role, path in setup["models"].items()}),
        queries=load_embeddings(storage.join(run.url, QUERY_FILE), run.record.vocabulary),
        slots=watch,
    )


def _stay_alive(replies: _Replies, watch: _ReportingSlots, deadline_s: float) -> None:
    """Send `alive` every second while work keeps finishing and the parent reads; otherwise end the process."""
    waiting = threading.Event()
    while not waiting.wait(_ALIVE_S):
        moved = watch.moved
        try:
            if moved is not None and time.monotonic() - moved > deadline_s + _MARGIN_S:
                replies.say("trouble", reason=hang_text(deadline_s), image_ids=watch.in_hand())
                os._exit(1)
            replies.say("alive")
        except OSError:
            os._exit(1)


def _die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already ended
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
