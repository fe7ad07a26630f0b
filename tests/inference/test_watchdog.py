"""What threads work on is known to a watchdog, and to others after the process's death."""

import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from owlsam_ray.annotate.actor_watch import WatchedWork
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.inference.watchdog import Overrun, Watchdog, resident_bytes
from owlsam_ray.parallel.work_slots import WorkSlots, read_slots, remove_old_slot_files
from owlsam_ray.run import in_hand


def test_slots_are_taken_and_given_back(tmp_path: Path) -> None:
    slots = WorkSlots(tmp_path)
    assert read_slots(slots.path) == []
    with slots.busy("decode", [7]), slots.busy("model", range(100, 300)):
        assert sorted(read_slots(slots.path)) == [("decode", [7]), ("model", list(range(100, 164)))]
        assert slots.in_hand() == (7, *range(100, 300))
    with slots.busy("encode", [-(2**62)]):
        assert read_slots(slots.path) == [("encode", [-(2**62)])]
    assert read_slots(slots.path) == []
    slots.close()
    assert not slots.path.exists()


def test_many_threads(tmp_path: Path) -> None:
    """More at once than there are slots: nothing is lost that fits, and nothing stays."""
    slots = WorkSlots(tmp_path)
    barrier = threading.Barrier(301)

    def work(number: int) -> None:
        with slots.busy("decode", [number]):
            barrier.wait()
            barrier.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(300)]
    for thread in threads:
        thread.start()
    barrier.wait()
    assert len(read_slots(slots.path)) == 256
    barrier.wait()
    for thread in threads:
        thread.join()
    assert read_slots(slots.path) == []
    assert slots.in_hand() == ()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_process_leaves_word(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import os, sys; from pathlib import Path; from owlsam_ray.inference.watchdog import WorkSlots\n"
        "slots = WorkSlots(Path(sys.argv[1]))\n"
        "with slots.busy('model', [1, 2]), slots.busy('decode', [3]):\n"
        "    os.kill(os.getpid(), int(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(int(number))], check=False)
    assert done.returncode == -number
    (left,) = tmp_path.iterdir()
    assert sorted(read_slots(left)) == [("decode", [3]), ("model", [1, 2])]


def test_a_file_of_something_else_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"\xff" * 5000)
    (tmp_path / "short").write_bytes(b"\x01")
    assert read_slots(tmp_path / "odd") == read_slots(tmp_path / "short") == []


def test_a_slot_that_is_half_written_counts_as_free(tmp_path: Path) -> None:
    """Whatever the moment of death: a slot says all of what was in hand, or nothing."""
    slots = WorkSlots(tmp_path)
    free = slots.path.read_bytes()
    with slots.busy("decode", [5, 6]):
        taken = slots.path.read_bytes()
    changed = [place for place in range(len(free)) if free[place] != taken[place]]
    ids, header = [place for place in changed if place > 1], [place for place in changed if place <= 1]
    torn = bytearray(free)
    for place in [*ids, *header]:  # in the order in which they are written
        assert torn == free or read_slots(_file(tmp_path / "torn", torn)) == []
        torn[place] = taken[place]
    assert read_slots(_file(tmp_path / "torn", torn)) == [("decode", [5, 6])]


def _file(path: Path, data: bytes | bytearray) -> Path:
    path.write_bytes(data)
    return path


def test_a_watchdog_that_is_stopped_ends_nothing(tmp_path: Path) -> None:
    dog = Watchdog(WorkSlots(tmp_path), deadline_s=0.3, memory_bytes=None, on_overrun=print).start()
    time.sleep(0.5)
    dog.stop()
    assert not dog._thread.is_alive()


def test_work_that_takes_too_long_is_reported(tmp_path: Path) -> None:
    slots, reported, overruns = WorkSlots(tmp_path), threading.Event(), list[Overrun]()

    def report(overrun: Overrun) -> None:
        overruns.append(overrun)
        reported.set()

    dog = Watchdog(slots, deadline_s=0.5, memory_bytes=None, on_overrun=report, last_resort=False).start()
    with slots.busy("decode", [5]):
        time.sleep(0.05)
    assert not reported.is_set()
    with slots.busy("decode", [6]):
        assert reported.wait(10)
    dog.stop()
    assert overruns == [Overrun((6,), "hang: no end within 0.5 s")]


