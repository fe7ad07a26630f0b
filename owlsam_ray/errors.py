"""Define all errors, which of them stop the run, and the exit codes that a scheduler can act on.

OwlsamError
├── ImageError              fails one image; becomes a row, never stops the run
├── ConfigError         2   the run file or the command line
├── InputError          2   the dataset, the vocabulary, a path
│   └── StorageSetupError   no credentials, or no package, to access a storage
├── WeightsError        2   weights are missing, or have another layout
├── TrainingError       5   a training cannot continue: the loss is not finite
├── PreflightError      2   the run cannot start on these resources (law 10)
├── GuardError          3   the run directory has another fingerprint, layout or numerics
├── AttemptLiveError    4   another attempt is working on this run directory
├── IncompleteError     5   shards are missing or corrupt, or the proof does not add up
├── FailedImagesError   1   more failed images than `reduce.max_failed`
└── InterruptedRunError 75  stopped by a signal; the same command continues the run
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from enum import IntEnum, StrEnum
from itertools import islice

_MESSAGE_LIMIT = 8000
"""Maximum characters of a message, about twenty lines."""
_REASON_LIMIT = 1000
"""Maximum characters of the reason of a failed image."""
_SHOWN_DEPTH = 4
"""Levels of nested values that a message shows."""


class ExitCode(IntEnum):
    """Exit codes of every command."""

    COMPLETE = 0
    TOO_MANY_FAILED = 1
    USAGE = 2
    REFUSED = 3
    ATTEMPT_LIVE = 4
    INCOMPLETE = 5
    INTERRUPTED = 75


class FailureClass(StrEnum):
    """Why an image failed, as far as it matters for a retry."""

    PERMANENT = "permanent"
    """The bytes cannot be decoded, or the file does not exist: a retry gives the same result."""
    TRANSIENT = "transient"
    """Storage failed after all retries: worth another try."""
    QUARANTINED = "quarantined"
    """The image killed a process."""


class OwlsamError(Exception):
    """Base class of all errors that this project raises on purpose."""

    exit_code: ExitCode = ExitCode.USAGE

    def __init__(self, *args: object) -> None:
        """Keep the message, truncated: a backstop for values that were not passed through `shown`."""
        if args and isinstance(args[0], str) and len(args[0]) > _MESSAGE_LIMIT:
            args = (f"{args[0][: _MESSAGE_LIMIT - 1]}…", *args[1:])
        super().__init__(*args)


class ImageError(OwlsamError):
    """Fails one image.

    Args:
        reason: a short stable keyword (`truncated`, `missing`, …), then optionally `: ` and details.
        failure_class: what a retry can expect.
    """

    def __init__(self, reason: str, failure_class: FailureClass = FailureClass.PERMANENT) -> None:
        reason = reason if len(reason) <= _REASON_LIMIT else f"{reason[: _REASON_LIMIT - 1]}…"
        super().__init__(reason)
        self.reason = reason
        self.failure_class = failure_class

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, FailureClass]]:
        """Keep both arguments when pickled (threads and actors pass the error on)."""
        return type(self), (self.reason, self.failure_class)


class ConfigError(OwlsamError):
    """The run file or an override is wrong."""


class InputError(OwlsamError):
    """The dataset, the vocabulary or a path is wrong."""


class StorageSetupError(InputError):
    """No credentials, or no package, to access a storage on this machine; the files are not to blame."""


class WeightsError(OwlsamError):
    """Weights are missing, or do not fit the model."""


class TrainingError(OwlsamError):
    """A training cannot continue."""

    exit_code = ExitCode.INCOMPLETE


class PreflightError(OwlsamError):
    """The run cannot start on these resources."""


class GuardError(OwlsamError):
    """The run directory belongs to another config, layout or numerics."""

    exit_code = ExitCode.REFUSED


class AttemptLiveError(OwlsamError):
    """Another attempt is working on the run directory."""

    exit_code = ExitCode.ATTEMPT_LIVE


class IncompleteError(OwlsamError):
    """Shards are missing or corrupt, or the proof does not add up."""

    exit_code = ExitCode.INCOMPLETE


class FailedImagesError(OwlsamError):
    """More images failed than the config allows."""

    exit_code = ExitCode.TOO_MANY_FAILED


class InterruptedRunError(OwlsamError):
    """A signal stopped the run between two shards."""

    exit_code = ExitCode.INTERRUPTED


def shown(value: object, limit: int = 120) -> str:
    """Format a value for a message: as `repr` writes it, truncated.

    Text is quoted; control characters and lone surrogates are escaped. Only as much of the value is rendered as fits,
    so a structure of gigabytes, or one with cycles, costs nothing.

    Args:
        value: any value, possibly untrusted.
        limit: maximum number of characters; truncated text ends with an ellipsis.
    """
    text = ""
    for piece in _pieces(value, limit, _SHOWN_DEPTH):
        text += piece
        if len(text) > limit:
            return f"{text[: max(limit - 1, 0)]}…"
    return text


def one_line(error: object, limit: int = 300) -> str:
    """Format a library's error message for use in ours: no line breaks or control characters, truncated.

    Args:
        error: an exception or a text; an empty message is replaced by the type's name.
        limit: maximum number of characters; truncated text ends with an ellipsis.
    """
    text = str(error)
    is_cut = len(text) > 2 * limit
    text = " ".join(text[: 2 * limit].split()) or type(error).__name__
    text = re.sub(r"[^ -~]", lambda match: match[0] if match[0].isprintable() else repr(match[0])[1:-1], text)
    return f"{text[: max(limit - 1, 0)]}…" if is_cut or len(text) > limit else text


def _pieces(value: object, limit: int, depth: int) -> Iterator[str]:
    """Yield the parts of a value's text in order, each not much longer than `limit`."""
    if isinstance(value, str):
        yield str.__repr__(value[: limit + 1])
    elif isinstance(value, bytes | bytearray):
        yield repr(bytes(value[: limit + 1]))
    elif isinstance(value, int) and value.bit_length() > 4 * limit:
        yield f"<integer of about {value.bit_length() * 30103 // 100000 + 1} digits>"
    elif isinstance(value, Mapping | list | tuple | Set):
        opening, closing = (
            ("{", "}") if isinstance(value, Mapping | Set) else "()" if isinstance(value, tuple) else "[]"
        )
        yield opening
        if depth:
            pairs = value.items() if isinstance(value, Mapping) else value
            yield from _listed(pairs, limit, depth - 1, is_mapping=isinstance(value, Mapping))
        elif value:
            yield "…"
        yield closing
    else:
        yield repr(value)


def _listed(values: Iterable[object], limit: int, depth: int, *, is_mapping: bool) -> Iterator[str]:
    for place, each in enumerate(islice(values, limit)):
        if place:
            yield ", "
        if is_mapping and isinstance(each, tuple):
            yield from _pieces(each[0], limit, depth)
            yield ": "
            each = each[1]
        yield from _pieces(each, limit, depth)


def raise_problems(where: str, problems: Sequence[str], way_out: str, *, use: str = "labelled") -> None:
    """Refuse a file if it has problems, naming the first five.

    Raises:
        InputError: there is at least one problem.
    """
    if problems:
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "\n  ".join(problems[:5])
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{where} cannot be {use} as it is ({count}):\n  {listed}{more}\n{way_out}")
