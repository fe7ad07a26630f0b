"""Signals that ask an attempt to stop: no shard is begun any more, and those in hand get some time to finish."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from owlsam_ray import storage

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what schedulers are often told to send some time before the end."""
_asked = threading.Event()
_log = logging.getLogger(__name__)


class GraceOverError(Exception):
    """Raised in the main thread when shards in hand did not finish in time, or somebody asked twice."""


def as_interrupts() -> None:
    """Make each of the signals what Ctrl-C is: until there is work to finish, a scheduler's stop is no failure."""
    _asked.clear()
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal as Ctrl-C is.

    Raises:
        KeyboardInterrupt: always.
    """
    _asked.set()
    signal.default_int_handler(number, frame)


def was_asked(wait_s: float = 0.0) -> bool:
    """Whether one of the signals came since `as_interrupts`; for other threads, which may wait for it a little.

    A scheduler often sends it to all processes of a job at once, Ray's own among them.
    """
    return _asked.wait(wait_s)


@contextlib.contextmanager
def stop_on_signals(stop_url: str, grace_s: float) -> Iterator[Callable[[], bool]]:
    """Write `stop_url` at the first signal, which every process of the attempt looks for; remove it at the end.

    To be entered after `ray.init`, which puts its own SIGTERM handler in place.

    Args:
        stop_url: the file.
        grace_s: seconds from the first signal until `GraceOverError` is raised.

    Returns:
        Whether somebody asked.
    """
    asked = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            grace_is_over(number, frame)
        asked.set()
        _asked.set()
        _log.warning("%s: finishing the shards in hand, at most %g s", signal.Signals(number).name, grace_s)
        signal.setitimer(signal.ITIMER_REAL, max(grace_s, 0.01))
        try:
            storage.write_atomic(stop_url, b"")
        except OSError as error:  # a full disk is no reason to go on
            _log.warning("cannot tell the actors to stop: %s", error)

    def grace_is_over(number: int, frame: FrameType | None) -> None:
        # Raised in the middle of Ray, it would be called a bug of Ray's, with a page of traceback.
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
