"""The plan: shards, hashes, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from owlsam_ray.datasets import ImageRecord, Source
from owlsam_ray.errors import GuardError, InputError
from owlsam_ray.manifest import Manifest, load_manifest, shard_size, write_part
from owlsam_ray.schema import MANIFEST_SCHEMA
from owlsam_ray.settings import DataConfig

DATA = DataConfig(source="folder", images="/pictures")


def plan(run: str, count: int, size: int | str = "auto", **fields: int) -> Manifest:
    records = [ImageRecord(image_id=10 + n, file_name=f"a/{n}.jpg", extra={"n": n}, **fields) for n in range(count)]
    return write_part(run, Source(records, info={"x": 1}), DATA, shard_size_setting=size, shard_max_mb=256)


@pytest.mark.parametrize(
    ("images", "expected"),
    [(1, 8), (91, 8), (512, 8), (640, 10), (5000, 78), (118_287, 1024), (10**8, 1024)],
)
def test_auto_shard_size(images: int, expected: int) -> None:
    assert shard_size(images, "auto") == expected


def test_auto_shard_size_is_capped_by_bytes() -> None:
    assert shard_size(10**6, "auto", mean_bytes=10**6, shard_max_mb=256) == 256
    assert shard_size(10**6, "auto", mean_bytes=10**9, shard_max_mb=256) == 1
    assert shard_size(10**6, 17, mean_bytes=10**9) == 17


@pytest.mark.parametrize("scheme", ["disk", "memory"])
def test_every_image_stands_in_one_shard(tmp_path: Path, scheme: str) -> None:
    fsspec.filesystem("memory").store.clear()
    run = str(tmp_path) if scheme == "disk" else "memory://runs/one"
    written = plan(run, 91)
    manifest = load_manifest(run, verify=True)
    assert manifest == written
    assert (manifest.num_images, manifest.num_shards) == (91, 12)
    seen: list[dict[str, Any]] = []
    ordinals: list[int] = []
    for shard in manifest.iter_shards():
        rows = manifest.read_shard(shard)
        assert rows.schema.equals(MANIFEST_SCHEMA)
        assert set(rows["shard"].to_pylist()) == {shard}
        first, count = manifest.shard_span(shard)
        assert count == rows.num_rows
        ordinals += range(first, first + count)
        seen += rows.to_pylist()
    assert ordinals == list(range(1, 92))
    assert [row["image_id"] for row in seen] == list(range(10, 101))
    assert seen[90]["uri"] == "/pictures/a/90.jpg"
    assert json.loads(seen[90]["extra"]) == {"n": 90}
    with pytest.raises(IndexError):
        manifest.read_shard(12)


def test_the_hash_is_of_the_bytes_and_moves_with_the_layout(tmp_path: Path) -> None:
    manifests = [plan(str(tmp_path / str(size)), 20, size) for size in (8, 9)]
    for size, manifest in zip((8, 9), manifests, strict=True):
        data = (tmp_path / str(size) / "manifest" / "part-0000.parquet").read_bytes()
        assert manifest.parts[0].sha256 == hashlib.sha256(data).hexdigest()
    assert manifests[0].layout_hash != manifests[1].layout_hash
    assert plan(str(tmp_path / "again"), 20, 8).layout_hash == manifests[0].layout_hash


def test_bytes_of_the_largest_shard(tmp_path: Path) -> None:
    assert plan(str(tmp_path / "a"), 20, 8, num_bytes=1000).max_shard_bytes == 8000
    assert plan(str(tmp_path / "b"), 20, 8, height=100, width=200).max_shard_bytes == 80_000
    assert plan(str(tmp_path / "c"), 20, 8).max_shard_bytes == 1_600_000


def test_nothing_to_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image"):
        plan(str(tmp_path), 0)
    assert load_manifest(str(tmp_path), verify=True) is None


def test_a_plan_is_never_overwritten(tmp_path: Path) -> None:
    plan(str(tmp_path), 3)
    with pytest.raises(GuardError, match="has a manifest already"):
        plan(str(tmp_path), 4)


def test_a_part_without_its_mark_does_not_count(tmp_path: Path) -> None:
    plan(str(tmp_path), 3)
    (tmp_path / "manifest" / "part-0000.json").unlink()
    assert load_manifest(str(tmp_path), verify=True) is None
    assert plan(str(tmp_path), 3).num_images == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("changed", "is not the file that was planned"),
        ("removed", "part-0000.parquet is missing"),
        ("sidecar", "part-0000.json is damaged"),
        ("types", "part-0000.json is damaged"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path: Path, damage: str, words: str) -> None:
    plan(str(tmp_path), 3)
    file = tmp_path / "manifest" / "part-0000.parquet"
    if damage == "changed":
        pq.write_table(pq.read_table(file), file, compression="none")
    elif damage == "removed":
        file.unlink()
    elif damage == "types":
        sidecar = json.loads((tmp_path / "manifest" / "part-0000.json").read_text())
        (tmp_path / "manifest" / "part-0000.json").write_text(json.dumps(sidecar | {"num_rows": "many"}))
    else:
        (tmp_path / "manifest" / "part-0000.json").write_text('{"file": 1}')
    with pytest.raises(GuardError, match=words):
        load_manifest(str(tmp_path), verify=True)
