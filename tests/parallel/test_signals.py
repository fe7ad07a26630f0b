"""Signals: the first asks, the second or the end of the grace time drops what is in hand."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from owlsam_ray.parallel.signals import SIGNALS, GraceOverError, as_interrupts, stop_on_signals


@pytest.fixture(autouse=True)
def _handlers_of_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_drops(tmp_path: Path, number: signal.Signals) -> None:
    stop = tmp_path / "stop"
    with stop_on_signals(str(stop), grace_s=60) as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        assert stop.exists()
        with pytest.raises(GraceOverError):
            os.kill(os.getpid(), signal.SIGTERM)
    assert not stop.exists()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_grace_time_ends(tmp_path: Path) -> None:
    with stop_on_signals(str(tmp_path / "stop"), grace_s=0.2):
        os.kill(os.getpid(), signal.SIGUSR1)
        start = time.monotonic()
        with pytest.raises(GraceOverError):
            time.sleep(30)
        assert time.monotonic() - start < 10


def test_a_full_disk_does_not_hide_the_signal(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with stop_on_signals(str(tmp_path / "file" / "stop"), grace_s=60) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()


@pytest.mark.parametrize("number", SIGNALS)
def test_before_there_is_work_every_signal_interrupts(number: signal.Signals) -> None:
    as_interrupts()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
