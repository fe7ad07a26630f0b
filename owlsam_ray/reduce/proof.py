"""Reading a shard proves it: its rows are the manifest's images, each once, labelled or failed for a reason."""

import math
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from owlsam_ray import storage
from owlsam_ray.config import allowed_failures
from owlsam_ray.errors import FailedImagesError, IncompleteError
from owlsam_ray.ledger import corrupt_shard, done_shards, read_footer, shard_url
from owlsam_ray.manifest import Manifest
from owlsam_ray.masks import rle_runs
from owlsam_ray.schema import PREDICTION_SCHEMA

_STATUSES = {"ok", "empty", "failed"}
_LISTS = tuple(field.name for field in PREDICTION_SCHEMA if pa.types.is_list(field.type))
_OF_A_MASK = ("predicted_iou", "stability", "rle_counts", *(name for name in _LISTS if name.startswith("mask_")))
_ALWAYS = tuple(name for name in _LISTS if name not in _OF_A_MASK)


def check_failures(max_failed: int | float, counts: dict[str, Any]) -> None:
    """Refuse more failed images than the config puts up with; everything was written all the same.

    Args:
        max_failed: `reduce.max_failed`.
        counts: of a command: `failed` and `images` among others.

    Raises:
        FailedImagesError: with the counts as its second argument.
    """
    allowed = allowed_failures(max_failed, counts["images"])
    if counts["failed"] > allowed:
        raise FailedImagesError(
            f"{counts['failed']} of {counts['images']} images failed, and reduce.max_failed ({max_failed}) puts up "
            f"with {allowed}. Nothing else is wrong: the labels of all other images are written. Reasons stand in the "
            "rows, and after reduce in coco/failures.jsonl.",
            counts,
        )


def check_all_present(run_url: str, manifest: Manifest) -> None:
    """Every shard has its file.

    Raises:
        IncompleteError: names how many are missing, and the first of them.
    """
    done = done_shards(run_url)
    missing = [shard for shard in manifest.iter_shards() if shard not in done]
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {manifest.num_shards} shards of {run_url} are not labelled yet (the first: "
            f"{', '.join(str(shard) for shard in missing[:5])}): call `owlsam annotate` again"
        )


def read_shard(
    run_url: str, shard: int, *, image_ids: list[int], fingerprint: str, ids_per_image: int, num_labels: int
) -> list[dict[str, Any]]:
    """Rows of one shard, proven.

    Args:
        run_url: the run directory.
        shard: its number.
        image_ids: of the manifest, in order.
        fingerprint: that the shard must carry.
        ids_per_image: K; det_index stays below.
        num_labels: categories; labels stay below.

    Raises:
        IncompleteError: names the file, what is wrong with it, and how to redo it.
        OSError: storage gave up, which says nothing about the file.
    """
    url = shard_url(run_url, shard)
    footer = read_footer(run_url, shard)
    if footer.fingerprint != fingerprint:
        raise corrupt_shard(url, "it has another label fingerprint")
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(url)))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of storage; Arrow's own have no number
            raise
        raise corrupt_shard(url, f"{type(error).__name__}: {error}") from None
    if not table.schema.equals(PREDICTION_SCHEMA):
        raise corrupt_shard(url, "its columns are not those of schema version 1")
    rows: list[dict[str, Any]] = table.to_pylist()
    if [row["image_id"] for row in rows] != image_ids:
        raise corrupt_shard(url, f"its {len(rows)} image ids are not the manifest's {len(image_ids)}")
    counts = dict.fromkeys(sorted(_STATUSES), 0)
    for row in rows:
        offence = _offence(row, ids_per_image=ids_per_image, num_labels=num_labels)
        if offence is not None:
            raise corrupt_shard(url, f"image {row['image_id']}: {offence}")
        counts[row["status"]] += 1
    if counts != footer.counts:
        raise corrupt_shard(url, f"it holds {counts} and claims {footer.counts}")
    return rows


def _offence(row: dict[str, Any], *, ids_per_image: int, num_labels: int) -> str | None:
    """What is wrong with a row; None when nothing is."""
    if row["status"] not in _STATUSES:
        return f"unknown status {row['status']!r}"
    if row["status"] == "failed":
        return None if row["reason"] and row["status_class"] else "failed without a reason"
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
    if any(not 0 <= index < ids_per_image for index in indices) or indices != sorted(set(indices)):
        return f"det_index {indices} does not rise within 0…{ids_per_image - 1}"
    if any(not 0 <= label < num_labels for label in row["label"]):
        return f"a label outside the {num_labels} categories"
    for position in range(len(indices)):
        offence = _mask_offence({name: lists[name][position] for name in _OF_A_MASK}, row["height"], row["width"])
        if offence is not None:
            return offence
    return None


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mask_offence(mask: dict[str, Any], height: int, width: int) -> str | None:
    """What is wrong with the mask of one detection; having none is fine."""
    counts = mask.pop("rle_counts")
    if counts is None:
        return None
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
            f"a mask of {covered} among {pixels} pixels, but the picture has {height}x{width} and the stated area is "
            f"{mask['mask_area']}"
        )
    return None
