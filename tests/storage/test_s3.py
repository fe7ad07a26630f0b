"""Images and run directory on object stores and in memory: plan, annotate, resume, reduce."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from owlsam_ray import storage
from owlsam_ray.config.load import load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.run.paths import PREDICTIONS
from owlsam_ray.run.record import load_record
from owlsam_ray.run.shards import done_shards
from owlsam_ray.storage import StoragePolicy
from tests.faulty_s3 import Faults, FaultyS3, faulty_s3, gcs_emulator
from tests.runs import TinyRun, label_here, make_tiny_run

NUM_IMAGES = 16


@pytest.fixture(autouse=True)
def default_policy() -> Iterator[None]:
    yield
    storage.configure(StoragePolicy())


@pytest.fixture
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


@pytest.fixture(scope="module")
def tiny16(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("tiny16"), num_images=NUM_IMAGES)


@pytest.fixture(scope="module")
def on_disk(tiny16: TinyRun) -> bytes:
    """The COCO file of a run on this machine's disk."""
    run = tiny16.root / "on-disk"
    for command in ("annotate", "reduce"):
        tiny16.call(command, run)
    return (run / "coco" / "annotations.json").read_bytes()


def upload(tiny: TinyRun, root: str) -> dict[str, Any]:
    """Copy the images; returns the settings that name them."""
    data = tiny.root / "data"
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        storage.write_atomic(storage.join(root, "data", path.relative_to(data).as_posix()), path.read_bytes())
    return {"data.images": f"{root}/data/images", "data.annotations": f"{root}/data/instances.json"}


def body(coco: bytes) -> bytes:
    """What does not differ with the place of the images."""
    return coco[coco.index(b'"images": [\n') :]


@pytest.mark.slow
def test_a_run_on_s3(s3: FaultyS3, tiny16: TinyRun, on_disk: bytes) -> None:
    settings, run = upload(tiny16, "s3://labels"), "s3://labels/runs/1"
    assert tiny16.call("annotate", run, **settings)["new"] == NUM_IMAGES
    names = storage.list_names(f"{run}/predictions")
    assert names == ["shard-00000000.parquet", "shard-00000001.parquet"]
    storage.remove(f"{run}/predictions/{names[1]}")
    assert tiny16.call("annotate", run, **settings)["new"] == 8
    counts = tiny16.call("reduce", run, **settings)
    assert counts["ok"] + counts["empty"] == NUM_IMAGES
    assert body(storage.read_bytes(f"{run}/coco/annotations.json")) == body(on_disk)


@pytest.mark.slow
def test_a_run_on_a_faulty_s3_is_the_same_run(s3: FaultyS3, tiny16: TinyRun, on_disk: bytes) -> None:
    settings, run = upload(tiny16, "s3://labels"), "s3://labels/runs/faulty"
    settings |= {"storage.backoff_s": 0.05, "storage.timeout_s": 3, "storage.concurrency": 4}
    s3.faults = Faults(seed=4, rate=0.3, stall_s=4)
    summary = tiny16.call("annotate", run, **settings)
    assert (summary["done"], summary["failed"]) == (NUM_IMAGES, 0)
    tiny16.call("reduce", run, **settings)
    counts, kinds = s3.faults.counts, s3.faults.kinds
    s3.faults = Faults()
    assert body(storage.read_bytes(f"{run}/coco/annotations.json")) == body(on_disk)
    for kind in kinds:
        assert sum(count for name, count in counts.items() if name.endswith(f" {kind}")) > 0, counts


@pytest.mark.slow
def test_an_image_that_storage_never_gives_fails_alone(s3: FaultyS3, tiny16: TinyRun, on_disk: bytes) -> None:
    settings, run = upload(tiny16, "s3://labels"), "s3://labels/runs/bad"
    settings |= {"storage.backoff_s": 0.05, "storage.retries": 3, "reduce.max_failed": 1}
    bad = f"/labels/data/images/a/{storage.list_names('s3://labels/data/images/a')[0]}"
    s3.faults = Faults(seed=5, rate=0.2, kinds=("500", "503", "cut"), always={f"GET {bad}": "503"})
    summary = tiny16.call("annotate", run, **settings)
    assert (summary["done"], summary["failed"]) == (NUM_IMAGES, 1)
    rows = [
        row
        for name in storage.list_names(f"{run}/predictions")
        for row in pq.read_table(storage.open_input(f"{run}/predictions/{name}")).to_pylist()
    ]
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert failed["reason"].startswith("fetch_failed: 503 SlowDown")
    assert failed["status_class"] == "transient"
    counts = tiny16.call("reduce", run, **settings)
    assert counts["ok"] + counts["empty"] == NUM_IMAGES - 1
    assert counts["failed_by_reason"] == {"fetch_failed": 1}


def run_here(config: RunConfig, run: str) -> bytes:
    """Plan, label and reduce in this process; returns the COCO file."""
    config = config.model_copy(update={"run": run})
    coco = label_here(config)
    record = load_record(run)
    assert record is not None
    assert record.fingerprint is not None
    plan = plan_run(config)
    assert done_shards(run) == set(plan.run.manifest.iter_shards())
    assert len(storage.list_names(storage.join(run, PREDICTIONS))) == plan.run.manifest.num_shards
    proof = json.loads(coco)["info"]["owlsam_ray"]["proof"]
    assert proof["ok"] + proof["empty"] == NUM_IMAGES
    assert json.loads(coco)["info"]["owlsam_ray"]["fingerprint"] == record.fingerprint
    return coco


@pytest.mark.parametrize("kind", ["memory", pytest.param("gs", marks=pytest.mark.slow)])
def test_a_run_in_one_process(kind: str, tiny16: TinyRun, tmp_path: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    plain = run_here(load_config([tiny16.run_file]), str(tmp_path / "run"))
    with gcs_emulator() if kind == "gs" else contextlib.nullcontext():
        settings = upload(tiny16, f"{kind}://labels")
        config = load_config([tiny16.run_file], overrides=[f"{key}={value}" for key, value in settings.items()])
        assert body(run_here(config, f"{kind}://labels/runs/1")) == body(plain)


@pytest.mark.slow
def test_a_run_on_gcs(tiny16: TinyRun, on_disk: bytes) -> None:
    with gcs_emulator():
        settings, run = upload(tiny16, "gs://labels"), "gs://labels/runs/1"
        assert tiny16.call("annotate", run, **settings)["new"] == NUM_IMAGES
        tiny16.call("reduce", run, **settings)
        assert body(storage.read_bytes(f"{run}/coco/annotations.json")) == body(on_disk)
