"""Plan a run: list the images once, select and check them, and freeze ids and shards. Later calls only append.

A listing streams through a temporary file on this machine's disk, where duplicate images are found and the selection is
made; only then are ids and shards frozen. `run.json` is written last and states how many parts of the manifest are
valid, so that a killed plan or extension leaves nothing that another call would take as complete.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from owlsam_ray import __version__, storage
from owlsam_ray.config.data import PlanConfig
from owlsam_ray.config.reduce import allowed_failures
from owlsam_ray.config.run import RunConfig
from owlsam_ray.config.vocabulary import is_vocabulary_file
from owlsam_ray.errors import FailedImagesError, GuardError, InputError
from owlsam_ray.inference.suppress import label_thresholds
from owlsam_ray.plan.image_check import verify_images
from owlsam_ray.plan.moved_images import with_checked_moves
from owlsam_ray.plan.selection import already_planned, named, select_images, selection_of
from owlsam_ray.run.guard import check_same_vocabulary
from owlsam_ray.run.manifest import Manifest, moved_uris
from owlsam_ray.run.manifest_writer import ShardLayout, shard_size, write_parts
from owlsam_ray.run.moved_data import Move
from owlsam_ray.run.paths import PREDICTIONS, RUN_FILE
from owlsam_ray.run.record import RunRecord, load_record, run_directory, save_record
from owlsam_ray.run.run import Run, open_run
from owlsam_ray.sources import Listing, ListingOptions, list_images
from owlsam_ray.sources.bad_rows import check_bad_rows
from owlsam_ray.sources.spool import Spool
from owlsam_ray.terminal import Show, silent
from owlsam_ray.vocabulary import Vocabulary, resolve_vocabulary

VERIFY_FILE = "verify.jsonl"
"""File of the images that failed the check of `plan.verify`, one line each."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned run, and what this call found and added."""

    run: Run
    new: int
    """Number of images that this call added; 0 if the run was already planned."""
    listed: int | None = None
    """Number of images in the listing, as far as it was read; None if this call did not list."""
    eligible: int | None = None
    """Number of distinct listed images that pass the filters, before limit and sample; None if this call did not list,
    a lower bound if a limit ended the reading early."""
    repeated: int = 0
    """Number of listed images that were left out as duplicates (`plan.duplicates: first`)."""
    bad: int = 0
    """Number of new rows of the dataset from which no image can be read."""


def plan_run(
    config: RunConfig,
    *,
    extend: bool = False,
    show: Show = silent,
    raise_if_taken_over: Callable[[], None] = lambda: None,
) -> Plan:
    """List the images once and freeze the layout; an existing plan is checked and kept.

    Args:
        config: the run's config.
        extend: add listed images that the run does not have yet, as further shards. Existing shards do not change;
            images that are no longer listed are kept.
        show: called with the progress.
        raise_if_taken_over: raises if another process has started planning instead of this one; called before anything
            is written.

    Raises:
        InputError: the dataset or the vocabulary is invalid, a threshold is for a category that is not in it, or there
            is no plan to extend.
        GuardError: the directory was planned with other settings or holds something else, or the listing contradicts
            the images that are already planned.
    """
    run = open_run(config, extending=extend)
    if run is None:
        run_url = run_directory(config)
        if extend:
            raise InputError(f"{run_url} holds no plan to extend (no {RUN_FILE}): run `owlsam plan` without --extend")
        if storage.list_names(storage.join(run_url, PREDICTIONS)):
            raise GuardError(
                f"{run_url} holds predictions but no {RUN_FILE}: restore that file, or choose another directory"
            )
        return _freeze(config, show=show, raise_if_taken_over=raise_if_taken_over)
    if extend:
        moves = _moves_of_extension(run)
        return _freeze(run.config, show=show, raise_if_taken_over=raise_if_taken_over, before=run, moves=moves)
    _check_names(run)
    _warn_of_other_selection(run)
    return Plan(with_checked_moves(run), 0)


def _moves_of_extension(run: Run) -> tuple[Move, ...]:
    """Find where the dataset has moved since the plan; empty if the new path holds a different dataset to add."""
    try:
        with_checked_moves(run)
    except GuardError:
        return ()
    return run.moves


def _freeze(
    config: RunConfig,
    *,
    show: Show,
    raise_if_taken_over: Callable[[], None],
    before: Run | None = None,
    moves: tuple[Move, ...] = (),
) -> Plan:
    """List, select, write the parts of the manifest, and make them valid.

    All parts use the paths of the first plan: with `moves`, URIs listed under new roots are written under the old ones.
    """
    run_url = run_directory(config)
    listing = list_dataset(config)
    back = [move.back() for move in moves]
    listing = replace(listing, tables=(moved_uris(table, back) for table in listing.tables))
    vocabulary = resolve_vocabulary(config.vocabulary, listing.categories)
    label_thresholds(config.suppress, [category.name for category in vocabulary.categories])
    if before is not None:
        check_same_vocabulary(vocabulary, before)
    with tempfile.TemporaryDirectory(prefix="owlsam-plan-") as folder:
        spool, wanted, repeated = select_images(listing, config.plan, Path(folder), show=show)
        next_id = 1
        if before is not None:
            old, next_id = already_planned(spool, before.manifest)
            wanted &= ~old
        count = int(wanted.sum())
        counts = {"listed": spool.num_listed, "eligible": len(spool) - repeated, "repeated": repeated}
        if count == 0 and before is not None:
            return Plan(before, 0, **counts)
        if count == 0:
            raise InputError(_nothing_left(config.plan, spool))
        bad = check_bad_rows(config, run_url, spool, wanted)
        _verify(config, run_url, (moved_uris(table, moves) for table in spool.tables(wanted)), count, show)
        raise_if_taken_over()
        _current_record(before, run_url)  # otherwise another call's parts would be taken for leftovers
        size = shard_size(
            count,
            config.resources.shard_size,
            mean_bytes=spool.mean_bytes,
            shard_max_mb=config.resources.shard_max_mb,
        )
        manifest = write_parts(
            run_url,
            _counted(spool.tables(wanted), "planned", count, show),
            ShardLayout(size, part_images=config.plan.part_images, max_file_mb=config.decode.max_file_mb),
            source={"info": listing.info, "licenses": listing.licenses, "categories": listing.categories},
            before=before.manifest if before else None,
            next_id=next_id,
        )
    record = _new_record(config, vocabulary, manifest, before, keep_places=bool(moves))
    raise_if_taken_over()
    save_record(run_url, record)
    return Plan(Run(record, manifest, config), count, bad=bad, **counts)


