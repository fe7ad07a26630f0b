"""Which images make which step, and threads that have them ready.

Everything is a function of (seed, step): a resumed training goes on with the same batches, and no state is kept. Step t
takes the images t·B … t·B + B − 1 of an endless sequence of shuffled epochs; the workers share each step's images out
among themselves, so that no image is seen twice in an epoch however many workers there are.
"""

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from owlsam_ray.errors import ImageError, InputError
from owlsam_ray.finetune.augment import AugmentSettings, augment
from owlsam_ray.finetune.data import Sample, TrainingImages

_log = logging.getLogger(__name__)

_AHEAD = 3
"""Steps that are made ready before they are asked for."""
_SHUFFLE, _AUGMENT, _COLLATE = 0, 1, 2
"""Streams of chance under one seed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How steps are cut out of the training set."""

    num_images: int
    batch_size: int
    """Images of a step, over all workers."""
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0

    def images_of(self, step: int) -> list[list[tuple[int, int]]]:
        """Micro batches of this worker in a step: (place in the endless sequence, image index) each."""
        per_call = self.batch_size // (self.world_size * self.accumulate)
        first = step * self.batch_size + self.rank * per_call * self.accumulate
        return [
            [(place, self._image_at(place)) for place in range(start, start + per_call)]
            for start in range(first, first + per_call * self.accumulate, per_call)
        ]

    def _image_at(self, place: int) -> int:
        epoch, position = divmod(place, self.num_images)
        return int(_epoch_order(self.seed, epoch, self.num_images)[position])


_orders: OrderedDict[tuple[int, int, int], np.ndarray[Any, np.dtype[np.int64]]] = OrderedDict()
_orders_lock = Lock()


def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The shuffled indices of an epoch; the last few stay in memory."""
    key = (seed, epoch, count)
    with _orders_lock:
        if key not in _orders:
            _orders[key] = np.random.default_rng([seed, _SHUFFLE, epoch]).permutation(count)
            while len(_orders) > 4:
                _orders.popitem(last=False)
        return _orders[key]


class SampleReader:
    """Reads samples, keeps some in memory, and leaves out images that cannot be read."""

    def __init__(self, images: TrainingImages, *, masks: bool, cache_mb: int = 0) -> None:
        self.images = images
        self.failures: Counter[str] = Counter()
        """Reason → images that were left out for it, each counted once."""
        self._masks = masks
        self._room = cache_mb * 2**20
        self._cache: dict[int, Sample] = {}
        self._failed: set[int] = set()
        self._lock = Lock()

    def read(self, index: int) -> Sample | None:
        """One sample without augmentation; None for an image that cannot be read, which is told once."""
        sample = self._cache.get(index)
        if sample is not None or index in self._failed:
            return sample
        try:
            sample = self.images.load(index, masks=self._masks)
        except ImageError as error:
            self._note_failure(index, error)
            return None
        size = sample.pixels.nbytes + (0 if sample.masks is None else sample.masks.nbytes)
        with self._lock:
            if size <= self._room:
                self._room -= size
                self._cache[index] = sample
        return sample

    def _note_failure(self, index: int, error: ImageError) -> None:
        with self._lock:
            if index in self._failed:
                return
            self._failed.add(index)
            self.failures[error.reason.split(":")[0]] += 1
        _log.warning("image %d is left out of the training: %s", self.images.image_ids[index], error.reason)
        if len(self._failed) == len(self.images):
            raise InputError(
                f"none of the {len(self.images)} training images can be read ({dict(self.failures)}): is data.train's "
                "`images` the folder that the file names are relative to?"
            )


def iterate_batches(
    plan: Plan,
    reader: SampleReader,
    collate: Callable[[Sequence[Sample], np.random.Generator], dict[str, Any]],
    *,
    augmentation: AugmentSettings,
    steps: range,
    threads: int,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Steps in order, each with this worker's micro batches; made ready by threads.

    Args:
        plan: which images.
        reader: gives them.
        collate: samples to a batch, see `task.Task`.
        augmentation: applied to each sample, with chance that depends on its place in the sequence.
        steps: to give.
        threads: that read; at least one.

    Yields:
        Step and micro batches. An image that cannot be read is replaced by the next of the sequence that can.
    """

    def sample_at(place: int, index: int) -> Sample:
        sample = reader.read(index)
        other = place
        while sample is None:
            other += plan.batch_size
            sample = reader.read(plan._image_at(other))
        return augment(sample, augmentation, np.random.default_rng([plan.seed, _AUGMENT, place]))

    def make(step: int, number: int, places: list[tuple[int, int]]) -> dict[str, Any]:
        samples = [sample_at(place, index) for place, index in places]
        return collate(samples, np.random.default_rng([plan.seed, _COLLATE, step, plan.rank, number]))

    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    waiting: deque[tuple[int, list[Future[dict[str, Any]]]]] = deque()
    try:
        for step in steps:
            micro = plan.images_of(step)
            waiting.append((step, [pool.submit(make, step, number, places) for number, places in enumerate(micro)]))
            if len(waiting) > _AHEAD:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        while waiting:
            ready, futures = waiting.popleft()
            yield ready, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
