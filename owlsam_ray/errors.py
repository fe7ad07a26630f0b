"""What fails one image, what stops the run, and the exit codes that a scheduler can act on.

OwlsamError
├── ImageError              fails one image; becomes a row, never stops the run
├── ConfigError         2   the run file or the command line
├── InputError          2   the dataset, the vocabulary, a path
│   └── StorageSetupError   no credentials, or no package, to ask a storage with
├── WeightsError        2   weights that are missing or of another layout
├── TrainingError       5   a training that cannot go on: a loss that is not finite
├── PreflightError      2   the run cannot start on these resources (law 10)
├── GuardError          3   another fingerprint, layout or numerics on this run directory
├── AttemptLiveError    4   another attempt works on this run directory
├── IncompleteError     5   shards missing or corrupt, or the proof does not add up
├── FailedImagesError   1   more failed images than `reduce.max_failed`
└── InterruptedRunError 75  stopped by a signal; the same command goes on
"""

from enum import IntEnum, StrEnum


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
    """Why a failed image failed, in the way that matters to a retry."""

    PERMANENT = "permanent"
    """The bytes cannot be decoded, or the file is not there: the same again tomorrow."""
    TRANSIENT = "transient"
    """Storage gave up: worth another try."""
    QUARANTINED = "quarantined"
    """It killed a process."""


class OwlsamError(Exception):
    """Root of all errors that this project raises on purpose."""

    exit_code: ExitCode = ExitCode.USAGE


class ImageError(OwlsamError):
    """Fails one image.

    Args:
        reason: a short stable word (`truncated`, `missing`, …), then optionally `: ` and details.
        failure_class: what a retry may expect.
    """

    def __init__(self, reason: str, failure_class: FailureClass = FailureClass.PERMANENT) -> None:
        super().__init__(reason)
        self.reason = reason
        self.failure_class = failure_class

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, FailureClass]]:
        """Keep both arguments when pickled (threads and actors pass it on)."""
        return type(self), (self.reason, self.failure_class)


class ConfigError(OwlsamError):
    """The run file or an override is wrong."""


class InputError(OwlsamError):
    """The dataset, the vocabulary or a path is wrong."""


class StorageSetupError(InputError):
    """No credentials, or no package, to ask a storage with on this machine; no property of a file."""


class WeightsError(OwlsamError):
    """Weights are missing, or do not fit the model."""


class TrainingError(OwlsamError):
    """A training cannot go on."""

    exit_code = ExitCode.INCOMPLETE


class PreflightError(OwlsamError):
    """The run cannot start on these resources."""


class GuardError(OwlsamError):
    """The run directory belongs to another config, layout or numerics."""

    exit_code = ExitCode.REFUSED


class AttemptLiveError(OwlsamError):
    """Another attempt works on the run directory."""

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
