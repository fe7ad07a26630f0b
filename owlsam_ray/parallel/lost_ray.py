"""Count how often in a row Ray was lost without progress, so that a scheduler does not retry forever.

There is one small file per slice of a run (or per training, per reduce). It holds how far the work was, and how many
consecutive calls have ended with a loss since then. Progress made by any call resets the count.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

from owlsam_ray import storage
from owlsam_ray.errors import IncompleteError, InterruptedRunError, OwlsamError
from owlsam_ray.parallel.signals import was_asked

MOST_LOSSES = 3
"""After this many losses in a row, the error says that calling again does not help."""
_SIGNAL_S = 0.2
"""Seconds until the main thread has noticed a signal that has also ended a part of Ray."""
SUFFIX = ".lost-ray"
"""Suffix of these files' names."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LossCount:
    """The number of losses of one piece of work."""

    url: str
    """The file that holds the count."""
    progress: Callable[[], int]
    """A number that rises with progress: finished shards, steps."""
    state: Callable[[], str]
    """How far the work is, for a message: `3 of 20 shards are done`. Called after `progress`."""

    def losses(self, progress: int) -> int:
        """Consecutive calls that lost Ray at this progress; 0 if the file is missing or unreadable."""
        try:
            seen = json.loads(storage.read_bytes(self.url))
            return int(seen["losses"]) if seen["progress"] == progress else 0
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0

    def count(self, cause: str, *, advice: str) -> OwlsamError:
        """Count one more loss, unless this call was asked to stop: then Ray was ended along with it.

        Args:
            cause: what happened, as the start of a sentence.
            advice: what may help when it happens again and again, as a sentence.

        Returns:
            The error that this call ends with: call again, or, after `MOST_LOSSES` without progress, do not.
        """
        progress = self.progress()  # called once: it may be a listing, and time is short
        if was_asked(_SIGNAL_S):
            return InterruptedRunError(f"asked to stop ({cause}): {self.state()}; run the same command again")
        losses = self.losses(progress) + 1
        try:
            # A busy disk may need longer than this process has; a power cut ends other losses too.
            storage.write_atomic(self.url, json.dumps({"losses": losses, "progress": progress}).encode(), durable=False)
        except OSError as error:
            _log.warning("cannot record the loss of Ray: %s", error)
        if losses < MOST_LOSSES:
            return InterruptedRunError(f"{cause}: {self.state()}; run the same command again")
        return IncompleteError(
            f"{cause}. {losses} attempts in a row have ended this way without progress ({self.state()}), so another "
            f"one does not help. {advice}"
        )

    def clear(self) -> None:
        """Reset the count: this call has ended without a loss."""
        try:
            if storage.exists(self.url):
                storage.remove(self.url)
        except OSError as error:
            _log.debug("cannot remove %s: %s", self.url, error)
