"""The benchmark of planning measures plans of every source, and reads what it wrote."""

import json
from pathlib import Path

import pytest

from owlsam_ray.config.run import RunConfig
from owlsam_ray.plan.plan import plan_run
from tests.bench.planning import COUNTS, SOURCES, bench_reading, plan_once


@pytest.mark.parametrize("source", list(SOURCES))
def test_every_source_is_planned(source: str, tmp_path: Path) -> None:
    data = SOURCES[source](tmp_path, 100)
    tree = {
        "run": str(tmp_path / "run"),
        "data": data,
        "vocabulary": {"categories": ["cat"]},
        "detector": {"weights": "none"},
        "segment": {"weights": "none.pt"},
        "plan": {"workers": 1},
    }
    plan = plan_run(RunConfig.model_validate(json.loads(json.dumps(tree))))
    assert plan.new == 100
    names = [name for table in plan.run.manifest.iter_images() for name in table["file_name"].to_pylist()]
    assert len(set(names)) == 100


@pytest.mark.slow
def test_a_plan_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    seconds, mib = plan_once(SOURCES["table.parquet"](tmp_path, 100), 100)
    assert 0.01 < seconds < 60
    assert 50 < mib < 1024, "the whole of Python and Arrow, and less than is promised for a million images"
    assert max(COUNTS) == 1_000_000


def test_reading_is_compared_on_the_same_bytes(tmp_path: Path) -> None:
    rates = bench_reading(str(tmp_path), 20, 3000, repeats=1)
    assert set(rates) == {"plain", "tar"}
    assert min(rates.values()) > 0
