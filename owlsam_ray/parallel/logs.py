"""Make log lines safe to publish and to show on a terminal: no secrets of URLs, no escape sequences."""

import logging
import sys
import traceback

from owlsam_ray.storage.secrets import masked
from owlsam_ray.terminal import printable_lines

_MOST_LINES = 400
_LONGEST_LINE = 10_000
"""Characters: one of our messages, which are already limited, plus the prefix of a log line."""


def safe_lines(text: str) -> str:
    """Mask, escape and shorten untrusted text, such as an error message or a traceback, for a log or a terminal."""
    lines = text.splitlines() if len(text) > _LONGEST_LINE else [text]
    if len(lines) > _MOST_LINES:
        half = _MOST_LINES // 2
        left_out = f"… {len(lines) - 2 * half:,} lines are left out here …"
        lines = [*lines[:half], left_out, *lines[-half:]]
    lines = [line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…" for line in lines]
    return printable_lines(masked("\n".join(lines)))


class SafeFormatter(logging.Formatter):
    """A formatter whose result is safe whatever the message, its arguments and a traceback contain."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, of several lines if the message has several or there is a traceback."""
        return safe_lines(super().format(record))


def stderr_handler(form: str | None = None, date_form: str | None = None) -> logging.Handler:
    """A handler that writes safe lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter(form, date_form))
    return handler


def log_safely_by_default() -> None:
    """Make Python's handler of last resort, used in Ray's workers, write safe lines."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(SafeFormatter())


def print_traceback() -> None:
    """Print the traceback of the current error to stderr, in safe lines."""
    print(safe_lines(traceback.format_exc()), file=sys.stderr, flush=True)
