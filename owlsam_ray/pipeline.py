"""The Ray Data graph: shard number → encoded bytes → actor → one Parquet file per shard.

One block is one shard is one file, from fetch to sink: a block carries the shard's number first, then its encoded
bytes, then its rows. Ray may neither split nor merge blocks, and the sink refuses a partial shard. Shards are handed to
Ray in waves, so that starting up stays flat however many there are.
"""

import json
import logging
import socket
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink

from owlsam_ray import storage
from owlsam_ray.config import RunConfig
from owlsam_ray.fetch import FETCHED_SCHEMA, fetch_shard, to_images
from owlsam_ray.guard import QUERY_FILE, RunRecord
from owlsam_ray.ledger import write_shard
from owlsam_ray.manifest import Manifest
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.resources import Allocation, export_ray_environment
from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table

_log = logging.getLogger(__name__)
# The named parameters that the warning asks for are not there yet in the release that gives it.
warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")

ROWS_SCHEMA = pa.schema(
    [
        *PREDICTION_SCHEMA,
        pa.field("shard", pa.int64()),
        pa.field("shard_rows", pa.int64()),
        pa.field("stage_s", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Job:
    """What every process of an attempt knows."""

    run_url: str
    config: RunConfig
    record: RunRecord
    manifest: Manifest
    allocation: Allocation
    models: ModelPaths
    """Local paths that the weights resolved to; the same on every node."""
    stop_url: str
    """Once this file exists no shard is begun any more."""

    def enter(self) -> None:
        """What a process does first: ask storage as the run file says."""
        storage.configure(self.config.storage.policy())

    def stopping(self) -> bool:
        """Whether the attempt was asked to stop."""
        return storage.exists(self.stop_url)


class FetchShard:
    """Ray task: a block with a shard's number to a block with its encoded images."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, block: pa.Table) -> pa.Table:
        """One row of `shard` to `FETCHED_SCHEMA`; no rows once the attempt was asked to stop."""
        self._job.enter()
        if self._job.stopping():
            return FETCHED_SCHEMA.empty_table()
        config = self._job.config
        return fetch_shard(
            self._job.manifest,
            block["shard"][0].as_py(),
            threads=config.resources.fetch_threads,
            max_file_mb=config.decode.max_file_mb,
        )


class Annotator:
    """Ray actor: holds both models; called by as many threads at once as there are shards in flight."""

    def __init__(self, job: Job) -> None:
        """Load the models; the prompts come embedded from the run directory."""
        # Imported here: fetch and write tasks import this module too, and torch would cost each of their processes
        # eight seconds and half a gigabyte.
        import torch
        from safetensors.torch import load as load_safetensors

        from owlsam_ray.engine import load_engine

        self._job = job
        job.enter()
        torch.set_num_threads(job.allocation.torch_threads)
        # fp32 means fp32 (TF32 keeps ten bits of it), and a convolution must not be another one from call to call.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        self._engine = load_engine(
            job.config,
            job.allocation,
            models=job.models,
            query_embeddings=load_safetensors(storage.read_bytes(storage.join(job.run_url, QUERY_FILE)))["queries"],
            query_labels=job.record.query_labels,
            category_names=job.record.category_names,
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """`FETCHED_SCHEMA` of one shard to its `ROWS_SCHEMA`; no rows once the attempt was asked to stop."""
        if block.num_rows == 0 or self._job.stopping():
            return ROWS_SCHEMA.empty_table()
        predictions, stage_s = self._engine.annotate(to_images(block))
        rows = predictions_to_table(predictions)
        for name in ("shard", "shard_rows"):
            rows = rows.append_column(name, block[name])
        seconds = pa.array([json.dumps(stage_s)] * rows.num_rows, pa.string())
        return rows.append_column("stage_s", seconds).cast(ROWS_SCHEMA)


class ShardSink(Datasink[list[int]]):
    """Writes every block as the file of its shard, and refuses a block that is not exactly one shard."""

    def __init__(self, job: Job) -> None:
        self._run_url = job.run_url
        self._enter = job.enter
        self._fingerprint = job.record.fingerprint or ""
        self._numerics = job.record.numerics_id

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[int]:
        """Write the shards of these blocks; returns their numbers.

        Raises:
            ValueError: a block holds a part of a shard, or more than one.
            OSError: storage refused.
        """
        self._enter()
        written = []
        for block in blocks:
            rows = BlockAccessor.for_block(block).to_arrow()
            if rows.num_rows == 0:
                continue
            shards, sizes = rows["shard"].unique().to_pylist(), rows["shard_rows"].unique().to_pylist()
            if len(shards) != 1 or sizes != [rows.num_rows]:
                raise ValueError(f"a block of {rows.num_rows} rows is not one whole shard: shards {shards} of {sizes}")
            write_shard(
                self._run_url,
                shards[0],
                rows.select(PREDICTION_SCHEMA.names),
                fingerprint=self._fingerprint,
                numerics=self._numerics,
                stage_s=json.loads(rows["stage_s"][0].as_py()),
            )
            written.append(shards[0])
        return written


def build_graph(job: Job, shards: Sequence[int]) -> "ray.data.Dataset":
    """The graph from shard numbers to rows, one block per shard; nothing runs yet."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a block is a shard, whatever its size
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_operator_progress_bars = False
    allocation, resources = job.allocation, job.config.resources
    return (
        ray.data.from_arrow([pa.table({"shard": pa.array([shard], pa.int64())}) for shard in shards])
        # Another CPU request than the actor's, or Ray would fuse the two stages into one process.
        .map_batches(FetchShard(job).__call__, batch_size=None, batch_format="pyarrow", num_cpus=resources.fetch_cpus)
        .map_batches(
            Annotator,
            fn_constructor_args=(job,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(allocation.actors, len(shards)),  # no model is loaded for nothing
                max_tasks_in_flight_per_actor=resources.shards_in_flight + 1,
                max_concurrent_calls_per_actor=resources.shards_in_flight,
                enable_true_multi_threading=True,
            ),
            num_cpus=allocation.cpus_per_actor,
            num_gpus=allocation.gpus_per_actor,
            max_task_retries=2,  # the default, for ever, would hang on an image that kills its process
        )
    )


def run_wave(job: Job, shards: Sequence[int]) -> None:
    """Label these shards and write their files.

    Raises:
        ray.exceptions.RayError: an actor could not start, a process died too often, storage refused a file.
    """
    build_graph(job, shards).write_datasink(
        ShardSink(job), ray_remote_args={"num_cpus": job.config.resources.write_cpus}
    )


class RaySettings(Protocol):
    """What `start_ray` reads of a section `resources`."""

    @property
    def ray_address(self) -> str | None:
        """An existing cluster; None: start one here."""

    @property
    def num_cpus(self) -> int | None:
        """CPUs of the one that is started."""

    @property
    def object_store_mb(self) -> int | None:
        """Object store of the one that is started."""

    @property
    def auth_mode(self) -> str:
        """Ray's RAY_AUTH_MODE."""


def start_ray(resources: RaySettings, *, level: str) -> bool:
    """Connect to a cluster, or start Ray on this machine; False when this process already had one.

    Raises:
        ConnectionError: no cluster answers at `ray_address`.
    """
    if ray.is_initialized():
        return False
    _check_answers(resources.ray_address)
    export_ray_environment(resources.auth_mode)
    quiet = logging.INFO if level == "debug" else logging.ERROR
    local: dict[str, Any] = {}
    if resources.ray_address is None:
        local = {"num_cpus": resources.num_cpus, "include_dashboard": False}
        if resources.object_store_mb is not None:
            local["object_store_memory"] = resources.object_store_mb * 2**20
    ray.init(
        # "local" never joins a cluster that happens to run on this machine.
        address=resources.ray_address or "local",
        logging_level=quiet,
        log_to_driver=level == "debug",
        **local,
    )
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(quiet)
    return True


def _check_answers(address: str | None) -> None:
    """Ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # none, or "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"no cluster answers at resources.ray_address {address}: {error}") from None


def cluster_totals() -> dict[str, float]:
    """CPUs, GPUs and object store bytes of the cluster."""
    totals = ray.cluster_resources()
    return {
        "num_cpus": totals.get("CPU", 0.0),
        "num_gpus": totals.get("GPU", 0.0),
        "store_bytes": totals.get("object_store_memory", 0.0),
    }
