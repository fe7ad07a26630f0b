"""One attempt at a run: guard, preflight, waves of shards, and an orderly end.

The same call again resumes: what is done is read from the listing, never from a database.
"""

import contextlib
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.data.exceptions import SystemException
from ray.exceptions import RayError

from owlsam_ray import pipeline, storage
from owlsam_ray.config import RunConfig
from owlsam_ray.errors import IncompleteError, InterruptedRunError, OwlsamError, PreflightError
from owlsam_ray.guard import (
    QUERY_FILE,
    RunRecord,
    check_writable,
    fingerprint_parts,
    forget_plan,
    guard_labels,
    guard_numerics,
    numerics_of,
    run_directory,
)
from owlsam_ray.ledger import PREDICTIONS, Tally
from owlsam_ray.manifest import Manifest
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.plan import plan_run
from owlsam_ray.progress import ProgressWatcher
from owlsam_ray.resources import allocate, check_nodes, check_object_store

_log = logging.getLogger(__name__)

_STORAGE_IS_FULL_OR_CLOSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}
_FRUITLESS_WAVES = 2
"""Waves in a row that may break without one new shard before the run gives up."""


def annotate_run(
    config: RunConfig, *, allow_numerics_change: bool = False, show: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Label everything that is not labelled yet; plans first when nobody did.

    Args:
        config: of the run.
        allow_numerics_change: go on with another device, dtype, batch or library version than earlier attempts.
        show: called with the progress now and then.

    Returns:
        Counts over the whole run, and what this attempt added.

    Raises:
        OwlsamError: see `errors` for the kinds and their exit codes.
    """
    run_url = run_directory(config)
    storage.configure(config.storage.policy())
    for url in (run_url, config.data.images, *config.data.files):
        if url is not None and url.startswith("memory:"):
            raise PreflightError(f"{url} lives in one process, and Ray's actors are others: use a disk or object store")
    check_writable(run_url)
    plan = plan_run(config)
    record, manifest = plan.record, plan.manifest
    if plan.new:
        _log.info("planned %d images in %d shards", manifest.num_images, manifest.num_shards)
    # Imported here: with torch they take eight seconds, and a wrong path in the run file is told without them.
    from owlsam_ray.models.load import find_models

    try:
        models = find_models(config.detector, config.segment)
        if record.fingerprint is None:
            embed_run_queries(config, record, models.detector, run_url)
    except (OwlsamError, OSError):
        if plan.new:  # by this call, for settings that do not work: corrected ones must not be refused
            forget_plan(run_url)
        raise
    weights = {"detector": models.detector, "segmenter": models.segmenter}
    record = guard_labels(record, fingerprint_parts(config, record, weights=weights, run_url=run_url), run_url)

    tally = Tally(run_url, manifest.num_images, manifest.num_shards, record.fingerprint).refresh()
    done_before = tally.images_done
    if len(tally.done) == manifest.num_shards:
        _log.info("nothing to do: all %d shards of %s are done", manifest.num_shards, run_url)
        return tally.summary() | {"new": 0, "seconds": 0.0}
    if done_before:
        _log.info("resuming: %d of %d shards are done", len(tally.done), manifest.num_shards)

    start = time.monotonic()
    stop_url = storage.join(run_url, "attempts", f"{_attempt_name()}.stop")
    try:
        with _ray(config), _stop_on_signals(stop_url, config.resources.grace_s):
            job = _prepare(config, record, manifest, models, stop_url)
            numerics = numerics_of(job.allocation, config.resources.dtype)
            job = replace(job, record=guard_numerics(record, numerics, run_url, allow_change=allow_numerics_change))
            storage.remove_stale_temporaries(storage.join(run_url, PREDICTIONS))
            given = {"actors": job.allocation.actors, "gpus": job.allocation.actors * job.allocation.gpus_per_actor}
            with ProgressWatcher(tally, interval_s=config.logging.progress_s, show=show) as watcher:
                _label(job, watcher)
    except _GraceOverError:
        raise _interrupted(tally.refresh(), "the grace time is over; shards in hand were dropped") from None
    return tally.summary() | {
        "new": tally.images_done - done_before,
        "seconds": round(time.monotonic() - start, 1),
        "stage_s": {stage: round(seconds, 1) for stage, seconds in tally.stage_s.items()},
        **given,
    }


def embed_run_queries(config: RunConfig, record: RunRecord, detector_weights: Path, run_url: str) -> None:
    """Run the text tower once, and the image tower on exemplars; keep the result in the run directory.

    Raises:
        InputError: a prompt is longer than the text tower takes, or an exemplar cannot be read.
    """
    from safetensors.torch import save as save_safetensors

    from owlsam_ray.queries import embed_queries

    embeddings = embed_queries(
        record.queries,
        detector_weights=detector_weights,
        settings=config.detector,
        ensemble=config.vocabulary.ensemble,
    )
    storage.write_atomic(storage.join(run_url, QUERY_FILE), save_safetensors({"queries": embeddings.contiguous()}))
    prompts = sum(len(query.prompts) for query in record.queries)
    exemplars = sum(query.exemplar is not None for query in record.queries)
    _log.info("embedded %d prompts and %d exemplars as %d queries", prompts, exemplars, len(record.queries))


def _attempt_name() -> str:
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{socket.gethostname()}-{os.getpid()}"


def _prepare(
    config: RunConfig, record: RunRecord, manifest: Manifest, models: ModelPaths, stop_url: str
) -> pipeline.Job:
    """Preflight against the cluster."""
    totals = pipeline.cluster_totals()
    allocation = allocate(
        config.resources,
        num_cpus=totals["num_cpus"],
        num_gpus=totals["num_gpus"],
        segmenter=config.segment.model,
    )
    check_nodes(allocation, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    check_object_store(
        allocation, config.resources, shard_bytes=manifest.max_shard_bytes, store_bytes=totals["store_bytes"]
    )
    _log.info(
        "%d actor(s) on %s, %g CPU and %g GPU each",
        allocation.actors,
        allocation.device,
        allocation.cpus_per_actor,
        allocation.gpus_per_actor,
    )
    return pipeline.Job(
        run_url=run_directory(config),
        config=config,
        record=record,
        manifest=manifest,
        allocation=allocation,
        models=models,
        stop_url=stop_url,
    )


def _label(job: pipeline.Job, watcher: ProgressWatcher) -> None:
    """Hand over waves of pending shards until none is left.

    A wave that breaks is built again from what is still missing; one that breaks without any progress is given up.
    """
    fruitless = 0
    tally = watcher.look()
    while len(tally.done) < job.manifest.num_shards:
        if job.stopping():
            raise _interrupted(tally, "asked to stop")
        done_before = len(tally.done)
        wave = []
        for shard in job.manifest.iter_shards():
            if shard not in tally.done:
                wave.append(shard)
            if len(wave) == job.config.resources.wave_shards:
                break
        try:
            pipeline.run_wave(job, wave)
        except RayError as error:
            cause = root_cause(error)
            tally = watcher.look()
            fruitless = 0 if len(tally.done) > done_before else fruitless + 1
            _give_up_on(cause, fruitless)
            _log.warning("a wave broke and is built again: %s", _in_one_line(cause))
            continue
        tally = watcher.look()
        fruitless = 0 if len(tally.done) > done_before else fruitless + 1
        if fruitless >= _FRUITLESS_WAVES and not job.stopping():
            raise IncompleteError(f"{len(wave)} shards were handed to Ray and none came back: see Ray's logs")


def _give_up_on(cause: BaseException, fruitless: int) -> None:
    """Raise what no second try can mend, in words that say what to do."""
    if isinstance(cause, OwlsamError):
        raise cause
    if isinstance(cause, OSError) and cause.errno in _STORAGE_IS_FULL_OR_CLOSED:
        raise IncompleteError(
            f"cannot write a shard: {cause.strerror} ({cause.filename or 'run directory'}). Finished shards are kept. "
            "Free space or fix the permissions, then call the same command again."
        ) from cause
    if fruitless >= _FRUITLESS_WAVES:
        raise IncompleteError(
            f"gave up after {fruitless} tries without a new shard: {_in_one_line(cause)}. Finished shards are kept; "
            "logging.level=debug shows the actors' output."
        ) from cause


def root_cause(error: BaseException) -> BaseException:
    """The exception inside Ray's wrappers that our code or a library raised."""
    inner = getattr(error, "cause", None) or error.__cause__
    if not isinstance(inner, BaseException) or isinstance(inner, SystemException):  # Ray's mark of its own errors
        return error
    return root_cause(inner)


def _in_one_line(error: BaseException) -> str:
    """Kind and message; of Ray's own errors the last line, where the traceback that they quote ends."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1 if isinstance(error, RayError) else 0].strip()}"


def _interrupted(tally: Tally, why: str) -> InterruptedRunError:
    return InterruptedRunError(
        f"interrupted ({why}): {len(tally.done)} of {tally.num_shards} shards are done; call the same command again"
    )


@contextlib.contextmanager
def _ray(config: RunConfig) -> Iterator[None]:
    """Ray for the time of an attempt; one that this process already had is left running."""
    try:
        ours = pipeline.start_ray(config.resources, level=config.logging.level)
    except SystemExit:
        # While it starts, Ray's own SIGTERM handler is in place.
        raise InterruptedRunError("interrupted while Ray was starting; call the same command again") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise IncompleteError(f"Ray does not start: {_in_one_line(error)}") from error
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


class _GraceOverError(Exception):
    """Raised in the main thread when shards in hand did not finish in time."""


@contextlib.contextmanager
def _stop_on_signals(stop_url: str, grace_s: float) -> Iterator[None]:
    """SIGINT and SIGTERM: begin no more shards, and let those in hand finish within the grace time.

    Installed after `ray.init`, which puts its own SIGTERM handler in place.
    """

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if storage.exists(stop_url):
            raise _GraceOverError  # asked twice
        _log.warning("%s: finishing the shards in hand, at most %g s", signal.Signals(number).name, grace_s)
        storage.write_atomic(stop_url, b"")
        signal.setitimer(signal.ITIMER_REAL, max(grace_s, 0.01))

    def grace_is_over(number: int, frame: FrameType | None) -> None:
        raise _GraceOverError

    handlers = {signal.SIGINT: ask_to_stop, signal.SIGTERM: ask_to_stop, signal.SIGALRM: grace_is_over}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        storage.remove(stop_url)
