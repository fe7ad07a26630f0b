"""However a small run is cut, in whatever order its chunks end, on a disk or on S3: the bytes of the plain writer."""

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owlsam_ray import storage
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.reduce import run
from owlsam_ray.reduce.formats.json_rows import dump_json
from owlsam_ray.reduce.formats.protocol import FileSpan
from owlsam_ray.run.manifest import Manifest
from tests.faulty_s3 import FaultyS3, faulty_s3
from tests.reduce.made_runs import random_run, reduce_shards
from tests.reduce.plain import Plain, plain_reduce
from tests.reduce.test_fast_path import RULES, random_decisions


def in_any_order(choose: random.Random) -> Callable[..., Iterator[Any]]:
    """As `map_in_order`, but chunks begin and end by chance."""

    def mapped(function: Callable[[Any], Any], items: Sequence[Any], *_: object) -> Iterator[Any]:
        results = [function(item) for item in choose.sample(items, len(items))]
        yield from choose.sample(results, len(results))

    return mapped


def plain_document(plain: Plain, out: dict[str, Any]) -> str:
    """The whole file, written plainly."""
    lists = {key: "".join(f"{line}\n" for line in [plain.lines(key)] if line) for key in ("images", "annotations")}
    return (
        f'{{\n"info": {dump_json(out["info"])},\n"licenses": {dump_json(out["licenses"])},\n'
        f'"images": [\n{lists["images"]}],\n"categories": {dump_json(out["categories"])},\n'
        f'"annotations": [\n{lists["annotations"]}]\n}}\n'
    )


def check(root: Path, out_url: str, manifest: Manifest, seed: int, images_per_file: int | None) -> None:
    choose = random.Random(seed)
    decisions = random_decisions(choose)
    config = ReduceConfig(out=out_url, images_per_file=images_per_file)
    with mock.patch.object(run, "map_in_order", in_any_order(choose)), mock.patch.object(run, "_CHUNKS_PER_WORKER", 3):
        counts = reduce_shards(str(root), manifest, config, decisions=decisions)
    spans: tuple[FileSpan, ...] = run.spans_of(manifest, images_per_file)
    assert counts["files"] == ["failures.jsonl", *(span.name("annotations", ".json") for span in spans)]
    for span in spans:
        shards = range(span.first_shard, span.first_shard + span.num_shards)
        plain = plain_reduce(str(root), manifest, RULES, decisions, shards=shards)
        text = storage.read_bytes(storage.join(out_url, span.name("annotations", ".json"))).decode("ascii")
        assert text == plain_document(plain, json.loads(text))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_images=st.integers(1, 30),
    shard_size=st.integers(1, 9),
    per_file=st.none() | st.integers(9, 40),
)
def test_on_a_disk(seed: int, num_images: int, shard_size: int, per_file: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        manifest = random_run(root, seed, num_images=num_images, shard_size=shard_size, most=5)
        check(root, str(root / "out"), manifest, seed, per_file)


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), num_images=st.integers(1, 30), per_file=st.none() | st.integers(9, 40))
def test_on_s3(s3: FaultyS3, seed: int, num_images: int, per_file: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        manifest = random_run(root, seed, num_images=num_images, shard_size=4, most=5)
        check(root, f"s3://labels/{seed}-{num_images}-{per_file}", manifest, seed, per_file)
