"""The plan: shards, hashes, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from owlsam_ray import storage
from owlsam_ray.errors import GuardError, InputError
from owlsam_ray.run.manifest import Manifest, load_manifest, num_shards_behind
from owlsam_ray.run.manifest_writer import ShardLayout, shard_size, write_parts
from owlsam_ray.schema import MANIFEST_SCHEMA
from owlsam_ray.sources import ImageRecord
from owlsam_ray.sources.listing import tables_of


def plan(
    run: str,
    count: int,
    size: int = 8,
    *,
    first: int = 0,
    before: Manifest | None = None,
    part: int = 10**6,
    **fields: int,
) -> Manifest:
    numbers = range(first, first + count)
    records = [ImageRecord(image_id=10 + n, file_name=f"a/{n}.jpg", extra={"n": n}, **fields) for n in numbers]
    tables = tables_of(records, "/pictures", rows=7)
    return write_parts(run, tables, ShardLayout(size, part_images=part), source={"info": {"x": first}}, before=before)


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
    assert plan(str(tmp_path / "a"), 20, 8, num_bytes=1000).max_shard_bytes(max_file_mb=512) == 8000
    assert plan(str(tmp_path / "b"), 20, 8, height=100, width=200).max_shard_bytes(max_file_mb=512) == 80_000
    assert plan(str(tmp_path / "c"), 20, 8).max_shard_bytes(max_file_mb=512) == 1_600_000


@pytest.mark.parametrize(
    ("sizes", "limit_mb", "expected"),
    [
        ({3: 3 * 10**9}, 512, 8 * 10**6),  # one file of 3 GB among pictures of 1 MB
        ({3: 3 * 10**9, 11: 500 * 10**6}, 512, 507 * 10**6),
        (dict.fromkeys(range(20), 600 * 10**6), 512, 0),
        (dict.fromkeys(range(20), 600 * 10**6), 5000, 4800 * 10**6),
        (dict.fromkeys(range(20), 9 * 10**6), 10, 72 * 10**6),  # many that are fetched make more than one
    ],
)
def test_an_image_that_is_too_large_to_be_fetched_takes_no_memory(
    tmp_path: Path, sizes: dict[int, int], limit_mb: int, expected: int
) -> None:
    records = [ImageRecord(image_id=n, file_name=f"{n}.jpg", num_bytes=sizes.get(n, 10**6)) for n in range(20)]
    layout = ShardLayout(8, max_file_mb=limit_mb)
    planned = write_parts(str(tmp_path), tables_of(records, "/pictures", rows=7), layout, source={})
    assert planned.max_shard_bytes(max_file_mb=limit_mb) == expected
    assert planned.parts[0].max_shard_bytes == expected


@pytest.mark.parametrize(("stored", "expected"), [(3 * 10**9, 512 * 10**6), (512 * 10**6 + 1, 512 * 10**6), (7, 7)])
def test_a_plan_of_before_that_counts_such_an_image_works(tmp_path: Path, stored: int, expected: int) -> None:
    plan(str(tmp_path), 20)
    sidecar = tmp_path / "manifest" / "part-0000.json"
    told = json.loads(sidecar.read_text()) | {"max_shard_bytes": stored}
    del told["counts_fetched_only"]
    sidecar.write_text(json.dumps(told))
    manifest = load_manifest(str(tmp_path), verify=True)
    assert manifest is not None
    assert manifest.max_shard_bytes(max_file_mb=512) == expected


def test_nothing_to_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image"):
        plan(str(tmp_path), 0)
    assert load_manifest(str(tmp_path), verify=True) is None


def test_parts_are_appended(tmp_path: Path) -> None:
    run = str(tmp_path)
    first = plan(run, 50, part=20)
    assert [(part.num_rows, part.first_ordinal, part.first_shard, part.num_shards) for part in first.parts] == [
        (16, 1, 0, 2), (16, 17, 2, 2), (16, 33, 4, 2), (2, 49, 6, 1)
    ]  # fmt: skip
    before = {path.name: path.read_bytes() for path in (tmp_path / "manifest").iterdir()}
    both = plan(run, 10, size=4, first=50, before=first)
    assert both.parts[:4] == first.parts
    assert (both.num_images, both.num_shards) == (60, 10)
    assert both.layout_hash != first.layout_hash
    assert {name: (tmp_path / "manifest" / name).read_bytes() for name in before} == before
    spans = [both.shard_span(shard) for shard in both.iter_shards()]
    assert sum(count for _, count in spans) == 60
    assert [start for start, _ in spans] == [1 + sum(count for _, count in spans[:n]) for n in range(10)]
    rows = [row for shard in both.iter_shards() for row in both.read_shard(shard).to_pylist()]
    assert [row["image_id"] for row in rows] == list(range(10, 70))
    assert [name for table in both.iter_images() for name in table["file_name"].to_pylist()] == [
        f"a/{n}.jpg" for n in range(60)
    ]
    assert [part.source for part in both.parts] == [{"info": {"x": 0}}, {}, {}, {}, {"info": {"x": 50}}]
    assert load_manifest(run, verify=True) == both
    assert load_manifest(run, verify=True, num_parts=4) == first


def test_parts_of_a_try_that_did_not_end_are_replaced(tmp_path: Path) -> None:
    first = plan(str(tmp_path), 16)
    plan(str(tmp_path), 50, first=16, before=first, part=8)
    both = plan(str(tmp_path), 8, first=16, before=first)
    assert load_manifest(str(tmp_path), verify=True) == both
    assert both.num_images == 24


def test_images_without_ids_are_numbered(tmp_path: Path) -> None:
    records = [ImageRecord(None, f"{n}.jpg") for n in range(10)]
    first = write_parts(str(tmp_path), tables_of(records, "/i"), ShardLayout(4), source={})
    more = [ImageRecord(None, f"{n}.png") for n in range(3)]
    both = write_parts(str(tmp_path), tables_of(more, "/i"), ShardLayout(4), source={}, before=first, next_id=50)
    ids = [row for table in both.iter_images() for row in table["image_id"].to_pylist()]
    assert ids == [*range(1, 11), 50, 51, 52]


def test_a_manifest_without_containers_is_read(tmp_path: Path) -> None:
    manifest = plan(str(tmp_path), 3)
    file = tmp_path / "manifest" / "part-0000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["container"]), file)
    assert manifest.read_shard(0).schema.equals(MANIFEST_SCHEMA)
    assert manifest.read_shard(0)["container"].to_pylist() == [None] * 3


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


def test_a_stale_listing_hides_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts whose number is known are asked for by their names."""
    run = "memory://stale/run"
    manifest = plan(run, 20, part=16)
    assert [part.num_shards for part in manifest.parts] == [2, 1]
    monkeypatch.setattr(storage, "list_names", lambda url: ["part-0000.json", "part-0000.parquet"])
    assert load_manifest(run, verify=True, num_parts=2) == manifest
    assert load_manifest(run, verify=True, num_parts=1) == Manifest(run, manifest.parts[:1])
    assert [num_shards_behind(run, number) for number in range(4)] == [3, 1, 0, 0]
    storage.remove(f"{run}/manifest/part-0001.json")
    with pytest.raises(GuardError, match=r"part-0001\.json is missing"):
        load_manifest(run, verify=False, num_parts=2)
    assert load_manifest("memory://stale/nothing", verify=False, num_parts=1) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"file": "../../elsewhere/part-0000.parquet"}, "it names the file '../../elsewhere/part-0000.parquet'"),
        ({"file": "/etc/part-0000.parquet"}, "it names the file '/etc/part-0000.parquet'"),
        ({"file": "part-0001.parquet"}, "it names the file 'part-0001.parquet'"),
        ({"file": "part-0000.parquet\n" + "x" * 10**6}, r"it names the file 'part-0000.parquet\\nxxx"),
        ({"shard_size": 0}, "20 images are not 3 shards of 0"),
        ({"num_rows": 10**15}, "1000000000000000 images are not 3 shards of 8"),
        ({"num_shards": 10**15}, "20 images are not 1000000000000000 shards of 8"),
        ({"first_shard": -1}, "it begins at image 1, shard -1, not at 1, 0"),
        ({"first_ordinal": 7}, "it begins at image 7, shard 0, not at 1, 0"),
    ],
)
def test_a_part_names_its_own_file_and_goes_on_from_the_one_before(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    plan(str(tmp_path / "run"), 20)
    sidecar = tmp_path / "run" / "manifest" / "part-0000.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | change))
    for num_parts in (None, 1):
        with pytest.raises(GuardError, match=told) as caught:
            load_manifest(str(tmp_path / "run"), verify=False, num_parts=num_parts)
        assert str(sidecar) in str(caught.value)
        assert len(str(caught.value)) < 1000
    if "file" in change:
        with pytest.raises(GuardError, match=told):
            num_shards_behind(str(tmp_path / "run"), 0)


def test_a_sidecar_of_nothing_but_brackets_is_damaged(tmp_path: Path) -> None:
    plan(str(tmp_path), 20)
    (tmp_path / "manifest" / "part-0000.json").write_text("[" * 10**5)
    with pytest.raises(GuardError, match="is damaged"):
        load_manifest(str(tmp_path), verify=False)
