"""Images and run directory on an object store: plan, annotate, resume, reduce."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from owlsam_ray import storage
from tests.runs import TinyRun, make_tiny_run


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """An empty bucket `labels` on a server of this process, which other processes reach as well."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("labels")
    yield filesystem
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_a_run_on_s3(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    tiny: TinyRun = make_tiny_run(tmp_path, num_images=16)
    bucket.put(f"{tmp_path}/data/", "labels/data/", recursive=True)
    on_disk = tmp_path / "run"
    for command in ("annotate", "reduce"):
        tiny.call(command, on_disk)

    settings: dict[str, Any] = {
        "data.images": "s3://labels/data/images",
        "data.annotations": "s3://labels/data/instances.json",
    }
    run = "s3://labels/runs/1"
    assert tiny.call("annotate", run, **settings)["new"] == 16
    names = storage.list_names(f"{run}/predictions")
    assert names == ["shard-00000000.parquet", "shard-00000001.parquet"]
    bucket.rm_file(f"labels/runs/1/predictions/{names[1]}")
    assert tiny.call("annotate", run, **settings)["new"] == 8
    counts = tiny.call("reduce", run, **settings)
    assert counts["ok"] + counts["empty"] == 16
    # The fingerprints differ with the place of the images; everything after the head is the same.
    remote = bucket.cat("labels/runs/1/coco/annotations.json")
    local = (on_disk / "coco" / "annotations.json").read_bytes()
    body = b'"images": [\n'
    assert remote[remote.index(body) :] == local[local.index(body) :]
