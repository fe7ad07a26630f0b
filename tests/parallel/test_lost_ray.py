"""Calls that end because Ray was lost: counted as long as nothing moves on."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest

from owlsam_ray.errors import IncompleteError, InterruptedRunError
from owlsam_ray.parallel.lost_ray import LossCount
from owlsam_ray.parallel.signals import SIGNALS, as_interrupts, stop_on_signals


class Work:
    """Shards of a slice, as a call after the other sees them."""

    def __init__(self, folder: Path, name: str = "slice-1-of-1") -> None:
        self.done = 0
        self.count = LossCount(str(folder / f"{name}.lost-ray"), lambda: self.done, lambda: f"{self.done} of 9 done")

    def lose(self) -> int:
        return int(self.count.count("the raylet was killed", advice="Give it memory.").exit_code)


def test_the_third_call_in_a_row_without_progress_says_that_another_does_not_help(tmp_path: Path) -> None:
    work = Work(tmp_path)
    assert [work.lose() for _ in range(4)] == [75, 75, 5, 5]
    first, third = Work(tmp_path, "a"), Work(tmp_path, "b")
    told = first.count.count("the raylet was killed", advice="Give it memory.")
    assert isinstance(told, InterruptedRunError)
    assert str(told) == "the raylet was killed: 0 of 9 done; run the same command again"
    third.lose(), third.lose()
    told = third.count.count("the raylet was killed", advice="Give it memory.")
    assert isinstance(told, IncompleteError)
    assert str(told) == (
        "the raylet was killed. 3 attempts in a row have ended this way without progress (0 of 9 done), so another one "
        "does not help. Give it memory."
    )


def test_a_loss_is_counted_without_waiting_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("a busy disk takes longer than the process has"))
    assert [Work(tmp_path).lose() for _ in range(3)] == [75, 75, 5]


@pytest.mark.parametrize("reset", ["progress", "less than before", "another end"])
def test_what_makes_the_count_start_anew(tmp_path: Path, reset: str) -> None:
    work = Work(tmp_path)
    work.done = 4
    assert [work.lose(), work.lose()] == [75, 75]
    if reset == "another end":
        work.count.clear()
    else:
        work.done = 5 if reset == "progress" else 3
    assert [work.lose() for _ in range(3)] == [75, 75, 5]


def test_slices_do_not_disturb_each_other(tmp_path: Path) -> None:
    one, other = Work(tmp_path, "slice-1-of-2"), Work(tmp_path, "slice-2-of-2")
    assert [one.lose(), other.lose(), one.lose()] == [75, 75, 75]
    other.count.clear()
    assert (one.lose(), other.lose()) == (5, 75)


def test_a_call_that_was_asked_to_stop_is_no_loss(tmp_path: Path) -> None:
    """A scheduler sends its signal to all processes of a job, those of Ray included."""
    work = Work(tmp_path)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for code in (75, 75, 75, 75):
            as_interrupts()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            assert work.lose() == code
            assert not list(tmp_path.iterdir())
        told = work.count.count("the raylet ended with exit code 0", advice="Give it memory.")
        assert str(told) == (
            "asked to stop (the raylet ended with exit code 0): 0 of 9 done; run the same command again"
        )
        as_interrupts()
        assert [work.lose() for _ in range(3)] == [75, 75, 5]
        with stop_on_signals(str(tmp_path / "stop"), grace_s=60):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert work.lose() == 75
    finally:
        as_interrupts()  # asked for nothing
        for number, handler in before.items():
            signal.signal(number, handler)


def test_progress_is_looked_at_once(tmp_path: Path) -> None:
    """It may be a long listing, and the process has a moment."""
    looks = iter(range(2))
    count = LossCount(str(tmp_path / "x.lost-ray"), lambda: next(looks), lambda: "far")
    count.count("the raylet was killed", advice="")
    assert list(looks) == [1]


@pytest.mark.parametrize("damage", [b"", b"[1]", b"null", b'{"losses": "x", "progress": 0}', b"\xff\xfe"])
def test_a_damaged_count_starts_anew(tmp_path: Path, damage: bytes) -> None:
    work = Work(tmp_path)
    (tmp_path / "slice-1-of-1.lost-ray").write_bytes(damage)
    assert [work.lose(), work.lose(), work.lose()] == [75, 75, 5]


def test_storage_that_refuses_is_no_reason_not_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    work = Work(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        assert [work.lose() for _ in range(3)] == [75, 75, 75]
    work.count.clear()
    assert "cannot record the loss of Ray" in caplog.text


def test_the_file_of_a_count_is_small_and_no_attempt(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.lose()
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_bytes()) == {"losses": 1, "progress": 0}
    assert not file.name.endswith(".json")  # as attempts do
    work.count.clear()
    assert not list(tmp_path.iterdir())
