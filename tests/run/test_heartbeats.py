"""Whether an attempt is alive, by the observer's own clock."""

import os
import time

import pytest

from owlsam_ray.run.attempts import AttemptRecord, process_name
from owlsam_ray.run.heartbeats import HeartbeatWatch


class Clock:
    """A monotonic clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def record_of(beat: int, *, id: str = "other", process: str | None = None, pid: int = 1) -> AttemptRecord:  # noqa: A002
    return AttemptRecord(
        id=id, scope="label", slice="1/1", host="elsewhere", pid=pid, process=process, started="?", beat=beat
    )


def test_an_attempt_is_unknown_until_its_counter_moves_or_stands_too_long(clock: Clock) -> None:
    watch = HeartbeatWatch()
    for beat, after_s, expected in (
        (7, 0.0, "unknown"),
        (7, 10.0, "unknown"),
        (7, 0.1, "silent"),
        (8, 1.0, "live"),
        (8, 10.0, "live"),
        (8, 0.1, "silent"),
        (9, 0.0, "live"),
    ):
        clock.now += after_s
        watch.look(record_of(beat))
        assert watch.life_of(record_of(beat), 10.0) == expected, (beat, after_s)


def test_what_else_an_attempt_says_of_itself_is_no_heartbeat(clock: Clock) -> None:
    watch = HeartbeatWatch()
    watch.look(record_of(1))
    clock.now += 11.0
    changed = record_of(1).model_copy(update={"state": "running", "last_error": "none"})
    watch.look(changed)
    assert watch.life_of(changed, 10.0) == "silent"


def test_attempts_are_watched_apart(clock: Clock) -> None:
    watch = HeartbeatWatch()
    for beat in (1, 2):
        watch.look(record_of(beat, id="one"))
        watch.look(record_of(5, id="two"))
    assert [watch.life_of(record_of(2, id=name), 10.0) for name in ("one", "two")] == ["live", "unknown"]


def test_a_process_that_is_gone_from_this_machine_is_dead_at_once(clock: Clock) -> None:
    mine = process_name(os.getpid())
    assert mine
    gone = record_of(1, process=f"{mine} 0", pid=2**22 + 5)
    watch = HeartbeatWatch()
    watch.look(gone)
    assert watch.life_of(gone, 10.0) == "dead"
