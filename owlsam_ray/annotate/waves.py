"""Run waves of shards through the Ray graph until all are done, and recover when processes die."""

import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ray.data.exceptions import SystemException
from ray.exceptions import RayError

from owlsam_ray.annotate import pipeline
from owlsam_ray.annotate.pipeline import AttemptContext
from owlsam_ray.errors import IncompleteError, OwlsamError
from owlsam_ray.run import in_hand
from owlsam_ray.run.attempts import Attempt
from owlsam_ray.run.counts import RunCounts
from owlsam_ray.run.in_hand import MAX_DEATHS
from owlsam_ray.run.progress import ProgressWatcher
from owlsam_ray.run.retry import Retry, find_failed

_STORAGE_IS_FULL_OR_CLOSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}
_FRUITLESS_WAVES = 3
"""Consecutive waves without a new finished shard or a new death after which the run gives up."""
_ADVICE = "Failed to apply UDF transform"
_log = logging.getLogger(__name__)


class StoppedError(Exception):
    """The attempt was asked to stop."""


class Work(Protocol):
    """Shards to finish."""

    def left(self) -> Sequence[int]:
        """Remaining shards, ascending."""

    def handed_back(self, shards: Sequence[int]) -> None:
        """Note shards that went through a wave that did not break; shards awaiting isolation are not among them."""


class Unfinished:
    """The shards of a slice that have no file."""

    def __init__(self, run_counts: RunCounts) -> None:
        self._run_counts = run_counts

    def left(self) -> Sequence[int]:
        """Remaining shards, from a fresh listing."""
        self._run_counts.refresh_listing()
        return list(self._run_counts.pending())

    def handed_back(self, shards: Sequence[int]) -> None:
        """Do nothing: the listing shows what is finished."""


class Failed:
    """Finished shards with failed rows; each is tried once."""

    def __init__(self, shards: Sequence[int]) -> None:
        self._left = dict.fromkeys(shards)

    def left(self) -> Sequence[int]:
        """Shards that have not been tried yet."""
        return list(self._left)

    def handed_back(self, shards: Sequence[int]) -> None:
        """Mark shards as tried, whatever the outcome."""
        for shard in shards:
            self._left.pop(shard, None)


