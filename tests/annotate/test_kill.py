"""Runs that are killed end with the same bytes as runs that are not, and nothing that was written is computed again."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from owlsam_ray.run.paths import PREDICTIONS
from owlsam_ray.run.shards import done_shards, shard_url
from tests.runs import TWO_ACTORS, TinyRun, coco_bytes

NUM_IMAGES, NUM_SHARDS = 320, 40


def start(tiny: TinyRun, run: Path) -> "subprocess.Popen[bytes]":
    return tiny.start("annotate", run, **TWO_ACTORS)


def wait_for(condition: Callable[[], bool], driver: "subprocess.Popen[bytes]", *, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, f"the driver ended with {driver.returncode} before the moment of the kill"
        assert time.monotonic() < deadline, "the moment of the kill never came"
        time.sleep(0.01)


def written_shards(run: Path) -> dict[str, tuple[int, int]]:
    """Name → (inode, mtime) of shard files."""
    return {
        entry.name: (entry.stat().st_ino, entry.stat().st_mtime_ns)
        for entry in os.scandir(run / PREDICTIONS)
        if entry.name.startswith("shard-")
    }


@pytest.mark.slow
def test_sigkill_of_the_driver_at_three_moments(tiny: TinyRun, uninterrupted: bytes) -> None:
    run = tiny.root / "killed"
    written: dict[str, tuple[int, int]] = {}
    for moment in (1, 9, 18):
        driver = start(tiny, run)
        wait_for(lambda moment=moment: len(done_shards(str(run))) >= moment, driver)  # type: ignore[misc]
        orphans = workers(driver.pid)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        # Ray's workers outlive a killed driver by some seconds, and may finish a file meanwhile.
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in orphans):
            assert time.monotonic() < deadline, "Ray's workers did not end"
            time.sleep(0.1)
        before, written = written, written_shards(run)
        assert {name: written[name] for name in before} == before, "a shard was written again"
        assert moment <= len(written) < NUM_SHARDS, f"{len(written)} shards were written at the kill"

    summary = tiny.call("annotate", run, **TWO_ACTORS)
    assert summary["done"] == NUM_IMAGES
    assert summary["new"] == NUM_IMAGES - 8 * len(written)
    after = written_shards(run)
    assert {name: after[name] for name in written} == written, "a shard was written again"
    assert coco_bytes(tiny, run) == uninterrupted


@pytest.mark.slow
def test_sigkill_of_an_actor(tiny: TinyRun, uninterrupted: bytes) -> None:
    run = tiny.root / "actor-killed"
    driver = start(tiny, run)
    wait_for(lambda: len(done_shards(str(run))) >= 2, driver)
    actors = workers(driver.pid, b"Annotator")
    assert len(actors) == 2
    os.kill(actors[0], signal.SIGKILL)
    assert driver.wait(timeout=300) == 0
    assert coco_bytes(tiny, run) == uninterrupted


def workers(driver_pid: int, name: bytes = b"") -> list[int]:
    """Tasks and actors of a driver; its node's agents live a minute longer, and write nothing."""
    found = []
    for pid in descendants(driver_pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if command.startswith(b"ray::") and name in command and b"Agent" not in command:
                found.append(pid)
    return found


def descendants(ancestor: int) -> list[int]:
    """Processes below another."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parents[int(entry.name)] = int((entry / "status").read_text().split("PPid:")[1].split()[0])

    def descends(pid: int) -> bool:
        while pid > 1:
            pid = parents.get(pid, 0)
            if pid == ancestor:
                return True
        return False

    return [pid for pid in parents if descends(pid)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_sigterm_finishes_the_shards_in_hand(tiny: TinyRun, uninterrupted: bytes) -> None:
    run = tiny.root / "terminated"
    driver = start(tiny, run)
    wait_for(lambda: len(done_shards(str(run))) >= 1, driver)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=60) == 75
    assert 1 <= len(done_shards(str(run))) < NUM_SHARDS
    assert not list((run / "attempts").glob("*.stop"))
    assert not list((run / PREDICTIONS).glob(".tmp-*"))
    # What was written is what the undisturbed run wrote; that such a run goes on is shown above.
    for shard in done_shards(str(run)):
        one, other = (pq.read_table(shard_url(str(root), shard)) for root in (run, tiny.root / "uninterrupted"))
        assert one.equals(other)


def test_sigterm_before_the_work_begins(tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "early"
    driver = start(tiny, run)
    wait_for(lambda: (run / "run.json").exists(), driver)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=60) == 75
    assert not done_shards(str(run))
