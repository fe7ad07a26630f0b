"""Decide what a run gets of the machine, and whether it can start at all (law 10). Plain arithmetic, no Ray."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.errors import PreflightError
from owlsam_ray.parallel.node_memory import memory_limit

MEBIBYTE = 2**20
_MOST_OF_A_NODE = 0.8


@dataclass(frozen=True, slots=True)
class Allocation:
    """`resources` with every `auto` resolved."""

    device: str
    """`cpu` or `cuda`."""
    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    detector_batch: int
    segmenter_batch: int
    decoder_batch: int
    """A multiple of 8: otherwise a CPU's result depends on a box's position in the batch."""
    threads: int
    """Decoding and encoding threads per actor."""
    torch_threads: int
    """Threads of one model call on a CPU. The same for any number of actors: other values change the last bits."""


def allocate(
    resources: ResourcesConfig, *, num_cpus: float, num_gpus: float, segmenter: str = "mobile_sam"
) -> Allocation:
    """Resolve every `auto` for a cluster, and check that the result fits it.

    Args:
        resources: the section `resources`.
        num_cpus: CPUs that Ray sees.
        num_gpus: GPUs that Ray sees.
        segmenter: `segment.model`.

    Raises:
        PreflightError: actors, fetch and write do not fit together: Ray would wait forever, silently.
    """
    device = _device(resources, num_gpus)
    gpus = resources.gpus_per_actor if resources.gpus_per_actor != "auto" else (1.0 if device == "cuda" else 0.0)
    on_gpu = device == "cuda"
    actors = _or(resources.actors, max(1, math.floor(num_gpus / gpus) if on_gpu else math.floor(num_cpus / 8)))
    cpus = resources.cpus_per_actor
    if cpus == "auto":
        cpus = _share_of_cpus(resources, num_cpus=num_cpus, actors=actors, most=8.0 if on_gpu else num_cpus)
    allocation = Allocation(
        device=device,
        actors=actors,
        cpus_per_actor=cpus,
        gpus_per_actor=gpus,
        detector_batch=_or(resources.detector_batch, 32 if on_gpu else 4),
        # SAM's global attention holds gigabytes of position bias per image.
        segmenter_batch=_or(resources.segmenter_batch, (4 if segmenter == "sam" else 16) if on_gpu else 2),
        decoder_batch=math.ceil(_or(resources.decoder_batch, 128 if on_gpu else 16) / 8) * 8,
        threads=_or(resources.decode_threads, max(2, math.floor(cpus))),
        torch_threads=_or(resources.torch_threads, _power_of_two(min(8, num_cpus))),
    )
    _check_fits(allocation, resources, num_cpus=num_cpus, num_gpus=num_gpus)
    return allocation


def check_object_store(
    allocation: Allocation, resources: ResourcesConfig, *, shard_bytes: int, store_bytes: float
) -> None:
    """Refuse a run whose shards in flight overflow the object store.

    Args:
        allocation: the result of `allocate`.
        resources: the section `resources`.
        shard_bytes: encoded bytes of the largest shard.
        store_bytes: Ray's object store memory, summed over the cluster.

    Raises:
        PreflightError: states the sizes and the settings that change them.
    """
    blocks = allocation.actors * resources.shards_in_flight + 2  # plus what fetch has ready
    needed = blocks * shard_bytes
    if needed > store_bytes:
        raise PreflightError(
            f"{blocks} shards in flight of up to {shard_bytes / MEBIBYTE:.0f} MiB need {needed / MEBIBYTE:.0f} MiB, "
            f"but Ray's object store has {store_bytes / MEBIBYTE:.0f} MiB. Raise resources.object_store_mb, lower "
            "resources.shards_in_flight or resources.actors, or plan again with a smaller resources.shard_size."
        )


def check_nodes(allocation: Allocation, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse actors that do not fit on single nodes, however large the cluster is.

    Args:
        allocation: the result of `allocate`.
        nodes: resources of each live node, named as in Ray (`CPU`, `GPU`).

    Raises:
        PreflightError: states what an actor needs and what the nodes have.
    """
    cpus, gpus = allocation.cpus_per_actor, allocation.gpus_per_actor
    fitting = sum(_times(node.get("CPU", 0.0), cpus, node.get("GPU", 0.0), gpus) for node in nodes)
    if fitting < allocation.actors:
        largest = ", ".join(f"{node.get('CPU', 0.0):g} CPU + {node.get('GPU', 0.0):g} GPU" for node in nodes[:5])
        raise PreflightError(
            f"{allocation.actors} actor(s) of {cpus:g} CPU + {gpus:g} GPU each do not fit the nodes ({largest}): there "
            f"is room for {fitting}. Lower resources.actors, resources.cpus_per_actor or resources.gpus_per_actor."
        )


