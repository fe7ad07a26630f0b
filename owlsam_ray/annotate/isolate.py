"""Isolate the images that kill processes: redo a suspect shard in a separate process, group by group.

Images that were being worked on when a process died go first, each alone; then all others together. If a group kills
the process, the images that it left in its work slots go first in turn; if it left none, the group is split in half. An
image that kills the process alone becomes a failed row; all others are labelled. A death by signal, a hang or an
unreadable reply must happen twice, because something outside the process may be the cause.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import pyarrow as pa

from owlsam_ray.annotate.isolation_messages import (
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
    receive_replies,
    send,
)
from owlsam_ray.errors import FailureClass, IncompleteError, PreflightError
from owlsam_ray.inference.watchdog import hang_text, memory_text, resident_bytes
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import Allocation, actor_memory_bytes
from owlsam_ray.parallel.child_imports import child_variables
from owlsam_ray.parallel.work_slots import SLOT_FILES, read_slots
from owlsam_ray.records import Prediction
from owlsam_ray.run.run import Run
from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table
from owlsam_ray.storage.arrow_types import misfit_of

_MOST_SUSPECTS = 16
"""With more suspects than this, splitting in half finds the culprit sooner."""
_LOOK_S = 0.2
_SILENCE_S = 20.0
"""Seconds without a reply (one comes every second), beyond the deadline of an image, that count as a hang."""
_REAP_S = 10.0
"""Seconds to wait for a killed process; one that hangs in the kernel cannot be killed and is abandoned after this."""
_LAST_RESORT_CODE = 1
"""Exit code of a process whose watchdog could not run."""
_START_S = 1800.0
"""Maximum seconds for loading the models."""
_STARTS_WITHOUT_READY = 2
_MOST_GIVEN_UP = 5
"""Images given up before the first one is labelled from which the process, not the images, is taken as the cause."""
_UNREADABLE = "killed_process: unreadable reply"
R = TypeVar("R", bound=Reply)
_Replies = queue.SimpleQueue[Reply | MessageError | None]
"""Replies of one worker process in order; at the end None."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IsolationTask:
    """A shard, and everything needed to label it."""

    run: Run
    shard: int
    positions: tuple[int, ...] | None
    """Positions in the shard of the images to label, ascending; None means all."""
    allocation: Allocation
    models: ModelPaths
    suspects: frozenset[int] = frozenset()
    """Ids of images being worked on when a process died; only a hint."""


@dataclass(frozen=True, slots=True)
class Death:
    """How a process that worked on a group ended."""

    reason: str
    """Reason of the failed row."""
    is_certain: bool
    """Whether the images must be the cause, not something outside the process."""
    in_hand: frozenset[int] = frozenset()
    """Ids of the images that it was working on, as far as known."""


class _WorkerDied(Exception):  # noqa: N818 (not an error but an expected event here)
    def __init__(self, death: Death) -> None:
        super().__init__(death.reason)
        self.death = death


@dataclass(slots=True)
class _Outcome:
    rows: list[pa.Table] = field(default_factory=list)
    """Tables of rows in any order, each image once."""
    stage_s: Counter[str] = field(default_factory=Counter)
    deaths: Counter[int] = field(default_factory=Counter)
    """By position: how often the image alone killed a process."""
    labelled: int = 0
    given_up: int = 0


def isolate_shard(task: IsolationTask) -> tuple[pa.Table, dict[str, float]]:
    """Label a shard even if its images kill processes.

    Returns:
        One row as `PREDICTION_SCHEMA` for each requested image, in manifest order; busy seconds of each stage.

    Raises:
        IncompleteError: the process ends before its first image.
        OwlsamError, OSError: an error that no image caused: storage failed, or a batch does not fit the GPU.
    """
    image_ids: list[int] = task.run.manifest.read_shard(task.shard)["image_id"].to_pylist()
    wanted = list(range(len(image_ids))) if task.positions is None else list(task.positions)
    groups = _first_groups(wanted, image_ids, task.suspects)
    outcome = _Outcome()
    with _Worker(task) as worker:
        while groups:
            group = groups.pop(0)
            try:
                rows, stage_s = worker.label(group)
            except _WorkerDied as died:
                groups = _after_death(group, died.death, image_ids, outcome) + groups
            else:
                outcome.rows.append(rows)
                outcome.stage_s.update(stage_s)
                outcome.labelled += len(group)
    joined = pa.concat_tables([PREDICTION_SCHEMA.empty_table(), *outcome.rows])
    places = {image_id: place for place, image_id in enumerate(joined["image_id"].to_pylist())}
    order = pa.array([places[image_ids[position]] for position in wanted], pa.int64())
    return joined.take(order), dict(outcome.stage_s)


