"""Label images in one process, without Ray: a threaded pipeline of decode, detect, suppress, segment and encode.

A caller passes the images of one shard and waits for their rows; concurrent callers are concurrent shards. A thread
pool decodes ahead of the model across shard boundaries, one model thread forms batches of a fixed, padded shape from
the decoded images, and the same pool encodes logits as RLE:

    annotate() ─ permits ─▶ decode pool ─▶ [ready] ─▶ model thread: detect → suppress → segment ─▶ encode pool ─▶ rows

The detector runs on views: the whole image, or its tiles. Permits bound the number of images between decode and encode
and the number of views, so memory is bounded whatever the size of a shard or an image. A batch runs before it is full
only if no views of any shard are pending.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.errors import FailureClass, ImageError, OwlsamError
from owlsam_ray.inference.decode import decode_image
from owlsam_ray.inference.detect import cap_detections, select_detections
from owlsam_ray.inference.encode import encode_prediction
from owlsam_ray.inference.out_of_memory import does_not_fit, unless_out_of_memory
from owlsam_ray.inference.segment import DecodedMasks, decode_boxes, pad_batch
from owlsam_ray.inference.suppress import suppress
from owlsam_ray.inference.tile import merge_views, tile_views
from owlsam_ray.inference.work_items import DetectorView, EngineSettings, Item, Job
from owlsam_ray.models.protocols import Detector, Segmenter
from owlsam_ray.models.sam_frame import boxes_to_sam_frame, input_size_hw
from owlsam_ray.parallel.work_slots import WorkSlots
from owlsam_ray.records import Detections, EncodedImage, Prediction


class Engine:
    """A detector, a segmenter, and the threads that keep them busy; `annotate` is thread-safe."""

    def __init__(
        self,
        detector: Detector,
        segmenter: Segmenter,
        *,
        query_embeddings: Tensor,
        query_labels: Sequence[int],
        settings: EngineSettings,
        slots: WorkSlots | None = None,
    ) -> None:
        """Start the threads.

        Args:
            detector: the model that finds boxes.
            segmenter: the model that turns boxes into masks.
            query_embeddings: (Q, D) float32, the queries embedded once per run.
            query_labels: category index of each query.
            settings: thresholds and batch sizes.
            slots: records what the threads are working on, for a watchdog.
        """
        if len(query_labels) != len(query_embeddings):
            raise ValueError(f"{len(query_labels)} query labels for {len(query_embeddings)} query embeddings")
        self._detector, self._segmenter, self._settings = detector, segmenter, settings
        self._slots = slots
        self._queries = query_embeddings.to(detector.device)
        self._query_labels = np.asarray(query_labels, np.int64)
        # Enough for a full batch of each model to form while every thread decodes; with fewer the engine could stall.
        self._permits = threading.Semaphore(2 * (settings.detector_batch + settings.segmenter_batch) + settings.threads)
        # More than a batch, so that one can always form while threads wait to add more views.
        self._view_permits = threading.Semaphore(2 * settings.detector_batch + settings.threads)
        self._state = threading.Condition()
        self._ready: deque[DetectorView] = deque()
        self._undecoded = 0  # images of all jobs that have not failed and whose views are not all in `_ready`
        self._closed = False
        self._error: BaseException | None = None
        self._jobs: set[Job] = set()
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="owlsam-image")
        # A daemon thread: a process that exits without closing the engine, as Ray actors do, must not wait for it.
        self._model_thread = threading.Thread(target=self._run_models, name="owlsam-model", daemon=True)
        self._model_thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish the images already passed in, then stop the threads."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._model_thread.join()
        self._pool.shutdown()

    def annotate(self, images: Sequence[EncodedImage]) -> tuple[list[Prediction], dict[str, float]]:
        """Label images.

        Args:
            images: images of one shard, any number of them.

        Returns:
            One prediction per image in the same order, and the busy seconds of each stage on these images.

        Raises:
            RuntimeError: a model call or a thread failed (not an image); the engine can no longer be used.
            PreflightError: a batch does not fit in GPU memory; the engine can no longer be used.
        """
        job = Job(images, [None] * len(images), len(images))
        with self._state:
            self._raise_if_broken()
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._jobs.add(job)
            self._undecoded += len(images)
        for position in range(len(images)):
            self._acquire(self._permits)
            self._pool.submit(self._decode, Item(job, position)).add_done_callback(self._check)
        if images:
            job.done.wait()
        self._raise_if_broken()
        with self._state:
            self._jobs.discard(job)
        return [result for result in job.results if result is not None], job.stage_s

    def _raise_if_broken(self) -> None:
        if isinstance(self._error, OwlsamError):
            raise self._error
        if self._error is not None:
            raise RuntimeError(f"the engine failed: {self._error}") from self._error

    def _acquire(self, permits: threading.Semaphore) -> None:
        """Wait for a permit; raise if the engine breaks."""
        self._raise_if_broken()
        while not permits.acquire(timeout=1.0):
            self._raise_if_broken()
        self._raise_if_broken()

    def _check(self, future: "Future[None]") -> None:
        error = future.exception()
        if error is not None:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """Break the engine after an exception that a single image did not cause; it is raised in every caller."""
        with self._state:
            self._error = self._error or error
            self._closed = True
            for job in self._jobs:
                job.done.set()
            self._state.notify_all()

    # Run in the pool's threads

    def _decode(self, item: Item) -> None:
        """Decode an image and pass its views to the model thread one by one."""
        self._raise_if_broken()  # no caller waits for the result any more
        try:
            with self._busy("decode", [item]):
                pixels = self._read(item)
        except ImageError as error:
            self._finish_failed(item, error)
        else:
            for index, view in enumerate(item.views):
                self._acquire(self._view_permits)
                with self._timed("decode", [item]), self._busy("decode", [item]):
                    # Copy tiles, so that they have the strides, hence the arithmetic, of a separate image.
                    part = pixels if len(item.views) == 1 else pixels[view.y0 : view.y1, view.x0 : view.x1].copy()
                    model_input = self._detector.preprocess(part)
                with self._state:
                    self._ready.append(DetectorView(item, index, model_input))
                    self._state.notify_all()
        with self._state:
            self._undecoded -= 1
            self._state.notify_all()

    def _read(self, item: Item) -> NDArray[np.uint8]:
        """Decode an item's bytes to (H, W, 3) RGB; set its size, note, views and segmenter input.

        Raises:
            ImageError: the image was not fetched or cannot be decoded.
        """
        image = item.image
        if image.failure is not None:
            raise ImageError(*image.failure)
        with self._timed("decode", [item]):
            decoded = decode_image(
                image.data if image.data is not None else b"",
                stated_hw=image.stated_hw,
                max_pixels=self._settings.decode.max_pixels,
                grey16=self._settings.decode.grey16,
            )
            height, width = decoded.pixels.shape[:2]
            item.size_hw = (height, width)
            item.note = "; ".join(filter(None, (image.note, decoded.note))) or None
            item.views = tile_views(item.size_hw, self._settings.tiling)
            item.segmenter_input = self._segmenter.preprocess(decoded.pixels)
        return decoded.pixels

    def _encode(self, item: Item, masks: DecodedMasks | None) -> None:
        try:
            with self._timed("encode", [item]), self._busy("encode", [item]):
                prediction = encode_prediction(
                    item.image.image_id,
                    item.size_hw,
                    item.detections,
                    masked=item.masked,
                    decoded=masks,
                    image_size=self._segmenter.image_size,
                    settings=self._settings.segment,
                    note=item.note,
                )
        except ImageError as error:
            self._finish_failed(item, error)
        else:
            self._finish(item, prediction)

    def _finish_failed(self, item: Item, error: ImageError) -> None:
        failure: tuple[str, FailureClass] = (error.reason, error.failure_class)
        self._finish(item, Prediction(image_id=item.image.image_id, failure=failure))

    def _finish(self, item: Item, prediction: Prediction) -> None:
        job = item.job
        with self._state:
            job.results[item.position] = prediction
            job.left -= 1
            finished = job.left == 0
        self._permits.release()
        if finished:
            job.done.set()

    # Run in the model thread

    def _run_models(self) -> None:
        try:
            self._model_loop()
        except BaseException as error:  # noqa: BLE001 (raised again in every caller)
            self._break(error)

    def _model_loop(self) -> None:
        to_detect: list[DetectorView] = []
        to_segment: list[Item] = []
        while self._await_batch(to_detect, to_segment):
            # A full encoder batch runs first: it holds the most memory.
            if len(to_segment) >= self._settings.segmenter_batch or not to_detect:
                images = to_segment[: self._settings.segmenter_batch]
                del to_segment[: len(images)]
                self._segment(images)
            else:
                views = to_detect[: self._settings.detector_batch]
                del to_detect[: len(views)]
                to_segment += self._detect(views)

    def _await_batch(self, to_detect: list[DetectorView], to_segment: list[Item]) -> bool:
        """Wait for a batch to run; False if the engine is broken, or closed with nothing left."""
        with self._state:
            while True:
                while self._ready and len(to_detect) < self._settings.detector_batch:
                    to_detect.append(self._ready.popleft())
                if (
                    len(to_detect) >= self._settings.detector_batch
                    or len(to_segment) >= self._settings.segmenter_batch
                    or (self._undecoded == 0 and (to_detect or to_segment))
                ):
                    return self._error is None
                if self._closed and (self._undecoded == 0 or self._error is not None):
                    return False
                self._state.wait()

    def _detect(self, batch: list[DetectorView]) -> list[Item]:
        """Detect boxes in a batch of views; return the images that are complete and have boxes to segment."""
        items = [view.item for view in batch]
        with self._timed("detect", items), self._busy("model", items):
            found = self._detect_padded([view.input for view in batch])
            self._view_permits.release(len(batch))
        to_segment = []
        for view, (view_boxes, view_scores) in zip(batch, found, strict=True):
            item = view.item
            with self._timed("suppress", [item]):
                try:
                    self._select(view, view_boxes, view_scores)
                    if len(item.found) < len(item.views):
                        continue
                    if item.failure is not None:
                        raise item.failure
                    self._suppress(item)
                except ImageError as error:
                    self._finish_failed(item, error)
                    continue
            if len(item.masked):
                to_segment.append(item)
            else:
                item.segmenter_input = None
                self._submit_encode(item, None)
        return to_segment

    def _detect_padded(self, inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Detect boxes and scores of each input in one call, or in several of the same shape if memory runs out.

        Raises:
            PreflightError: memory runs out even with a single input.
        """
        size = self._settings.detector_batch
        batch = pad_batch(inputs, size)
        found = unless_out_of_memory(partial(self._detector.detect, batch, self._queries))
        if found is not None:
            boxes, scores = found
            return list(zip(boxes[: len(inputs)], scores[: len(inputs)], strict=True))
        if len(inputs) == 1:
            raise does_not_fit(
                "detector_batch", size, lambda smaller: self._detector.detect(batch[:smaller], self._queries)
            )
        half = len(inputs) // 2
        return self._detect_padded(inputs[:half]) + self._detect_padded(inputs[half:])

    def _select(self, view: DetectorView, boxes: Tensor, scores: Tensor) -> None:
        """Keep detections of one view that score above the floor; an error is raised after the image's last view."""
        item, size_hw = view.item, view.item.views[view.index].size_hw
        item.found[view.index] = Detections.empty()
        try:
            item.found[view.index] = select_detections(
                self._detector.unscale(boxes, size_hw).numpy(),
                scores.numpy(),
                size_hw=size_hw,
                query_labels=self._query_labels,
                settings=self._settings.detector,
            )
        except ImageError as error:
            item.failure = item.failure or error

    def _suppress(self, item: Item) -> None:
        """Merge the detections of all views of an image, suppress overlaps, and choose which get a mask."""
        settings = self._settings
        found = merge_views(
            [item.found[index] for index in range(len(item.views))],
            item.views,
            max_candidates=settings.detector.max_candidates,
        )
        found = suppress(
            found,
            settings.suppress,
            thresholds=settings.label_thresholds,
            score_floor=settings.detector.score_floor,
        )
        item.found.clear()
        item.detections = cap_detections(found, settings.detector.max_detections)
        item.masked = np.flatnonzero(item.detections.scores >= settings.segment.score_floor)

    def _segment(self, batch: list[Item]) -> None:
        with self._timed("segment", batch), self._busy("model", batch):
            decoded = self._segment_padded(batch)
        for item, masks in zip(batch, decoded, strict=True):
            item.segmenter_input = None
            self._submit_encode(item, masks)

    def _segment_padded(self, batch: list[Item]) -> list[DecodedMasks]:
        """Compute masks of each image in one encoder call, or in several of the same shape if memory runs out.

        With several calls, embeddings and masks of fewer images are in memory during each call.

        Raises:
            PreflightError: memory runs out even with a single image.
        """
        settings, image_size = self._settings, self._segmenter.image_size
        inputs = pad_batch(
            [item.segmenter_input for item in batch if item.segmenter_input is not None], settings.segmenter_batch
        )
        boxes = [
            boxes_to_sam_frame(item.detections.boxes_xyxy[item.masked], size_hw=item.size_hw, image_size=image_size)
            for item in batch
        ]
        sizes = [input_size_hw(item.size_hw, image_size) for item in batch]

        def decode(embeddings: Tensor, size: int) -> list[DecodedMasks]:
            return decode_boxes(
                self._segmenter,
                embeddings,
                boxes,
                input_sizes_hw=sizes,
                batch_size=size,
                settings=settings.segment,
            )

        embeddings = unless_out_of_memory(partial(self._segmenter.encode, inputs))
        if embeddings is not None:
            masks = unless_out_of_memory(partial(decode, embeddings, settings.decoder_batch))
            if masks is not None:
                return masks
        if len(batch) == 1:
            if embeddings is None:
                raise does_not_fit(
                    "segmenter_batch", settings.segmenter_batch, lambda size: self._segmenter.encode(inputs[:size])
                )
            raise does_not_fit("decoder_batch", settings.decoder_batch, partial(decode, embeddings), step=8)
        embeddings = None  # free the memory before the halves run
        half = len(batch) // 2
        return self._segment_padded(batch[:half]) + self._segment_padded(batch[half:])

    def _submit_encode(self, item: Item, masks: DecodedMasks | None) -> None:
        self._pool.submit(self._encode, item, masks).add_done_callback(self._check)

    def _busy(self, kind: str, items: Sequence[Item]) -> AbstractContextManager[None]:
        """Record the work in the slots, if there are any."""
        if self._slots is None:
            return contextlib.nullcontext()
        return self._slots.busy(kind, [item.image.image_id for item in items])

    @contextlib.contextmanager
    def _timed(self, stage: str, items: Sequence[Item]) -> Iterator[None]:
        """Split the block's wall time equally among its images, and add it to their jobs."""
        start = time.perf_counter()
        try:
            yield
        finally:
            share = (time.perf_counter() - start) / len(items)
            with self._state:
                for item in items:
                    item.job.stage_s[stage] += share
