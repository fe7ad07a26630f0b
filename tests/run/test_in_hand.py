"""Crumbs: what is in hand leaves a trace exactly when its process dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from owlsam_ray import storage
from owlsam_ray.run import in_hand as crumbs
from owlsam_ray.run.in_hand import Crumb


def crumb(shard: int, worker: str, **fields: object) -> Crumb:
    return Crumb.model_validate({"shard": shard, "worker": worker, "attempt": "a", "host": "h"} | fields)


@pytest.mark.parametrize("remote", [False, True])
def test_a_crumb_lasts_as_long_as_the_work(tmp_path: Path, remote: bool) -> None:
    run = "memory://crumbs" if remote else str(tmp_path)
    with crumbs.in_hand(run, crumb(7, "one")), crumbs.in_hand(run, crumb(7, "other")):
        assert crumbs.strikes(crumbs.list_crumbs(run)) == {7: 2}
    assert crumbs.list_crumbs(run) == {}
    with pytest.raises(OSError, match="storage"), crumbs.in_hand(run, crumb(8, "one")):
        raise OSError("storage")
    assert crumbs.list_crumbs(run) == {}
    with pytest.raises(ZeroDivisionError), crumbs.in_hand(run, crumb(8, "one")):
        raise ZeroDivisionError  # an image may have caused it
    assert crumbs.strikes(crumbs.list_crumbs(run)) == {8: 1}
    crumbs.sweep(run, {8})


def test_a_killed_process_leaves_its_crumb(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from owlsam_ray import crumbs; from owlsam_ray.run.in_hand import Crumb\n"
        "with crumbs.in_hand(sys.argv[1], Crumb(shard=3, worker=crumbs.new_worker_name(), attempt='a', host='h')):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
        assert done.returncode == -signal.SIGKILL
    assert crumbs.strikes(crumbs.list_crumbs(str(tmp_path))) == {3: 2}


def test_what_a_process_found_out_is_remembered(tmp_path: Path) -> None:
    run = str(tmp_path)
    crumbs.drop(run, crumb(5, "one"))
    crumbs.drop(run, crumb(5, "one", image_ids=(42,), reason="hang: no end within 3 s"))
    crumbs.drop(run, crumb(5, "other", notes=str(tmp_path / "not-there")))
    names = crumbs.list_crumbs(run)[5]
    assert len(names) == 2
    assert crumbs.suspects(run, [*names, "shard-00000005.gone.json"]) == {42}


def test_crumbs_of_finished_shards_are_swept(tmp_path: Path) -> None:
    run = str(tmp_path)
    for shard in (1, 2, 3):
        crumbs.drop(run, crumb(shard, "one"))
    storage.write_atomic(f"{run}/attempts/in-hand/readme.txt", b"not ours")
    crumbs.sweep(run, range(1, 3))
    assert crumbs.strikes(crumbs.list_crumbs(run)) == {3: 1}
    assert os.path.exists(f"{run}/attempts/in-hand/readme.txt")


def test_workers_have_names_of_their_own() -> None:
    assert len({crumbs.new_worker_name() for _ in range(1000)}) == 1000