def _first_groups(wanted: Sequence[int], image_ids: Sequence[int], suspects: frozenset[int]) -> list[list[int]]:
    """Suspects one by one (together if there are many, as from a GPU batch), then the others together."""
    suspected = [position for position in wanted if image_ids[position] in suspects]
    others = [position for position in wanted if image_ids[position] not in suspects]
    first = [suspected] if len(suspected) > _MOST_SUSPECTS else [[position] for position in suspected]
    return [*first, *([others] if others else [])]


def _after_death(group: list[int], death: Death, image_ids: Sequence[int], outcome: _Outcome) -> list[list[int]]:
    """Return the groups to try next; an image found to be the culprit becomes a failed row."""
    if len(group) > 1 and 0 < sum(image_ids[position] in death.in_hand for position in group) < len(group):
        return _first_groups(group, image_ids, death.in_hand)
    if len(group) > 1:
        half = len(group) // 2
        return [group[:half], group[half:]]
    (position,) = group
    outcome.deaths[position] += 1
    if not death.is_certain and outcome.deaths[position] == 1:
        return [group]
    outcome.given_up += 1
    if outcome.labelled == 0 and outcome.given_up >= _MOST_GIVEN_UP:
        raise PreflightError(
            f"each of {outcome.given_up} images killed its process when labelled alone, the last with "
            f"'{death.reason}', and none succeeded: the images are not the cause. Raise resources.actor_memory_gb or "
            "resources.image_deadline_s, or check the machine."
        )
    _log.warning("image %d is quarantined: %s", image_ids[position], death.reason)
    failed = Prediction(image_id=image_ids[position], failure=(death.reason, FailureClass.QUARANTINED))
    outcome.rows.append(predictions_to_table([failed]).cast(PREDICTION_SCHEMA))
    return []


