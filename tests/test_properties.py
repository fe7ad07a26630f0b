"""Properties: what a run gives depends neither on its shards' sizes and order, nor on its attempts and their ends."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from owlsam_ray import storage
from owlsam_ray.annotate.attempt import embed_run_queries
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import FailureClass
from owlsam_ray.fetch.images import fetch_shard, to_images
from owlsam_ray.inference.engine import Engine
from owlsam_ray.inference.load import open_engine
from owlsam_ray.inference.queries import load_embeddings
from owlsam_ray.models.arithmetic import restored_arithmetic
from owlsam_ray.models.load import find_models
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.attempts import Slice
from owlsam_ray.run.counts import RunCounts
from owlsam_ray.run.guard import fingerprint_parts, guard_labels, guard_numerics, numerics_of
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.paths import PREDICTIONS, QUERY_FILE
from owlsam_ray.run.record import RunRecord
from owlsam_ray.run.retry import Retry, find_failed, replace_rows
from owlsam_ray.run.shards import done_shards, load_shard, shard_url, write_shard
from owlsam_ray.schema import predictions_to_table
from tests.drawn_images import draw_image
from tests.image_files import save
from tests.shard_runs import ShardRun, make_shard_run

NUM_IMAGES = 30
TRANSIENT = Retry(str(FailureClass.TRANSIENT))
Rows = tuple[pa.Table, dict[str, float]]


class Runs:
    """Run directories of the same images, one for each shard size, and one engine for all."""

    def __init__(self) -> None:
        self.planned: dict[int, tuple[RunConfig, RunRecord, Manifest]] = {}
        for number in range(NUM_IMAGES):
            data = save(draw_image(number).resize((24, 20)))
            bad = {3: b"", 11: b"<html></html>", 12: data[: len(data) // 2], 29: b"\x89PNG"}
            storage.write_atomic(f"memory://properties/images/{number:02d}.png", bad.get(number, data))
        config, record, _ = self.plan(7)
        allocation = allocate(config.resources, num_cpus=2, num_gpus=0)
        models = find_models(config.detector, config.segment)
        queries = load_embeddings(storage.join(str(config.run), QUERY_FILE), record.vocabulary)
        self.engine: Engine = open_engine(config, allocation, models=models, queries=queries)

    def plan(self, shard_size: int) -> tuple[RunConfig, RunRecord, Manifest]:
        """A run directory without a shard."""
        if shard_size not in self.planned:
            config = RunConfig.model_validate(
                {
                    "run": f"memory://properties/runs/{shard_size}",
                    "data": {"source": "folder", "images": "memory://properties/images"},
                    "vocabulary": {"categories": ["cat", "dog", "red ball"], "templates": "a {}"},
                    "detector": {"model": "fake", "score_floor": 0.02},
                    "segment": {"model": "fake"},
                    "reduce": {"score_threshold": 0.05, "min_mask_area": 0},
                    "resources": {"shard_size": shard_size},
                }
            )
            run, models = plan_run(config).run, find_models(config.detector, config.segment)
            embed_run_queries(run, models.detector)
            parts = fingerprint_parts(run, weights={"detector": models.detector, "segmenter": models.segmenter})
            allocation = allocate(config.resources, num_cpus=2, num_gpus=0)
            numerics = numerics_of(allocation, config.resources.dtype)
            run = guard_numerics(guard_labels(run, parts), numerics, allow_change=False)
            self.planned[shard_size] = config, run.record, run.manifest
        config, record, manifest = self.planned[shard_size]
        for folder in (PREDICTIONS, "coco"):
            for name in storage.list_names(storage.join(str(config.run), folder)):
                storage.remove(storage.join(str(config.run), folder, name))
        return config, record, manifest

    def label(
        self, manifest: Manifest, shard: int, *, unread: Sequence[int] = (), positions: Sequence[int] | None = None
    ) -> Rows:
        """Rows of a shard, or of some of its images. `unread`: ids of images for which storage gives up."""
        images = to_images(fetch_shard(manifest, shard, threads=2, max_file_mb=1, positions=positions))
        gone = ("fetch_failed: injected", FailureClass.TRANSIENT)
        images = [dataclasses.replace(i, data=None, failure=gone) if i.image_id in unread else i for i in images]
        predictions, stage_s = self.engine.annotate(images)
        return predictions_to_table(predictions), stage_s


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with restored_arithmetic():
        made = Runs()
        yield made
        made.engine.close()
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(scope="module")
def reference(runs: Runs) -> bytes:
    """One attempt, shard by shard."""
    config, record, manifest = runs.plan(7)
    for shard in manifest.iter_shards():
        write(config, record, shard, runs.label(manifest, shard))
    return reduced(config)


def write(config: RunConfig, record: RunRecord, shard: int, rows: Rows) -> None:
    marks = {"fingerprint": record.fingerprint or "", "numerics": record.numerics_id}
    write_shard(str(config.run), shard, rows[0], **marks, stage_s=rows[1])


def reduced(config: RunConfig) -> bytes:
    reduce_run(config)
    return storage.read_bytes(storage.join(str(config.run), "coco", "annotations.json"))


def test_the_reference_holds_all_kinds_of_rows(runs: Runs, reference: bytes) -> None:
    assert reference.count(b'"file_name"') == NUM_IMAGES - 4
    assert reference.count(b'"segmentation"') > 20


@settings(max_examples=40, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_output_depends_on_images_and_settings_alone(data: st.DataObject, runs: Runs, reference: bytes) -> None:
    """Any shard size and slices; attempts that end early, overlap, write late, cannot read some images; any order."""
    config, record, manifest = runs.plan(data.draw(st.integers(1, NUM_IMAGES + 1), label="shard size"))
    run, slices = str(config.run), data.draw(st.integers(1, 4), label="slices")
    image_ids = st.lists(st.integers(1, NUM_IMAGES), max_size=3)
    late: list[tuple[int, Rows]] = []

    def label_one(shard: int, unread: Sequence[int] = ()) -> tuple[int, Rows]:
        return shard, runs.label(manifest, shard, unread=unread)

    # Attempts that end in the middle. What they have in hand is lost, or written when others have done it as well.
    for _ in range(data.draw(st.integers(0, 3), label="attempts that end")):
        part = Slice(data.draw(st.integers(1, slices), label="slice"), slices).shards(manifest.num_shards)
        order = data.draw(st.permutations(sorted(set(part) - done_shards(run))), label="order")
        finished = data.draw(st.integers(0, len(order)), label="finished")
        in_hand = data.draw(st.integers(0, 2), label="in hand")
        unread = data.draw(image_ids, label="images that cannot be read")
        for shard in order[:finished]:
            write(config, record, *label_one(shard, unread))
        if data.draw(st.booleans(), label="writes late"):
            late += [label_one(shard, unread) for shard in order[finished : finished + in_hand]]
    # Attempts that do what is left of their slices, with several shards at once in the engine's batches.
    for index in data.draw(st.permutations(range(1, slices + 1)), label="slices in order"):
        left = sorted(set(Slice(index, slices).shards(manifest.num_shards)) - done_shards(run))
        order = data.draw(st.permutations(left), label="order")
        with ThreadPoolExecutor(data.draw(st.integers(1, 3), label="at once")) as pool:
            for shard, rows in pool.map(label_one, order):
                write(config, record, shard, rows)
    for shard, rows in late:
        write(config, record, shard, rows)
    # The sweep over what could not be read.
    for shard in done_shards(run):
        positions = find_failed(run, shard, TRANSIENT).plain
        if positions:
            rows = runs.label(manifest, shard, positions=positions)
            replace_rows(run, shard, rows[0], stage_s=rows[1])
    assert done_shards(run) == set(manifest.iter_shards())
    assert reduced(config) == reference


# The ledger and its tally, against a dict


IMAGES, SHARD_SIZE = 46, 4
SHARDS = -(-IMAGES // SHARD_SIZE)
shards_drawn = st.integers(0, SHARDS - 1)


class LedgerMachine(RuleBasedStateMachine):
    """Files come, change and go; the tally knows what it was told to look at, and counts that."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[int, dict[str, int]] = {}
        self.listed: set[int] = set()
        self.first: set[int] | None = None
        self.read: dict[int, dict[str, int]] = {}

    @initialize(index=st.integers(1, 3), count=st.integers(1, 3))
    def plan(self, index: int, count: int) -> None:
        fsspec.filesystem("memory").store.clear()
        self.run: ShardRun = make_shard_run("memory://ledger/run", num_images=IMAGES, shard_size=SHARD_SIZE)
        self.part = Slice(min(index, count), count).shards(SHARDS)
        self.tally = RunCounts(self.run, shards=self.part)

    @rule(shard=shards_drawn, kept=st.integers(0, SHARD_SIZE))
    def write(self, shard: int, kept: int) -> None:
        """Of the rows of a shard the first `kept` are as they are, the others failed for a moment."""
        rows = self.run.rows(shard).to_pylist()
        failed = {"status": "failed", "reason": "fetch_failed: injected", "status_class": "transient"}
        for row in rows[kept:]:
            row.update({name: None for name in row if name != "image_id"} | failed)
        self.run.write(shard, pa.Table.from_pylist(rows, self.run.rows(shard).schema))
        self.files[shard] = {
            **{word: sum(row["status"] == word for row in rows) for word in ("ok", "empty", "failed")},
            "transient": sum(row["status_class"] == "transient" for row in rows),
            "detections": sum(len(row["label"] or ()) for row in rows),
            "masks": sum(area is not None for row in rows for area in row["mask_area"] or ()),
        }

    @rule(shard=shards_drawn)
    def remove(self, shard: int) -> None:
        if self.files.pop(shard, None) is not None:
            storage.remove(shard_url(self.run.url, shard))

    @rule(name=st.sampled_from(["shard-1.parquet", "shard-00000001.parquet.bad", ".tmp-shard-00000002.parquet"]))
    def clutter(self, name: str) -> None:
        storage.write_atomic(storage.join(self.run.url, PREDICTIONS, name), b"x")

    @rule()
    def list_files(self) -> None:
        assert self.tally.refresh_listing() == self.files.keys() & set(self.part)
        self.listed = self.files.keys() & set(self.part)
        self.first = self.listed if self.first is None else self.first
        self.read = {shard: counts for shard, counts in self.read.items() if shard in self.listed}

    @rule(limit=st.none() | st.integers(1, 5))
    def read_footers(self, limit: int | None) -> None:
        self.tally.read_footers(limit)
        for shard in sorted(self.listed - self.read.keys())[:limit]:
            if shard in self.files:
                self.read[shard] = self.files[shard]

    @rule()
    def refresh(self) -> None:
        self.list_files()
        self.tally.refresh()
        self.read |= {shard: self.files[shard] for shard in self.listed - self.read.keys()}

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        shards = data.draw(st.sets(st.sampled_from(sorted(self.listed))))
        self.tally.forget(shards)
        for shard in shards:
            self.read.pop(shard, None)

    @rule(shard=shards_drawn)
    def load(self, shard: int) -> None:
        """What a shard says about itself is what its rows tell."""
        if shard in self.files:
            footer, rows = load_shard(self.run.url, shard)
            assert {**footer.counts, "transient": footer.transient}.items() <= self.files[shard].items()
            assert rows["image_id"].to_pylist() == self.run.manifest.read_shard(shard)["image_id"].to_pylist()

    @invariant()
    def agree(self) -> None:
        assert done_shards(self.run.url) == self.files.keys()
        tally, sizes = self.tally, {shard: self.run.manifest.shard_span(shard)[1] for shard in self.part}
        counts = {word: sum(each[word] for each in self.read.values()) for word in tally.counts}
        assert tally.done == self.listed
        assert tally.pending() == sorted(set(self.part) - self.listed)
        assert tally.unread == len(self.listed - self.read.keys())
        assert tally.counts == counts
        assert tally.failed_shards == {shard for shard, each in self.read.items() if each["failed"]}
        assert tally.transient_shards == {shard for shard, each in self.read.items() if each["transient"]}
        assert (tally.num_shards, tally.num_images) == (len(self.part), sum(sizes.values()))
        done = sum(sizes[shard] for shard in self.listed)
        assert tally.images_done == done
        fresh = self.listed - self.first if self.first is not None else set()
        assert tally.images_fresh == sum(sizes[shard] for shard in fresh)
        assert sum(tally.stage_s.values()) == pytest.approx(0.5 * len(self.read))
        expected = counts | {"done": done, "left": sum(sizes.values()) - done, "shards_done": len(self.listed)}
        assert expected.items() <= (tally.summary() | {"transient": counts["transient"]}).items()

    def teardown(self) -> None:
        fsspec.filesystem("memory").store.clear()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, print_blob=True)
