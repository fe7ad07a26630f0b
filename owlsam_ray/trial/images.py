"""Label a few images in this process, through all stages of a run, for `owlsam check`."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from owlsam_ray.config.base import MEGABYTE
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import ImageError, PreflightError
from owlsam_ray.fetch.images import fetch_rows
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import Allocation
from owlsam_ray.records import EncodedImage, Prediction
from owlsam_ray.run.shards import encode_shard, footer_bytes
from owlsam_ray.schema import ROW_GROUP_IMAGES, predictions_to_table
from owlsam_ray.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompts:
    """Vocabulary, models and query embeddings for an engine."""

    vocabulary: Vocabulary
    models: ModelPaths
    embeddings: "Tensor"
    """(Q, D) float32."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Results for the images."""

    file_names: list[str]
    predictions: list[Prediction]
    images_per_s: float | None
    """Rough rate of one actor; None if every image failed."""

    def counts(self) -> dict[str, int]:
        """Number of images tried (`labelled`), and rows by status."""
        found = Counter(str(row.status) for row in self.predictions)
        return {"labelled": len(self.predictions), **{name: found[name] for name in ("ok", "empty", "failed")}}

    @property
    def failed_images(self) -> list[dict[str, str]]:
        """file_name and reason of the failed images."""
        return [
            {"file_name": name, "reason": row.failure[0]}
            for name, row in zip(self.file_names, self.predictions, strict=True)
            if row.failure is not None
        ]

    @property
    def bytes_per_image(self) -> float | None:
        """Rough bytes of a shard file per image; None if every image failed."""
        rows = [row for row in self.predictions if row.failure is None]
        if not rows:
            return None
        data = encode_shard(0, predictions_to_table(rows), fingerprint="", numerics="", stage_s={})
        footer = footer_bytes(data)  # its size per row group is about the same for few images as for many
        return (len(data) - footer) / len(rows) + footer / ROW_GROUP_IMAGES


def label_here(config: RunConfig, allocation: Allocation, prompts: Prompts, rows: Sequence[dict[str, Any]]) -> Labelled:
    """Fetch, decode, detect, segment and encode images in the same way as an actor.

    Args:
        config: the run's config.
        allocation: resources of an actor on this machine.
        prompts: vocabulary, models and query embeddings.
        rows: rows of a listing or a manifest, at least one.

    Raises:
        PreflightError: the models do not run on this machine.
        WeightsError: the models do not load.
    """
    fetched = fetch_rows(
        rows,
        threads=config.resources.fetch_threads,
        max_bytes=config.decode.max_file_mb * MEGABYTE,
        deadline_s=config.resources.fetch_deadline_s,
    )
    images = [_encoded(number, row, data) for number, (row, data) in enumerate(zip(rows, fetched, strict=True))]
    try:
        predictions, rate = _run(config, allocation, prompts, images)
    except RuntimeError as error:  # from torch or the engine: no memory, no driver, …
        raise PreflightError(f"the models do not run on this machine: {error}") from error
    return Labelled([row["file_name"] for row in rows], predictions, rate)


def _encoded(number: int, row: dict[str, Any], fetched: bytes | ImageError) -> EncodedImage:
    stated = (row["height"], row["width"]) if row["height"] is not None and row["width"] is not None else None
    if isinstance(fetched, ImageError):
        return EncodedImage(number, None, stated_hw=stated, failure=(fetched.reason, fetched.failure_class))
    return EncodedImage(number, fetched, stated_hw=stated)


def _run(
    config: RunConfig, allocation: Allocation, prompts: Prompts, images: Sequence[EncodedImage]
) -> tuple[list[Prediction], float | None]:
    """Label the images, and measure images per second over those that did not fail.

    On a GPU the first pass is a warm-up, and a second pass fills a batch for the measurement: calls have a fixed shape,
    so a few images cost as much as a full batch.
    """
    import torch

    from owlsam_ray.inference.load import load_engine

    threads = torch.get_num_threads()
    torch.set_num_threads(allocation.torch_threads)
    try:
        with load_engine(
            config,
            allocation,
            models=prompts.models,
            query_embeddings=prompts.embeddings,
            query_labels=[query.label for query in prompts.vocabulary.queries],
            category_names=[category.name for category in prompts.vocabulary.categories],
        ) as engine:
            start = time.perf_counter()
            predictions, _ = engine.annotate(images)
            seconds = time.perf_counter() - start
            good = [image for image, row in zip(images, predictions, strict=True) if row.failure is None]
            timed = len(good)
            if good and allocation.device == "cuda":
                many = good * math.ceil(allocation.detector_batch / len(good))
                start = time.perf_counter()
                engine.annotate(many)
                seconds, timed = time.perf_counter() - start, len(many)
    finally:
        torch.set_num_threads(threads)
    return predictions, timed / seconds if timed else None
