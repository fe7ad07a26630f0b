"""Select the images of a listing to plan: filters, limit or sample, duplicates, images that are already planned."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.config.data import PlanConfig
from owlsam_ray.errors import GuardError, InputError, raise_problems, shown
from owlsam_ray.ops.arrays import repeats
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.schema import MAX_IMAGE_ID, Container
from owlsam_ray.sources import Listing
from owlsam_ray.sources.spool import Selection, Spool, digests_of, sample_mask, spool_listing
from owlsam_ray.storage.secrets import masked_url
from owlsam_ray.terminal import Show, silent

_SELECTING = {"limit", "sample", "seed", "splits", "categories"}
_log = logging.getLogger(__name__)


def select_images(
    listing: Listing, plan: PlanConfig, folder: Path, *, show: Show = silent
) -> tuple[Spool, NDArray[np.bool_], int]:
    """Spool a listing and select images from it.

    Args:
        listing: the listing; it is consumed.
        plan: filters, limit or sample, and handling of duplicates.
        folder: directory for temporary files.
        show: called with the progress.

    Returns:
        N spooled images; (N,) mask of the selected ones; the number of images left out as duplicates.

    Raises:
        InputError: the source is invalid, images are listed twice, or the dataset lacks a requested category.
        IncompleteError: there is no space for the temporary file.
    """
    keep_first = plan.duplicates == "first"
    selection = Selection(
        limit=plan.limit,
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
        _log.warning("no image is in split %s; the splits are %s", ", ".join(map(repr, unseen)), named(spool.splits))
    _use_other_names(spool)
    distinct = _check_repeats(spool, keep_first=keep_first)
    wanted = distinct.copy()
    if plan.limit is not None:
        wanted &= np.cumsum(distinct) <= plan.limit
    if plan.sample is not None:
        wanted[np.flatnonzero(distinct)] = sample_mask(spool.digests[distinct], plan.sample, plan.seed)
    return spool, wanted, int((~distinct).sum())


def _annotated_images(listing: Listing, wanted: Sequence[int | str]) -> NDArray[np.int64]:
    """Ascending ids of the images with an annotation of one of these categories."""
    if listing.annotated is None:
        raise InputError("plan.categories selects images by annotations, but this dataset has none: leave it out")
    ids: dict[Any, int] = {}
    for position, entry in enumerate(listing.categories):
        if not (isinstance(entry, dict) and isinstance(entry.get("name"), str) and type(entry.get("id")) is int):
            raise InputError(
                f"plan.categories: categories[{position}] of the dataset needs an integer id and a name: "
                f"{shown(entry, 80)}"
            )
        ids[entry["name"]] = entry["id"]
    known = set(ids.values())
    unknown = [each for each in wanted if each not in ids and each not in known]
    if unknown:
        names = ", ".join(repr(name) for name in list(ids)[:5])
        raise InputError(
            f"plan.categories names {shown(unknown[0])}, which is not among the {len(ids)} categories of the dataset "
            f"({names}, …)"
        )
    chosen = np.array(sorted(int(ids.get(each, each)) for each in wanted), np.int64)
    found = [np.empty(0, np.int64)]
    for table in listing.annotated():
        hits = np.isin(table["category_id"].to_numpy(), chosen)
        found.append(np.unique(table["image_id"].to_numpy()[hits]))
    return np.unique(np.concatenate(found))


def _use_other_names(spool: Spool) -> None:
    """Rename images with equal names to their alternative names, if they have one."""
    later, first = repeats(spool.digests)
    clashing = np.zeros(len(spool), np.bool_)
    clashing[later] = clashing[first] = True
    spool.take_other_names(clashing & spool.has_other)


def _check_repeats(spool: Spool, *, keep_first: bool) -> NDArray[np.bool_]:
    """(N,) mask of first occurrences of images.

    Raises:
        InputError: an image is listed twice and `keep_first` is not set, or two images have the same id.
    """
    distinct = np.ones(len(spool), np.bool_)
    later, first = repeats(spool.digests)
    distinct[later] = False
    problems = []
    if spool.ids is not None:
        again, earlier = repeats(np.where(distinct, spool.ids, -1 - np.arange(len(spool))))
        pairs = list(zip(spool.rows_at(again[:5]), spool.rows_at(earlier[:5]), strict=True))
        problems += [
            f"id {row['image_id']} is given to both {shown(other['file_name'])} and {shown(row['file_name'])}"
            for row, other in pairs
        ]
        problems += ["another id that is given twice"] * max(0, len(again) - 5)
    way_out = "Fix the dataset: ids and file names must be unique."
    hint = ""
    if len(later):
        pairs = list(zip(spool.rows_at(later[:5]), spool.rows_at(first[:5]), strict=True))
        if spool.name_setting is not None and any(_place_of(row) != _place_of(other) for row, other in pairs):
            hint = f" They are different images with one name: leave out {spool.name_setting}, and each gets its own."
        if not keep_first:
            problems += [f"{shown(row['file_name'])} is listed twice{_ids(other, row)}" for row, other in pairs]
            problems += ["another image that is listed twice"] * max(0, len(later) - 5)
            way_out += hint or " With plan.duplicates=first an image that is listed twice counts once."
    raise_problems("the listing", problems, way_out)
    if len(later):
        name = pairs[0][0]["file_name"]
        _log.warning("left out %d images whose names are listed earlier; the first: %r.%s", len(later), name, hint)
    return distinct


def _place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["uri"], row["member"], row["offset"]


def _ids(row: dict[str, Any], other: dict[str, Any]) -> str:
    return "" if row["image_id"] is None else f", as id {row['image_id']} and as id {other['image_id']}"


def already_planned(spool: Spool, manifest: Manifest) -> tuple[NDArray[np.bool_], int]:
    """Find the images of a listing that are already in a manifest.

    New images whose names are taken in the manifest are renamed to their alternative names.

    Returns:
        (N,) mask of images that are in the manifest, matched by id, or by location if the listing has no ids; and the
        first id above all ids of the run.

    Raises:
        GuardError: the id or name of an image belongs to another image of the run, or no ids are left.
    """
    known = _Known.of(manifest)
    every = np.ones(len(spool), np.bool_)
    mine = np.concatenate([_places(table) for table in spool.tables(every)]) if len(spool) else spool.digests
    by_place, at_place = _find(mine, known.places)
    # A name may change with the common folder of several files, or with `data.images`.
    same, at, contradicts = by_place, at_place, np.zeros(len(spool), np.bool_)
    if spool.ids is not None:
        same, at = _find(spool.ids, known.ids)
        fixed = same & known.bad[at] & ~spool.bad
        contradicts = same & (known.names[at] != spool.digests) & (known.places[at] != mine) & ~known.bad[at]
        if fixed.any():
            _log.warning(
                "%d rows without a usable image when they were planned stay failed rows of this run, although their "
                "ids have an image now: plan these images in another directory",
                int(fixed.sum()),
            )
    taken, _ = _find(spool.digests, known.names)
    spool.take_other_names(taken & ~same & spool.has_other)
    taken, named = _find(spool.digests, known.names)
    contradicts |= taken & ~same
    offenders = np.flatnonzero(contradicts)
    if len(offenders):
        row = spool.rows_at(offenders[:1])[0]
        number = "" if row["image_id"] is None else f" (id {row['image_id']})"
        what = "id" if spool.ids is not None and same[offenders[0]] else "name"
        other = int(known.ids[at[offenders[0]] if what == "id" else named[offenders[0]]])
        raise GuardError(
            f"{len(offenders)} images of the listing contradict the plan of {manifest.run_url}: the {what} of "
            f"{shown(row['file_name'])}{number}, {masked_url(row['uri'])}, belongs to another image of the run (id "
            f"{other}). Fix the listing, or use another directory."
        )
    next_id = int(known.ids.max()) + 1
    if spool.ids is None and next_id + len(spool) >= MAX_IMAGE_ID:
        raise GuardError(f"no ids are left above {next_id - 1} in {manifest.run_url}: use another directory")
    return same, next_id


@dataclass(frozen=True, slots=True)
class _Known:
    """M images of a manifest."""

    names: NDArray[np.bytes_]
    """(M,) digests of file names."""
    ids: NDArray[np.int64]
    places: NDArray[np.bytes_]
    """(M,) digests of locations."""
    bad: NDArray[np.bool_]
    """(M,) mask of bad rows, from which no image can be read."""

    @classmethod
    def of(cls, manifest: Manifest) -> "_Known":
        names, ids, places, bad = [], [], [], []
        for table in manifest.iter_images():
            names.append(digests_of(table["file_name"]))
            ids.append(table["image_id"].to_numpy())
            places.append(_places(table))
            bad.append(_are_bad(table).to_numpy())
        return cls(np.concatenate(names), np.concatenate(ids), np.concatenate(places), np.concatenate(bad))


def _find(values: NDArray[Any], known: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(N,) mask of values found in `known`, and (N,) their positions there; undefined for values not found."""
    order = np.argsort(known)
    at = order[np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)]
    return known[at] == values, at


def _places(table: pa.Table) -> NDArray[np.bytes_]:
    """(N,) digests of image locations (file, member, offset); for bad rows, the location of the row."""
    # For bad rows, `member` holds the reason, whose wording may change.
    members = pc.if_else(_are_bad(table), str(Container.BAD), table["member"])
    parts = (pc.fill_null(column.cast(pa.string()), "") for column in (table["uri"], members, table["offset"]))
    return digests_of(pc.binary_join_element_wise(*parts, "\0"))


def _are_bad(table: pa.Table) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(table["container"], str(Container.BAD)), False)


def selection_of(plan: PlanConfig) -> str:
    """Describe the selection as settings, such as `plan.limit=10`; empty if everything is selected."""
    fields = plan.model_dump(mode="json", include=_SELECTING, exclude_defaults=True)
    return ", ".join(f"plan.{key}={value}" for key, value in fields.items())


def named(splits: Collection[str]) -> str:
    """Name the first ten splits in order, for messages; `none` if there are none."""
    names = sorted(splits)
    return ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "") if names else "none"