@dataclass(frozen=True, slots=True)
class Labeller:
    """Labels the shards of an attempt."""

    context: AttemptContext
    run_counts: RunCounts
    watcher: ProgressWatcher
    attempt: Attempt
    asked_to_stop: Callable[[], bool]
    isolating: Callable[[bool], None] = lambda _: None
    """Called with True before shards are isolated one by one, and with False afterwards."""

    def label(self) -> None:
        """Label every shard that has no file.

        Raises:
            StoppedError: the attempt was asked to stop.
            OwlsamError: further tries cannot help, or another attempt has taken over.
        """
        self._bring_to_end(self.context, Unfinished(self.run_counts))
        self.watcher.look()

    def retry(self, retry: Retry) -> None:
        """Retry failed rows of finished shards once.

        Raises:
            StoppedError: the attempt was asked to stop.
            OwlsamError: further tries cannot help, or another attempt has taken over.
        """
        shards = sorted(self.run_counts.transient_shards if retry.only_transient else self.run_counts.failed_shards)
        if not shards:
            return
        _log.info("retrying the %s images of %d shards", retry.what, len(shards))
        context = replace(self.context, retry=retry)
        # Images that killed a process before must not go to an actor.
        killers = [
            shard
            for shard in (() if retry.only_transient else shards)
            if find_failed(context.run.url, shard, retry).quarantined
        ]
        try:
            self._bring_to_end(context, Failed(sorted(set(shards) - set(killers))))
            self._bring_to_end(context, Failed(killers), alone=True)
        finally:
            self.run_counts.forget(shards)
        self.watcher.look()

    def _bring_to_end(self, context: AttemptContext, work: Work, *, alone: bool = False) -> None:
        """Run waves until no shard is left; shards that processes died on come last, each in a separate process.

        A wave that breaks is rebuilt from the shards still missing; after several waves without any progress the
        attempt gives up.
        """
        fruitless, most = 0, context.run.config.resources.wave_shards
        left = work.left()
        while left:
            self._stop_if_asked()
            found = in_hand.list_markers(context.run.url)
            deaths_before = {shard: len(found.get(shard, ())) for shard in left}
            plain = [] if alone else [shard for shard in left if deaths_before[shard] < MAX_DEATHS]
            # Shards that a process died on go last, so that they do not take others down with them.
            wave = sorted(plain, key=lambda shard: (deaths_before[shard], shard))[:most]
            try:
                if wave:
                    pipeline.run_wave(context, wave)
                else:
                    _log.warning("%d shards that processes died on are labelled one by one, in isolation", len(left))
                    self.isolating(True)
                    pipeline.run_isolated(context, {shard: found.get(shard, []) for shard in left})
            except RayError as error:
                cause: BaseException | None = root_cause(error)
            else:
                cause = None
            self.isolating(False)
            after = in_hand.deaths(in_hand.list_markers(context.run.url))
            if cause is None and not context.stopping():
                work.handed_back([shard for shard in wave or left if after.get(shard, 0) < MAX_DEATHS or not wave])
            self._stop_if_asked()
            before, left = left, work.left()
            deaths = sum(after.get(shard, 0) for shard in left)
            if len(left) < len(before) or deaths > sum(deaths_before[shard] for shard in left):
                fruitless = 0
            else:
                fruitless += 1
            self._go_on_or_give_up(cause, fruitless, len(wave) or len(before))

    def _stop_if_asked(self) -> None:
        self.attempt.raise_if_taken_over()
        if self.asked_to_stop():
            raise StoppedError

    def _go_on_or_give_up(self, cause: BaseException | None, fruitless: int, num_shards: int) -> None:
        """Raise errors that further tries cannot fix, with a message that says what to do."""
        if cause is None:
            if fruitless >= _FRUITLESS_WAVES:
                raise IncompleteError(f"Ray finished none of {num_shards} shards and raised no error: see Ray's logs")
            return
        self.attempt.set_report(last_error=in_one_line(cause))
        if isinstance(cause, OwlsamError):
            raise cause
        if isinstance(cause, OSError) and cause.errno in _STORAGE_IS_FULL_OR_CLOSED:
            raise IncompleteError(
                f"cannot write a shard: {cause.strerror} ({cause.filename or 'run directory'}). Finished shards are "
                "kept. Free space or fix the permissions, then run the same command again."
            ) from cause
        if fruitless >= _FRUITLESS_WAVES:
            raise IncompleteError(
                f"gave up after {fruitless} tries without a new shard: {in_one_line(cause)}. Finished shards are kept; "
                "logging.level=debug shows the actors' output."
            ) from cause
        _log.warning("a wave of shards failed and is started again: %s", in_one_line(cause))


def root_cause(error: BaseException) -> BaseException:
    """Find the exception from our code or a library inside Ray's wrappers, and remove what Ray adds to it."""
    inner = getattr(error, "cause", None) or error.__cause__
    if not isinstance(inner, BaseException) or isinstance(inner, SystemException):  # Ray marks its own errors with it
        return _unwrapped(error)
    return root_cause(inner)


def _unwrapped(error: BaseException) -> BaseException:
    """Remove the advice on Ray settings that Ray appends to a message or adds as a further argument.

    Pickling turns a further argument of an OSError into its file name.
    """
    if isinstance(error, OSError) and error.errno is not None:
        names = [] if _cut(error.filename) in ("", None) else [error.filename]
        return type(error)(error.errno, error.strerror, *names)
    if isinstance(error, OwlsamError):
        return type(error)(*(argument for argument in map(_cut, error.args) if argument != ""))
    return error


def _cut(argument: Any) -> Any:
    """Cut a text at Ray's advice; return anything else unchanged."""
    return argument.partition(_ADVICE)[0].rstrip() if isinstance(argument, str) else argument


def in_one_line(error: BaseException) -> str:
    """Format the type and the first line of an error; for Ray's own errors the last line, which ends a traceback."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1 if isinstance(error, RayError) else 0].strip()}"
