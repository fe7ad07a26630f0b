"""`owlsam verify`: whatever is wrong with a run directory is found and named, and repairing redoes nothing else."""

import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlsam_ray import storage
from owlsam_ray.cli import main as cli
from owlsam_ray.errors import AttemptLiveError, IncompleteError, InputError
from owlsam_ray.run.attempts import Slice
from owlsam_ray.run.claim import claim
from owlsam_ray.run.paths import QUERY_FILE, RUN_FILE
from owlsam_ray.run.shards import FOOTER_KEY, done_shards, shard_name, shard_url
from owlsam_ray.run.verify import verify_run
from owlsam_ray.schema import PREDICTION_SCHEMA
from tests.runs import ROOT, environment
from tests.shard_runs import ShardRun, make_shard_run

QUICK = {"resources": {"heartbeat_s": 0.1, "takeover_s": 1.0}}


@pytest.fixture(params=["disk", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> ShardRun:
    """40 images in 10 shards of 4, all labelled."""
    url = str(tmp_path / "run") if request.param == "disk" else f"memory://audit/{tmp_path.name}"
    made = make_shard_run(url, num_images=40, shard_size=4, config=QUICK)
    made.write_all()
    return made


def refused(url: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Message and summary of a run with which something is wrong."""
    with pytest.raises(IncompleteError) as caught:
        verify_run(url, **options)
    message, summary = caught.value.args
    return message, summary


def test_a_whole_run(run: ShardRun) -> None:
    shown: list[tuple[str, int, int | None]] = []
    summary = verify_run(run.url, show=lambda *state: shown.append(state))
    assert summary == {
        "images": 40,
        "shards": 10,
        "images_done": 40,
        "ok": 20,
        "empty": 10,
        "failed": 10,
        "good": 10,
        "left": 0,
        "without_checksum": 0,
        "bad": 0,
        "bad_shards": [],
        "unread": 0,
        "unread_shards": [],
        "moved": 0,
        "problems": [],
        "temporary_files": 0,
        "other_files": [],
    }
    assert shown[-1] == ("verified", 40, 40)


def test_missing_shards_are_left_and_no_damage(run: ShardRun) -> None:
    for shard in (3, 7):
        storage.remove(shard_url(run.url, shard))
    summary = verify_run(run.url)
    assert (summary["good"], summary["left"], summary["images_done"], summary["bad"]) == (8, 2, 32, 0)


def damage(run: ShardRun, shard: int, how: str) -> None:
    """Spoil one shard file."""
    url = shard_url(run.url, shard)
    data = bytearray(storage.read_bytes(url))
    rows = run.rows(shard)
    if how == "cut":
        storage.write_atomic(url, bytes(data[:-30]))
    elif how == "empty":
        storage.write_atomic(url, b"")
    elif how == "flipped bit in the data":
        data[len(data) // 8] ^= 4
        storage.write_atomic(url, bytes(data))
    elif how == "flipped bit in the footer":
        data[-2000] ^= 4
        storage.write_atomic(url, bytes(data))
    elif how == "another shard":
        storage.write_atomic(url, storage.read_bytes(shard_url(run.url, (shard + 1) % 10)))
    elif how == "fewer rows":
        run.write(shard, rows.slice(1))
    elif how == "other order":
        run.write(shard, rows.take([1, 0, 2, 3]))
    elif how == "fingerprint":
        run.write(shard, rows, fingerprint="other")
    elif how == "numerics":
        run.write(shard, rows, numerics="other")
    elif how == "mask":
        entries = rows.to_pylist()
        entries[2]["mask_area"] = [7] * len(entries[2]["mask_area"])
        run.write(shard, pa.Table.from_pylist(entries, PREDICTION_SCHEMA))
    elif how == "reason":
        entries = rows.to_pylist()
        entries[3]["reason"] = None
        run.write(shard, pa.Table.from_pylist(entries, PREDICTION_SCHEMA))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "do not end like a Parquet file"),
        ("empty", "0 bytes"),
        ("flipped bit in the data", "checksum of its data"),
        ("flipped bit in the footer", "is not a whole shard"),
        ("another shard", "its footer states shard 6"),
        ("fewer rows", "its 3 image ids are not the manifest's 4"),
        ("other order", "its 4 image ids are not the manifest's 4"),
        ("fingerprint", "another label fingerprint"),
        ("numerics", "no attempt of the run used its numerics other"),
        ("mask", "a mask of 6 among 48 pixels"),
        ("reason", "image 24: failed without a reason"),
    ],
)
def test_a_bad_shard_is_named_and_repaired(
    tmp_path: Path, how: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_shard_run(str(tmp_path), num_images=40, shard_size=4, config=QUICK)
    run.write_all()
    before = {shard: storage.read_bytes(shard_url(run.url, shard)) for shard in range(10) if shard != 5}
    damage(run, 5, how)
    spoilt = storage.read_bytes(shard_url(run.url, 5))
    with caplog.at_level(logging.ERROR, "owlsam_ray"):
        message, summary = refused(run.url)
    assert (summary["bad"], summary["good"], summary["left"], summary["moved"]) == (1, 9, 0, 0)
    (named,) = summary["bad_shards"]
    assert named["shard"] == 5
    assert words in named["error"]
    assert words in message
    assert "--repair" in message
    assert words in caplog.text

    summary = verify_run(run.url, repair=True)
    assert (summary["bad"], summary["moved"], summary["left"], summary["good"]) == (1, 1, 1, 9)
    assert done_shards(run.url) == set(before)
    assert storage.read_bytes(storage.join(run.url, "damaged", shard_name(5))) == spoilt
    assert all(storage.read_bytes(shard_url(run.url, shard)) == data for shard, data in before.items())
    run.write_all([5])
    assert verify_run(run.url)["good"] == 10


def test_repairing_again_keeps_what_was_moved_before(run: ShardRun) -> None:
    contents = []
    for number in range(3):
        contents.append(b"no shard" * (number + 1))
        storage.write_atomic(shard_url(run.url, 2), contents[-1])
        damage(run, 8, "cut")
        assert verify_run(run.url, repair=True)["moved"] == 2
        run.write_all([2, 8])
    names = [shard_name(2), f"{shard_name(2)}.1", f"{shard_name(2)}.2"]
    assert [storage.read_bytes(storage.join(run.url, "damaged", name)) for name in names] == contents
    assert len(storage.list_names(storage.join(run.url, "damaged"))) == 6


def test_shards_that_do_not_exist_and_other_files(run: ShardRun) -> None:
    storage.write_atomic(shard_url(run.url, 10), storage.read_bytes(shard_url(run.url, 1)))
    storage.write_atomic(storage.join(run.url, "predictions", "notes.txt"), b"mine")
    message, summary = refused(run.url)
    assert "not a shard of this run, which has 10" in message
    assert (summary["bad"], summary["left"], summary["other_files"]) == (1, 0, ["notes.txt"])
    summary = verify_run(run.url, repair=True)
    assert (summary["moved"], summary["left"], summary["good"]) == (1, 0, 10)
    assert storage.exists(storage.join(run.url, "predictions", "notes.txt"))


def test_temporary_files_are_counted_and_old_ones_removed_by_repair(tmp_path: Path) -> None:
    run = make_shard_run(str(tmp_path), num_images=8, shard_size=4, config=QUICK)
    run.write_all()
    for name, age in ((".tmp-young", 0), (".tmp-old", 7200)):
        file = tmp_path / "predictions" / name
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    assert verify_run(run.url)["temporary_files"] == 2
    assert verify_run(run.url, repair=True)["temporary_files"] == 2
    assert storage.temporary_files(str(tmp_path / "predictions")) == [".tmp-young"]


def test_old_files_without_checksums_are_counted(tmp_path: Path) -> None:
    run = make_shard_run(str(tmp_path), num_images=8, shard_size=4)
    run.write_all()
    path = shard_url(run.url, 1)
    fields = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY])
    del fields["data_sha256"], fields["footer_sha256"]
    pq.write_table(pq.read_table(path).replace_schema_metadata({FOOTER_KEY: json.dumps(fields)}), path)
    summary = verify_run(run.url)
    assert (summary["good"], summary["without_checksum"]) == (2, 1)


def test_other_files_of_the_run(run: ShardRun) -> None:
    embeddings = storage.join(run.url, QUERY_FILE)
    right = storage.read_bytes(embeddings)
    storage.write_atomic(embeddings, right + b"!")
    message, summary = refused(run.url, repair=True)
    assert "is not the file that the labels were made with" in message
    assert (summary["bad"], summary["good"], len(summary["problems"])) == (0, 10, 1)
    storage.remove(embeddings)
    assert f"{embeddings} is missing" in refused(run.url)[0]
    storage.write_atomic(embeddings, right)

    record = storage.join(run.url, RUN_FILE)
    right = storage.read_bytes(record)
    storage.write_atomic(record, right.replace(b'"query_embeddings": "', b'"query_embeddings": "x'))
    assert "is not the hash of its parts" in refused(run.url)[0]
    storage.write_atomic(record, right[:-50])
    with pytest.raises(IncompleteError, match=r"run\.json is damaged"):
        verify_run(run.url)
    storage.write_atomic(record, right)

    part = storage.join(run.url, "manifest", "part-0000.parquet")
    planned = bytearray(storage.read_bytes(part))
    planned[100] ^= 1
    storage.write_atomic(part, bytes(planned))
    with pytest.raises(IncompleteError, match="is not the file that was planned"):
        verify_run(run.url)
    storage.remove(record)
    with pytest.raises(InputError, match="holds no run"):
        verify_run(run.url)


def test_a_planned_run_without_labels(tmp_path: Path) -> None:
    run = make_shard_run(str(tmp_path), num_images=8, shard_size=4)
    record = json.loads((tmp_path / RUN_FILE).read_text())
    (tmp_path / RUN_FILE).write_text(json.dumps(record | {"fingerprint": None, "fingerprint_parts": None}))
    (tmp_path / QUERY_FILE).unlink()
    summary = verify_run(run.url)
    assert (summary["good"], summary["left"], summary["problems"]) == (0, 2, [])
    run.write_all([0])
    assert "which has labelled nothing yet" in refused(run.url)[0]


def test_storage_that_gives_up_condemns_no_file(run: ShardRun, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.read_bytes

    def failing(url: str) -> bytes:
        if url == shard_url(run.url, 4):
            raise TimeoutError(110, "no answer")
        if url == shard_url(run.url, 6):
            raise FileNotFoundError(2, "taken away since the listing")
        return real(url)

    monkeypatch.setattr("owlsam_ray.run.shards.storage.read_bytes", failing)
    message, summary = refused(run.url, repair=True)
    assert "no answer" in message
    assert (summary["unread"], summary["bad"], summary["moved"]) == (1, 0, 0)
    assert (summary["good"], summary["left"]) == (8, 1)
    assert done_shards(run.url) == set(range(10))


def test_no_repair_beside_a_live_attempt(run: ShardRun) -> None:
    damage(run, 5, "cut")
    with claim(run.url, scope="label", part=Slice(2, 3), heartbeat_s=0.1, takeover_s=1.0):
        with pytest.raises(AttemptLiveError):
            verify_run(run.url, repair=True)
        assert refused(run.url)[1]["bad"] == 1  # looking is allowed
    assert done_shards(run.url) == set(range(10))
    assert verify_run(run.url, repair=True)["moved"] == 1


def test_repair_after_an_attempt_was_killed(tmp_path: Path) -> None:
    """One of another host, which shows no life for `takeover_s`."""
    run = make_shard_run(str(tmp_path), num_images=8, shard_size=4, config=QUICK)
    run.write_all()
    record = {"id": "a", "scope": "label", "slice": "1/1", "host": "elsewhere", "pid": 1, "started": "", "beat": 7}
    storage.write_atomic(storage.join(run.url, "attempts", "a.json"), json.dumps(record).encode())
    damage(run, 1, "cut")
    start = time.monotonic()
    assert verify_run(run.url, repair=True)["moved"] == 1
    assert time.monotonic() - start > 1.0


@pytest.mark.slow
def test_processes_find_the_same(tmp_path: Path) -> None:
    run = make_shard_run(str(tmp_path), num_images=400, shard_size=4, config=QUICK)
    run.write_all()
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    spoilt = sorted(choose.sample(range(99), 8))
    for shard in spoilt:
        damage(run, shard, choose.choice(["cut", "flipped bit in the data", "numerics", "mask"]))
    here, there = (refused(run.url, workers=workers) for workers in (1, 2))
    assert here == there
    assert [each["shard"] for each in here[1]["bad_shards"]] == spoilt


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_shard_run(str(tmp_path), num_images=40, shard_size=4, config=QUICK)
    run.write_all()

    def call(*options: str) -> tuple[int, dict[str, Any], str]:
        code = cli.main(["verify", run.url, *options])
        printed = capsys.readouterr()
        return code, json.loads(printed.out), printed.err

    code, summary, _ = call()
    assert (code, summary["good"], summary["run"], summary["exit_code"]) == (0, 10, run.url, 0)
    damage(run, 5, "cut")
    code, summary, log = call()
    assert (code, summary["bad"], summary["bad_shards"][0]["shard"]) == (5, 1, 5)
    assert shard_url(run.url, 5) in log
    code, summary, _ = call("--repair")
    assert (code, summary["bad"], summary["moved"]) == (0, 1, 1)
    code, summary, _ = call()
    assert (code, summary["bad"], summary["left"]) == (0, 0, 1)


def test_verify_and_status_load_neither_torch_nor_ray(tmp_path: Path) -> None:
    run = make_shard_run(str(tmp_path), num_images=8, shard_size=4)
    run.write_all()
    code = (
        "import sys; from owlsam_ray.cli import main as cli; url = sys.argv[1]; "
        "codes = [cli.main(['verify', url]), cli.main(['status', url])]; "
        "sys.exit(str({'ray', 'torch'} & set(sys.modules)) if {'ray', 'torch'} & set(sys.modules) else sum(codes))"
    )
    command = [sys.executable, "-c", code, run.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
