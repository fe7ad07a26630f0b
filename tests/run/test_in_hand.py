"""Markers: what is in hand leaves a trace exactly when its process dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from owlsam_ray import storage
from owlsam_ray.run import in_hand
from owlsam_ray.run.in_hand import InHandMarker


def marker(shard: int, worker: str, **fields: object) -> InHandMarker:
    return InHandMarker.model_validate({"shard": shard, "worker": worker, "attempt": "a", "host": "h"} | fields)


@pytest.mark.parametrize("remote", [False, True])
def test_a_marker_lasts_as_long_as_the_work(tmp_path: Path, remote: bool) -> None:
    run = "memory://markers" if remote else str(tmp_path)
    with in_hand.held(run, marker(7, "one")), in_hand.held(run, marker(7, "other")):
        assert in_hand.deaths(in_hand.list_markers(run)) == {7: 2}
    assert in_hand.list_markers(run) == {}
    with pytest.raises(OSError, match="storage"), in_hand.held(run, marker(8, "one")):
        raise OSError("storage")
    assert in_hand.list_markers(run) == {}
    with pytest.raises(ZeroDivisionError), in_hand.held(run, marker(8, "one")):
        raise ZeroDivisionError  # an image may have caused it
    assert in_hand.deaths(in_hand.list_markers(run)) == {8: 1}
    in_hand.clear(run, {8})


def test_a_killed_process_leaves_its_marker(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from owlsam_ray.run import in_hand\n"
        "marker = in_hand.InHandMarker(shard=3, worker=in_hand.new_worker_name(), attempt='a', host='h')\n"
        "with in_hand.held(sys.argv[1], marker):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
        assert done.returncode == -signal.SIGKILL
    assert in_hand.deaths(in_hand.list_markers(str(tmp_path))) == {3: 2}


def test_what_a_process_found_out_is_remembered(tmp_path: Path) -> None:
    run = str(tmp_path)
    in_hand.write(run, marker(5, "one"))
    in_hand.write(run, marker(5, "one", image_ids=(42,), reason="hang: no end within 3 s"))
    in_hand.write(run, marker(5, "other", notes=str(tmp_path / "not-there")))
    names = in_hand.list_markers(run)[5]
    assert len(names) == 2
    assert in_hand.suspects(run, [*names, "shard-00000005.gone.json"]) == {42}


def test_markers_of_finished_shards_are_cleared(tmp_path: Path) -> None:
    run = str(tmp_path)
    for shard in (1, 2, 3):
        in_hand.write(run, marker(shard, "one"))
    storage.write_atomic(f"{run}/attempts/in-hand/readme.txt", b"not ours")
    in_hand.clear(run, range(1, 3))
    assert in_hand.deaths(in_hand.list_markers(run)) == {3: 1}
    assert os.path.exists(f"{run}/attempts/in-hand/readme.txt")


def test_workers_have_names_of_their_own() -> None:
    assert len({in_hand.new_worker_name() for _ in range(1000)}) == 1000
