"""The Ray graph: one block, one shard, one file; nothing fused, nothing partial."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.exceptions import RayError

from owlsam_ray.annotate.attempt import annotate_run
from owlsam_ray.annotate.pipeline import ROWS_SCHEMA, AttemptContext, FetchShard, ShardSink, build_graph
from owlsam_ray.annotate.waves import root_cause
from owlsam_ray.config.load import load_config
from owlsam_ray.errors import IncompleteError, PreflightError, StorageSetupError
from owlsam_ray.fetch.images import FETCHED_SCHEMA
from owlsam_ray.models.load import find_models
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.paths import MANIFEST, RUN_FILE
from owlsam_ray.run.run import Run, open_run
from owlsam_ray.run.shards import done_shards, read_footer
from owlsam_ray.schema import predictions_to_table
from tests.run.test_shards import prediction
from tests.runs import TinyRun, coco_bytes


def opened(tiny: TinyRun, name: str) -> Run:
    run = open_run(load_config([tiny.run_file], run=str(tiny.root / name)))
    assert run is not None
    return run


@pytest.fixture(scope="module")
def context(tiny: TinyRun, uninterrupted: bytes) -> AttemptContext:
    """The context of an attempt on a run of its own, planned as the uninterrupted one."""
    (tiny.root / "pipeline").mkdir()
    shutil.copytree(tiny.root / "uninterrupted" / MANIFEST, tiny.root / "pipeline" / MANIFEST)
    shutil.copy(tiny.root / "uninterrupted" / RUN_FILE, tiny.root / "pipeline")
    run = opened(tiny, "pipeline")
    return AttemptContext(
        run=run,
        allocation=allocate(run.config.resources, num_cpus=2, num_gpus=0),
        models=find_models(run.config.detector, run.config.segment),
        attempt="pipeline",
        stop_url=str(tiny.root / "pipeline.stop"),
        fence_url=str(tiny.root / "pipeline.fenced"),
    )


def rows(shard: int, count: int, *, of: int) -> pa.Table:
    table = predictions_to_table([prediction(number, 1) for number in range(count)])
    table = table.append_column("shard", pa.array([shard] * count, pa.int64()))
    table = table.append_column("shard_rows", pa.array([of] * count, pa.int64()))
    return table.append_column("stage_s", pa.array(['{"decode": 1.5}'] * count)).cast(ROWS_SCHEMA)


def test_the_sink_writes_whole_shards(context: AttemptContext) -> None:
    sink = ShardSink(context)
    assert sink.write([rows(3, 8, of=8), ROWS_SCHEMA.empty_table(), rows(19, 5, of=5)], None) == [3, 19]
    footer = read_footer(context.run.url, 3)
    assert (footer.num_rows, footer.numerics, footer.stage_s) == (8, context.run.record.numerics_id, {"decode": 1.5})
    assert footer.fingerprint == context.run.record.fingerprint


@pytest.mark.parametrize(
    "block",
    [rows(5, 7, of=8), rows(5, 9, of=8), pa.concat_tables([rows(5, 4, of=8), rows(6, 4, of=8)])],
    ids=["partial", "too many", "two halves"],
)
def test_the_sink_refuses_what_is_not_one_whole_shard(context: AttemptContext, block: pa.Table) -> None:
    with pytest.raises(ValueError, match="is not one whole shard"):
        ShardSink(context).write([block], None)
    assert not {5, 6} & done_shards(context.run.url)


def test_nothing_is_begun_once_the_attempt_was_asked_to_stop(context: AttemptContext) -> None:
    Path(context.stop_url).touch()
    try:
        assert FetchShard(context)(pa.table({"shard": [0]})).num_rows == 0
    finally:
        Path(context.stop_url).unlink()
    assert FetchShard(context)(pa.table({"shard": [0]})).schema.equals(FETCHED_SCHEMA)


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def errors_of_ours_reach_the_driver_as_they_are(context: AttemptContext) -> None:
    build_graph(context, [0])  # sets Ray up
    for error in (PreflightError("no room"), StorageSetupError("no key"), OSError(28, "no space left")):

        def stumble(block: pa.Table, error: Exception = error) -> pa.Table:
            raise error

        blocks = ray.data.from_arrow([pa.table({"shard": [0]})])
        with pytest.raises(RayError) as raised:
            blocks.map_batches(stumble, batch_size=None, batch_format="pyarrow").materialize()
        found = root_cause(raised.value)
        assert (type(found), found.args) == (type(error), error.args)


@pytest.mark.slow
def test_the_graph_on_ray(context: AttemptContext, tiny: TinyRun, local_ray: None) -> None:
    """One start of Ray for errors and the shape of the graph."""
    errors_of_ours_reach_the_driver_as_they_are(context)
    dataset = build_graph(replace(context, run=opened(tiny, "uninterrupted")), range(5)).materialize()
    blocks = [ray.get(reference) for reference in dataset.get_internal_block_refs()]
    assert sorted((block["shard"][0].as_py(), block.num_rows) for block in blocks) == [(n, 8) for n in range(5)]
    assert "pixels" not in str(blocks[0].schema)
    operators = [line for line in dataset.stats().splitlines() if line.startswith("Operator")]
    fetch = [line for line in operators if "FetchShard" in line]
    annotator = [line for line in operators if "Annotator" in line]
    assert len(fetch) == len(annotator) == 1
    assert fetch != annotator, f"Ray fused the stages: {operators}"


@pytest.mark.slow
def test_waves_on_ray(tiny: TinyRun, uninterrupted: bytes, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waves smaller than the run, and then a resume that finds everything done without a model."""
    run = str(tiny.root / "waves")
    config = load_config([tiny.run_file], run=run, overrides=["resources.wave_shards=15"])
    counts = annotate_run(config)
    assert (counts["done"], counts["new"], counts["shards"]) == (320, 320, 40)

    def no_text_tower(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the text tower must not run on resume")

    monkeypatch.setattr("owlsam_ray.models.owl_text._forward", no_text_tower)
    assert annotate_run(config)["new"] == 0
    for shard in (2, 9):
        Path(run, "predictions", f"shard-{shard:08d}.parquet").unlink()
    assert annotate_run(config)["new"] == 16
    # One actor, with waves and a second attempt: the same bytes.
    assert coco_bytes(tiny, Path(run)) == uninterrupted


def test_the_text_tower_runs_once(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the prompts in the first attempt; actors hold no text tower (see `test_owl`)."""
    from owlsam_ray.annotate import attempt as annotate
    from owlsam_ray.models import owl_text

    calls: list[int] = []
    original = owl_text._forward

    def counted(model: Any, input_ids: Any, attention_mask: Any) -> Any:
        calls.append(len(input_ids))
        return original(model, input_ids, attention_mask)

    class EnoughError(Exception):
        pass

    def no_ray(*_: Any) -> Any:
        raise EnoughError

    monkeypatch.setattr(owl_text, "_forward", counted)
    monkeypatch.setattr(annotate, "_ray", no_ray)
    config = load_config([tiny.run_file], run=str(tmp_path / "run"))
    for _ in range(3):
        with pytest.raises(EnoughError):
            annotate_run(config)
    assert calls == [4]


def test_memory_urls_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    for settings in ({"run": "memory://run"}, {"data.images": "memory://images"}):
        overrides = [f"{name}={value}" for name, value in ({"run": str(tmp_path)} | settings).items()]
        with pytest.raises(PreflightError, match="exists only in this process"):
            annotate_run(load_config([tiny.run_file], overrides=overrides))


@pytest.mark.slow
def test_a_damaged_shard_stops_a_resume(tiny: TinyRun, tmp_path: Path) -> None:
    from owlsam_ray.plan.plan import plan_run

    config = load_config([tiny.run_file], run=str(tmp_path))
    manifest: Manifest = plan_run(config).run.manifest
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "shard-00000004.parquet").write_bytes(b"PAR1")
    assert manifest.num_shards == 40
    with pytest.raises(IncompleteError, match=r"shard-00000004\.parquet is not a whole shard"):
        annotate_run(config)