class _Worker:
    """The worker process; started on demand, and again after each death."""

    def __init__(self, task: IsolationTask) -> None:
        self._task = task
        self._folder = tempfile.TemporaryDirectory(prefix="owlsam-isolated-")
        self._memory_bytes = actor_memory_bytes(task.run.config.resources)
        self._deadline_s = task.run.config.resources.image_deadline_s
        self._process: subprocess.Popen[str] | None = None
        self._replies: _Replies = queue.SimpleQueue()
        self._groups = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._folder.cleanup()

    def label(self, positions: list[int]) -> tuple[pa.Table, dict[str, float]]:
        """Label the images at these positions; return their rows in any order, and the busy seconds.

        Raises:
            _WorkerDied: the process died.
            OwlsamError, OSError: the same as for `isolate_shard`.
        """
        if self._process is None:
            self._start()
        self._groups += 1
        path = Path(self._folder.name) / f"group-{self._groups}.arrow"
        self._send(LabelGroup(positions=tuple(positions), path=str(path)))
        done = self._await(Done, self._deadline_s + _SILENCE_S)
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            if (wrong := misfit_of(reader.schema, PREDICTION_SCHEMA)) is not None:
                raise IncompleteError(f"the isolation process of shard {self._task.shard} wrote no valid rows: {wrong}")
            rows = reader.read_all()
        return rows, done.stage_s

    def _start(self) -> None:
        """Start the process and wait until its models are loaded.

        Raises:
            IncompleteError: it died before that, in every try.
        """
        for _ in range(_STARTS_WITHOUT_READY):
            self._launch()
            try:
                self._await(Ready, _START_S)
            except _WorkerDied as died:
                last = died.death.reason
            else:
                return
        raise IncompleteError(
            f"the isolation process of shard {self._task.shard} ended before its first image ({last}): "
            f"{self._last_log_line()}"
        )

    def _launch(self) -> None:
        with (Path(self._folder.name) / "log").open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own module)
                [sys.executable, "-m", "owlsam_ray.annotate.isolation_worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=os.environ | child_variables(Path(self._folder.name)),
            )
        self._replies = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(self._process.stdout, self._replies), daemon=True).start()
        task = self._task
        self._send(
            Setup(
                shard=task.shard,
                folder=self._folder.name,
                config=task.run.config,
                record=task.run.record,
                allocation=task.allocation,
                models=task.models,
            )
        )

    def _send(self, request: Request) -> None:
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("there is no isolation process to write to")
        with contextlib.suppress(BrokenPipeError):  # it died: its last reply says why
            send(self._process.stdin, request)

    def _await(self, wanted: type[R], silence_s: float) -> R:
        """Wait for the next reply of a kind, for at most `silence_s` seconds without any reply.

        Raises:
            _WorkerDied: the process ended or was ended.
            OwlsamError, OSError: the process got an error that no image caused.
        """
        process = self._process
        if process is None:
            raise RuntimeError("there is no isolation process to read from")
        last_reply_s, reason = time.monotonic(), None
        overrun_ids: tuple[int, ...] = ()
        while reason is None:
            with contextlib.suppress(queue.Empty):
                reply = self._replies.get(timeout=_LOOK_S)
                if reply is None:
                    break
                last_reply_s = time.monotonic()
                if isinstance(reply, wanted):
                    return reply
                if isinstance(reply, Raised):
                    self._end()
                    raise reply.error()
                if isinstance(reply, Overran):
                    reason, overrun_ids = reply.reason, reply.image_ids
                elif isinstance(reply, ModelRaised):
                    reason = reply.reason
                elif isinstance(reply, MessageError):
                    reason = _UNREADABLE
            if self._memory_bytes is not None and resident_bytes(process.pid) > 1.1 * self._memory_bytes:
                reason = reason or memory_text(self._memory_bytes)
            elif time.monotonic() - last_reply_s > silence_s:
                reason = reason or hang_text(self._deadline_s)
        code = self._end(grace_s=_REAP_S if reason is None else 0.0)
        if reason is None and code == _LAST_RESORT_CODE and time.monotonic() - last_reply_s > self._deadline_s:
            reason = hang_text(self._deadline_s)
        in_hand = frozenset(overrun_ids) or self._left_in_hand()
        # A process that is paused from outside looks as if it hung.
        is_certain = reason not in (None, _UNREADABLE, hang_text(self._deadline_s))
        raise _WorkerDied(Death(reason or _how_it_ended(code), is_certain=is_certain, in_hand=in_hand))

    def _left_in_hand(self) -> frozenset[int]:
        """Read image ids from the work slots of dead processes, and remove the slot files."""
        found: set[int] = set()
        for path in Path(self._folder.name).glob(f"{SLOT_FILES}*"):
            found.update(image_id for _, image_ids in read_slots(path) for image_id in image_ids)
            path.unlink()
        return frozenset(found)

    def _end(self, *, grace_s: float = 0.0) -> int:
        """End the process, if there is one, and return its exit code (0 without one).

        Args:
            grace_s: seconds to wait for it to end before it is killed.
        """
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        process.kill()
        try:
            code = process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        return code

    def _last_log_line(self) -> str:
        text = (Path(self._folder.name) / "log").read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1] if text else "it logged nothing"


def _receive(stream: IO[str], replies: _Replies) -> None:
    """Queue the replies of a process until its output ends, or a line is not a reply."""
    try:
        for reply in receive_replies(stream):
            replies.put(reply)
    except MessageError as error:
        replies.put(error)
    except ValueError:  # the stream was closed meanwhile
        pass
    replies.put(None)


def _how_it_ended(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed_process: {signal.Signals(-code).name}"
    return f"killed_process: exit code {code}"
