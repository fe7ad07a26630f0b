"""One attempt at a time on a slice, whatever happens to the others; signs of life go by the observer's own clock."""

import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlsam_ray import storage
from owlsam_ray.errors import AttemptLiveError, ConfigError
from owlsam_ray.run import attempts as fence_module
from owlsam_ray.run.attempts import Attempt, AttemptRecord, Slice, ended_attempts, fence, live_attempts
from owlsam_ray.run.claim import claim
from owlsam_ray.run.paths import ATTEMPTS


def claimed(
    run: Path | str, part: str = "1/1", *, takeover_s: float = 2.0, takeover: bool = False, patient: bool = False
) -> AbstractContextManager[Attempt]:
    return claim(
        str(run),
        scope="label",
        part=Slice.parse(part),
        heartbeat_s=0.05,
        takeover_s=takeover_s,
        takeover=takeover,
        patient=patient,
    )


def write_silent(run: Path, *, host: str = "elsewhere", state: str = "running") -> AttemptRecord:
    """An attempt of another machine that shows no life."""
    record = AttemptRecord(id="old", scope="label", slice="1/1", host=host, pid=1, started="?", beat=7, state=state)
    storage.write_atomic(str(run / ATTEMPTS / "old.json"), json.dumps(record.model_dump()).encode())
    return record


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_slices_overlap_when_they_share_a_shard(one: int, other: int, data: st.DataObject) -> None:
    first = Slice(data.draw(st.integers(1, one)), one)
    second = Slice(data.draw(st.integers(1, other)), other)
    shared = set(first.shards(300)) & set(second.shards(300))
    assert first.overlaps(second) == second.overlaps(first) == bool(shared)


@given(st.integers(1, 9), st.integers(0, 100))
def test_the_slices_of_a_run_are_disjoint_and_make_it_up(count: int, num_shards: int) -> None:
    shards = [shard for index in range(1, count + 1) for shard in Slice(index, count).shards(num_shards)]
    assert sorted(shards) == list(range(num_shards))


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3", "1.0/2"])
def test_what_is_no_slice_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="i/n"):
        Slice.parse(text)


def test_an_attempt_is_there_while_it_lasts(tmp_path: Path) -> None:
    with claimed(tmp_path) as attempt:
        attempt.set_report(progress={"done": 3}, last_error="none really")
        beat = live_attempts(str(tmp_path))[0].beat
        deadline = time.monotonic() + 10
        while (now := live_attempts(str(tmp_path))[0]).beat <= beat + 2:
            assert time.monotonic() < deadline
        assert (now.id, now.state, now.progress) == (attempt.id, "running", {"done": 3})
        assert now.last_error == "none really"
    assert live_attempts(str(tmp_path)) == []
    (ended,) = ended_attempts(str(tmp_path))
    assert (ended.id, ended.exit_code) == (attempt.id, 0)
    assert ended.ended is not None


def test_the_exit_code_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), claimed(tmp_path):
        raise ConfigError("no good")
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path):
        raise KeyboardInterrupt
    found = ended_attempts(str(tmp_path))
    assert sorted(str(record.exit_code) for record in found) == ["2", "75"]
    assert {record.last_error for record in found} == {"no good", "KeyboardInterrupt"}


def test_a_second_attempt_refuses_and_leaves_no_trace(tmp_path: Path) -> None:
    with claimed(tmp_path) as first:
        with pytest.raises(AttemptLiveError, match=first.id), claimed(tmp_path):
            raise AssertionError("two at once")
        first.raise_if_taken_over()
    assert [record.id for record in ended_attempts(str(tmp_path))] == [first.id]


def test_slices_work_side_by_side(tmp_path: Path) -> None:
    with claimed(tmp_path, "1/3"), claimed(tmp_path, "2/3"), claimed(tmp_path, "3/3"):
        assert len(live_attempts(str(tmp_path))) == 3
        with pytest.raises(AttemptLiveError), claimed(tmp_path, "1/1"):
            raise AssertionError("the whole run holds every slice")


def test_another_scope_is_no_obstacle(tmp_path: Path) -> None:
    with (
        claimed(tmp_path),
        claim(str(tmp_path), scope="setup", part=Slice(), heartbeat_s=0.05, takeover_s=1) as other,
    ):
        other.raise_if_taken_over()


def test_a_silent_attempt_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    write_silent(tmp_path)
    start = time.monotonic()
    with claimed(tmp_path, takeover_s=1.0) as attempt:
        assert time.monotonic() - start >= 1.0
        attempt.raise_if_taken_over()
        assert storage.read_bytes(str(tmp_path / ATTEMPTS / "old.fenced")).decode().startswith(attempt.id)
    assert {record.id: record.exit_code for record in ended_attempts(str(tmp_path))} == {"old": None, attempt.id: 0}


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(AttemptLiveError), claimed(tmp_path, takeover_s=120):
        raise AssertionError("it lives")
    child.kill()
    child.wait()
    start = time.monotonic()
    with claimed(tmp_path, takeover_s=120):
        assert time.monotonic() - start < 60
    child.stdout.close()


_HOLD = """
import sys, time
from owlsam_ray.run.attempts import Slice
from owlsam_ray.run.claim import claim
with claim(sys.argv[1], scope="label", part=Slice(), heartbeat_s=0.05, takeover_s=5):
    print("held", flush=True)
    time.sleep(600)
"""


