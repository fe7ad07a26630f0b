"""End this process in an orderly way from any thread, when the main thread no longer can.

Ray's C++ code ends a process silently, with exit code 1, some seconds after a part of Ray has died. The thread that
notices this first calls `end_process`: every act registered with `before_end` is run, each within a short time, and the
process ends with the exit code of the error.
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
"""Seconds that each act may take: storage that does not answer must not keep the process alive."""
_acts: list[Act] = []
_begun = threading.Lock()
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def before_end(act: Act) -> Iterator[None]:
    """Register an act for this context: `end_process` calls it in a separate thread, the latest act first."""
    _acts.append(act)
    try:
        yield
    finally:
        _acts.remove(act)


def end_process(
    explain: Callable[[], OwlsamError],
    otherwise: OwlsamError,
    *,
    explain_s: float = _ACT_S,
    at_last: Callable[[], None] = lambda: None,
) -> NoReturn:
    """Run all registered acts, then end the process with an error's exit code.

    Args:
        explain: makes the error; may access storage.
        otherwise: the error to use if `explain` takes too long or fails.
        explain_s: seconds that `explain` may take.
        at_last: called after everything else.
    """
    if not _begun.acquire(blocking=False):
        threading.Event().wait()  # another thread is ending the process
    found: list[OwlsamError] = []
    _within_a_time(lambda: found.append(explain()), explain_s)
    error = found[0] if found else otherwise
    for act in reversed(_acts):
        _within_a_time(lambda act=act: act(error))  # type: ignore[misc]
    _within_a_time(at_last)
    os._exit(int(error.exit_code))


def _within_a_time(act: Callable[[], None], seconds: float = _ACT_S) -> None:
    def run() -> None:
        try:
            act()
        except Exception:  # noqa: BLE001 (the process ends; the other acts and the exit code matter more)
            _log.debug("an action before the exit failed", exc_info=True)

    thread = threading.Thread(target=run, name="owlsam-last-act", daemon=True)
    thread.start()
    thread.join(seconds)
