"""Decide whether other attempts are alive, by this process's own clock; clocks of two hosts are never compared."""

import time
from dataclasses import dataclass, field
from typing import Literal

from owlsam_ray.run.attempts import AttemptRecord, is_dead_here

Life = Literal["live", "silent", "dead", "unknown"]
"""`live`: a heartbeat arrived while it was watched; `silent`: none arrived for longer than the patience; `dead`: its
process ran on this machine and is gone; `unknown`: not watched long enough."""


@dataclass(frozen=True, slots=True)
class _Sighting:
    """What was last seen of an attempt."""

    beat: int
    since: float
    """When it was first seen with this counter, on the monotonic clock in seconds."""
    moved: bool
    """Whether its counter has changed since the attempt was first seen."""


@dataclass(slots=True)
class HeartbeatWatch:
    """Watches the heartbeat counters of other attempts, by their ids."""

    _seen: dict[str, _Sighting] = field(default_factory=dict)

    def look(self, record: AttemptRecord) -> None:
        """Note an attempt as it was just read from its file."""
        before = self._seen.get(record.id)
        if before is None or before.beat != record.beat:
            self._seen[record.id] = _Sighting(record.beat, time.monotonic(), moved=before is not None)

    def life_of(self, record: AttemptRecord, patience_s: float) -> Life:
        """Whether an attempt that was looked at is alive.

        Args:
            record: the attempt.
            patience_s: seconds without a heartbeat after which it is silent.
        """
        if is_dead_here(record):
            return "dead"
        seen = self._seen[record.id]
        if time.monotonic() - seen.since > patience_s:
            return "silent"
        return "live" if seen.moved else "unknown"
