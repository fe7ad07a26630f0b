"""Answer the requests to a worker process: label one group of images after another (see `isolation_messages.py`)."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa

from owlsam_ray import storage
from owlsam_ray.annotate.isolation_messages import (
    Alive,
    Done,
    LabelGroup,
    MessageError,
    ModelRaised,
    Overran,
    Raised,
    Ready,
    Reply,
    Request,
    Setup,
    receive_requests,
    send,
)
from owlsam_ray.errors import OwlsamError
from owlsam_ray.fetch.images import fetch_shard, to_images
from owlsam_ray.inference.engine import Engine
from owlsam_ray.inference.load import open_engine
from owlsam_ray.inference.queries import load_embeddings
from owlsam_ray.inference.watchdog import Overrun, Watchdog, hang_text
from owlsam_ray.parallel.allocation import actor_memory_bytes
from owlsam_ray.parallel.logs import print_traceback
from owlsam_ray.parallel.work_slots import WorkSlots
from owlsam_ray.run.paths import QUERY_FILE
from owlsam_ray.run.run import Run, reopen_run
from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table

_ALIVE_S = 1.0
_MARGIN_S = 10.0
"""Seconds allowed between two pieces of work that take slots, in addition to the deadline."""


class _Replies:
    """The stream of replies to the parent, for several threads."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, reply: Reply) -> None:
        with self._lock:
            send(self._stream, reply)

    def end_process(self, overrun: Overrun) -> None:
        """Reply why this process ends, and end it."""
        try:
            self.send(Overran(reason=overrun.reason, image_ids=overrun.image_ids))
        finally:
            os._exit(1)


class _TimedSlots(WorkSlots):
    """Work slots that also record when a piece of work last ended, because work without a slot could hang too."""

    last_end: float | None = None
    """Time of the last end, on the monotonic clock in seconds; None while there is nothing to label."""

    @contextlib.contextmanager
    def busy(self, kind: str, image_ids: Sequence[int]) -> Iterator[None]:
        """See `WorkSlots`."""
        try:
            with super().busy(kind, image_ids):
                yield
        finally:
            if self.last_end is not None:
                self.last_end = time.monotonic()


def serve(requests: IO[str], replies: IO[str]) -> int:
    """Answer requests until their stream ends, or until something ends this process; return the exit code."""
    out = _Replies(replies)
    try:
        _work(receive_requests(requests), out)
    except (OwlsamError, OSError) as error:
        out.send(Raised.of(error))
        return 1
    except Exception as error:  # noqa: BLE001 (an image may make a model raise anything; it becomes the reason)
        print_traceback()
        cause = error.__cause__ or error  # the error that broke the engine
        line = (str(cause).strip().splitlines() or [""])[0][:200]
        out.send(ModelRaised(reason=f"model_error: {type(cause).__name__}: {line}"))
        return 1
    return 0


def _work(requests: Iterator[Request], replies: _Replies) -> None:
    """Open an engine in the same way as an actor, and label the groups."""
    setup = next(requests, None)
    if not isinstance(setup, Setup):
        raise MessageError("the first request is not a setup")
    config = setup.config
    storage.configure(config.storage.policy())
    deadline_s = config.resources.image_deadline_s
    slots = _TimedSlots(Path(setup.folder))
    Watchdog(
        slots,
        deadline_s=deadline_s,
        memory_bytes=actor_memory_bytes(config.resources),
        on_overrun=replies.end_process,
    ).start()
    threading.Thread(target=_stay_alive, args=(replies, slots, deadline_s), daemon=True).start()
    run = reopen_run(config, setup.record).with_moves()
    queries = load_embeddings(storage.join(run.url, QUERY_FILE), run.record.vocabulary)
    with open_engine(config, setup.allocation, models=setup.models, queries=queries, slots=slots) as engine:
        replies.send(Ready())
        for group in requests:
            if not isinstance(group, LabelGroup):
                raise MessageError("a second setup")
            replies.send(Done(stage_s=_label(group, setup.shard, run, engine, slots)))
    slots.close()


def _label(group: LabelGroup, shard: int, run: Run, engine: Engine, slots: _TimedSlots) -> dict[str, float]:
    """Fetch and label a group, write its rows, and return the busy seconds of each stage."""
    fetched = fetch_shard(
        run.manifest,
        shard,
        threads=run.config.resources.fetch_threads,
        max_file_mb=run.config.decode.max_file_mb,
        deadline_s=run.config.resources.fetch_deadline_s,
        positions=group.positions,
    )
    slots.last_end = time.monotonic()
    predictions, stage_s = engine.annotate(to_images(fetched))
    slots.last_end = None
    rows = predictions_to_table(predictions).cast(PREDICTION_SCHEMA)
    with pa.OSFile(group.path, "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
    return stage_s


def _stay_alive(replies: _Replies, slots: _TimedSlots, deadline_s: float) -> None:
    """Send `Alive` every second while work keeps finishing and the parent reads; otherwise end the process."""
    waiting = threading.Event()
    while not waiting.wait(_ALIVE_S):
        last_end = slots.last_end
        try:
            if last_end is not None and time.monotonic() - last_end > deadline_s + _MARGIN_S:
                replies.end_process(Overrun(slots.in_hand(), hang_text(deadline_s)))
            replies.send(Alive())
        except OSError:
            os._exit(1)
