"""Run one attempt: claim, guard, preflight, waves of shards, and an orderly end.

The same call again resumes the run: finished shards are found by listing their files, never in a database.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from owlsam_ray import storage
from owlsam_ray.annotate.memory_need import KillWatch, check_memory, check_node_memory, memory_need
from owlsam_ray.annotate.pipeline import AttemptContext
from owlsam_ray.annotate.waves import Labeller, StoppedError
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import InterruptedRunError, OwlsamError, PreflightError
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import allocate, check_nodes, check_object_store
from owlsam_ray.parallel.ending import before_end
from owlsam_ray.parallel.lost_ray import SUFFIX, LossCount
from owlsam_ray.parallel.node_memory import memory_limit
from owlsam_ray.parallel.ray_cluster import cluster_totals, start_ray, stop_ray
from owlsam_ray.parallel.ray_watch import watch_ray
from owlsam_ray.parallel.signals import GraceOverError, as_interrupts, stop_on_signals
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.run import in_hand
from owlsam_ray.run.attempts import LABEL, Attempt, Slice
from owlsam_ray.run.claim import claim, claim_setup
from owlsam_ray.run.counts import RunCounts
from owlsam_ray.run.guard import (
    check_writable,
    fingerprint_parts,
    guard_labels,
    guard_numerics,
    numerics_of,
)
from owlsam_ray.run.paths import ATTEMPTS, PREDICTIONS, PROGRESS_FILE, QUERY_FILE
from owlsam_ray.run.progress import ProgressWatcher
from owlsam_ray.run.proof import check_failures
from owlsam_ray.run.record import forget_plan, run_directory
from owlsam_ray.run.retry import Retry
from owlsam_ray.run.run import Run

_log = logging.getLogger(__name__)
_WHOLE = Slice()
_ADVICE = (
    "Usually memory is short: give the job more, or lower resources.actors, resources.shards_in_flight or "
    "resources.object_store_mb. Finished shards are kept."
)


@dataclass(frozen=True, slots=True)
class AttemptOptions:
    """Options of one call that are not in the run file."""

    part: Slice = _WHOLE
    """Slice of shards to label; concurrent attempts can share a run."""
    takeover: bool = False
    """Stop a live attempt and continue in its place."""
    retry: Retry | None = None
    """Failed rows to retry once everything is labelled; None retries transient failures."""
    judge: bool = False
    """Raise FailedImagesError if more images failed than `reduce.max_failed` allows; ignored for a slice."""
    allow_numerics_change: bool = False
    """Continue with a different device, dtype, batch or library version than earlier attempts."""


def annotate_run(
    config: RunConfig,
    options: AttemptOptions = AttemptOptions(),
    *,
    show: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Label all images that are not labelled yet; plan the run first if it has no plan.

    Args:
        config: the run's config.
        options: options of this call.
        show: called with the progress at intervals.

    Returns:
        Counts over the slice (by default the whole run), and what this attempt added.

    Raises:
        OwlsamError: see `errors` for the kinds and their exit codes.
    """
    run_url = run_directory(config)
    storage.configure(config.storage.policy())
    for url in (run_url, config.data.images, *config.data.files):
        if url is not None and url.startswith("memory:"):
            raise PreflightError(f"{url} exists only in this process, not in Ray's actors: use a disk or object store")
    check_writable(run_url)
    with (
        claim(
            run_url,
            scope=LABEL,
            part=options.part,
            heartbeat_s=config.resources.heartbeat_s,
            takeover_s=config.resources.takeover_s,
            takeover=options.takeover,
        ) as attempt,
        before_end(attempt.sign_off),
    ):
        run, models = _set_up(config)
        counts = _annotate(run, models, options, attempt, show)
        counts["fingerprint"] = run.record.fingerprint[:16] if run.record.fingerprint else None
        if options.judge and options.part.is_whole:
            check_failures(config.reduce.max_failed, counts)  # here, because sign-off records its exit code
        return counts


