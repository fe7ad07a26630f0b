"""Reading a shard proves it: its rows are the manifest's images, each once, labelled or failed for a reason."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from owlsam_ray import storage
from owlsam_ray.errors import IncompleteError
from owlsam_ray.ledger import corrupt_shard, done_shards, read_footer, shard_url
from owlsam_ray.manifest import Manifest
from owlsam_ray.schema import PREDICTION_SCHEMA

_STATUSES = {"ok", "empty", "failed"}


def allowed_failures(max_failed: int | float, num_images: int) -> int:
    """Failed images that are put up with: an integer is a count, a float is a share."""
    return max_failed if isinstance(max_failed, int) else math.floor(max_failed * num_images)


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
    """
    url = shard_url(run_url, shard)
    footer = read_footer(run_url, shard)
    if footer.fingerprint != fingerprint:
        raise corrupt_shard(url, "it has another label fingerprint")
    filesystem, path = storage.open_filesystem(url)
    try:
        with filesystem.open(path, "rb") as file:
            table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
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
    if any(row[name] is None or len(row[name]) != len(indices) for name in ("label", "x0", "score", "rle_counts")):
        return "its lists differ in length"
    if any(not 0 <= index < ids_per_image for index in indices) or indices != sorted(set(indices)):
        return f"det_index {indices} does not rise within 0…{ids_per_image - 1}"
    if any(not 0 <= label < num_labels for label in row["label"]):
        return f"a label outside the {num_labels} categories"
    for counts, area in zip(row["rle_counts"], row["mask_area"], strict=True):
        if counts is None:
            continue
        pixels, covered = rle_lengths(counts)
        if pixels != row["height"] * row["width"] or covered != area:
            return (
                f"a mask of {covered} among {pixels} pixels, but the picture has {row['height']}x{row['width']} "
                f"and the stated area is {area}"
            )
    return None


def rle_lengths(counts: bytes) -> tuple[int, int]:
    """(pixels, covered pixels) of a compressed RLE, without drawing the mask. (-1, -1) for text that is none.

    The code: runs are written as differences to the run two before, in groups of five bits with a continuation bit,
    offset by 48, lowest group first, sign in the last group's highest bit. Source: cocoapi's `rleToString`.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return (-1, -1)
    last = (codes & 32) == 0
    group = np.concatenate([[0], np.cumsum(last)[:-1]])  # which number a code belongs to
    start = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    shift = 5 * (np.arange(len(codes)) - start[group])
    numbers = np.bincount(group, weights=((codes & 31) << shift).astype(np.float64)).astype(np.int64)
    negative = (codes[last] & 16) != 0
    numbers[negative] -= 1 << (shift[last][negative] + 5)
    # Undo the differences: from the fourth run on, each stands relative to the run two before.
    runs = numbers.copy()
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(numbers[parity::2])
    return (int(runs.sum()), int(runs[1::2].sum())) if runs.min() >= 0 else (-1, -1)
