"""Claim a slice of a run: wait for the attempt that works on it, or take the slice over."""

import contextlib
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from owlsam_ray import storage
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.errors import AttemptLiveError
from owlsam_ray.run.attempts import (
    ENDED,
    LABEL,
    LIVE,
    OF_SETUP,
    SETUP,
    Attempt,
    AttemptRecord,
    Slice,
    attempt_url,
    fence,
    live_attempts,
    now_utc,
    process_name,
    safe_file_name,
    write_attempt,
)
from owlsam_ray.run.heartbeats import HeartbeatWatch

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def claim(
    run_url: str,
    *,
    scope: str,
    part: Slice,
    heartbeat_s: float,
    takeover_s: float,
    takeover: bool = False,
    patient: bool = False,
) -> Iterator[Attempt]:
    """Hold a slice of a run exclusively while the context lasts.

    Args:
        run_url: the run directory.
        scope: `LABEL` or `SETUP`; attempts with different scopes do not exclude each other.
        part: the slice.
        heartbeat_s: seconds between two heartbeats.
        takeover_s: seconds without a heartbeat after which another attempt is considered dead.
        takeover: fence live attempts and wait until they have stopped.
        patient: wait for live attempts instead of refusing.

    Raises:
        AttemptLiveError: another attempt is alive on this slice or an overlapping one.
        OSError: storage failed.
    """
    me = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{safe_file_name(socket.gethostname())}-{os.getpid()}"
    record = AttemptRecord(
        id=f"{me}-{secrets.token_hex(3)}{OF_SETUP if scope == SETUP else ''}",
        scope=scope,
        heartbeat_s=heartbeat_s,
        slice=str(part),
        host=socket.gethostname(),
        pid=os.getpid(),
        process=process_name(os.getpid()),
        started=now_utc(),
    )
    attempt = Attempt(run_url, record, heartbeat_s)
    attempt.save()
    with attempt:
        _Observer(attempt, part, takeover_s=takeover_s, takeover=takeover, patient=patient).wait_for_the_slice()
        record.state = "running"
        attempt.save()
        yield attempt


def claim_setup(run_url: str, resources: ResourcesConfig) -> contextlib.AbstractContextManager[Attempt]:
    """Hold the setup scope: while the context lasts, other processes wait to plan the run or write `run.json`."""
    return claim(
        run_url,
        scope=SETUP,
        part=Slice(),
        heartbeat_s=resources.heartbeat_s,
        takeover_s=resources.takeover_s,
        patient=True,
    )


@dataclass
class _Observer:
    """Observes the attempts that block this process's own attempt."""

    mine: Attempt
    part: Slice
    takeover_s: float
    takeover: bool
    patient: bool
    heartbeats: HeartbeatWatch = field(default_factory=HeartbeatWatch)
    logged: set[str] = field(default_factory=set)

    def wait_for_the_slice(self) -> None:
        """Return once no other attempt blocks the slice.

        An attempt enters after it has written `claiming` and then seen that all overlapping attempts are `waiting`. If
        two claim at the same time, at least the one that looks later sees the other, so they cannot both enter. The one
        with the larger id switches to `waiting`, and claims again when the slice is free.
        """
        while True:
            self.mine.raise_if_taken_over()
            every = live_attempts(self.mine.run_url, scope=self.mine.record.scope)
            others = [other for other in every if self._is_in_the_way(other)]
            if not others and self.mine.record.state == "claiming":
                return
            for other in others:
                self._consider(other)
            first = all(other.state == "claiming" and other.id > self.mine.id for other in others)
            state = "claiming" if first else "waiting"
            if state != self.mine.record.state:
                self.mine.record.state = state
                self.mine.save()
            elif others:  # the more attempts there are, the less often each one looks
                time.sleep(min(0.5, self.takeover_s / 20) * max(1.0, len(every) / 8) * random.uniform(0.75, 1.25))

    def _is_in_the_way(self, other: AttemptRecord) -> bool:
        mine = self.mine.record
        return other.id != mine.id and other.state != "waiting" and self.part.overlaps(Slice.parse(other.slice))

    def _consider(self, other: AttemptRecord) -> None:
        """Take over from a dead attempt; wait for a live one, or refuse.

        Raises:
            AttemptLiveError: the other attempt is alive, and this one may neither wait for it nor fence it.
        """
        self.heartbeats.look(other)
        life = self.heartbeats.life_of(other, max(self.takeover_s, 2 * other.heartbeat_s))
        if life == "dead":
            _log.warning("the attempt %s is dead: taking over", other.where)
            self._take_over(other)
            return
        if life == "silent":
            _log.warning("the attempt %s has sent no heartbeat for %g s: taking over", other.where, self.takeover_s)
            self._take_over(other)
            return
        if self.takeover and other.state == "running":
            fence(self.mine.run_url, other.id, by=self.mine.record.where)
            self._log_once(other, "is fenced: waiting until it has stopped")
            return
        yields = other.state == "claiming" and other.id > self.mine.id
        if life == "live" and not yields and not self.patient:
            raise AttemptLiveError(
                f"another attempt is working on {self.mine.run_url}: {other.where}. Wait for it to end, inspect it "
                "with `owlsam status`, or run again with --takeover to stop it."
            )
        silence = f"to send no heartbeat for {self.takeover_s:g} s"
        self._log_once(other, f"is registered: waiting for it to end, or {silence}")

    def _take_over(self, other: AttemptRecord) -> None:
        fence(self.mine.run_url, other.id, by=self.mine.record.where)
        other.ended = now_utc()
        write_attempt(self.mine.run_url, other, ENDED)
        storage.remove(attempt_url(self.mine.run_url, other.id, LIVE))

    def _log_once(self, other: AttemptRecord, what: str) -> None:
        if other.id not in self.logged:
            self.logged.add(other.id)
            who = "the attempt" if other.scope == LABEL else "the setup by"
            _log.info("%s %s %s", who, other.where, what)
