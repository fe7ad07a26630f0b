"""Ray Data graph: shard number → encoded bytes → actor → one Parquet file per shard.

From fetch to sink, one block is one shard, which becomes one file: a block first holds the shard's number, then its
encoded bytes, then its rows. Ray may neither split nor merge blocks, and the sink refuses a partial shard. Shards are
passed to Ray in waves, so that the startup time does not grow with their number. With `AttemptContext.retry`, a block
holds only the failed images of a finished shard, and the sink puts their rows into the shard's file.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink

from owlsam_ray import storage
from owlsam_ray.fetch.images import FETCHED_SCHEMA, fetch_shard, to_images
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import Allocation
from owlsam_ray.parallel.logs import log_safely_by_default
from owlsam_ray.run import in_hand
from owlsam_ray.run.in_hand import MAX_DEATHS
from owlsam_ray.run.paths import QUERY_FILE
from owlsam_ray.run.retry import Retry, find_failed, replace_rows
from owlsam_ray.run.run import Run
from owlsam_ray.run.shards import write_shard
from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table
from owlsam_ray.storage.arrow_types import forget_ray_types

forget_ray_types()  # this module is imported by the driver, and by every task and actor of the graph
# The release that issues this warning does not have the named parameters that it asks for.
warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")

_MOST_RETRIES = 3
"""Maximum retries of a fetch or write task whose process dies; Ray's default is unlimited."""
_MOST_RESTARTS = 8
"""Maximum restarts of an actor in a wave; then the wave breaks, and is rebuilt as long as there is progress."""