def _new_record(
    config: RunConfig, vocabulary: Vocabulary, manifest: Manifest, before: Run | None, *, keep_places: bool
) -> RunRecord:
    """Build the unsaved `run.json` of a plan or extension; `keep_places` keeps the dataset paths of the first plan."""
    fields: dict[str, Any] = {
        "config": config.model_dump(mode="json", exclude={"run"}),
        "layout_hash": manifest.layout_hash,
        "num_parts": len(manifest.parts),
    }
    now = _current_record(before, manifest.run_url)
    if now is not None:
        if keep_places:
            places = {name: now.config["data"][name] for name in ("images", "annotations", "files")}
            fields["config"]["data"] |= places
        return now.model_copy(update=fields)
    return RunRecord(
        owlsam_version=__version__,
        categories=vocabulary.categories,
        queries=vocabulary.queries,
        ids_per_image=config.detector.max_detections,
        **fields,
    )


def _current_record(before: Run | None, run_url: str) -> RunRecord | None:
    """Reload the record, with fields that an attempt may have set during the listing; None for a first plan.

    Raises:
        GuardError: another call has changed the plan meanwhile.
    """
    now = load_record(run_url)
    if (now.layout_hash if now else None) != (before.record.layout_hash if before else None):
        raise GuardError(f"{run_url} was planned or extended by another command meanwhile: run this one again")
    return now


def _check_names(run: Run) -> None:
    """Check that the content of the vocabulary file has not changed; a change counts as different settings.

    Raises:
        GuardError: the content has changed.
    """
    settings = run.config.vocabulary
    if not is_vocabulary_file(settings.categories):
        return
    try:
        vocabulary = resolve_vocabulary(settings, [])
    except InputError as error:
        _log.warning("the run keeps its planned vocabulary, because the vocabulary file cannot be read: %s", error)
        return
    check_same_vocabulary(vocabulary, run)


def list_dataset(config: RunConfig) -> Listing:
    """List the dataset of a config, before any selection.

    Raises:
        InputError: the dataset is invalid; see `sources`.
    """
    workers = config.plan.workers if config.plan.workers != "auto" else len(os.sched_getaffinity(0))
    return list_images(
        config.data, ListingOptions(workers=workers, keep_whole=config.plan.damaged_files == "keep_whole")
    )


def _verify(config: RunConfig, run_url: str, tables: Iterable[pa.Table], count: int, show: Show) -> None:
    """Check the images as `plan.verify` requests.

    Raises:
        FailedImagesError: more images fail than the run tolerates; nothing is planned.
    """
    mode = config.plan.verify
    if mode == "none":
        return
    with storage.open_atomic(storage.join(run_url, VERIFY_FILE)) as out:
        found = verify_images(
            tables,
            mode,
            out,
            threads=config.resources.fetch_threads,
            decode=config.decode,
            show=lambda done: show("verified", done, count),
        )
    if not found.failed:
        return
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(found.failed_by_reason.items()))
    where = f"{found.failed} of {found.images} images would fail ({reasons}): see {run_url}/{VERIFY_FILE}"
    allowed = allowed_failures(config.reduce.max_failed, found.images)
    if found.failed > allowed:
        raise FailedImagesError(
            f"{where}. reduce.max_failed ({config.reduce.max_failed}) allows {allowed}, so nothing is planned. "
            "Fix the dataset, or raise reduce.max_failed.",
            {"images": found.images, "failed": found.failed, "failed_by_reason": dict(found.failed_by_reason)},
        )
    _log.warning("%s. They are planned, and become failed rows.", where)


def _counted(tables: Iterable[pa.Table], what: str, total: int, show: Show) -> Iterator[pa.Table]:
    done = 0
    for table in tables:
        yield table
        done += table.num_rows
        show(what, done, total)


def _nothing_left(plan: PlanConfig, spool: Spool) -> str:
    chosen = plan.model_dump(mode="json", include={"splits", "categories"}, exclude_defaults=True)
    if chosen and spool.num_listed:
        passed = ", ".join(f"plan.{key}={value}" for key, value in chosen.items())
        splits = f". The splits are {named(spool.splits)}" if plan.splits else ""
        return f"none of {spool.num_listed} images matches {passed}{splits}"
    return "there are no images to plan"


def _warn_of_other_selection(run: Run) -> None:
    """Warn if the existing plan was made with a different selection than the config requests."""
    before = selection_of(run.record.stored_config().plan)
    if selection_of(run.config.plan) != before:
        _log.warning(
            "the run keeps its planned selection, %s; `owlsam plan --extend` adds the images that it lacks",
            before or "all images",
        )