def test_takeover_fences_an_attempt_that_lives(tmp_path: Path) -> None:
    stopped = threading.Event()

    def work() -> None:
        with contextlib.suppress(AttemptLiveError), claimed(tmp_path) as attempt:
            begun.set()
            while True:
                attempt.raise_if_taken_over()
                time.sleep(0.01)
        stopped.set()

    begun = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    with claimed(tmp_path, takeover=True) as attempt:
        assert stopped.is_set(), "two at once"
        attempt.raise_if_taken_over()
    thread.join()
    assert sorted(str(record.exit_code) for record in ended_attempts(str(tmp_path))) == ["0", "4"]


def test_a_fenced_attempt_notices(tmp_path: Path) -> None:
    def work() -> None:
        with claimed(tmp_path) as attempt:
            fence(str(tmp_path), attempt.id, by="somebody")
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                attempt.raise_if_taken_over()
                time.sleep(0.01)

    with pytest.raises(AttemptLiveError, match="taken over by somebody"):
        work()


def test_two_takeovers_at_once_leave_one(tmp_path: Path) -> None:
    """And the attempt that they take over ends."""
    ends: dict[str, str] = {}
    begun, last = threading.Event(), threading.Event()

    def work(name: str, *, takeover: bool) -> None:
        try:
            with claimed(tmp_path, takeover=takeover) as attempt:
                begun.set()
                while not last.wait(0.01):
                    attempt.raise_if_taken_over()
            ends[name] = "complete"
        except AttemptLiveError:
            ends[name] = "fenced"

    threads = [threading.Thread(target=work, args=("first",), kwargs={"takeover": False})]
    threads[0].start()
    begun.wait()
    threads += [threading.Thread(target=work, args=(name,), kwargs={"takeover": True}) for name in ("one", "other")]
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 30
    while len(ends) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    last.set()
    for thread in threads:
        thread.join()
    assert sorted(ends.values()) == ["complete", "fenced", "fenced"]
    assert ends["first"] == "fenced"


def test_one_that_hangs_after_it_was_fenced_falls_silent(tmp_path: Path) -> None:
    with claimed(tmp_path) as hanging, claimed(tmp_path, takeover=True, takeover_s=1.0) as attempt:
        assert attempt.id != hanging.id


def test_a_process_of_which_nothing_can_be_read_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, where /proc hides them."""
    mine = fence_module.process_name(os.getpid())
    assert mine
    record = AttemptRecord(id="i", scope="label", slice="1/1", host="h", pid=1, started="?", process=f"{mine} 0")
    real = fence_module.process_name
    monkeypatch.setattr(fence_module, "process_name", lambda pid: real(pid) if pid == os.getpid() else None)
    assert not fence_module.is_dead_here(record)
    assert fence_module.is_dead_here(record.model_copy(update={"pid": 2**22 + 5}))


def test_a_slow_heartbeat_is_waited_for(tmp_path: Path) -> None:
    record = write_silent(tmp_path).model_copy(update={"heartbeat_s": 1.0})
    storage.write_atomic(str(tmp_path / ATTEMPTS / "old.json"), json.dumps(record.model_dump()).encode())
    start = time.monotonic()
    with claimed(tmp_path, takeover_s=0.2):
        assert time.monotonic() - start >= 2.0


def test_the_wall_clock_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may jump by years while an attempt is watched."""
    jumps = iter([1e9, 5e9, 0.0, 2e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps, 3e9))
    write_silent(tmp_path)
    start = time.monotonic()
    with claimed(tmp_path, takeover_s=0.5):
        assert 0.5 <= time.monotonic() - start < 30


def test_storage_that_refuses_for_a_while_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed(tmp_path) as attempt:
        write = storage.write_atomic

        def refuse(url: str, data: bytes | memoryview) -> None:
            raise OSError(28, "no space left")

        monkeypatch.setattr(storage, "write_atomic", refuse)
        time.sleep(0.3)
        monkeypatch.setattr(storage, "write_atomic", write)
        beat = live_attempts(str(tmp_path))[0].beat
        deadline = time.monotonic() + 10
        while live_attempts(str(tmp_path))[0].beat <= beat:
            assert time.monotonic() < deadline
        attempt.raise_if_taken_over()


def test_a_file_that_is_no_attempts_is_ignored(tmp_path: Path) -> None:
    storage.write_atomic(str(tmp_path / ATTEMPTS / "odd.json"), b"{")
    with claimed(tmp_path):
        assert len(live_attempts(str(tmp_path))) == 1


@pytest.mark.parametrize("seed", range(6))
def test_claims_at_the_same_moment(tmp_path: Path, seed: int) -> None:
    """Many processes at once: never two inside, and with patience each gets its turn."""
    print("seed", seed)
    context = multiprocessing.get_context("spawn")
    inside, together, turns = context.Value("i", 0), context.Value("i", 0), context.Value("i", 0)
    shared = (inside, together, turns)
    threads = [
        threading.Thread(target=_enter, args=(str(tmp_path), seed * 100 + number, shared)) for number in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.value == 0, "two at once"
    assert turns.value == 5


def _enter(run: str, seed: int, shared: tuple) -> None:  # type: ignore[type-arg]
    inside, together, turns = shared
    chance = random.Random(seed)
    time.sleep(chance.uniform(0, 0.05))
    with claimed(run, patient=True, takeover_s=60):
        with inside.get_lock():
            inside.value += 1
            together.value += inside.value > 1
        time.sleep(chance.uniform(0, 0.02))
        with inside.get_lock():
            inside.value -= 1
        with turns.get_lock():
            turns.value += 1


def test_on_an_object_store() -> None:
    run = f"memory://fence-{time.monotonic_ns()}"
    with claimed(run) as first, pytest.raises(AttemptLiveError, match=first.id), claimed(run):
        raise AssertionError("two at once")
    with claimed(run):
        assert len(live_attempts(run)) == 1


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "owlsam-heartbeat"]
