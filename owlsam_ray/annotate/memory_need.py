"""Compute the minimum memory of a run, refuse runs with less, and detect repeated out-of-memory kills (law 10)."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from owlsam_ray.errors import PreflightError
from owlsam_ray.parallel.allocation import Allocation
from owlsam_ray.parallel.node_memory import memory_kills, memory_limit

_GB = 10**9
_DRIVER = 750_000_000
"""Bytes of the driver, raylet, GCS and the node's agent; measured without the blocks of the object store."""
_ACTOR = 700_000_000
"""Bytes of an actor without weights: Python, torch, transformers and Ray."""
_CUDA = 1_000_000_000
"""Bytes of host memory that the CUDA libraries use in a process."""
_FETCH = 150_000_000
"""Bytes of the fetch and write processes."""
_MOST_KILLS = 20
_LEAST_S = 60.0


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Minimum memory of a run in bytes, without the temporary memory of images and model calls."""

    driver: int
    """The driver, including the parts of Ray on its node."""
    actor: int
    """One actor."""
    fetch: int
    actors: int

    @property
    def total(self) -> int:
        """Total if everything runs on one node."""
        return self.driver + self.fetch + self.actors * self.actor

    def __str__(self) -> str:
        return (
            f"{self.total / _GB:.2f} GB (driver and Ray {self.driver / _GB:.2f}, {self.actors} actor(s) of "
            f"{self.actor / _GB:.2f} each, fetch {self.fetch / _GB:.2f})"
        )


def memory_need(allocation: Allocation, weights: Sequence[Path]) -> MemoryNeed:
    """Compute the minimum memory of a run.

    Args:
        allocation: what the actors get, from `allocate`.
        weights: files or directories of the models.
    """
    models = 0 if allocation.device == "cuda" else sum(_file_bytes(path) for path in weights)
    on_gpu = _CUDA if allocation.device == "cuda" else 0
    return MemoryNeed(driver=_DRIVER, actor=_ACTOR + on_gpu + models, fetch=_FETCH, actors=allocation.actors)


def _file_bytes(path: Path) -> int:
    """Bytes of the weights in a file or directory; of several formats in a directory, only the largest counts."""
    if path.is_file():
        return path.stat().st_size
    kinds: dict[str, int] = {}
    for entry in os.scandir(path) if path.is_dir() else ():
        suffix = os.path.splitext(entry.name)[1]
        if suffix in (".safetensors", ".bin", ".pt", ".pth") and entry.is_file():
            kinds[suffix] = kinds.get(suffix, 0) + entry.stat().st_size
    return max(kinds.values(), default=0)


def check_memory(need: MemoryNeed, here: int | None) -> None:
    """Refuse a run on this machine alone that the kernel would kill for lack of memory.

    Args:
        need: the run's minimum, from `memory_need`.
        here: bytes available to this machine, container or job; None if unknown.

    Raises:
        PreflightError: memory is too small; the message states the need and what is available.
    """
    if here is not None and need.total > here:
        raise PreflightError(
            f"too little memory: this run needs at least {need}, and this machine, container or job may use "
            f"{here / _GB:.2f} GB. Give it more, lower resources.actors, or choose smaller models."
        )


def check_node_memory(need: MemoryNeed, nodes: Sequence[float | None]) -> None:
    """Refuse actors that do not fit on the nodes of a cluster, wherever Ray places them.

    Args:
        need: the run's minimum, from `memory_need`.
        nodes: memory of each live node in bytes, as Ray reports it; None if it does not.

    Raises:
        PreflightError: the actors do not fit; the message states the need of an actor and what is available.
    """
    known = [node for node in nodes if node is not None]
    fitting = sum(int(node // need.actor) for node in known)
    if known and len(known) == len(nodes) and fitting < need.actors:
        largest = ", ".join(f"{node / _GB:.2f} GB" for node in sorted(known, reverse=True)[:5])
        raise PreflightError(
            f"too little memory: {need.actors} actor(s) need at least {need.actor / _GB:.2f} GB each, and the nodes "
            f"have {largest}: there is room for {fitting}. Lower resources.actors, or give the nodes more memory."
        )


@dataclass(slots=True)
class KillWatch:
    """Detects that the kernel keeps killing processes for lack of memory while no shard is finished.

    Without it the run would never end: Ray restarts such processes forever, some without a configurable limit.
    """

    done: Callable[[], int]
    """Returns the number of finished shards without accessing storage."""
    need: MemoryNeed | None = None
    """The run's minimum, set once it is known."""
    kills: Callable[[], int | None] = memory_kills
    clock: Callable[[], float] = time.monotonic
    paused: bool = field(default=False, init=False)
    _since: tuple[int, int, float] | None = field(default=None, init=False)
    """Finished shards, kills, and time in seconds, when the number of finished shards last changed."""

    def pause(self, paused: bool) -> None:
        """Pause or resume the watch; paused while images that use too much memory are isolated one by one."""
        self.paused = paused

    def cause(self) -> str | None:
        """Why the run cannot continue; None if it can."""
        kills, done, now = self.kills(), self.done(), self.clock()
        if kills is None:
            return None
        if self._since is None or self.paused or done != self._since[0]:
            self._since = (done, kills, now)
            return None
        _, before, start = self._since
        if kills - before < _MOST_KILLS or now - start < _LEAST_S:
            return None
        here = memory_limit()
        has = "" if here is None else f" ({here / _GB:.2f} GB)"
        return (
            f"too little memory{has}: the kernel killed {kills - before} processes in {now - start:.0f} s, and no "
            f"shard was finished{'' if self.need is None else f'; the run needs at least {self.need}'}"
        )
