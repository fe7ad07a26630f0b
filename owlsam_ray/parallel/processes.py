"""Work on many items in several processes, and yield the results in order."""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from owlsam_ray import storage
from owlsam_ray.errors import IncompleteError
from owlsam_ray.parallel.child_imports import without_working_directory

ItemT = TypeVar("ItemT")

ResultT = TypeVar("ResultT")


def in_order(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int, *, apart: bool = True
) -> Iterator[ResultT]:
    """Yield the results of a function in the order of its arguments, working on a few at once.

    Args:
        function: a module-level function, since other processes look it up by name. They use this process's storage
            policy.
        items: its arguments.
        workers: number of processes; with 1, or with one item, the function is called in this process.
        apart: whether other processes can do the work; `memory://` exists in this process alone.

    Raises:
        IncompleteError: a process was killed.
        Any error that the function raises, at that item's place.
    """
    workers = min(workers, len(items)) if apart else 1
    if workers <= 1:
        yield from map(function, items)
        return
    # Spawned, not forked: the threads of this process may hold locks.
    context = multiprocessing.get_context("spawn")
    left = iter(items)
    with without_working_directory():  # the pool and its first item start all processes
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(storage.policy(),))
        waiting = deque(pool.submit(function, item) for item in itertools.islice(left, 2 * workers))
    with pool:
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(left, 1))
        except BrokenProcessPool:
            raise IncompleteError(
                f"one of {workers} processes was killed from outside, perhaps for lack of memory: run again, or with "
                "fewer workers"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _begin(policy: storage.StoragePolicy) -> None:
    """Use the parent's storage policy, and exit when the parent does, even if it is killed."""
    storage.configure(policy)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
