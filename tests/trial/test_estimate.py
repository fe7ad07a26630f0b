"""What a run will take: the rate of a sample, and a whole estimate."""

import json
import subprocess
from pathlib import Path

import pytest

from owlsam_ray.trial.estimate import steady_rate
from tests.runs import ROOT, environment, make_tiny_run


@pytest.mark.parametrize(
    ("seen", "rate", "began"),
    [
        ([(10.0, 0), (20.0, 8), (21.0, 16), (24.0, 40), (26.0, 40)], 8.0, 19.0),  # writing at the end is no labelling
        ([(10.0, 0), (20.0, 40)], None, 20.0),
        ([(10.0, 0), (20.0, 0)], None, 20.0),
    ],
)
def test_steady_rate(seen: list[tuple[float, int]], rate: float | None, began: float) -> None:
    assert steady_rate(seen) == (rate, began)


@pytest.mark.slow
def test_selections_and_refusals(tmp_path: Path) -> None:
    tiny = make_tiny_run(tmp_path, num_images=120)
    run = tmp_path / "run"
    found = tiny.call("estimate", run, **{"plan.sample": 100})
    assert (found["images"], found["sample"], found["failed"]) == (100, 100, 0), (
        "no more images than the run would label"
    )
    assert found["gpu_hours"] in (0, None)
    small = tiny.call("estimate", run, **{"plan.splits": ["images"]}, check=2)
    assert "none of 120 images matches" in small["error"]
    assert not (run / "run.json").exists(), "the run itself is not planned"
    shards = list((run / "estimate" / "predictions").glob("*.parquet"))
    assert not shards, "an estimate that fails leaves no labels of an earlier one"


@pytest.mark.slow
def test_hours_follow_from_the_rate(tmp_path: Path) -> None:
    tiny = make_tiny_run(tmp_path, num_images=120)
    command = [*tiny.command("estimate", tmp_path / "run"), "--images", "96"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(), cwd=ROOT)
    found = json.loads(done.stdout)
    assert (found["images"], found["sample"], found["actors"]) == (120, 96, 1)
    assert found["images_per_s"] > 0
    assert found["hours"] == pytest.approx(120 / found["images_per_s"] / 3600, abs=1e-3)
    shards = sorted((tmp_path / "run" / "estimate" / "predictions").glob("*.parquet"))
    assert found["predictions_bytes"] == pytest.approx(sum(path.stat().st_size for path in shards) * 120 / 96, abs=1)
    assert found["start_s"] > 0