def _times(cpus: float, cpus_each: float, gpus: float, gpus_each: float) -> int:
    """Number of actors that one node can hold."""
    by_cpu = math.floor(cpus / cpus_each + 1e-6)
    return by_cpu if gpus_each == 0 else min(by_cpu, math.floor(gpus / gpus_each + 1e-6))


def actor_memory_bytes(resources: ResourcesConfig) -> int | None:
    """Bytes of memory that an actor on this node may use before it is ended; None if the node's memory is unknown.

    A process that uses most of a node's memory is out of control: a single image can cause that. Below this limit, Ray
    and the kernel choose which process to end, and may choose the wrong one.
    """
    if resources.actor_memory_gb != "auto":
        return round(resources.actor_memory_gb * 10**9)
    total = memory_limit()
    return None if total is None else round(_MOST_OF_A_NODE * total)


def export_ray_environment(auth_mode: str) -> None:
    """Set the environment variables that Ray reads, some of them as early as its import."""
    # If it were left to the environment, or to an earlier run's token file, actors would die at once without a reason.
    os.environ["RAY_AUTH_MODE"] = auth_mode
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _device(resources: ResourcesConfig, num_gpus: float) -> str:
    wants_gpu = resources.gpus_per_actor != 0
    if resources.device == "cuda":
        if not wants_gpu:
            raise PreflightError(
                "resources.device is cuda, but resources.gpus_per_actor is 0: Ray hides the GPUs from such an actor. "
                "Set gpus_per_actor to 1 (or a fraction), or device to cpu."
            )
        if num_gpus <= 0:
            raise PreflightError("resources.device is cuda, but Ray sees no GPU. Use device: cpu, or another cluster.")
        return "cuda"
    if resources.device == "cpu":
        return "cpu"
    return "cuda" if num_gpus > 0 and wants_gpu else "cpu"


def _share_of_cpus(resources: ResourcesConfig, *, num_cpus: float, actors: int, most: float) -> float:
    """CPUs of one actor for `auto`: what fetch and write leave, in whole CPUs or quarters."""
    left = min(most, (num_cpus - resources.fetch_cpus - resources.write_cpus) / actors)
    # Ray accepts fractions only below one CPU.
    share = float(math.floor(left)) if left >= 1 else max(0.05, math.floor(left * 4) / 4)
    # Ray would fuse equal requests into one process.
    return share - 0.1 if share == resources.fetch_cpus and share > 0.15 else share


def _check_fits(allocation: Allocation, resources: ResourcesConfig, *, num_cpus: float, num_gpus: float) -> None:
    cpus = allocation.cpus_per_actor
    for name, value in (
        ("cpus_per_actor", cpus),
        ("gpus_per_actor", allocation.gpus_per_actor),
        ("fetch_cpus", resources.fetch_cpus),
        ("write_cpus", resources.write_cpus),
    ):
        if value > 1 and value != int(value):
            raise PreflightError(f"resources.{name} is {value:g}: above 1, Ray takes whole numbers only.")
    if cpus == resources.fetch_cpus:
        raise PreflightError(
            f"resources.cpus_per_actor and resources.fetch_cpus are both {cpus:g}: Ray would fuse fetching into the "
            "actor, one after the other. Make them differ (0.5 and 0.45 will do)."
        )
    needed = allocation.actors * cpus + resources.fetch_cpus + resources.write_cpus
    if needed > num_cpus + 1e-6:
        raise PreflightError(
            f"{allocation.actors} actor(s) × {cpus:g} CPU + fetch {resources.fetch_cpus:g} + write "
            f"{resources.write_cpus:g} = {needed:g} CPUs, but Ray has {num_cpus:g}: the run would make no progress. "
            "Lower resources.actors or resources.cpus_per_actor, or give Ray more CPUs."
        )
    wanted_gpus = allocation.actors * allocation.gpus_per_actor
    if wanted_gpus > num_gpus + 1e-6:
        raise PreflightError(
            f"{allocation.actors} actor(s) × {allocation.gpus_per_actor:g} GPU = {wanted_gpus:g} GPUs, but Ray has "
            f"{num_gpus:g}. Lower resources.actors or resources.gpus_per_actor."
        )


def _power_of_two(most: float) -> int:
    """The largest power of two that is not greater, at least 1."""
    return 1 << max(0, math.floor(math.log2(most)))


def _or(value: int | str, default: int) -> int:
    return default if isinstance(value, str) else value
