"""Handle signals that stop an attempt: no new shard is started, and shards in progress get time to finish."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from owlsam_ray import storage

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Schedulers are often configured to send SIGUSR1 some time before the end."""
_asked = threading.Event()
_log = logging.getLogger(__name__)


class GraceOverError(Exception):
    """Raised in the main thread when shards in progress did not finish in time, or at the second signal."""


def as_interrupts() -> None:
    """Handle each of the signals like Ctrl-C: before there is work to finish, a scheduler's stop is not a failure."""
    _asked.clear()
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal like Ctrl-C.

    Raises:
        KeyboardInterrupt: always.
    """
    _asked.set()
    signal.default_int_handler(number, frame)


def was_asked(wait_s: float = 0.0) -> bool:
    """Whether one of the signals arrived since `as_interrupts`; other threads may wait for it a little.

    A scheduler often sends it to all processes of a job at once, including Ray's own.
    """
    return _asked.wait(wait_s)


@contextlib.contextmanager
def stop_on_signals(stop_url: str, grace_s: float) -> Iterator[Callable[[], bool]]:
    """At the first signal, write `stop_url`, which every process of the attempt checks; remove it at the end.

    Enter this context after `ray.init`, which installs its own SIGTERM handler.

    Args:
        stop_url: the file.
        grace_s: seconds from the first signal until `GraceOverError` is raised.

    Returns:
        A function that says whether a signal has arrived.
    """
    asked = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            grace_is_over(number, frame)
        asked.set()
        _asked.set()
        _log.warning("%s: finishing the shards in progress, for at most %g s", signal.Signals(number).name, grace_s)
        signal.setitimer(signal.ITIMER_REAL, max(grace_s, 0.01))
        try:
            storage.write_atomic(stop_url, b"")
        except OSError as error:  # a full disk is not a reason to continue
            _log.warning("cannot ask the actors to stop: %s", error)

    def grace_is_over(number: int, frame: FrameType | None) -> None:
        # If it were raised inside Ray, Ray would report it as a bug in Ray, with a page of traceback.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        raise GraceOverError

    handlers = dict.fromkeys(SIGNALS, ask_to_stop) | {signal.SIGALRM: grace_is_over}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked.is_set
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):
            storage.remove(stop_url)
