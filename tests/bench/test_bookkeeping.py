"""The benchmark of bookkeeping makes the runs that it says, and a run of ten million images starts as is promised."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from owlsam_ray.run.counts import RunCounts
from owlsam_ray.run.run import open_stored_run
from tests.bench.bookkeeping import NUM_IMAGES, bench, finish, make_run, marks_of
from tests.bench.measured_process import MeasuredProcess, tree_bytes

GIB = 1024


def test_a_generated_run_is_a_planned_one_of_which_99_percent_are_finished(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    make_run(tmp_path, 3005, shard_size=10)
    opened = open_stored_run(run)  # compares its hashes
    record, manifest = opened.record, opened.manifest
    assert (manifest.num_images, manifest.num_shards) == (3005, 301)
    for shard in (0, 1, 2, 100, 200):
        assert all(Path(uri).is_file() for uri in manifest.read_shard(shard)["uri"].to_pylist())
    finish(run, manifest, *marks_of(record))
    tally = RunCounts(replace(opened, record=record.model_copy(update={"fingerprint": marks_of(record)[0]}))).refresh()
    assert tally.pending() == [0, 100, 200, 300]
    assert (tally.counts["failed"], tally.images_done, tally.transient_shards) == (2970, 2970, set())


@pytest.mark.slow
def test_figures_are_told_for_both_states() -> None:
    found = bench(1500, 1, with_ray=False, shard_size=10)
    assert [found[state]["wave"] for state in ("fresh", "99 % done")] == [150, 2]
    assert all(0 < figures["ready_s"] < 30 and 50 < figures["mib"] < GIB for figures in found.values())
    assert found["99 % done"]["footers_s"] > found["fresh"]["footers_s"]


@pytest.mark.slow
def test_a_run_of_ten_million_images_starts_at_once_and_in_little_memory() -> None:
    """Seconds after Ray is up are told, not asserted: most of them load models on a machine that others may use."""
    found = bench(NUM_IMAGES, 1, with_ray=True)
    print(found)
    for state, wave in (("fresh", 1000), ("99 % done", 98)):
        assert found[state]["wave"] == wave
        assert found[state]["ready_s"] < 10
        assert found[f"{state}, with Ray"]["mib"] < GIB


def test_a_process_is_measured_with_all_below_it() -> None:
    hold = "x = bytearray(150 << 20); x[::4096] = bytes(len(x[::4096])); import time; time.sleep(3)"
    code = f"import subprocess, sys; print('up', file=sys.stderr, flush=True); subprocess.run([sys.executable, '-c', {hold!r}]); print(5)"  # noqa: E501
    with MeasuredProcess([sys.executable, "-c", code]) as process:
        assert 0 < process.moment_of("up") < 30
        assert process.wait() == 0
    assert process.output == "5\n"
    assert process.peak_bytes < 100 << 20 < 150 << 20 < process.all_peak_bytes < 400 << 20
    assert process.store_peak_bytes == 0


def test_a_process_that_ends_early_is_told_with_its_log() -> None:
    code = "import sys; sys.exit('no such thing')"
    with MeasuredProcess([sys.executable, "-c", code]) as process, pytest.raises(RuntimeError, match="no such thing"):
        process.moment_of("up")


def test_a_process_is_ended_when_nobody_waits_for_it() -> None:
    with MeasuredProcess([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        assert process.terminate() == -15


def test_files_are_counted_below_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"123")
    (tmp_path / "d").write_bytes(b"12")
    assert tree_bytes(tmp_path) == (2, 5)
