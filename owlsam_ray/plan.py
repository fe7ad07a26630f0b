"""Which images a run labels, in which shards: listed once, then only appended to.

A listing streams through a temporary file on this machine's disk, where repeated images are found and a selection is
made; only then are ids and shards frozen. `run.json` is written last and says how many parts of the manifest count, so
that a plan or an extension that is killed leaves nothing that another call would take for whole.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray import __version__, storage
from owlsam_ray.config import PlanConfig, RunConfig, allowed_failures
from owlsam_ray.datasets import Listing, ListingOptions, list_images
from owlsam_ray.datasets.source import MAX_IMAGE_ID, raise_offences
from owlsam_ray.datasets.spool import Selection, Spool, digests_of, repeats, sample_mask, spool_listing
from owlsam_ray.errors import FailedImagesError, GuardError, InputError
from owlsam_ray.guard import (
    RUN_FILE,
    RunRecord,
    check_config,
    check_same_vocabulary,
    load_record,
    load_run_manifest,
    run_directory,
    save_record,
)
from owlsam_ray.manifest import Layout, Manifest, shard_size, write_parts
from owlsam_ray.settings import is_vocabulary_file
from owlsam_ray.stages.suppress import label_thresholds
from owlsam_ray.verify import verify_images
from owlsam_ray.vocabulary import resolve_vocabulary

_SELECTING = {"limit", "sample", "seed", "splits", "categories"}
VERIFY_FILE = "verify.jsonl"
"""Images that `plan.verify` found wanting, a line each."""
_log = logging.getLogger(__name__)

Show = Callable[[str, int, int | None], None]
"""Called with what is done (`listed`, `verified`, `planned`), how many images, and of how many where that is known."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned run."""

    record: RunRecord
    manifest: Manifest
    new: int
    """Images that this call added; 0: it was planned already."""
    listed: int | None = None
    """Images in the listing, as far as it was read; None when this call did not list."""
    eligible: int | None = None
    """Images of the listing that pass the filters, each once, before limit and sample; None when this call did not
    list, a lower bound where a limit ended the reading."""
    repeated: int = 0
    """Images of the listing that were left out because they stand in it twice (`plan.duplicates: first`)."""


def _silent(what: str, done: int, total: int | None) -> None:
    pass


def plan_run(config: RunConfig, *, extend: bool = False, show: Show = _silent) -> Plan:
    """List the images once and freeze the layout; an existing plan is checked and kept.

    Args:
        config: of the run.
        extend: add the images of the listing that the run does not have yet, as further shards. Old shards stay as they
            are; images that are no longer listed stay as well.
        show: progress.

    Raises:
        InputError: the dataset or the vocabulary is wrong, a threshold is for a category that is not in it, or there is
            nothing to extend.
        GuardError: the directory was planned with other settings, or holds something else; or the listing contradicts
            the images that are planned already.
    """
    run_url = run_directory(config)
    record = load_record(run_url)
    if record is None:
        if extend:
            raise InputError(f"{run_url} holds no plan to extend (no {RUN_FILE}): call `owlsam plan` without --extend")
        if storage.list_names(storage.join(run_url, "predictions")):
            raise GuardError(
                f"{run_url} holds predictions but no {RUN_FILE}: restore that file, or choose another directory"
            )
        return _freeze(config, show=show)
    check_config(config, record, data_too=not extend)
    manifest = load_run_manifest(run_url, record)
    if extend:
        return _freeze(config, show=show, before=Plan(record, manifest, 0))
    _check_names(config, record)
    _tell_other_selection(config.plan, record)
    return Plan(record, manifest, 0)


