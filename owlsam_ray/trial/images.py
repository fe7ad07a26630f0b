"""Label a few images in this process, without Ray, through all stages of a run."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from owlsam_ray.config.base import MEGABYTE
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import PreflightError
from owlsam_ray.fetch.images import fetch_rows
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import Allocation
from owlsam_ray.records import EncodedImage, Prediction
from owlsam_ray.run.shards import encode_shard, footer_bytes
from owlsam_ray.schema import ROW_GROUP_IMAGES, predictions_to_table

if TYPE_CHECKING:
    from owlsam_ray.inference.engine import Engine
    from owlsam_ray.inference.queries import EmbeddedQueries


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample of a run's images, labelled."""

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


def label_sample(
    rows: Sequence[dict[str, Any]],
    config: RunConfig,
    allocation: Allocation,
    *,
    models: ModelPaths,
    queries: "EmbeddedQueries",
) -> Sample:
    """Fetch and label images in this process, and measure how fast it labels them.

    Args:
        rows: rows of a listing or a manifest, at least one.
        config: the run's config.
        allocation: resources of an actor on this machine.
        models: paths of the weights.
        queries: what to look for.

    Raises:
        StorageSetupError: this machine cannot access the storage.
        PreflightError: the models do not run on this machine.
        WeightsError: the models do not load.
    """
    fetched = fetch_rows(
        rows,
        threads=config.resources.fetch_threads,
        max_bytes=config.decode.max_file_mb * MEGABYTE,
        deadline_s=config.resources.fetch_deadline_s,
    )
    images = [
        EncodedImage.of(outcome, image_id=number, height=row["height"], width=row["width"])
        for number, (row, outcome) in enumerate(zip(rows, fetched, strict=True))
    ]
    predictions, rate = label_here(images, config, allocation, models=models, queries=queries, measure_rate=True)
    return Sample([row["file_name"] for row in rows], predictions, rate)


def label_here(
    images: Sequence[EncodedImage],
    config: RunConfig,
    allocation: Allocation,
    *,
    models: ModelPaths,
    queries: "EmbeddedQueries",
    measure_rate: bool = False,
) -> tuple[list[Prediction], float | None]:
    """Decode, detect, segment and encode images in this process as an actor would.

    Torch's settings are afterwards as they were before.

    Args:
        images: encoded images, any number of them.
        config: the run's config.
        allocation: resources of an actor on this machine.
        models: paths of the weights.
        queries: what to look for.
        measure_rate: also measure images per second; on a GPU this takes a second pass.

    Returns:
        One prediction per image in the same order; the rate, None if it was not measured or if every image failed.

    Raises:
        PreflightError: the models do not run on this machine.
        WeightsError: the models do not load.
        InputError: a threshold names a category that the vocabulary does not have.
    """
    from owlsam_ray.inference.load import open_engine
    from owlsam_ray.models.arithmetic import restored_arithmetic

    try:
        with (
            restored_arithmetic(),
            open_engine(config, allocation, models=models, queries=queries) as engine,
        ):
            start = time.perf_counter()
            predictions, _ = engine.annotate(images)
            seconds = time.perf_counter() - start
            good = [image for image, row in zip(images, predictions, strict=True) if row.failure is None]
            if not measure_rate or not good:
                return predictions, None
            if allocation.device == "cuda":
                return predictions, _rate_of_full_batches(engine, good, allocation.detector_batch)
    except RuntimeError as error:  # from torch or the engine: no memory, no driver, …
        raise PreflightError(f"the models do not run on this machine: {error}") from error
    return predictions, len(good) / seconds


def _rate_of_full_batches(engine: "Engine", images: Sequence[EncodedImage], batch: int) -> float:
    """Measure images per second over at least one full batch, after a first pass that warmed up the GPU.

    Calls have a fixed shape, so a few images cost as much as a full batch.
    """
    many = list(images) * math.ceil(batch / len(images))
    start = time.perf_counter()
    engine.annotate(many)
    return len(many) / (time.perf_counter() - start)
