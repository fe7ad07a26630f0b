"""`owlsam check`: try everything that can stop a run in its first minutes, before a queue slot is spent.

It runs in one process without Ray and leaves nothing behind in the run directory. All independent steps are tried, so
that one call reports every problem. The cost of the run is a rough guess from a few images on this machine;
`owlsam estimate` measures it.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from owlsam_ray import storage
from owlsam_ray.config.reduce import allowed_failures
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import ConfigError, FailedImagesError, InputError, PreflightError
from owlsam_ray.inference.suppress import label_thresholds
from owlsam_ray.models.shipped import check_shipped
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import MEBIBYTE, Allocation, allocate, check_object_store
from owlsam_ray.plan.moved_images import with_checked_moves
from owlsam_ray.plan.plan import list_dataset
from owlsam_ray.plan.selection import select_images
from owlsam_ray.run.guard import check_writable
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.manifest_writer import shard_size
from owlsam_ray.run.record import run_directory
from owlsam_ray.run.run import Run, open_run
from owlsam_ray.run.shards import done_shards
from owlsam_ray.terminal import Show, silent
from owlsam_ray.trial.images import Sample, label_sample
from owlsam_ray.trial.steps import Done, Steps
from owlsam_ray.vocabulary import Vocabulary, resolve_vocabulary

if TYPE_CHECKING:
    from owlsam_ray.inference.queries import EmbeddedQueries


@dataclass(frozen=True, slots=True)
class _Directory:
    """The run directory, which may already hold a plan."""

    run: Run | None
    left: int
    """Images without labels; 0 without a plan."""


@dataclass(frozen=True, slots=True)
class _Dataset:
    """The images to label."""

    left: int
    """Images without labels."""
    rows: list[dict[str, Any]]
    """A sample of the images, as rows of the listing or the manifest."""
    categories: list[dict[str, Any]]
    shard_bytes: int
    """Estimated encoded bytes of a large shard."""


def check_run(
    config: RunConfig, *, images: int = 8, say: Callable[[str], None] = lambda line: None, show: Show = silent
) -> dict[str, Any]:
    """Try everything that a run needs.

    Args:
        config: the run's config. If the run is already planned, the images of the plan are used.
        images: size of the evenly spread sample of images that goes through all stages, from storage to masks.
        say: called with one line for each step.
        show: called with the progress of the listing.

    Returns:
        `steps`: step, ok (None: not tried), seconds, detail; `images` to label; `labelled` images of the sample, and
        `ok`, `empty`, `failed` and the `failed_images` among them; `images_per_s` of one actor, `actors` and `hours`,
        all rough; `predictions_bytes` and `free_bytes`. Values that depend on a failed step are None.

    Raises:
        OwlsamError: the error of the first step that failed, with this dictionary as its second argument.
    """
    if images < 1:
        raise ConfigError(f"--images is {images}: it must be at least 1")
    steps = Steps(say)
    steps.run("run file", _try_run_file, config)
    directory = steps.run("run directory", _try_directory, config)
    dataset = steps.run("dataset", _try_dataset, config, directory, images, show)
    vocabulary = None
    if dataset is None and config.vocabulary.categories == "dataset":
        steps.skip("vocabulary")
    else:
        own = dataset.categories if dataset is not None else []
        vocabulary = steps.run("vocabulary", _try_vocabulary, config, directory, own)
    allocation = steps.run("resources", _try_resources, config)
    models = steps.run("weights", _try_weights, config)
    queries = None
    if vocabulary is None or models is None:
        steps.skip("prompts")
    else:
        queries = steps.run("prompts", _try_prompts, config, vocabulary, models)
    sample = None
    if dataset is None or allocation is None or models is None or queries is None:
        steps.skip("images")
    else:
        sample = steps.run("images", _try_images, config, allocation, models, queries, dataset.rows)
    summary = _estimated(dataset, allocation, sample)
    if dataset is None or allocation is None or config.run is None:
        steps.skip("space")
    else:
        steps.run("space", _try_space, config, allocation, dataset, summary)
    summary |= {"planned": directory is not None and directory.run is not None, "steps": steps.reported}
    if summary["hours"] is not None:
        say(_in_words(summary))
    if steps.first_error is not None:
        error = steps.first_error
        others = sum(step["ok"] is False for step in steps.reported) - 1
        more = f" ({others} more step(s) failed, see above)" if others else ""
        raise type(error)(f"{error.args[0]}{more}", summary)
    return summary


def _try_run_file(config: RunConfig) -> Done[bool]:
    """Report the run file, which has already been read."""
    return Done(True, f"{config.data.source} dataset, {config.detector.model} and {config.segment.model}")


def _try_directory(config: RunConfig) -> Done[_Directory]:
    """Check that the run directory is writable and that its plan, if any, has the same settings."""
    run_url = run_directory(config)
    with _nothing_new(run_url):
        check_writable(run_url)
        run = open_run(config)
    if run is None:
        return Done(_Directory(None, 0), f"{run_url}, no plan yet")
    run = with_checked_moves(run)
    manifest = run.manifest
    done = sum(manifest.shard_span(shard)[1] for shard in done_shards(run_url) if shard < manifest.num_shards)
    left = manifest.num_images - done
    detail = f"{run_url}, planned: {manifest.num_images:,} images, {left:,} of them without labels"
    return Done(_Directory(run, left), detail)


@contextlib.contextmanager
def _nothing_new(run_url: str) -> Iterator[None]:
    """On exit, remove directories created meanwhile, from this one upwards, if they are empty."""
    filesystem, path = storage.open_filesystem(run_url)
    new: list[str] = []
    while storage.is_local(filesystem) and not os.path.exists(path):
        new.append(path)
        path = os.path.dirname(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for each in new:
                os.rmdir(each)


def _try_dataset(config: RunConfig, directory: _Directory | None, images: int, show: Show) -> Done[_Dataset]:
    """Find the images that are planned, or that would be planned."""
    if directory is not None and directory.run is not None:
        return _of_plan(directory.run.manifest, directory.left, images, max_file_mb=config.decode.max_file_mb)
    listing = list_dataset(config)
    with tempfile.TemporaryDirectory(prefix="owlsam-check-") as folder:
        spool, wanted, _ = select_images(listing, config.plan, Path(folder), show=show)
        chosen = np.flatnonzero(wanted)
        if len(chosen) == 0:
            raise InputError("no image to label: check data, plan.splits and plan.categories in the run file")
        rows = spool.rows_at(chosen[_spread(len(chosen), images)])
    size = shard_size(
        len(chosen),
        config.resources.shard_size,
        mean_bytes=spool.mean_bytes,
        shard_max_mb=config.resources.shard_max_mb,
    )
    dataset = _Dataset(len(chosen), rows, listing.categories, round(size * spool.mean_bytes))
    return Done(dataset, f"{len(chosen):,} of {spool.num_listed:,} listed images, in shards of {size}")


def _of_plan(manifest: Manifest, left: int, images: int, *, max_file_mb: int) -> Done[_Dataset]:
    """Describe the dataset from the plan, without listing it."""
    rows = []
    for shard in _spread(manifest.num_shards, images):
        of_shard = manifest.read_shard(int(shard)).to_pylist()
        each = -(-images // min(images, manifest.num_shards))
        rows += [of_shard[int(place)] for place in _spread(len(of_shard), each)]
    categories = manifest.parts[0].source["categories"]
    dataset = _Dataset(left, rows[:images], categories, manifest.max_shard_bytes(max_file_mb=max_file_mb))
    return Done(dataset, f"{manifest.num_images:,} planned images in {manifest.num_shards:,} shards")


def _spread(total: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """At most `count` evenly spread positions below `total`, ascending."""
    count = min(total, count)
    return np.arange(count) * total // max(count, 1)


def _try_vocabulary(
    config: RunConfig, directory: _Directory | None, categories: list[dict[str, Any]]
) -> Done[Vocabulary]:
    run = directory.run if directory is not None else None
    vocabulary = run.record.vocabulary if run is not None else resolve_vocabulary(config.vocabulary, categories)
    label_thresholds(config.suppress, vocabulary.category_names)
    return Done(vocabulary, f"{len(vocabulary.categories)} categories, {len(vocabulary.queries)} queries")


def _try_resources(config: RunConfig) -> Done[Allocation]:
    """Allocate the resources of an actor on this machine; on a remote cluster it may get more."""
    import torch

    resources = config.resources
    num_cpus = resources.num_cpus or len(os.sched_getaffinity(0))
    on_cluster = resources.ray_address is not None
    if on_cluster:
        changes = {"actors": 1, "cpus_per_actor": "auto", "gpus_per_actor": "auto", "fetch_cpus": 0.5}
        resources = resources.model_copy(update=changes)
        num_cpus = max(2, num_cpus)
    allocation = allocate(
        resources, num_cpus=num_cpus, num_gpus=torch.cuda.device_count(), segmenter=config.segment.model
    )
    unchecked = "one actor on this machine; the cluster's resources are not checked"
    where = unchecked if on_cluster else f"{allocation.actors} actor(s)"
    return Done(allocation, f"{where}, {allocation.device}, {allocation.cpus_per_actor:g} CPU each")


def _try_weights(config: RunConfig) -> Done[ModelPaths]:
    from owlsam_ray.models.load import find_models

    check_shipped(config.detector.weights, config.segment.weights)
    models = find_models(config.detector, config.segment)
    return Done(models, f"{config.detector.weights} and {config.segment.weights}")


def _try_prompts(config: RunConfig, vocabulary: Vocabulary, models: ModelPaths) -> Done["EmbeddedQueries"]:
    from owlsam_ray.inference.queries import embed_vocabulary

    queries = embed_vocabulary(vocabulary, config, detector_weights=models.detector)
    return Done(queries, f"{len(queries.embeddings)} embedded")


def _try_images(
    config: RunConfig,
    allocation: Allocation,
    models: ModelPaths,
    queries: "EmbeddedQueries",
    rows: list[dict[str, Any]],
) -> Done[Sample]:
    """Fetch and label the sample; failures are an error only if the run would not tolerate their number."""
    sample = label_sample(rows, config, allocation, models=models, queries=queries)
    counts, failed = sample.counts(), sample.failed_images
    named = "; ".join(f"{each['file_name']}: {each['reason']}" for each in failed)
    if counts["failed"] > allowed_failures(config.reduce.max_failed, len(rows)):
        error = FailedImagesError(
            f"{counts['failed']} of {len(rows)} images failed ({named}), more than reduce.max_failed "
            f"({config.reduce.max_failed}) allows"
        )
        return Done(sample, "", error)
    rate = "" if sample.images_per_s is None else f", {sample.images_per_s:.2f} images/s"
    detail = f"{counts['ok']} ok, {counts['empty']} empty, {counts['failed']} failed on {allocation.device}{rate}"
    return Done(sample, f"{detail} ({named})" if named else detail)


def _estimated(dataset: _Dataset | None, allocation: Allocation | None, sample: Sample | None) -> dict[str, Any]:
    """Extrapolate from the sample to all images."""
    summary: dict[str, Any] = {
        "images": dataset.left if dataset is not None else None,
        "actors": allocation.actors if allocation is not None else None,
        "labelled": 0,
        "ok": 0,
        "empty": 0,
        "failed": 0,
        "failed_images": [],
        "images_per_s": None,
        "hours": None,
        "predictions_bytes": None,
        "free_bytes": None,
    }
    if sample is None or dataset is None or allocation is None:
        return summary
    summary |= sample.counts() | {"failed_images": sample.failed_images}
    if sample.bytes_per_image is not None:
        summary["predictions_bytes"] = round(sample.bytes_per_image * dataset.left)
    if sample.images_per_s is not None:
        hours = dataset.left / (sample.images_per_s * allocation.actors) / 3600
        summary |= {"images_per_s": round(sample.images_per_s, 3), "hours": round(hours, 3)}
    return summary


def _try_space(config: RunConfig, allocation: Allocation, dataset: _Dataset, summary: dict[str, Any]) -> Done[bool]:
    """Check that shard files fit the disk and shards in flight fit the object store, where the sizes are known."""
    resources = config.resources
    free, needed = storage.free_bytes(run_directory(config)), summary["predictions_bytes"]
    summary["free_bytes"] = free
    if free is not None and needed is not None and needed > free:
        raise PreflightError(
            f"roughly {needed / 1e9:.1f} GB of shards do not fit in {config.run}, which has {free / 1e9:.1f} GB free: "
            "free space, or choose another run directory"
        )
    details = [] if needed is None else [f"roughly {needed / 1e9:.2f} GB of shards"]
    details += [] if free is None else [f"{free / 1e9:.1f} GB free"]
    if resources.object_store_mb is not None and resources.ray_address is None:
        store_bytes = resources.object_store_mb * MEBIBYTE
        check_object_store(allocation, resources, shard_bytes=dataset.shard_bytes, store_bytes=store_bytes)
        details.append("shards in flight fit resources.object_store_mb")
    return Done(True, ", ".join(details))


def _in_words(summary: dict[str, Any]) -> str:
    return (
        f"roughly {summary['hours']:.1f} hours for {summary['images']:,} images with {summary['actors']} actor(s) like "
        f"this machine's, extrapolated from {summary['labelled']} images; `owlsam estimate` measures it"
    )
