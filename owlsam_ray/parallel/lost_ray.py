"""How often in a row Ray was lost without any progress, so that no scheduler calls again for ever.

One small file for each slice of a run (or each training, each reduce): how far the work was, and how many calls in a
row have ended so since. Progress by anyone makes the count start anew.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

from owlsam_ray import storage
from owlsam_ray.errors import IncompleteError, InterruptedRunError, OwlsamError
from owlsam_ray.parallel.signals import was_asked

MOST_LOSSES = 3
"""The last of so many calls in a row says that calling again does not help."""
_SIGNAL_S = 0.2
"""Until the main thread has taken notice of a signal that has ended a part of Ray as well."""
SUFFIX = ".lost-ray"
"""How the names of these files end."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LossCount:
    """The count of one piece of work."""

    url: str
    """Its file."""
    progress: Callable[[], int]
    """A number that rises with progress: finished shards, steps."""
    state: Callable[[], str]
    """How far the work is, for a message: `3 of 20 shards are done`. Called after `progress`."""

    def losses(self, progress: int) -> int:
        """Calls in a row that ended so, with this progress; 0 where nobody can tell."""
        try:
            seen = json.loads(storage.read_bytes(self.url))
            return int(seen["losses"]) if seen["progress"] == progress else 0
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0

    def count(self, cause: str, *, advice: str) -> OwlsamError:
        """Count one more, unless somebody has asked this call to stop: then Ray was ended along with it.

        Args:
            cause: what happened, the start of a sentence.
            advice: what may help when it happens again and again, a sentence.

        Returns:
            What this call is to end with: call again, or, after `MOST_LOSSES` without progress, do not.
        """
        progress = self.progress()  # once: it may be a listing, and there is little time
        if was_asked(_SIGNAL_S):
            return InterruptedRunError(f"asked to stop ({cause}): {self.state()}; call the same command again")
        losses = self.losses(progress) + 1
        try:
            storage.write_atomic(self.url, json.dumps({"losses": losses, "progress": progress}).encode())
        except OSError as error:
            _log.warning("cannot count that Ray was lost: %s", error)
        if losses < MOST_LOSSES:
            return InterruptedRunError(f"{cause}: {self.state()}; call the same command again")
        return IncompleteError(
            f"{cause}. {losses} calls in a row have ended so without progress ({self.state()}), so calling again does "
            f"not help. {advice}"
        )

    def clear(self) -> None:
        """Count anew: this call has ended otherwise."""
        try:
            if storage.exists(self.url):
                storage.remove(self.url)
        except OSError as error:
            _log.debug("cannot remove %s: %s", self.url, error)
