"""Images that kill processes, in a whole run: exactly these are quarantined, and every other image is labelled."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from owlsam_ray.config.load import load_config
from owlsam_ray.models.fakes import ALLOCATE, HANG, SEGFAULT
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.paths import PREDICTIONS
from tests.annotate.test_kill import alive, workers
from tests.runs import TinyRun, label_here

NUM_IMAGES, SHARD_SIZE = 60, 10
FEW = {7: SEGFAULT, 12: HANG}
MANY = {7: SEGFAULT, 28: ALLOCATE, 29: HANG, 45: SEGFAULT}
REASONS = {
    SEGFAULT: "killed_process: SIGSEGV",
    ALLOCATE: "out_of_memory: above 1.5 GB",
    HANG: "hang: no end within 3 s",
}


def draw(root: Path, poisoned: dict[int, int]) -> TinyRun:
    """A run of which some pictures kill a process that lets them."""
    (root / "images").mkdir()
    chance = np.random.default_rng(9)
    for number in range(NUM_IMAGES):
        pixels = chance.integers(0, 250, (12, 16, 3), np.uint8)
        if number in poisoned:
            pixels[0, 0] = 255, 0, poisoned[number]
        Image.fromarray(pixels).save(root / "images" / f"{number:03d}.png")
    config: dict[str, Any] = {
        "data": {"source": "folder", "images": str(root / "images")},
        "vocabulary": {"categories": ["cat", "dog"], "templates": "a {}"},
        "detector": {"model": "fake"},
        "segment": {"model": "fake"},
        "reduce": {"min_mask_area": 0, "max_failed": len(poisoned)},
        "resources": {
            "actors": 1,
            "num_cpus": 2,
            "object_store_mb": 100,
            "torch_threads": 1,
            "shard_size": SHARD_SIZE,
            "image_deadline_s": 3,
            "actor_memory_gb": 1.5,
            "heartbeat_s": 1,
            "takeover_s": 10,
        },
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return TinyRun(root, NUM_IMAGES)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((run / PREDICTIONS).glob("shard-*")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [FEW, MANY], ids=["few", "many"])
def test_exactly_the_culprits_are_quarantined(tmp_path: Path, kinds: dict[int, int]) -> None:
    tiny = draw(tmp_path, kinds)
    peaceful, run = tmp_path / "peaceful", tmp_path / "run"
    label_here(load_config([tiny.run_file], run=str(peaceful)))
    counts = tiny.call("annotate", run, **{"fakes.poison": True})
    assert (counts["done"], counts["failed"]) == (NUM_IMAGES, len(kinds))
    for number, (row, before) in enumerate(zip(rows_of(run), rows_of(peaceful), strict=True)):
        if number in kinds:
            assert (row["status_class"], row["reason"]) == ("quarantined", REASONS[kinds[number]]), number
        else:
            assert row == before, number
    assert not os.listdir(run / "attempts" / "in-hand")
    assert reduce_run(load_config([tiny.run_file], run=str(run)))["failed"] == len(kinds)
    failures = [json.loads(line) for line in (run / "coco" / "failures.jsonl").read_text().splitlines()]
    assert {failure["file_name"] for failure in failures} == {f"{number:03d}.png" for number in kinds}

    # The files were fixed: only by name are quarantined images tried again, and then all is as in peace.
    assert tiny.call_command([*tiny.command("annotate", run), "--retry-failed"])["failed"] == len(kinds)
    assert tiny.call_command([*tiny.command("annotate", run), "--retry-failed", "quarantined"])["failed"] == 0
    assert rows_of(run) == rows_of(peaceful)


@pytest.mark.slow
def test_a_driver_that_is_killed_meanwhile_changes_nothing(tmp_path: Path) -> None:
    poisoned, run = draw(tmp_path, MANY), tmp_path / "killed"
    for moment in (12, 20):
        driver = poisoned.start("annotate", run, **{"fakes.poison": True})
        time.sleep(moment)
        orphans = workers(driver.pid)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in orphans) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert poisoned.call("annotate", run, **{"fakes.poison": True})["failed"] == len(MANY)
    found = {number: row["reason"] for number, row in enumerate(rows_of(run)) if row["status"] == "failed"}
    assert found == {number: REASONS[what] for number, what in MANY.items()}
