"""Prove a shard: its rows are the manifest's images, each exactly once, labelled or failed with a reason.

Each rule of its rows is stated once, in `rules_of`: a message, and a mask over the rows or detections that break it,
computed over whole columns.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.config.reduce import allowed_failures
from owlsam_ray.errors import FailedImagesError, IncompleteError, shown
from owlsam_ray.ops.rle import rle_areas
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.paths import FAILURES
from owlsam_ray.run.record import RunRecord
from owlsam_ray.run.shards import ShardFooter, corrupt_shard, done_shards, load_shard, shard_url
from owlsam_ray.schema import PREDICTION_SCHEMA

_STATUSES = ("ok", "empty", "failed")
_LISTS = tuple(field.name for field in PREDICTION_SCHEMA if pa.types.is_list(field.type))
_OF_A_MASK = ("predicted_iou", "stability", *(name for name in _LISTS if name.startswith("mask_")))
"""Null if and only if `rle_counts` is."""
_ALWAYS = tuple(name for name in _LISTS if name not in (*_OF_A_MASK, "rle_counts"))


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


def check_all_present(manifest: Manifest) -> None:
    """Check that every shard has a file.

    Raises:
        IncompleteError: shards are missing; the message states how many, and the first of them.
    """
    done = done_shards(manifest.run_url)
    missing = [shard for shard in manifest.iter_shards() if shard not in done]
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {manifest.num_shards} shards of {manifest.run_url} are not labelled yet (the first: "
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
    problem = first_problem(table, rules)
    if problem is not None:
        row, what = problem
        raise corrupt_shard(url, f"image {table['image_id'][row]}: {what}")
    counts = dict.fromkeys(_STATUSES, 0)
    counts |= {entry["values"]: entry["counts"] for entry in pc.value_counts(table["status"]).to_pylist()}
    if counts != footer.counts:
        raise corrupt_shard(url, f"its rows have the counts {counts}, but its footer claims {footer.counts}")
    return footer, table


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a shard, evaluated on its rows."""

    problem: str
    """What is wrong where the rule is broken: a format string over the fields of `_facts`."""
    broken: NDArray[np.bool_]
    """(B,) whether each row breaks the rule, or (D,) whether each detection does."""
    row_of: NDArray[np.int64] | None = None
    """(D,) row of each detection; None: the rule is about rows."""

    def first(self) -> tuple[int, int | None]:
        """The first row that breaks the rule, and the position of the detection in its lists; None: the row does."""
        at = int(np.argmax(self.broken))
        if self.row_of is None:
            return at, None
        row = int(self.row_of[at])
        return row, at - int(np.searchsorted(self.row_of, row))


def first_problem(rows: pa.Table, limits: ShardRules) -> tuple[int, str] | None:
    """Find the first row that breaks a rule.

    Args:
        rows: (B,) rows as `PREDICTION_SCHEMA`.
        limits: the run's rules.

    Returns:
        The row, and the first rule that it breaks, as a phrase; None if no row breaks any.
    """
    found = None
    while (rule := next((rule for rule in rules_of(rows, limits) if rule.broken.any()), None)) is not None:
        row, place = rule.first()
        found = row, rule.problem.format_map(_facts(rows.slice(row, 1), place, limits))
        rows = rows.slice(0, row)  # a row before may break a later rule; it holds to this one, so the loop ends
    return found


def rules_of(rows: pa.Table, limits: ShardRules) -> Iterator[Rule]:
    """Yield all rules of a shard's rows, in the order in which they are checked.

    A rule is evaluated as if no row broke an earlier one: take the next only if no row breaks this one.
    """
    status = rows["status"]
    yield Rule("unknown status {status}", ~_flags(pc.is_in(status, value_set=pa.array(_STATUSES))))
    ok, empty, failed = (_flags(pc.equal(status, each)) for each in _STATUSES)
    unstated = [_flags(pc.equal(pc.fill_null(rows[name], ""), "")) for name in ("reason", "status_class")]
    yield Rule("failed without a reason", failed & np.any(unstated, axis=0))
    labelled = ~failed
    lengths = {name: pc.fill_null(pc.list_value_length(rows[name]), -1).to_numpy() for name in _LISTS}
    yield Rule("failed with detections", failed & np.any([each > 0 for each in lengths.values()], axis=0))
    for name, length in lengths.items():
        yield Rule(f"null instead of a list: {name}", labelled & (length < 0))
    count = lengths.pop("det_index")
    yield Rule("status ok with 0 detections", ok & (count == 0))
    yield Rule("status empty with {count} detections", empty & (count > 0))
    for name, length in lengths.items():
        yield Rule(f"its lists differ in length: det_index and {name}", labelled & (length != count))
    for name in ("height", "width"):
        yield Rule(f"null: {name}", labelled & _flags(pc.is_null(rows[name])))
    row_of = np.repeat(np.arange(rows.num_rows), np.maximum(count, 0))
    lists = {name: pc.list_flatten(rows[name]).combine_chunks() for name in _LISTS}
    yield from _detection_rules(lists, row_of, limits)
    height, width = (pc.fill_null(rows[name], 0).to_numpy().astype(np.int64) for name in ("height", "width"))
    yield from _mask_rules(lists, row_of, (height * width)[row_of])