ROWS_SCHEMA = pa.schema(
    [
        *PREDICTION_SCHEMA,
        pa.field("shard", pa.int64()),
        pa.field("shard_rows", pa.int64()),
        pa.field("stage_s", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What every process of an attempt has."""

    run: Run
    allocation: Allocation
    models: ModelPaths
    """Local paths of the resolved weights; the same on every node."""
    attempt: str
    """Name of the attempt."""
    stop_url: str
    """If this file exists, no further shard is started."""
    fence_url: str
    """If this file exists, nothing more is written: another attempt has taken over."""
    retry: Retry | None = None
    """Failed rows of finished shards to label again; None labels unfinished shards."""

    def enter(self) -> None:
        """Set up storage and logging as the run file says; every process calls this first."""
        storage.configure(self.run.config.storage.policy())
        log_safely_by_default()

    def stopping(self) -> bool:
        """Whether the attempt was asked to stop or was taken over."""
        return storage.exists(self.stop_url) or self.fenced()

    def fenced(self) -> bool:
        """Whether another attempt has taken over."""
        return storage.exists(self.fence_url)

    def write(self, shard: int, rows: pa.Table, stage_s: dict[str, float]) -> None:
        """Write a shard, or with `retry` replace the rows that were labelled again.

        Raises:
            OSError: storage failed.
        """
        if self.retry is not None:
            replace_rows(self.run.url, shard, rows, stage_s=stage_s)
            return
        write_shard(
            self.run.url,
            shard,
            rows,
            fingerprint=self.run.record.fingerprint or "",
            numerics=self.run.record.numerics_id,
            stage_s=stage_s,
        )


class FetchShard:
    """Ray task: maps a block with a shard's number to a block with its encoded images."""

    def __init__(self, context: AttemptContext) -> None:
        self._context = context

    def __call__(self, block: pa.Table) -> pa.Table:
        """Map one row with `shard` to rows of `FETCHED_SCHEMA`; no rows once the attempt was asked to stop."""
        self._context.enter()
        if self._context.stopping():
            return FETCHED_SCHEMA.empty_table()
        run, shard = self._context.run, block["shard"][0].as_py()
        positions = None
        if self._context.retry is not None:
            positions = find_failed(run.url, shard, self._context.retry).plain
            if not positions:
                return FETCHED_SCHEMA.empty_table()
        return fetch_shard(
            run.manifest,
            shard,
            threads=run.config.resources.fetch_threads,
            max_file_mb=run.config.decode.max_file_mb,
            deadline_s=run.config.resources.fetch_deadline_s,
            positions=positions,
        )


class Annotator:
    """Ray actor: holds both models; called concurrently by one thread per shard in flight."""

    def __init__(self, context: AttemptContext) -> None:
        """Load the models, and the query embeddings from the run directory."""
        # Imported here: fetch and write tasks import this module too, and torch would cost each of their processes
        # eight seconds and half a gigabyte.
        from owlsam_ray.annotate.actor_watch import WatchedWork
        from owlsam_ray.inference.load import open_engine
        from owlsam_ray.inference.queries import load_embeddings

        self._context = context
        context.enter()
        run = context.run
        # Deaths of earlier processes: a process that Ray restarts finds the markers of the previous one.
        self._deaths = in_hand.deaths(in_hand.list_markers(run.url))
        self._watched = WatchedWork(run.url, context.attempt, run.config.resources)
        self._engine = open_engine(
            run.config,
            context.allocation,
            models=context.models,
            queries=load_embeddings(storage.join(run.url, QUERY_FILE), run.record.vocabulary),
            slots=self._watched.slots,
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """Map one shard's rows of `FETCHED_SCHEMA` to rows of `ROWS_SCHEMA`.

        No rows once the attempt was asked to stop, or if `MAX_DEATHS` processes died while working on the shard.
        """
        if block.num_rows == 0 or self._context.stopping():
            return ROWS_SCHEMA.empty_table()
        shard = block["shard"][0].as_py()
        if self._deaths.get(shard, 0) >= MAX_DEATHS:
            return ROWS_SCHEMA.empty_table()
        with self._watched.in_hand(shard):
            predictions, stage_s = self._engine.annotate(to_images(block))
        rows = predictions_to_table(predictions)
        for name in ("shard", "shard_rows"):
            rows = rows.append_column(name, block[name])
        seconds = pa.array([json.dumps(stage_s)] * rows.num_rows, pa.string())
        return rows.append_column("stage_s", seconds).cast(ROWS_SCHEMA)


class ShardSink(Datasink[list[int]]):
    """Writes every block as the file of its shard, and refuses a block that is not exactly one shard."""

    def __init__(self, context: AttemptContext) -> None:
        self._context = context

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[int]:
        """Write the shards of these blocks and return their numbers.

        Raises:
            ValueError: a block holds a part of a shard, or more than one shard.
            OSError: storage failed.
        """
        self._context.enter()
        written = []
        for block in blocks:
            rows = BlockAccessor.for_block(block).to_arrow()
            if rows.num_rows == 0:
                continue
            shards, sizes = rows["shard"].unique().to_pylist(), rows["shard_rows"].unique().to_pylist()
            if len(shards) != 1 or sizes != [rows.num_rows]:
                raise ValueError(f"a block of {rows.num_rows} rows is not one whole shard: shards {shards} of {sizes}")
            if self._context.fenced():
                break
            self._context.write(shards[0], rows.select(PREDICTION_SCHEMA.names), json.loads(rows["stage_s"][0].as_py()))
            written.append(shards[0])
        return written


def build_graph(context: AttemptContext, shards: Sequence[int]) -> "ray.data.Dataset":
    """Build the graph from shard numbers to rows, one block per shard; nothing runs yet."""
    settings = ray.data.DataContext.get_current()
    settings.target_max_block_size = None  # a block is a shard, whatever its size
    settings.enable_progress_bars = False
    settings.print_on_execution_start = False
    settings.enable_operator_progress_bars = False
    settings.raise_original_map_exception = True  # our errors must reach the driver with their own type
    allocation, resources = context.allocation, context.run.config.resources
    return (
        ray.data.from_arrow([pa.table({"shard": pa.array([shard], pa.int64())}) for shard in shards])
        # The CPU request must differ from the actor's, or Ray would fuse the two stages into one process.
        .map_batches(
            FetchShard(context).__call__,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=resources.fetch_cpus,
            max_retries=_MOST_RETRIES,
        )
        .map_batches(
            Annotator,
            fn_constructor_args=(context,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(allocation.actors, len(shards)),  # never load a model without work
                max_tasks_in_flight_per_actor=resources.shards_in_flight + 1,
                max_concurrent_calls_per_actor=resources.shards_in_flight,
                enable_true_multi_threading=True,
            ),
            num_cpus=allocation.cpus_per_actor,
            num_gpus=allocation.gpus_per_actor,
            # More than the number of times a shard is started at all: after MAX_DEATHS deaths the actor hands it back.
            # Unlimited retries, the default, would hide an actor that dies of something else.
            max_task_retries=MAX_DEATHS + 2,
            max_restarts=_MOST_RESTARTS,
        )
    )


def run_wave(context: AttemptContext, shards: Sequence[int]) -> None:
    """Label these shards and write their files.

    Raises:
        ray.exceptions.RayError: an actor could not start, a process died too often, or a file could not be written.
    """
    write_cpus = context.run.config.resources.write_cpus
    build_graph(context, shards).write_datasink(
        ShardSink(context), ray_remote_args={"num_cpus": write_cpus, "max_retries": _MOST_RETRIES}
    )


def run_isolated(context: AttemptContext, shards: Mapping[int, Sequence[str]]) -> None:
    """Label shards that processes died on, each in a separate process, and write their files.

    Args:
        context: what every process of the attempt has.
        shards: marker names by shard number.

    Raises:
        OwlsamError: the attempt cannot continue.
        ray.exceptions.RayError: a process died, but not because of an image.
    """
    allocation = context.allocation
    task = ray.remote(num_cpus=allocation.cpus_per_actor, num_gpus=allocation.gpus_per_actor, max_retries=0)(_isolate)
    waiting = list(shards.items())
    running: list[Any] = []
    while waiting or running:
        if context.stopping():
            for each in running:
                ray.cancel(each, force=True)
            return
        while waiting and len(running) < allocation.actors:
            shard, names = waiting.pop(0)
            running.append(task.remote(context, shard, tuple(names)))
        done, running = ray.wait(running, timeout=1.0)
        ray.get(done)


def _isolate(context: AttemptContext, shard: int, marker_names: Sequence[str]) -> None:
    """Label one shard in isolation, in a process on the node that Ray chooses."""
    from owlsam_ray.annotate.isolate import IsolationTask, isolate_shard

    context.enter()
    positions = None
    if context.retry is not None:
        failed = find_failed(context.run.url, shard, context.retry)
        positions = tuple(sorted(failed.plain + failed.quarantined))
    rows, stage_s = isolate_shard(
        IsolationTask(
            run=context.run,
            shard=shard,
            positions=positions,
            allocation=context.allocation,
            models=context.models,
            suspects=in_hand.suspects(context.run.url, marker_names),
        )
    )
    if not context.fenced():
        context.write(shard, rows, stage_s)