def test_memory_that_grows_is_reported(tmp_path: Path) -> None:
    slots = WorkSlots(tmp_path)
    assert resident_bytes() > 10**6
    assert resident_bytes(2**30) == 0
    with slots.busy("decode", [5]):
        dog = Watchdog(slots, deadline_s=9, memory_bytes=1000, on_overrun=print)
        assert dog.look() == Overrun((5,), "out_of_memory: above 1e-06 GB")
    assert Watchdog(slots, deadline_s=9, memory_bytes=2**50, on_overrun=print).look() is None


def test_shared_memory_is_nobodys_own() -> None:
    before = resident_bytes()
    with mmap.mmap(-1, 200 * 2**20) as shared:
        for start in range(0, len(shared), 2**20):
            shared[start : start + 2**20] = bytes(2**20)
        assert resident_bytes() - before < 100 * 2**20
    own = bytearray(b"x") * (200 * 2**20)
    assert resident_bytes() - before > 100 * 2**20
    del own


def test_a_process_whose_lock_is_held_ends_all_the_same() -> None:
    """By a call into C that never gives the interpreter's lock back."""
    code = (
        "import ctypes, owlsam_ray.inference.watchdog as w; w._LAST_RESORT_S = 0.5\n"
        "w.Watchdog(w.WorkSlots(), deadline_s=0.5, memory_bytes=None, on_overrun=print).start()\n"
        "import time; time.sleep(1)\n"
        "ctypes.PyDLL(None).sleep(600)\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == 1
    assert time.monotonic() - start < 30


def test_old_files_are_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, young = WorkSlots(), WorkSlots()
    os.utime(old.path, (1, 1))
    remove_old_slot_files()
    assert (old.path.exists(), young.path.exists()) == (False, True)


def test_a_file_of_slots_is_there_only_while_there_is_work(tmp_path: Path) -> None:
    slots = WorkSlots(tmp_path)
    slots.remove_file()
    assert not list(tmp_path.iterdir())
    with slots.busy("decode", [1]):
        slots.renew()  # work of before ends in the file of before
        (file,) = tmp_path.iterdir()
        with slots.busy("model", [2]):
            assert read_slots(file) == [("model", [2])]
        assert slots.in_hand() == (1,)
    assert read_slots(file) == []
    slots.remove_file()
    assert not list(tmp_path.iterdir())


def test_an_actor_leaves_no_file_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run = tmp_path / "tmp", str(tmp_path / "run")
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(Watchdog, "start", lambda self: self)
    work = WatchedWork(run, "attempt", ResourcesConfig())
    assert not list(folder.iterdir())
    with work.in_hand(3):
        (file,) = folder.iterdir()
        with work.in_hand(4):
            assert list(folder.iterdir()) == [file]
        assert list(folder.iterdir()) == [file]
    assert not list(folder.iterdir())
    with pytest.raises(OSError, match="full"), work.in_hand(5):
        raise OSError("full")
    assert not list(folder.iterdir())
    with work.in_hand(6), work.slots.busy("decode", [9]):
        (file,) = folder.iterdir()
        (names,) = in_hand.list_markers(run).values()
        assert in_hand.suspects(run, names) == {9}


def test_the_file_of_a_dead_process_goes_with_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    ours, other, elsewhere = (
        tmp_path / "tmp" / "owlsam-watch-x",
        tmp_path / "tmp" / "somebody-elses",
        tmp_path / "owlsam-watch-y",
    )
    for number, notes in enumerate((ours, other, elsewhere)):
        notes.write_bytes(b"")
        in_hand.write(
            str(tmp_path),
            in_hand.InHandMarker(shard=number, worker="w", attempt="a", host=socket.gethostname(), notes=str(notes)),
        )
    in_hand.clear(str(tmp_path), {0, 1, 2})
    assert (ours.exists(), other.exists(), elsewhere.exists()) == (False, True, True)
    assert in_hand.list_markers(str(tmp_path)) == {}
