"""`owlsam status`: what a run directory tells, and which attempts live."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from owlsam_ray import storage
from owlsam_ray.cli import main as cli
from owlsam_ray.errors import IncompleteError, InputError
from owlsam_ray.run.attempts import Slice
from owlsam_ray.run.claim import claim
from owlsam_ray.run.failure_counts import find_failures
from owlsam_ray.run.in_hand import InHandMarker, write
from owlsam_ray.run.paths import PREDICTIONS
from owlsam_ray.run.shards import FOOTER_KEY, shard_url
from owlsam_ray.run.status import RunStatus, status_table, watch_run
from tests.shard_runs import ShardRun, make_shard_run

BEAT_S = 0.1
QUICK = {"resources": {"heartbeat_s": BEAT_S, "takeover_s": 1.0}}


@pytest.fixture(params=["disk", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> ShardRun:
    """40 images in 10 shards of 4, of which 8 are labelled."""
    url = str(tmp_path / "run") if request.param == "disk" else f"memory://status/{tmp_path.name}"
    made = make_shard_run(url, num_images=40, shard_size=4, config=QUICK)
    made.write_all(range(8))
    return made


def old_footer(path: str) -> None:
    """As 0.1 wrote it."""
    fields = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY])
    for name in ("data_sha256", "footer_sha256", "failures"):
        del fields[name]
    pq.write_table(pq.read_table(path).replace_schema_metadata({FOOTER_KEY: json.dumps(fields)}), path)


def attempt(name: str, **values: Any) -> dict[str, Any]:
    fields = {"id": name, "scope": "label", "slice": "1/1", "host": "elsewhere", "pid": 1, "started": "s", "beat": 7}
    return fields | values


def register(run: ShardRun, record: dict[str, Any], ending: str = "json") -> None:
    storage.write_atomic(storage.join(run.url, "attempts", f"{record['id']}.{ending}"), json.dumps(record).encode())


def test_counts(run: ShardRun) -> None:
    start = time.monotonic()
    state = RunStatus(run.url).look()
    assert time.monotonic() - start < 1.0  # nobody is waited for
    assert state == {
        "run": run.url,
        "images": 40,
        "done": 32,
        "ok": 16,
        "empty": 8,
        "failed": 8,
        "left": 8,
        "detections": 24,
        "masks": 24,
        "shards": 10,
        "shards_done": 8,
        "failed_by_class": {"permanent": 4, "quarantined": 2, "transient": 2},
        "failed_by_reason": {"fetch_failed": 2, "killed_process": 2, "truncated": 4},
        "quarantined": [
            {"image_id": 16, "file_name": "000016.jpg", "reason": "killed_process: SIGSEGV"},
            {"image_id": 32, "file_name": "000032.jpg", "reason": "killed_process: SIGSEGV"},
        ],
        "in_hand": 0,
        "problems": [],
        "images_per_s": None,
        "eta_s": None,
        "attempts": [],
        "attempts_ended": 0,
        "last_errors": [],
    }


def test_old_footers_tell_the_same(tmp_path: Path) -> None:
    run = make_shard_run(str(tmp_path), num_images=40, shard_size=4, config=QUICK)
    run.write_all()
    new = RunStatus(run.url).look()
    for shard in (1, 3, 4):
        old_footer(shard_url(run.url, shard))
    assert RunStatus(run.url).look() == new
    assert len(find_failures(run.manifest, range(10), named=1).quarantined) == 1


def test_only_shards_with_quarantined_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_shard_run(str(tmp_path), num_images=40, shard_size=4, config=QUICK)
    run.write_all()
    read: list[str] = []
    real = pq.ParquetFile

    def counted(file: Any, **options: Any) -> Any:
        read.append(file.name)
        return real(file, **options)

    monkeypatch.setattr(pq, "ParquetFile", counted)
    RunStatus(run.url).look()
    assert [name for name in read if PREDICTIONS in name] == [shard_url(run.url, shard) for shard in (3, 7)]


def test_live_silent_and_ended_attempts(run: ShardRun) -> None:
    register(run, attempt("2-ended", ended="2026-01-02", exit_code=5, last_error="disk full"), "ended.json")
    register(run, attempt("3-ended", ended="2026-01-01", exit_code=75), "ended.json")
    write(run.url, InHandMarker(shard=8, worker="w", attempt="1-gone", host="elsewhere"))
    with (
        claim(run.url, scope="label", part=Slice(1, 2), heartbeat_s=BEAT_S, takeover_s=0.3) as one,
        claim(run.url, scope="label", part=Slice(2, 2), heartbeat_s=BEAT_S, takeover_s=0.3) as other,
    ):
        register(run, attempt("1-gone", progress={"images_per_s": 100.0}, last_error="no answer"))
        one.set_report(progress={"images_per_s": 1.5})
        other.set_report(progress={"images_per_s": 0.5}, last_error="slow down")
        start = time.monotonic()
        state = RunStatus(run.url).look()
        assert 1.0 < time.monotonic() - start < 5.0  # as long as the silent one could be a live one
    states = {each["id"]: each["state"] for each in state["attempts"]}
    assert states["1-gone"] == "silent"
    assert states[one.id] == states[other.id] == "live"
    assert (state["images_per_s"], state["eta_s"], state["in_hand"]) == (2.0, 4, 1)
    ended = [(each["id"], each["exit_code"]) for each in state["attempts"] if each["state"] == "ended"]
    assert ended == [("2-ended", 5), ("3-ended", 75)]
    errors = {each["attempt"]: each["error"] for each in state["last_errors"]}
    assert errors == {"1-gone": "no answer", other.id: "slow down", "2-ended": "disk full"}


def test_a_process_of_this_machine_that_is_gone_is_dead(tmp_path: Path) -> None:
    run = make_shard_run(str(tmp_path / "run"), num_images=4, shard_size=4)
    code = (
        "import os, sys; from owlsam_ray.run.attempts import Slice\n"
        "from owlsam_ray.run.claim import claim\n"
        "with claim(sys.argv[1], scope='label', part=Slice(), heartbeat_s=1, takeover_s=2): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, run.url], check=False)
    start = time.monotonic()
    (found,) = RunStatus(run.url).look()["attempts"]
    assert found["state"] == "dead"
    assert time.monotonic() - start < 8, "it was waited for"


def test_waiting_ends_with_the_first_sign_of_life(run: ShardRun) -> None:
    slow = make_shard_run(run.url, num_images=40, shard_size=4)  # heartbeats every ten seconds, says the run file
    with claim(slow.url, scope="label", part=Slice(), heartbeat_s=BEAT_S, takeover_s=1.0):
        start = time.monotonic()
        state = RunStatus(slow.url).look()
        assert time.monotonic() - start < 3.0
        assert [each["state"] for each in state["attempts"]] == ["live"]
        unwaited = RunStatus(slow.url).look(wait_s=0)
        assert [each["state"] for each in unwaited["attempts"]] == ["unknown"]


def test_damage_is_a_problem_and_no_end(run: ShardRun) -> None:
    storage.write_atomic(shard_url(run.url, 2), b"no shard")
    state = RunStatus(run.url).look()
    (problem,) = state["problems"]
    assert "1 shard files cannot be trusted" in problem
    assert shard_url(run.url, 2) in problem
    assert state["ok"] == 14
    storage.write_atomic(shard_url(run.url, 10), b"no shard")
    with pytest.raises(IncompleteError, match="the run has 10 shards"):
        RunStatus(run.url).look()


def test_nothing_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        RunStatus(str(tmp_path))


def test_watching_sees_what_changes(run: ShardRun) -> None:
    states: list[dict[str, Any]] = []
    left = [8, 9]

    def show(state: dict[str, Any]) -> None:
        states.append(state)
        if left:
            shard = left.pop()
            run.write(shard, run.rows(shard))

    assert watch_run(run.url, show, every_s=0.01) == states[-1]
    assert [state["left"] for state in states] == [8, 4, 0]
    assert states[-1]["failed_by_reason"] == {"fetch_failed": 3, "killed_process": 2, "truncated": 5}

    status = RunStatus(run.url)
    assert status.look()["failed"] == 10
    rows = run.rows(0).to_pylist()
    healed = run.rows(1).slice(0, 1).to_pylist()[0] | {"image_id": rows[3]["image_id"]}
    run.write(0, run.rows(0).from_pylist([*rows[:3], healed], run.rows(0).schema))
    assert status.look()["failed"] == 9  # tried again, in a file of the same name


def test_the_end_of_a_watched_attempt(run: ShardRun) -> None:
    run.write_all()
    status = RunStatus(run.url)
    with claim(run.url, scope="label", part=Slice(), heartbeat_s=BEAT_S, takeover_s=1.0):
        assert [each["state"] for each in status.look()["attempts"]] == ["live"]
    state = status.look()
    assert [(each["state"], each["exit_code"]) for each in state["attempts"]] == [("ended", 0)]
    assert state["attempts_ended"] == 1


def test_command(run: ShardRun, capsys: pytest.CaptureFixture[str]) -> None:
    register(run, attempt("1-gone"))
    storage.write_atomic(shard_url(run.url, 2), b"no shard")
    code = cli.main(["status", run.url, "--wait", "0"])
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (code, summary["exit_code"], summary["left"], summary["failed"]) == (0, 0, 8, 7)
    assert summary["attempts"][0]["state"] == "unknown"
    for words in ("32 of 40 images", "000016.jpg: killed_process: SIGSEGV", "1-gone", "cannot be trusted"):
        assert words in printed.err
    assert cli.main(["status", run.url, "--json", "--wait", "0"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["run"] == run.url
    assert printed.err == ""
    assert cli.main(["status", f"{run.url}/nowhere"]) == 2


def test_names_are_no_markup(run: ShardRun) -> None:
    state = RunStatus(run.url).look()
    state["quarantined"] = [{"file_name": "[red]x[/red].jpg", "reason": "hang"}]
    text = io.StringIO()
    Console(file=text, width=100).print(status_table(state))
    assert "[red]x[/red].jpg: hang" in text.getvalue()
