"""Runs that the code of 9484201 made: today's code reads them, and goes on where they stopped."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from owlsam_ray.config.run import RunConfig
from owlsam_ray.evaluate.run import evaluate_run
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.record import load_record
from owlsam_ray.run.status import watch_run
from owlsam_ray.run.verify import verify_run
from tests.fixtures.make_earlier_runs import config_fields
from tests.runs import label_here

EARLIER = Path(__file__).parent / "fixtures" / "earlier"


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be written to; the working directory, since the runs have relative paths."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return tmp_path / "earlier"


def config_of(run: str) -> RunConfig:
    return RunConfig.model_validate(config_fields(run))


def rows(run: Path) -> list[list[dict[str, object]]]:
    return [pq.read_table(file).to_pylist() for file in sorted((run / "predictions").glob("*.parquet"))]


def test_the_fixture_is_small_and_names_no_machine() -> None:
    files = [file for file in EARLIER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 300_000
    for file in files:
        content = file.read_bytes()
        assert not any(word in content for word in (b"/tmp", b"/work", b"/home", b"/root")), file


def test_a_finished_run_is_reduced_and_evaluated_as_it_was(earlier: Path) -> None:
    labels = (earlier / "finished" / "coco" / "annotations.json").read_bytes()
    scores = (earlier / "finished" / "evaluation.json").read_bytes()
    counts = reduce_run(config_of("finished"))
    assert (counts["images"], counts["failed"], counts["num_annotations"]) == (12, 1, 30)
    now, then = json.loads((earlier / "finished/coco/annotations.json").read_bytes()), json.loads(labels)
    assert {**now, "info": None} == {**then, "info": None}
    for key in ("fingerprint", "image_list", "weights_sha256", "queries", "ids_per_image", "proof"):
        assert now["info"]["owlsam_ray"][key] == then["info"]["owlsam_ray"][key]
    evaluation, before = evaluate_run(config_of("finished")), json.loads(scores)
    for key in ("box", "mask"):
        assert evaluation[key] == pytest.approx(before[key])


@pytest.mark.parametrize(("run", "left"), [("finished", 0), ("half_done", 2)])
def test_status_and_verify_read_them(earlier: Path, run: str, left: int) -> None:
    found = verify_run(str(earlier / run))
    assert (found["bad"], found["left"], found["good"]) == (0, left, 4 - left)
    state = watch_run(str(earlier / run), lambda _: None, every_s=None, wait_s=0.0)
    assert (state["shards_done"], state["shards"]) == (4 - left, 4)


@pytest.mark.slow
def test_the_command_finishes_a_half_done_run(earlier: Path) -> None:
    """With Ray, and with the images at another place."""
    (earlier / "images").rename(earlier / "moved")
    fields = config_fields("half_done")
    fields["data"]["images"] = "moved"
    (earlier / "run.yaml").write_text(json.dumps(fields))
    command = [sys.executable, "-m", "owlsam_ray", "annotate", "run.yaml", "--allow-numerics-change"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["new"] == 6
    assert rows(earlier / "half_done") == rows(earlier / "finished")


def test_a_half_done_run_is_finished_with_the_same_bytes(earlier: Path) -> None:
    whole = rows(earlier / "finished")
    assert len(rows(earlier / "half_done")) == 2
    fingerprints = {record.fingerprint for run in ("finished", "half_done") if (record := load_record(run))}
    assert len(fingerprints) == 1
    labels = label_here(config_of("half_done"), allow_numerics_change=True)
    assert rows(earlier / "half_done") == whole
    reduce_run(config_of("finished"))
    assert labels == (earlier / "finished" / "coco" / "annotations.json").read_bytes()
    record = load_record("half_done")
    assert record is not None
    assert {record.fingerprint} == fingerprints
