"""An orderly end of this process from any thread, when the main thread can no longer bring it about.

Ray's C++ code ends a process without a word, with exit code 1, some seconds after a part of Ray has died. Whoever
notices that first calls `end_process`: what was registered with `before_end` is done, each within a short time, and
the process ends with the exit code of the error.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from owlsam_ray.errors import OwlsamError

Act = Callable[[OwlsamError], None]
_ACT_S = 1.5
"""Seconds that each act may take: storage that does not answer must not keep the process."""
_acts: list[Act] = []
_begun = threading.Lock()
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def before_end(act: Act) -> Iterator[None]:
    """While this context lasts, `end_process` calls the act, the latest first; in a thread of its own."""
    _acts.append(act)
    try:
        yield
    finally:
        _acts.remove(act)


def end_process(
    explain: Callable[[], OwlsamError], otherwise: OwlsamError, *, at_last: Callable[[], None] = lambda: None
) -> NoReturn:
    """End the process with the exit code of an error, after everything that was registered.

    Args:
        explain: makes the error; may ask storage.
        otherwise: the error when that takes too long, or fails.
        at_last: called after everything else.
    """
    if not _begun.acquire(blocking=False):
        threading.Event().wait()  # another thread does
    found: list[OwlsamError] = []
    _within_a_time(lambda: found.append(explain()))
    error = found[0] if found else otherwise
    for act in reversed(_acts):
        _within_a_time(lambda act=act: act(error))  # type: ignore[misc]
    _within_a_time(at_last)
    os._exit(int(error.exit_code))


def _within_a_time(act: Callable[[], None]) -> None:
    def run() -> None:
        try:
            act()
        except Exception:  # noqa: BLE001 (the process ends; the other acts, and its exit code, matter more)
            _log.debug("an act before the end failed", exc_info=True)

    thread = threading.Thread(target=run, name="owlsam-last-act", daemon=True)
    thread.start()
    thread.join(_ACT_S)