def _freeze(config: RunConfig, *, show: Show, before: Plan | None = None) -> Plan:
    """List, select, write the parts, and make them count."""
    run_url = run_directory(config)
    listing = list_dataset(config)
    vocabulary = resolve_vocabulary(config.vocabulary, listing.categories)
    label_thresholds(config.suppress, [category.name for category in vocabulary.categories])
    if before is not None:
        check_same_vocabulary(vocabulary, before.record, run_url)
    with tempfile.TemporaryDirectory(prefix="owlsam-plan-") as folder:
        spool, wanted, repeated = select_images(listing, config.plan, Path(folder), show=show)
        next_id = 1
        if before is not None:
            old, next_id = _already_planned(spool, before.manifest)
            wanted &= ~old
        count = int(wanted.sum())
        told = {"listed": spool.num_listed, "eligible": len(spool) - repeated, "repeated": repeated}
        if count == 0 and before is not None:
            return Plan(before.record, before.manifest, 0, **told)
        if count == 0:
            raise InputError(_nothing_left(config.plan, spool))
        _verify(config, run_url, spool.tables(wanted), count, show)
        size = shard_size(
            count,
            config.resources.shard_size,
            mean_bytes=spool.mean_bytes,
            shard_max_mb=config.resources.shard_max_mb,
        )
        manifest = write_parts(
            run_url,
            _counted(spool.tables(wanted), "planned", count, show),
            Layout(shard_size=size, part_images=config.plan.part_images),
            source={"info": listing.info, "licenses": listing.licenses, "categories": listing.categories},
            before=before.manifest if before else None,
            next_id=next_id,
        )
    fields: dict[str, Any] = {
        "config": config.model_dump(mode="json", exclude={"run"}),
        "layout_hash": manifest.layout_hash,
        "num_parts": len(manifest.parts),
    }
    if before is None:
        record = RunRecord(
            owlsam_version=__version__,
            categories=vocabulary.categories,
            queries=vocabulary.queries,
            ids_per_image=config.detector.max_detections,
            **fields,
        )
    else:
        # Read again: an attempt may have set its fingerprint while this listed.
        now = load_record(run_url)
        if now is None or now.layout_hash != before.record.layout_hash:
            raise GuardError(f"{run_url} was planned or extended by another call meanwhile: call this again")
        record = now.model_copy(update=fields)
    save_record(run_url, record)
    return Plan(record, manifest, count, **told)


def _check_names(config: RunConfig, record: RunRecord) -> None:
    """A file of names that is another one by now is other settings, though its path is the same.

    Raises:
        GuardError: it is.
    """
    if not is_vocabulary_file(config.vocabulary.categories):
        return
    try:
        vocabulary = resolve_vocabulary(config.vocabulary, [])
    except InputError as error:
        _log.warning("the names of the run are kept as they were planned: %s", error)
        return
    check_same_vocabulary(vocabulary, record, run_directory(config))


def list_dataset(config: RunConfig) -> Listing:
    """The listing that a config names, before any selection.

    Raises:
        InputError: see the sources.
    """
    workers = config.plan.workers if config.plan.workers != "auto" else len(os.sched_getaffinity(0))
    return list_images(
        config.data, ListingOptions(workers=workers, keep_whole=config.plan.damaged_files == "keep_whole")
    )


def select_images(
    listing: Listing, plan: PlanConfig, folder: Path, *, show: Show = _silent
) -> tuple[Spool, NDArray[np.bool_], int]:
    """Spool a listing and choose among its images.

    Args:
        listing: is used up.
        plan: the choice.
        folder: for temporary files.
        show: progress.

    Returns:
        N spooled images; (N,) which of them are chosen; how many were left out because they are listed twice.

    Raises:
        InputError: the source is wrong; images repeat; categories are asked for that the dataset does not have.
        IncompleteError: there is no room for the temporary file.
    """
    keep_first = plan.duplicates == "first"
    selection = Selection(
        limit=plan.limit,
        sample=plan.sample,
        seed=plan.seed,
        splits=plan.splits,
        image_ids=_annotated_images(listing, plan.categories) if plan.categories else None,
    )
    spool = spool_listing(
        listing,
        folder / "listing.arrow",
        selection,
        stop_at_limit=not keep_first,
        show=lambda done, total: show("listed", done, total),
    )
    unseen = sorted(set(plan.splits) - spool.splits)
    if unseen and len(spool) and plan.limit is None:
        _log.warning("no image is of split %s; there are %s", ", ".join(map(repr, unseen)), _named(spool.splits))
    distinct = _check_repeats(spool, keep_first=keep_first)
    wanted = distinct.copy()
    if plan.limit is not None:
        wanted &= np.cumsum(distinct) <= plan.limit
    if plan.sample is not None:
        wanted[np.flatnonzero(distinct)] = sample_mask(spool.digests[distinct], plan.sample, plan.seed)
    return spool, wanted, int((~distinct).sum())


