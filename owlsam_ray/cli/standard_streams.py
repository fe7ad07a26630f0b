"""stdout and stderr of a command: one for its own lines alone, the other never worth stopping for.

A log that cannot be written (`2>/dev/full`, a closed pipe) changes neither the work nor the exit code. What libraries
and their C code print goes to stderr, so that stdout holds the command's lines of JSON and nothing else.
"""

import contextlib
import errno
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

_STDIN, _STDOUT, _STDERR = 0, 1, 2


class QuietStream:
    """A text stream whose errors do not matter; everything else is the stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if that works; returns the number of characters."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each of them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, if that works."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Answers:
    """Where the lines go that a command was called for; any thread may write one."""

    def __init__(self, stream: TextIO | None, descriptor: int | None) -> None:
        """Prepare.

        Args:
            stream: Python's stdout; None: it is closed.
            descriptor: of the same, kept apart from descriptor 1; None: the stream has none.
        """
        self._stream, self._descriptor = stream, descriptor
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        """Write a line, whole, at once.

        Raises:
            OSError: it cannot be written, or nobody reads it any more.
        """
        with self._lock:
            if self._descriptor is not None:
                _write_all(self._descriptor, f"{line}\n".encode())
            elif self._stream is not None:
                print(line, file=self._stream, flush=True)


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:  # a pipe that another program made so
            select.select([], [descriptor], [])


@contextlib.contextmanager
def own_stdout() -> Iterator[Answers]:
    """Keep stdout for the lines of this command: until the end, whatever else is printed goes to stderr."""
    _open_closed_ones()
    python = sys.stdout
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: closed
        python.flush()
    descriptor = os.dup(_STDOUT) if _is_real(python) else None  # no child inherits it
    if descriptor is not None:
        os.dup2(_STDERR, _STDOUT)
    quiet = QuietStream(sys.stderr) if sys.stderr is not None else None
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            yield Answers(python, descriptor)
    finally:
        if descriptor is not None:
            os.dup2(descriptor, _STDOUT)
            os.close(descriptor)
        for stream in (sys.stdout, sys.stderr):
            _forget_what_cannot_be_written(stream)


def _is_real(stream: TextIO | None) -> bool:
    """Whether it is descriptor 1, not a stand-in of a test or of another program."""
    try:
        return stream is not None and stream.fileno() == _STDOUT
    except (OSError, ValueError):
        return False


def _open_closed_ones() -> None:
    """Descriptors 0 to 2 that the caller has closed: a file of ours that got one would be written into."""
    for number in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)  # the lowest that is free


def _forget_what_cannot_be_written(stream: TextIO | None) -> None:
    """At its end Python flushes both once more, and an error there would replace the exit code by 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