def _detection_rules(lists: dict[str, pa.Array], row_of: NDArray[np.int64], limits: ShardRules) -> Iterator[Rule]:
    """Yield the rules of (D,) detections, but for their masks."""
    for name in _ALWAYS:
        yield Rule(f"null or not finite: {name}", ~_are_finite(lists[name]), row_of)
    index = lists["det_index"].to_numpy()
    falls = np.zeros(len(index), np.bool_)
    falls[1:] = (index[1:] <= index[:-1]) & (row_of[1:] == row_of[:-1])
    outside = _are_outside(index, limits.ids_per_image)
    yield Rule("det_index {indices} is not strictly ascending within 0…{last_index}", falls | outside, row_of)
    label, prompt = lists["label"].to_numpy(), lists["prompt_id"].to_numpy()
    yield Rule("a label outside the {num_labels} categories", _are_outside(label, limits.num_labels), row_of)
    if limits.num_prompts is not None:
        yield Rule("a prompt outside the {num_prompts} queries", _are_outside(prompt, limits.num_prompts), row_of)


def _mask_rules(lists: dict[str, pa.Array], row_of: NDArray[np.int64], pixels: NDArray[np.int64]) -> Iterator[Rule]:
    """Yield the rules of the masks of (D,) detections, in images of (D,) pixels."""
    counts = lists["rle_counts"]
    has_mask = _flags(counts.is_valid())
    for name in _OF_A_MASK:
        yield Rule(f"no mask, but a value of {name}", ~has_mask & _flags(lists[name].is_valid()), row_of)
    for name in _OF_A_MASK:
        yield Rule(f"a mask with null or not finite {name}", has_mask & ~_are_finite(lists[name]), row_of)
    _, offsets, data = counts.buffers()
    starts = np.frombuffer(offsets or b"\0" * 4, np.int32)[counts.offset :][: len(counts) + 1].astype(np.int64)
    sums = rle_areas(np.frombuffer(data or b"", np.uint8), starts)
    yield Rule("{rle_counts!r:.40} is not a compressed RLE", has_mask & (sums[:, 0] < 0), row_of)
    area = pc.fill_null(lists["mask_area"], 0).to_numpy()
    yield Rule(
        "a mask of {covered} among {pixels} pixels, but the image has {height}x{width} and the stated area is "
        "{mask_area}",
        has_mask & ((sums[:, 0] != pixels) | (sums[:, 1] != area)),
        row_of,
    )


def _facts(row: pa.Table, place: int | None, limits: ShardRules) -> dict[str, Any]:
    """Collect what messages say: fields of one row, with `place` those of one detection, and the limits."""
    facts: dict[str, Any] = row.to_pylist()[0]
    indices = facts["det_index"] or []
    facts |= {
        "status": shown(facts["status"]),
        "indices": indices,
        "count": len(indices),
        "last_index": limits.ids_per_image - 1,
        "num_labels": limits.num_labels,
        "num_prompts": limits.num_prompts,
    }
    if place is None:
        return facts
    facts |= {name: facts[name][place] for name in _LISTS}
    text = facts["rle_counts"] or b""
    ((pixels, covered),) = rle_areas(np.frombuffer(text, np.uint8), np.array([0, len(text)])).tolist()
    return facts | {"pixels": pixels, "covered": covered}


def _are_finite(values: pa.Array) -> NDArray[np.bool_]:
    """(N,) whether each value is neither null nor, in a column of floats, infinite or NaN."""
    if not pa.types.is_floating(values.type):
        return _flags(values.is_valid())
    return np.isfinite(values.to_numpy(zero_copy_only=False))  # nulls become NaN


def _are_outside(values: NDArray[np.int32], end: int) -> NDArray[np.bool_]:
    """(N,) whether each value is below 0, or `end` or above."""
    return (values < 0) | (values >= end)


def _flags(values: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    """(N,) of N booleans without nulls."""
    flags: NDArray[np.bool_] = np.asarray(values)
    return flags
