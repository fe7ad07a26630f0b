"""`owlsam estimate`: estimate the time and space of a run by labelling a sample of its images."""

import logging
import time
from collections.abc import Callable
from typing import Any

from owlsam_ray import storage
from owlsam_ray.annotate.attempt import annotate_run
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import InputError
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.guard import check_writable
from owlsam_ray.run.paths import MANIFEST, PREDICTIONS, PROGRESS_FILE, QUERY_FILE, RUN_FILE
from owlsam_ray.run.record import run_directory
from owlsam_ray.terminal import Show, silent

FOLDER = "estimate"
_SHARD_SIZE = 8
_SHARDS_IN_FLIGHT = 8
"""With the shard size, enough images for the batches of a GPU, in shards small enough to measure a rate."""
_log = logging.getLogger(__name__)


def estimate_run(
    config: RunConfig,
    *,
    images: int,
    show_plan: Show = silent,
    show: Callable[[dict[str, Any]], None] = lambda state: None,
) -> dict[str, Any]:
    """Label a sample, and estimate the time and space for all images.

    The sample is a separate run in `RUN/estimate`, which replaces an earlier one and is kept, so that its labels can be
    inspected. The rate is measured from the first finished shard on; the time to load models is reported separately.

    Args:
        config: the config of the whole run, which need not be planned.
        images: number of images in the sample.
        show_plan: called with the progress of the listing.
        show: called with the progress of the labelling.

    Returns:
        images (that the whole run would label), sample, images_per_s, start_s, hours, gpu_hours, gpus, actors,
        predictions_bytes and coco_bytes (of the whole run), detections_per_image, failed (of the sample), sample_run
        (its run directory). A rate that could not be measured is None, and so are the values derived from it.

    Raises:
        OwlsamError: the same as for `annotate_run` and `reduce_run`.
    """
    if images < 1:
        raise InputError(f"--images is {images}: it must be at least 1")
    run_url = storage.join(run_directory(config), FOLDER)
    check_writable(run_url)
    _clear(run_url)
    total, small = _plan_sample(config, run_url, images, show_plan)
    seen: list[tuple[float, int]] = []

    def watch(state: dict[str, Any]) -> None:
        seen.append((time.monotonic(), state["done"]))
        show(state)

    start = time.monotonic()
    counts = annotate_run(small, show=watch)
    seen.append((time.monotonic(), counts["done"]))
    reduced = reduce_run(small)
    rate, began = steady_rate(seen)
    hours = None if rate is None else total / rate / 3600
    share = total / counts["images"]
    names = storage.list_names(storage.join(run_url, PREDICTIONS))
    shard_bytes = sum(storage.num_bytes(storage.join(run_url, PREDICTIONS, name)) or 0 for name in names)
    return {
        "images": total,
        "sample": counts["images"],
        "failed": counts["failed"],
        "detections_per_image": round(counts["detections"] / counts["images"], 2),
        "actors": counts["actors"],
        "gpus": counts["gpus"],
        "images_per_s": None if rate is None else round(rate, 3),
        "start_s": round(began - start, 1),
        "hours": None if hours is None else round(hours, 3),
        "gpu_hours": None if hours is None else round(hours * counts["gpus"], 3),
        "predictions_bytes": round(shard_bytes * share),
        "coco_bytes": round((storage.num_bytes(reduced["annotations"]) or 0) * share),
        "sample_run": run_url,
    }


def steady_rate(seen: list[tuple[float, int]]) -> tuple[float | None, float]:
    """Images per second from the first finished images on, and the extrapolated start time.

    Args:
        seen: (seconds, images done), ascending; the last entry is the end.

    Returns:
        The rate, None if all images were seen to finish at the same time; the start time in seconds.
    """
    first = next(((at, done) for at, done in seen if done), seen[-1])
    last = next((at, done) for at, done in seen if done == seen[-1][1])
    if last[1] == first[1] or last[0] <= first[0]:
        return None, first[0]
    rate = (last[1] - first[1]) / (last[0] - first[0])
    return rate, first[0] - first[1] / rate


def _plan_sample(config: RunConfig, run_url: str, images: int, show: Show) -> tuple[int, RunConfig]:
    """Plan the sample; return the number of images that the whole run would label, and the sample's config."""
    asked = config.plan
    images = min([images, *(each for each in (asked.limit, asked.sample) if each is not None)])
    changes = {"limit": None, "sample": images, "verify": "none"}
    resources = config.resources.model_copy(
        update={
            "shard_size": _SHARD_SIZE,
            "shards_in_flight": max(_SHARDS_IN_FLIGHT, config.resources.shards_in_flight),
        }
    )
    small = config.model_copy(
        update={
            "run": run_url,
            "plan": asked.model_copy(update=changes),
            "resources": resources,
            "logging": config.logging.model_copy(update={"progress_s": min(0.5, config.logging.progress_s)}),
        }
    )
    plan = plan_run(small, show=show)
    total = min(plan.eligible or 0, asked.limit or asked.sample or plan.eligible or 0)
    return total, small


def _clear(run_url: str) -> None:
    """Remove an earlier estimate."""
    storage.remove(storage.join(run_url, RUN_FILE))
    for folder in (PREDICTIONS, MANIFEST):
        for name in storage.list_names(storage.join(run_url, folder)):
            storage.remove(storage.join(run_url, folder, name))
    for name in (QUERY_FILE, PROGRESS_FILE):
        storage.remove(storage.join(run_url, name))