def _set_up(config: RunConfig) -> tuple[Run, ModelPaths]:
    """Plan, embed and guard under an exclusive claim, because attempts of a job array start at the same time."""
    with claim_setup(run_directory(config), config.resources) as setup:
        plan = plan_run(config, raise_if_taken_over=setup.raise_if_taken_over)
        run = plan.run
        if plan.new:
            _log.info("planned %d images in %d shards", run.manifest.num_images, run.manifest.num_shards)
        # Imported here: it may load torch, which is not needed to report a wrong path in the run file.
        from owlsam_ray.models.load import find_models

        try:
            models = find_models(config.detector, config.segment)
            if run.record.fingerprint is None:
                embed_run_queries(run, models.detector)
            parts = fingerprint_parts(run, weights={"detector": models.detector, "segmenter": models.segmenter})
        except Exception:
            if plan.new:  # this call planned with settings that do not work; corrected ones must not be refused
                forget_plan(run.url)
            raise
        setup.raise_if_taken_over()
        return guard_labels(run, parts), models


def _annotate(
    run: Run,
    models: ModelPaths,
    options: AttemptOptions,
    attempt: Attempt,
    show: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run the attempt, after its slice is claimed and the run is set up."""
    config = run.config
    mine = options.part.shards(run.manifest.num_shards)
    run_counts = RunCounts(run, shards=mine)
    listed = run_counts.refresh_listing()
    retries = _retries(options.retry)
    if len(listed) == len(mine):
        run_counts.refresh()
        if not any(
            run_counts.transient_shards if retry.only_transient else run_counts.failed_shards for retry in retries
        ):
            _log.info("nothing to do: all %d shards of %s are done", len(mine), _named(run.url, options.part))
            in_hand.clear(run.url, mine)  # left by an attempt that was killed at its very end
            return run_counts.summary() | {"new": 0, "seconds": 0.0}
    elif listed:
        _log.info("resuming: %d of %d shards are done", len(listed), len(mine))
    start = time.monotonic()
    losses = LossCount(
        storage.join(run.url, ATTEMPTS, f"slice-{options.part.index}-of-{options.part.count}{SUFFIX}"),
        progress=lambda: len(run_counts.refresh_listing()),
        state=lambda: f"{len(run_counts.done)} of {run_counts.num_shards} shards are done",
    )
    kills = KillWatch(done=lambda: len(run_counts.done))
    try:
        with (
            _ray(config, losses, kills),
            stop_on_signals(attempt.stop_url, config.resources.grace_s) as asked,
        ):
            context = _prepare(run, models, attempt)
            with claim_setup(run.url, config.resources) as setup:
                setup.raise_if_taken_over()
                numerics = numerics_of(context.allocation, config.resources.dtype)
                guarded = guard_numerics(run, numerics, allow_change=options.allow_numerics_change)
            context = replace(context, run=guarded)
            kills.need = memory_need(context.allocation, (models.detector, models.segmenter))
            storage.remove_stale_temporaries(storage.join(run.url, PREDICTIONS))
            with _watch(config, options.part, run_counts, attempt, show) as watcher:
                labeller = Labeller(context, run_counts, watcher, attempt, asked, isolating=kills.pause)
                labeller.label()
                for retry in retries:
                    labeller.retry(retry)
        in_hand.clear(run.url, mine)
    except StoppedError:
        raise _interrupted(run_counts, "asked to stop") from None
    except SystemExit:
        # Raised by Ray's own signal handler, which is briefly in place while Ray starts and ends.
        raise _interrupted(run_counts, "asked to stop a second time") from None
    except GraceOverError:
        in_hand.release(run.url, attempt.id)  # no process died because of these
        raise _interrupted(run_counts, "the grace time is over; shards in progress were dropped") from None
    return run_counts.summary() | {
        "new": run_counts.images_fresh,
        "seconds": round(time.monotonic() - start, 1),
        "stage_s": {stage: round(seconds, 1) for stage, seconds in run_counts.stage_s.items()},
        "actors": context.allocation.actors,
        "gpus": context.allocation.actors * context.allocation.gpus_per_actor,
    }


def _retries(asked: Retry | None) -> list[Retry]:
    """What to retry at the end: always transient failures; each row only once."""
    if asked is None:
        return [Retry("transient")]
    if asked.selects("", "transient"):
        return [asked]
    return [Retry("transient", but=asked.what), asked]


def _named(run_url: str, part: Slice) -> str:
    return run_url if part.is_whole else f"slice {part} of {run_url}"


def _watch(
    config: RunConfig, part: Slice, run_counts: RunCounts, attempt: Attempt, show: Callable[[dict[str, Any]], None]
) -> ProgressWatcher:
    """Report progress to `show`, to `progress.json`, and with the heartbeats to other machines."""

    def report(state: dict[str, Any]) -> None:
        attempt.set_report(progress=state)
        show(state)

    return ProgressWatcher(
        run_counts,
        interval_s=config.logging.progress_s,
        show=report,
        file_name=PROGRESS_FILE if part.is_whole else f"progress-{part.index}-of-{part.count}.json",
    )


def embed_run_queries(run: Run, detector_weights: Path) -> None:
    """Run the text tower once, and the image tower on exemplars; save the result in the run directory.

    Raises:
        InputError: a prompt is longer than the text tower allows, or an exemplar cannot be read.
    """
    from owlsam_ray.inference.queries import embed_vocabulary, save_embeddings

    record = run.record
    queries = embed_vocabulary(record.vocabulary, run.config, detector_weights=detector_weights)
    save_embeddings(storage.join(run.url, QUERY_FILE), queries)
    prompts = sum(len(query.prompts) for query in record.queries)
    exemplars = sum(query.exemplar is not None for query in record.queries)
    _log.info("embedded %d prompts and %d exemplars as %d queries", prompts, exemplars, len(record.queries))


def _prepare(run: Run, models: ModelPaths, attempt: Attempt) -> AttemptContext:
    """Check that the cluster has the resources for the run."""
    config = run.config
    totals = cluster_totals()
    allocation = allocate(
        config.resources,
        num_cpus=totals["num_cpus"],
        num_gpus=totals["num_gpus"],
        segmenter=config.segment.model,
    )
    check_nodes(allocation, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    check_object_store(
        allocation,
        config.resources,
        shard_bytes=run.manifest.max_shard_bytes(max_file_mb=config.decode.max_file_mb),
        store_bytes=totals["store_bytes"],
    )
    need = memory_need(allocation, (models.detector, models.segmenter))
    if config.resources.ray_address is None:
        check_memory(need, memory_limit())
    else:
        check_node_memory(need, [node["Resources"].get("memory") for node in ray.nodes() if node["Alive"]])
    _log.info("memory: the run needs at least %s", need)
    _log.info(
        "%d actor(s) on %s, %g CPU and %g GPU each",
        allocation.actors,
        allocation.device,
        allocation.cpus_per_actor,
        allocation.gpus_per_actor,
    )
    return AttemptContext(
        run=run,
        allocation=allocation,
        models=models,
        attempt=attempt.id,
        stop_url=attempt.stop_url,
        fence_url=attempt.fence_url,
    )


def _interrupted(run_counts: RunCounts, why: str) -> InterruptedRunError:
    return InterruptedRunError(f"interrupted ({why}): {_shards_done(run_counts)}; run the same command again")


def _shards_done(run_counts: RunCounts) -> str:
    """State how many shards are done, from a fresh listing: the last one may miss the latest shards."""
    with contextlib.suppress(OSError, OwlsamError):
        run_counts.refresh_listing()
    return f"{len(run_counts.done)} of {run_counts.num_shards} shards are done"


@contextlib.contextmanager
def _ray(config: RunConfig, losses: LossCount, kills: KillWatch) -> Iterator[None]:
    """Run Ray during an attempt; a Ray that was already running in this process is left running."""
    try:
        ours = start_ray(config.resources, level=config.logging.level)
    except SystemExit:
        # Raised by Ray's own SIGTERM handler, which is in place while Ray starts.
        raise InterruptedRunError("interrupted while Ray was starting; run the same command again") from None
    as_interrupts()
    try:
        with watch_ray(lambda cause: losses.count(cause, advice=_ADVICE), also=kills.cause):
            yield
    finally:
        losses.clear()  # not a loss of Ray: control does not return here after one
        if ours:
            stop_ray()
