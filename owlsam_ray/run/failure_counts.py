"""Count failed rows of finished shards by class and reason, reading as few rows as possible."""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from owlsam_ray import storage
from owlsam_ray.errors import FailureClass, IncompleteError
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.shards import read_footer, shard_url
from owlsam_ray.schema import PREDICTION_SCHEMA

_AT_ONCE = 32
"""Footers read concurrently."""
_CHUNK = 512


@dataclass(slots=True)
class Failures:
    """Failed rows of some shards."""

    by_class: Counter[str] = field(default_factory=Counter)
    by_reason: Counter[str] = field(default_factory=Counter)
    """Counts by the reason's text before its first colon."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """The first quarantined images: image_id, file_name, reason."""


def find_failures(manifest: Manifest, shards: Iterable[int], *, named: int = 20) -> Failures:
    """Count the failed rows of shards by class and reason.

    The counts come from the footers, except for files of version 0.1, which do not have them. Rows are read only for
    those files, and for shards whose quarantined images are to be named.

    Args:
        manifest: the run's manifest.
        shards: finished shards with failed rows. Files that are gone or damaged by now are skipped.
        named: maximum number of quarantined images to name.

    Raises:
        OSError: storage failed.
    """
    found = Failures()
    left = sorted(shards)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while left:
            chunk, left = left[:_CHUNK], left[_CHUNK:]
            counted = pool.map(lambda shard: _counted_in_footer(manifest.run_url, shard), chunk)
            for shard, failures in zip(chunk, counted, strict=True):
                if failures is None:
                    _read_rows(manifest, shard, found, named=named, count=True)
                    continue
                for words, count in failures.items():
                    status_class, reason = words.split(" ", 1)
                    found.by_class[status_class] += count
                    found.by_reason[reason] += count
                has_quarantined = any(words.split(" ")[0] == FailureClass.QUARANTINED for words in failures)
                if has_quarantined and len(found.quarantined) < named:
                    _read_rows(manifest, shard, found, named=named, count=False)
    return found


def _counted_in_footer(run_url: str, shard: int) -> dict[str, int] | None:
    """Failed rows by class and reason; None if the footer does not hold them, {} if the file is gone or damaged."""
    try:
        return read_footer(run_url, shard).failures
    except (FileNotFoundError, IncompleteError):
        return {}


def _read_rows(manifest: Manifest, shard: int, found: Failures, *, named: int, count: bool) -> None:
    """Name the quarantined images of a shard; with `count`, count its failed rows too."""
    columns = ["image_id", "status", "reason", "status_class"]
    try:
        with storage.open_input(shard_url(manifest.run_url, shard)) as file:
            table = pq.ParquetFile(file)
            if not table.schema_arrow.equals(PREDICTION_SCHEMA):  # not one of our shards: do not read its values
                return
            rows = table.read(columns).to_pylist()
    except (FileNotFoundError, pa.ArrowException):
        return
    file_names: list[str] = []
    for position, row in enumerate(rows):
        if row["status"] != "failed":
            continue
        if count:
            found.by_class[row["status_class"]] += 1
            found.by_reason[row["reason"].split(":")[0]] += 1
        if row["status_class"] == FailureClass.QUARANTINED and len(found.quarantined) < named:
            file_names = file_names or manifest.read_shard(shard)["file_name"].to_pylist()
            name = file_names[position] if position < len(file_names) else None
            found.quarantined.append({"image_id": row["image_id"], "file_name": name, "reason": row["reason"]})
