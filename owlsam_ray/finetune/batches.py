"""Choose the images of each step, and prepare them in threads.

Everything is a function of (seed, step): a resumed training continues with the same batches, and no state is stored.
Step t takes the images t·B … t·B + B − 1 of an endless sequence of shuffled epochs. The workers divide each step's
images among themselves, so that no image is seen twice in an epoch, for any number of workers.
"""

import logging
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Literal

import numpy as np

from owlsam_ray.errors import FailureClass, ImageError, IncompleteError, InputError
from owlsam_ray.finetune.augment import AugmentSettings, augment
from owlsam_ray.finetune.data import Sample, TrainingImages

_log = logging.getLogger(__name__)

_AHEAD = 3
"""Steps prepared in advance; more if steps are so small that threads would be idle."""
_PAUSES_S = (0.5, 2.0)
"""Pauses between attempts to read an image that storage did not return."""
_OUTAGE = 32
"""Consecutive images that storage did not return after which storage counts as down: pausing for each would take too
long."""
_SHUFFLE, _AUGMENT, _COLLATE = 0, 1, 2
"""Random streams under one seed."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How steps are cut from the training set."""

    num_images: int
    batch_size: int
    """Number of images of a step, over all workers."""
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0

    def images_of(self, step: int) -> list[list[tuple[int, int]]]:
        """Return this worker's micro batches of a step, each as (place in the endless sequence, image index) pairs."""
        per_call = self.batch_size // (self.world_size * self.accumulate)
        first = step * self.batch_size + self.rank * per_call * self.accumulate
        return [
            [(place, self._image_at(place)) for place in range(start, start + per_call)]
            for start in range(first, first + per_call * self.accumulate, per_call)
        ]

    def replacements_of(self, place: int) -> Iterator[int]:
        """Yield every other image once, to replace an unreadable one: those of the next steps, then the rest."""
        epoch, position = divmod(place, self.num_images)
        order = _epoch_order(self.seed, epoch, self.num_images)
        # Strides of a whole step return to the start before they have visited every image: then shift by one.
        rounds = math.gcd(self.batch_size, self.num_images)
        for shift in range(rounds):
            for stride in range(self.num_images // rounds):
                if shift or stride:
                    yield int(order[(position + shift + stride * self.batch_size) % self.num_images])

    def _image_at(self, place: int) -> int:
        epoch, position = divmod(place, self.num_images)
        return int(_epoch_order(self.seed, epoch, self.num_images)[position])


_orders: OrderedDict[tuple[int, int, int], np.ndarray[Any, np.dtype[np.int64]]] = OrderedDict()
_orders_lock = Lock()


def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The shuffled indices of an epoch; the last few epochs are cached."""
    key = (seed, epoch, count)
    with _orders_lock:
        if key not in _orders:
            _orders[key] = np.random.default_rng([seed, _SHUFFLE, epoch]).permutation(count)
            while len(_orders) > 4:
                _orders.popitem(last=False)
        return _orders[key]


class SampleReader:
    """Read samples, cache some in memory, and leave out images that cannot be read. Thread-safe.

    Args:
        images: the images to read.
        masks: whether samples have masks.
        cache_mb: memory for cached samples, in MiB.
        split: purpose of the images, for messages.
    """

    def __init__(
        self,
        images: TrainingImages,
        *,
        masks: bool,
        cache_mb: int = 0,
        split: Literal["training", "validation"] = "training",
    ) -> None:
        self.images = images
        self.failures: Counter[str] = Counter()
        """Reason → number of images left out for it, each counted once; those of `fetch_failed` may be retried."""
        self._masks, self._split = masks, split
        self._room = cache_mb * 2**20
        self._cache: dict[int, Sample] = {}
        self._failed: set[int] = set()
        """Images that are not tried again."""
        self._not_given: set[int] = set()
        """Images that storage did not return at least once."""
        self._in_a_row = 0
        """Consecutive images that storage did not return since it last answered."""
        self._lock = Lock()

    def read(self, index: int) -> Sample | None:
        """Read one sample without augmentation; None for an image that cannot be read, which is logged once.

        An image that storage does not return is retried after a pause, and again whenever it is requested.

        Raises:
            InputError: no image at all can be read.
            IncompleteError: storage returned none of many images in a row.
        """
        sample = self._cache.get(index)
        if sample is not None:
            return sample
        if index not in self._failed:
            try:
                sample = self._load(index)
            except ImageError as error:
                self._note_failure(index, error)
            else:
                self._keep(index, sample)
                return sample
        # Checked at every miss: each of several threads must raise, not only the one with the last failure.
        self._check_any_left()
        return None

    def _load(self, index: int) -> Sample:
        for pause in _PAUSES_S:
            try:
                return self.images.load(index, masks=self._masks)
            except ImageError as error:
                if error.failure_class is not FailureClass.TRANSIENT:
                    raise
                _log.debug("retrying image %d in %g s: %s", self.images.image_ids[index], pause, error.reason)
            time.sleep(pause)
        return self.images.load(index, masks=self._masks)

    def _keep(self, index: int, sample: Sample) -> None:
        size = sample.pixels.nbytes + (0 if sample.masks is None else sample.masks.nbytes)
        with self._lock:
            self._in_a_row = 0
            if size <= self._room and index not in self._cache:
                self._room -= size
                self._cache[index] = sample

    def _note_failure(self, index: int, error: ImageError) -> None:
        transient = error.failure_class is FailureClass.TRANSIENT
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if transient else 0
            noted = self._not_given if transient else self._failed
            is_new = index not in noted
            if is_new:
                noted.add(index)
                self.failures[error.reason.split(":")[0]] += 1
        if self._in_a_row >= _OUTAGE:
            raise IncompleteError(
                f"storage failed for {self._in_a_row} {self._split} images in a row ({error.reason}): "
                "once it works again, the same command continues from the last checkpoint"
            )
        if is_new:
            for_now = " for now" if transient else ""
            _log.warning(
                "image %d is left out of the %s%s: %s",
                self.images.image_ids[index], self._split, for_now, error.reason,
            )  # fmt: skip

    def _check_any_left(self) -> None:
        if len(self._failed) == len(self.images):
            key = "train" if self._split == "training" else "val"
            raise InputError(
                f"none of the {len(self.images)} {self._split} images can be read ({dict(self.failures)}): is "
                f"data.{key}'s `images` the folder that the file names are relative to?"
            )


def iterate_batches(
    plan: BatchPlan,
    reader: SampleReader,
    collate: Callable[[Sequence[Sample], np.random.Generator], dict[str, Any]],
    *,
    augmentation: AugmentSettings,
    steps: range,
    threads: int,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield steps in order, each with this worker's micro batches, prepared by threads.

    Args:
        plan: which images make which step.
        reader: reads the images.
        collate: turns samples into a batch, see `task.Task`.
        augmentation: applied to each sample, with randomness that depends on its place in the sequence.
        steps: steps to yield.
        threads: number of reading threads; at least one.

    Yields:
        Step and micro batches. An image that cannot be read is replaced by another one of the epoch.

    Raises:
        InputError: no image can be read.
        IncompleteError: storage returned none of many images in a row, or none of all images.
    """

    def sample_at(place: int, index: int) -> Sample:
        sample = reader.read(index) or _replacement(plan, reader, place)
        return augment(sample, augmentation, np.random.default_rng([plan.seed, _AUGMENT, place]))

    def start(step: int) -> list[Future[dict[str, Any]]]:
        return [
            _Parts(
                [partial(sample_at, place, index) for place, index in places],
                collate,
                np.random.default_rng([plan.seed, _COLLATE, step, plan.rank, number]),
            ).submit(pool)
            for number, places in enumerate(plan.images_of(step))
        ]

    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    waiting: deque[tuple[int, list[Future[dict[str, Any]]]]] = deque()
    ahead = max(_AHEAD, math.ceil(threads * plan.world_size / plan.batch_size))
    try:
        for step in steps:
            waiting.append((step, start(step)))
            if len(waiting) > ahead:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        while waiting:
            ready, futures = waiting.popleft()
            yield ready, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _replacement(plan: BatchPlan, reader: SampleReader, place: int) -> Sample:
    for index in plan.replacements_of(place):
        sample = reader.read(index)
        if sample is not None:
            return sample
    raise IncompleteError(
        f"none of the {plan.num_images} training images can be read for now ({dict(reader.failures)}): once storage "
        "works again, the same command continues from the last checkpoint"
    )


class _Parts:
    """A micro batch that threads prepare together, one sample each; the thread that finishes last collates."""

    def __init__(
        self,
        makers: Sequence[Callable[[], Sample]],
        collate: Callable[[Sequence[Sample], np.random.Generator], dict[str, Any]],
        rng: np.random.Generator,
    ) -> None:
        self._makers, self._collate, self._rng = makers, collate, rng
        self._samples: list[Sample | None] = [None] * len(makers)
        self._missing = len(makers)
        self._lock = Lock()
        self._batch: Future[dict[str, Any]] = Future()

    def submit(self, pool: ThreadPoolExecutor) -> Future[dict[str, Any]]:
        """Submit all samples to the threads; the future returns the batch when all are done, or the first error."""
        for number in range(len(self._makers)):
            pool.submit(self._make, number)
        return self._batch

    def _make(self, number: int) -> None:
        try:
            self._samples[number] = self._makers[number]()
            with self._lock:
                self._missing -= 1
                is_last = self._missing == 0
            if is_last:
                samples = [sample for sample in self._samples if sample is not None]
                self._samples = []
                self._batch.set_result(self._collate(samples, self._rng))
        except BaseException as error:  # noqa: BLE001 - who waits for the batch must hear of it, whatever it is
            with self._lock:
                if not self._batch.done():
                    self._batch.set_exception(error)