def _verify(config: RunConfig, run_url: str, tables: Iterable[pa.Table], count: int, show: Show) -> None:
    """Look at the images, when that is asked for.

    Raises:
        FailedImagesError: more of them fail than the run puts up with; nothing is planned then.
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
            f"{where}. reduce.max_failed ({config.reduce.max_failed}) puts up with {allowed}, so nothing is planned. "
            "Mend the dataset, or raise reduce.max_failed.",
            {"images": found.images, "failed": found.failed, "failed_by_reason": dict(found.failed_by_reason)},
        )
    _log.warning("%s. They are planned, and become failed rows.", where)


def _annotated_images(listing: Listing, wanted: Sequence[int | str]) -> NDArray[np.int64]:
    """Rising ids of the images with an annotation of one of these categories."""
    if listing.annotated is None:
        raise InputError("plan.categories selects by annotations, and this dataset has none: leave it out")
    ids: dict[Any, int] = {}
    for position, entry in enumerate(listing.categories):
        if not (isinstance(entry, dict) and isinstance(entry.get("name"), str) and type(entry.get("id")) is int):
            raise InputError(
                f"plan.categories: categories[{position}] of the dataset needs an integer id and a name: {entry!r:.80}"
            )
        ids[entry["name"]] = entry["id"]
    known = set(ids.values())
    unknown = [each for each in wanted if each not in ids and each not in known]
    if unknown:
        names = ", ".join(repr(name) for name in list(ids)[:5])
        raise InputError(
            f"plan.categories names {unknown[0]!r}, which is not among the {len(ids)} categories of the dataset "
            f"({names}, …)"
        )
    chosen = np.array(sorted(int(ids.get(each, each)) for each in wanted), np.int64)
    found = [np.empty(0, np.int64)]
    for table in listing.annotated():
        hits = np.isin(table["category_id"].to_numpy(), chosen)
        found.append(np.unique(table["image_id"].to_numpy()[hits]))
    return np.unique(np.concatenate(found))


def _check_repeats(spool: Spool, *, keep_first: bool) -> NDArray[np.bool_]:
    """(N,) whether an image is there for the first time.

    Raises:
        InputError: one is there twice, and may not be; or two have the same id.
    """
    distinct = np.ones(len(spool), np.bool_)
    later, first = repeats(spool.digests)
    distinct[later] = False
    offences = []
    if spool.ids is not None:
        again, earlier = repeats(np.where(distinct, spool.ids, -1 - np.arange(len(spool))))
        pairs = zip(spool.rows_at(again[:5]), spool.rows_at(earlier[:5]), strict=True)
        offences += [
            f"id {row['image_id']} is given to both {other['file_name']!r} and {row['file_name']!r}"
            for row, other in pairs
        ]
        offences += ["another id that is given twice"] * max(0, len(again) - 5)
    if len(later) and not keep_first:
        pairs = zip(spool.rows_at(later[:5]), spool.rows_at(first[:5]), strict=True)
        offences += [f"{row['file_name']!r} is listed twice{_ids(other, row)}" for row, other in pairs]
        offences += ["another image that is listed twice"] * max(0, len(later) - 5)
    first_counts = len(later) > 0 and not keep_first
    raise_offences(
        "the listing",
        offences,
        "Mend the dataset: ids and file names must be unique."
        + (" With plan.duplicates=first an image that is listed twice counts once." if first_counts else ""),
    )
    if len(later):
        row = spool.rows_at(later[:1])[0]
        _log.warning("left out %d images whose names are listed before, the first: %r", len(later), row["file_name"])
    return distinct


def _ids(row: dict[str, Any], other: dict[str, Any]) -> str:
    return "" if row["image_id"] is None else f", as id {row['image_id']} and as id {other['image_id']}"


def _already_planned(spool: Spool, manifest: Manifest) -> tuple[NDArray[np.bool_], int]:
    """What of a listing stands in a manifest.

    Returns:
        (N,) whether an image does: under its id, or without ids, where it lies; the first id above all of the run.

    Raises:
        GuardError: another image of the run has the id or the name.
    """
    names, ids, places = [], [], []
    for table in manifest.iter_images():
        names.append(digests_of(table["file_name"]))
        ids.append(table["image_id"].to_numpy())
        if spool.ids is None:
            places.append(_places(table))
    known_names, known_ids = np.concatenate(names), np.concatenate(ids)
    same_name, named = _find(spool.digests, known_names)
    if spool.ids is not None:
        same, at = _find(spool.ids, known_ids)
        wrong = (same & (known_names[at] != spool.digests)) | (same_name & ~same)
    else:
        every = np.ones(len(spool), np.bool_)
        mine = np.concatenate([_places(table) for table in spool.tables(every)]) if len(spool) else spool.digests
        # A name may change with the folder that several files have in common, or with `data.images`.
        same, _ = _find(mine, np.concatenate(places))
        wrong = same_name & ~same
    offenders = np.flatnonzero(wrong)
    if len(offenders):
        row = spool.rows_at(offenders[:1])[0]
        number = "" if row["image_id"] is None else f" (id {row['image_id']})"
        what = "id" if spool.ids is not None and same[offenders[0]] else "name"
        other = int(known_ids[at[offenders[0]] if what == "id" else named[offenders[0]]])
        raise GuardError(
            f"{len(offenders)} images of the listing contradict the plan of {manifest.run_url}: the {what} of "
            f"{row['file_name']!r}{number}, {row['uri']}, belongs to another image of the run (id {other}). Mend the "
            "listing, or use another directory."
        )
    next_id = int(known_ids.max()) + 1
    if spool.ids is None and next_id + len(spool) >= MAX_IMAGE_ID:
        raise GuardError(f"no ids are left above {next_id - 1} in {manifest.run_url}: use another directory")
    return same, next_id


def _find(values: NDArray[Any], known: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(N,) whether each value is among the known ones, (N,) and where; the place of one that is not means nothing."""
    order = np.argsort(known)
    at = order[np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)]
    return known[at] == values, at


def _places(table: pa.Table) -> NDArray[np.bytes_]:
    """(N,) digests of where images lie: file, member, offset."""
    parts = (pc.fill_null(table[name].cast(pa.string()), "") for name in ("uri", "member", "offset"))
    return digests_of(pc.binary_join_element_wise(*parts, "\0"))


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
        splits = f". There are the splits {_named(spool.splits)}" if plan.splits else ""
        return f"none of {spool.num_listed} images passes {passed}{splits}"
    return "there is no image to plan"


def _named(splits: Collection[str]) -> str:
    names = sorted(splits)
    return ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "") if names else "none"


def selection_of(plan: PlanConfig) -> str:
    """What is selected, as people set it; empty when everything is."""
    fields = plan.model_dump(mode="json", include=_SELECTING, exclude_defaults=True)
    return ", ".join(f"plan.{key}={value}" for key, value in fields.items())


def _tell_other_selection(plan: PlanConfig, record: RunRecord) -> None:
    """Say so when a plan that is kept was made with another selection than is asked for now."""
    before = selection_of(record.stored_config().plan)
    if selection_of(plan) != before:
        _log.warning(
            "the run was planned with %s, which is kept; `owlsam plan --extend` adds what it lacks",
            before or "all images",
        )
