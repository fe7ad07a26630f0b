"""Images in, rows out: the whole path inside one process, without Ray.

A caller hands over the images of one shard and waits for their rows; several callers at once are several shards in
flight. Threads decode ahead of the model across shard borders, one model thread forms batches of a fixed, padded shape
from whatever is decoded, and the same pool of threads turns logits into RLE:

    annotate() ─ permits ─▶ decode pool ─▶ [ready] ─▶ model thread: detect → suppress → segment ─▶ encode pool ─▶ rows

What the detector is given are views: the whole picture, or its tiles. The number of images between decode and encode is
bounded by permits, and so is the number of views, so memory is bounded whatever the size of a shard or of a picture. A
batch is flushed before it is full only when no view of any shard is left to come.
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
    """A detector, a segmenter, and the threads that keep them busy. `annotate` may be called from several threads."""

    def __init__(
        self,
        detector: Detector,
        segmenter: Segmenter,
        *,
        query_embeddings: Tensor,
        query_labels: Sequence[int],
        settings: EngineSettings,
        watch: WorkSlots | None = None,
    ) -> None:
        """Start the threads.

        Args:
            detector: the model that finds boxes.
            segmenter: the model that turns boxes into masks.
            query_embeddings: (Q, D) float32, the queries embedded once per run.
            query_labels: category index of each query.
            settings: thresholds and batch sizes.
            watch: is told what the threads work on.
        """
        if len(query_labels) != len(query_embeddings):
            raise ValueError(f"{len(query_labels)} query labels for {len(query_embeddings)} query embeddings")
        self._detector, self._segmenter, self._settings = detector, segmenter, settings
        self._watch = watch
        self._queries = query_embeddings.to(detector.device)
        self._query_labels = np.asarray(query_labels, np.int64)
        # Enough for one full batch of each model to form while every thread decodes: fewer could stand still.
        self._permits = threading.Semaphore(2 * (settings.detector_batch + settings.segmenter_batch) + settings.threads)
        # More than a batch, so that one can always form while threads wait to hand over more views.
        self._view_permits = threading.Semaphore(2 * settings.detector_batch + settings.threads)
        self._state = threading.Condition()
        self._ready: deque[DetectorView] = deque()
        self._undecoded = 0  # images of all jobs whose views have not all reached `_ready`, and that did not fail
        self._closed = False
        self._error: BaseException | None = None
        self._jobs: set[Job] = set()
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="owlsam-image")
        # A daemon: a process that ends without closing the engine, as Ray's actors do, must not wait for it for ever.
        self._model_thread = threading.Thread(target=self._run_models, name="owlsam-model", daemon=True)
        self._model_thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads after what was handed over."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._model_thread.join()
        self._pool.shutdown()

    def annotate(self, images: Sequence[EncodedImage]) -> tuple[list[Prediction], dict[str, float]]:
        """Label images.

        Args:
            images: of one shard, in any number.

        Returns:
            One prediction per image in the same order, and the busy seconds of each stage on these images.

        Raises:
            RuntimeError: a model call or a thread failed (not: an image failed); the engine is of no more use.
            PreflightError: the same, of a batch that does not fit the GPU's memory.
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
            raise RuntimeError(f"the engine broke: {self._error}") from self._error

    def _acquire(self, permits: threading.Semaphore) -> None:
        """Wait for a permit, or for the end of the engine."""
        self._raise_if_broken()
        while not permits.acquire(timeout=1.0):
            self._raise_if_broken()
        self._raise_if_broken()

    def _check(self, future: "Future[None]") -> None:
        error = future.exception()
        if error is not None:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """An exception that is no image's own breaks the engine: every caller hears of it."""
        with self._state:
            self._error = self._error or error
            self._closed = True
            for job in self._jobs:
                job.done.set()
            self._state.notify_all()

    # What the pool's threads do

    def _decode(self, item: Item) -> None:
        """Decode an image, and hand its views to the model thread one by one."""
        self._raise_if_broken()  # nobody waits for it any more
        try:
            with self._busy("decode", [item]):
                pixels = self._read(item)
        except ImageError as error:
            self._finish_failed(item, error)
        else:
            for index, view in enumerate(item.views):
                self._acquire(self._view_permits)
                with self._timed("decode", [item]), self._busy("decode", [item]):
                    # A tile is copied: it is to have the strides, hence the arithmetic, of a picture of its own.
                    part = pixels if len(item.views) == 1 else pixels[view.y0 : view.y1, view.x0 : view.x1].copy()
                    model_input = self._detector.preprocess(part)
                with self._state:
                    self._ready.append(DetectorView(item, index, model_input))
                    self._state.notify_all()
        with self._state:
            self._undecoded -= 1
            self._state.notify_all()

    def _read(self, item: Item) -> NDArray[np.uint8]:
        """Bytes to (H, W, 3) RGB; what it knows of the image goes to the item.

        Raises:
            ImageError: it was not fetched, or cannot be decoded.
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

    # What the model thread does

    def _run_models(self) -> None:
        try:
            self._model_loop()
        except BaseException as error:  # noqa: BLE001 (raised again in every caller)
            self._break(error)

    def _model_loop(self) -> None:
        to_detect: list[DetectorView] = []
        to_segment: list[Item] = []
        while self._await_batch(to_detect, to_segment):
            # A full encoder batch goes first: it holds the most memory.
            if len(to_segment) >= self._settings.segmenter_batch or not to_detect:
                images = to_segment[: self._settings.segmenter_batch]
                del to_segment[: len(images)]
                self._segment(images)
            else:
                views = to_detect[: self._settings.detector_batch]
                del to_detect[: len(views)]
                to_segment += self._detect(views)

    def _await_batch(self, to_detect: list[DetectorView], to_segment: list[Item]) -> bool:
        """Wait until there is a batch to run; False when the engine is closed and nothing is left."""
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
        """Find the boxes of a batch of views; returns the images that are complete and have boxes to segment."""
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
        """Boxes and scores of each input, in one call; in several of the same shape when memory runs out.

        Raises:
            PreflightError: it does for a single one.
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
        """Keep what scores above the floor in one view; a problem waits for the image's last view."""
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
        """The detections of all views to those of the image, and which of them get a mask."""
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
        """Masks of each image, from one encoder call; in several of the same shape when memory runs out.

        Then the embeddings and masks of fewer images are held beside a call.

        Raises:
            PreflightError: it does for a single image.
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
        embeddings = None  # to be free while the halves are done
        half = len(batch) // 2
        return self._segment_padded(batch[:half]) + self._segment_padded(batch[half:])

    def _submit_encode(self, item: Item, masks: DecodedMasks | None) -> None:
        self._pool.submit(self._encode, item, masks).add_done_callback(self._check)

    def _busy(self, kind: str, items: Sequence[Item]) -> AbstractContextManager[None]:
        """Tell the watch, if there is one."""
        if self._watch is None:
            return contextlib.nullcontext()
        return self._watch.busy(kind, [item.image.image_id for item in items])

    @contextlib.contextmanager
    def _timed(self, stage: str, items: Sequence[Item]) -> Iterator[None]:
        """Charge the block's wall time to the jobs of its images, in equal parts."""
        start = time.perf_counter()
        try:
            yield
        finally:
            share = (time.perf_counter() - start) / len(items)
            with self._state:
                for item in items:
                    item.job.stage_s[stage] += share
