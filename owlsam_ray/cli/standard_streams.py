"""Keep stdout for a command's own lines and keep stderr from ever failing the command.

A log that cannot be written (`2>/dev/full`, a closed pipe) changes neither the work nor the exit code. Output printed
by libraries and their C code goes to stderr, so that stdout holds the command's JSON lines and nothing else.
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
    """A text stream that ignores errors when writing and flushing; all else is passed to the wrapped stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, ignoring errors; return its number of characters."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each line, ignoring errors."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream, ignoring errors."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Answers:
    """Writes the command's output lines to stdout; safe to call from any thread."""

    def __init__(self, stream: TextIO | None, descriptor: int | None) -> None:
        """Take the stream to write to.

        Args:
            stream: Python's stdout; None when it is closed.
            descriptor: a duplicate of stdout's file descriptor, separate from descriptor 1; None when the stream has
                no descriptor.
        """
        self._stream, self._descriptor = stream, descriptor
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        """Write one whole line at once.

        Raises:
            OSError: the line cannot be written, or the reader has closed its end.
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
        except BlockingIOError:  # another program made the pipe non-blocking
            select.select([], [descriptor], [])


@contextlib.contextmanager
def own_stdout() -> Iterator[Answers]:
    """Reserve stdout for this command's lines: inside the block, anything else that is printed goes to stderr."""
    _open_closed_ones()
    python = sys.stdout
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: closed
        python.flush()
    descriptor = os.dup(_STDOUT) if _is_real(python) else None  # not inherited by child processes
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
    """Whether the stream is descriptor 1, not a substitute set by a test or by another program."""
    try:
        return stream is not None and stream.fileno() == _STDOUT
    except (OSError, ValueError):
        return False


def _open_closed_ones() -> None:
    """Open descriptors 0 to 2 where the caller closed them, so that no file opened later gets one and is written to."""
    for number in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor


def _forget_what_cannot_be_written(stream: TextIO | None) -> None:
    """Send an unwritable stream to /dev/null: Python flushes at exit, and an error then makes the exit code 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
