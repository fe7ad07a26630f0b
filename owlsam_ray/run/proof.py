"""Prove a shard: its rows are the manifest's images, each exactly once, labelled or failed with a reason.

The rules are implemented twice: over whole columns, which is five times faster when nothing is wrong, and row by row,
which describes what is wrong. A test compares the two.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray.config.reduce import allowed_failures
from owlsam_ray.errors import FailedImagesError, IncompleteError, shown
from owlsam_ray.ops.rle import rle_areas, rle_runs
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.paths import FAILURES
from owlsam_ray.run.record import RunRecord
from owlsam_ray.run.shards import ShardFooter, corrupt_shard, done_shards, load_shard, shard_url
from owlsam_ray.schema import PREDICTION_SCHEMA, ROW_GROUP_IMAGES

_STATUSES = {"ok", "empty", "failed"}
_LISTS = tuple(field.name for field in PREDICTION_SCHEMA if pa.types.is_list(field.type))
_OF_A_MASK = ("predicted_iou", "stability", "rle_counts", *(name for name in _LISTS if name.startswith("mask_")))
_ALWAYS = tuple(name for name in _LISTS if name not in _OF_A_MASK)


def check_failures(max_failed: int | float, counts: dict[str, Any]) -> None:
    """Refuse more failed images than the config tolerates; everything has been written regardless.

    Args:
        max_failed: `reduce.max_failed`.
        counts: a command's counts; at least `failed` and `images`, and the path `failures` if there is one.

    Raises:
        FailedImagesError: too many images failed; the counts are its second argument.
    """
    allowed = allowed_failures(max_failed, counts["images"])
    if counts["failed"] > allowed:
        raise FailedImagesError(
            f"{counts['failed']} of {counts['images']} images failed, and reduce.max_failed ({max_failed}) "
            f"allows {allowed}. Nothing else is wrong: the labels of all other images are written. The reasons are in "
            f"the rows, and after reduce in {counts.get('failures', FAILURES)}.",
            counts,
        )


def check_all_present(run_url: str, manifest: Manifest) -> None:
    """Check that every shard has a file.

    Raises:
        IncompleteError: shards are missing; the message states how many, and the first of them.
    """
    done = done_shards(run_url)
    missing = [shard for shard in manifest.iter_shards() if shard not in done]
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {manifest.num_shards} shards of {run_url} are not labelled yet (the first: "
            f"{', '.join(str(shard) for shard in missing[:5])}): run `owlsam annotate` again"
        )


@dataclass(frozen=True, slots=True)
class ShardRules:
    """Limits that the shards of a run must satisfy."""

    fingerprint: str
    ids_per_image: int
    """K: det_index is less than K."""
    num_labels: int
    """Number of categories; labels are less than this."""
    num_prompts: int | None = None
    """Number of queries; prompt ids are less than this. None accepts any."""
    numerics: frozenset[str] | None = None
    """Ids of the numerics that the run was computed with; None accepts any."""

    @staticmethod
    def of(record: RunRecord, *, numerics: frozenset[str] | None = None) -> "ShardRules":
        """Rules of a run that has been labelled."""
        return ShardRules(
            record.fingerprint or "",
            record.ids_per_image,
            len(record.categories),
            num_prompts=len(record.queries) or None,
            numerics=numerics,
        )


def prove_shard(
    run_url: str, shard: int, image_ids: Collection[int] | pa.ChunkedArray, rules: ShardRules
) -> tuple[ShardFooter, pa.Table]:
    """Read a whole shard file and prove its checksums, its footer and each of its rows.

    Args:
        run_url: the run directory.
        shard: the shard's number.
        image_ids: image ids of the shard in the manifest, in order.
        rules: the run's rules.

    Returns:
        The footer, and the rows as `PREDICTION_SCHEMA`.

    Raises:
        IncompleteError: the shard breaks a rule; the message names the file, the problem, and how to redo it.
        OSError: storage failed, which says nothing about the file.
    """
    url = shard_url(run_url, shard)
    footer, table = load_shard(run_url, shard)
    if footer.fingerprint != rules.fingerprint:
        raise corrupt_shard(url, "it has another label fingerprint")
    if rules.numerics is not None and footer.numerics not in rules.numerics:
        raise corrupt_shard(url, f"no attempt of the run used its numerics {footer.numerics}")
    if not np.array_equal(table["image_id"].to_numpy(), np.asarray(image_ids, np.int64)):
        raise corrupt_shard(url, f"its {table.num_rows} image ids are not the manifest's {len(image_ids)}")
    if not _is_clean(table, rules):
        for start in range(0, table.num_rows, ROW_GROUP_IMAGES):
            _explain(url, table.slice(start, ROW_GROUP_IMAGES), rules)
    counts = dict.fromkeys(sorted(_STATUSES), 0)
    counts |= {entry["values"]: entry["counts"] for entry in pc.value_counts(table["status"]).to_pylist()}
    if counts != footer.counts:
        raise corrupt_shard(url, f"its rows have the counts {counts}, but its footer claims {footer.counts}")
    return footer, table


def _explain(url: str, rows: pa.Table, rules: ShardRules) -> None:
    """Report the first row that breaks a rule.

    Raises:
        IncompleteError: there is such a row.
    """
    for row in rows.to_pylist():
        problem = _problem(row, rules)
        if problem is not None:
            raise corrupt_shard(url, f"image {row['image_id']}: {problem}")


def _is_clean(rows: pa.Table, rules: ShardRules) -> bool:
    """Whether `_problem` would find nothing in any row, computed over whole columns."""
    if not pc.all(pc.is_in(rows["status"], value_set=pa.array(sorted(_STATUSES)))).as_py():
        return rows.num_rows == 0
    is_failed = pc.equal(rows["status"], "failed")
    failed, labelled = rows.filter(is_failed), rows.filter(pc.invert(is_failed)).combine_chunks()
    if any(failed[name].null_count or "" in failed[name].to_pylist() for name in ("reason", "status_class")):
        return False
    if any(pc.sum(pc.list_value_length(failed[name])).as_py() for name in _LISTS):
        return False
    if labelled.num_rows == 0:
        return True
    if any(labelled[name].null_count for name in (*_LISTS, "height", "width")):
        return False
    lengths = pc.list_value_length(labelled["det_index"]).to_numpy()
    if not np.array_equal(lengths == 0, pc.equal(labelled["status"], "empty").to_numpy()):
        return False
    if any(not np.array_equal(lengths, pc.list_value_length(labelled[name]).to_numpy()) for name in _LISTS):
        return False
    lists = {name: _flat(labelled[name]) for name in _LISTS}
    if any(not _all_finite(lists[name]) for name in _ALWAYS):
        return False
    indices, labels = lists["det_index"].to_numpy(), lists["label"].to_numpy()
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    rises = (np.diff(indices) > 0) | (np.diff(row_of) > 0)
    if not (rises.all() and ((indices >= 0) & (indices < rules.ids_per_image)).all()):
        return False
    if not ((labels >= 0) & (labels < rules.num_labels)).all():
        return False
    prompts = lists["prompt_id"].to_numpy()
    if rules.num_prompts is not None and not ((prompts >= 0) & (prompts < rules.num_prompts)).all():
        return False
    pixels = labelled["height"].to_numpy().astype(np.int64) * labelled["width"].to_numpy()
    return _masks_are_clean(lists, pixels[row_of])


def _masks_are_clean(lists: dict[str, pa.Array], pixels: np.ndarray[Any, np.dtype[np.int64]]) -> bool:
    """Whether each mask of these detections covers as many pixels as its image has, and has the stated area."""
    has_mask = lists["rle_counts"].is_valid()
    if any(lists[name].null_count < has_mask.false_count for name in _OF_A_MASK):
        return False
    masks = {name: lists[name].filter(has_mask) for name in _OF_A_MASK}
    counts = masks.pop("rle_counts")
    if not all(_all_finite(values) for values in masks.values()):
        return False
    if len(counts) == 0:
        return True
    _, offsets, data = counts.buffers()
    starts = np.frombuffer(offsets, np.int32)[counts.offset : counts.offset + len(counts) + 1].astype(np.int64)
    sums = rle_areas(np.frombuffer(data or b"", np.uint8), starts)
    return bool(
        np.array_equal(sums[:, 0], pixels[has_mask.to_numpy(zero_copy_only=False)])
        and np.array_equal(sums[:, 1], masks["mask_area"].to_numpy())
    )


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return pc.list_flatten(column).combine_chunks()


def _all_finite(values: pa.Array) -> bool:
    """Whether there are no nulls and all floats are finite."""
    return values.null_count == 0 and bool(np.isfinite(values.to_numpy()).all())


def _problem(row: dict[str, Any], rules: ShardRules) -> str | None:
    """What is wrong with a row; None if it is valid."""
    if row["status"] not in _STATUSES:
        return f"unknown status {shown(row['status'])}"
    if row["status"] == "failed":
        if not (row["reason"] and row["status_class"]):
            return "failed without a reason"
        return "failed with detections" if any(row[name] for name in _LISTS) else None
    indices = row["det_index"]
    if indices is None or (len(indices) == 0) != (row["status"] == "empty"):
        return f"status {row['status']} with {len(indices or [])} detections"
    lists = {name: row[name] for name in _LISTS}
    ragged = [name for name, values in lists.items() if values is None or len(values) != len(indices)]
    if ragged:
        return f"its lists differ in length: {', '.join(ragged)}"
    odd = [name for name in _ALWAYS if not all(_is_finite(value) for value in lists[name])]
    if odd or row["height"] is None or row["width"] is None:
        return f"null or not finite: {', '.join(odd) or 'height or width'}"
    if any(not 0 <= index < rules.ids_per_image for index in indices) or indices != sorted(set(indices)):
        return f"det_index {indices} is not strictly ascending within 0…{rules.ids_per_image - 1}"
    if any(not 0 <= label < rules.num_labels for label in row["label"]):
        return f"a label outside the {rules.num_labels} categories"
    if rules.num_prompts is not None and any(not 0 <= each < rules.num_prompts for each in row["prompt_id"]):
        return f"a prompt outside the {rules.num_prompts} queries"
    for position in range(len(indices)):
        problem = _mask_problem({name: lists[name][position] for name in _OF_A_MASK}, row["height"], row["width"])
        if problem is not None:
            return problem
    return None


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mask_problem(mask: dict[str, Any], height: int, width: int) -> str | None:
    """What is wrong with the mask of one detection; None if it is valid or there is no mask."""
    counts = mask.pop("rle_counts")
    if counts is None:
        told = [name for name, value in mask.items() if value is not None]
        return f"no mask, but values of {', '.join(told)}" if told else None
    odd = [name for name, value in mask.items() if not _is_finite(value)]
    if odd:
        return f"a mask with null or not finite {', '.join(odd)}"
    try:
        runs = rle_runs(counts)
    except ValueError as error:
        return str(error)
    pixels, covered = int(runs.sum()), int(runs[1::2].sum())
    if (runs < 0).any() or pixels != height * width or covered != mask["mask_area"]:
        return (
            f"a mask of {covered} among {pixels} pixels, but the image has {height}x{width} and the stated area is "
            f"{mask['mask_area']}"
        )
    return None
