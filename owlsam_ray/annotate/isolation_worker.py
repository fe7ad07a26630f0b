"""Entry point of the worker process that labels groups of a suspect shard; `isolate.py` starts it.

The argument is the parent's pid. This process is bound to its parent before modules that take seconds are imported.
"""

import ctypes
import os
import signal
import sys
from typing import IO

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Process the requests on standard input; return the exit code."""
    _die_with_parent(int(sys.argv[1]))
    replies = _take_stdout()
    from owlsam_ray.annotate.isolation_loop import serve

    return serve(sys.stdin, replies)


def _die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already ended
        os._exit(1)


def _take_stdout() -> IO[str]:
    """Return the pipe to the parent; what libraries print goes to stderr from now on, and never between replies."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


if __name__ == "__main__":
    sys.exit(main())
