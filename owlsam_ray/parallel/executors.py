"""Run a function over many items in order: in this process, in a local pool, or in tasks of a Ray cluster."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from owlsam_ray import storage
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.errors import IncompleteError
from owlsam_ray.parallel.allocation import export_ray_environment
from owlsam_ray.parallel.lost_ray import LossCount
from owlsam_ray.parallel.processes import in_order
from owlsam_ray.parallel.signals import as_interrupts, interrupt

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Executor = Literal["local", "ray"]
_MOST_TASKS = 256
_ADVICE = "Usually memory is short: give the job more, or lower reduce.workers, or leave out reduce.executor."


def num_workers(setting: int | str, *, num_images: int, small: int, executor: Executor) -> int:
    """Resolve the number of workers.

    Args:
        setting: a number, or `auto`.
        num_images: number of images in the run.
        small: number of images up to which `auto` starts no process.
        executor: where the workers run.
    """
    if not isinstance(setting, str):
        return setting
    if executor == "ray":
        return _MOST_TASKS  # reduced later to the CPUs of the cluster, which is not connected yet
    if num_images <= small:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    workers: int,
    executor: Executor,
    resources: ResourcesConfig,
    losses: LossCount | None = None,
) -> Iterator[ResultT]:
    """Yield the results of a function in the order of its arguments, working on a few at once.

    Args:
        function: a module-level function, since other processes look it up by name.
        items: its arguments.
        workers: maximum number of concurrent calls.
        executor: `local` with one worker calls the function in this process.
        resources: which Ray to use.
        losses: counts how often in a row Ray was lost; None: not counted.

    Raises:
        Any error that the function raises, at that item's place.
    """
    if executor == "local":
        yield from in_order(function, items, workers)
        return
    export_ray_environment(resources.auth_mode)  # read when ray is imported

    import ray

    from owlsam_ray.parallel.ray_cluster import start_ray, stop_ray
    from owlsam_ray.parallel.ray_watch import watch_ray

    handler = signal.getsignal(signal.SIGTERM)
    started = start_ray(resources, level="info")
    if handler is interrupt:  # the command's handler, which Ray has replaced by its own
        as_interrupts()
    try:
        with watch_ray(None if losses is None else lambda cause: losses.count(cause, advice=_ADVICE)):
            yield from _ray_in_order(ray, function, items, workers)
    finally:
        if losses is not None:  # Ray was not lost: a loss ends the process before this point
            losses.clear()
        if started:
            stop_ray()


def _ray_in_order(
    ray: Any, function: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int
) -> Iterator[ResultT]:
    waiting: deque[Any] = deque()
    try:
        workers = max(1, min(workers, int(ray.cluster_resources().get("CPU", 1))))
        call = ray.remote(num_cpus=1, max_retries=3)(_call)
        left = iter(items)
        policy = storage.policy()
        for item in left:
            waiting.append(call.remote(function, item, policy))
            if len(waiting) >= 2 * workers:
                yield _result(ray, waiting.popleft())
        while waiting:
            yield _result(ray, waiting.popleft())
    finally:
        for reference in waiting:  # the cluster may be shared with others
            ray.cancel(reference)


def _call(function: Callable[[Any], Any], item: Any, policy: storage.StoragePolicy) -> Any:
    storage.configure(policy)
    return function(item)


def _result(ray: Any, reference: Any) -> Any:
    """The result of a task; an error is raised as it was in the task."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayError as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IncompleteError(f"Ray lost a task of reduce: {first}. Run again, or with fewer reduce.workers.") from None
