"""Write the rows of a listing as parts of the manifest, split into shards."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from owlsam_ray import storage
from owlsam_ray.config.base import MEGABYTE
from owlsam_ray.errors import InputError
from owlsam_ray.run.manifest import Manifest, ManifestPart, file_sha256, part_name
from owlsam_ray.run.paths import MANIFEST
from owlsam_ray.schema import MANIFEST_SCHEMA, encoded_bytes

_SMALLEST_SHARD, _LARGEST_SHARD, _SHARDS_WANTED = 8, 1024, 64


def shard_size(num_images: int, setting: int | str, *, mean_bytes: float | None = None, shard_max_mb: int = 256) -> int:
    """Choose the number of images per shard.

    Args:
        num_images: number of images to plan.
        setting: a fixed number, or `auto`: images / 64, clamped to 8…1024 and limited by `shard_max_mb`.
        mean_bytes: mean size of an encoded image, if known.
        shard_max_mb: maximum size of a shard in megabytes (10⁶ bytes).
    """
    if not isinstance(setting, str):
        return setting
    size = min(max(num_images // _SHARDS_WANTED, _SMALLEST_SHARD), _LARGEST_SHARD)
    if mean_bytes:
        size = min(size, int(shard_max_mb * 10**6 / mean_bytes))
    return max(1, size)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """How rows are split into shards and parts."""

    shard_size: int
    """Images per shard."""
    part_images: int = 1_000_000
    """Images per part; rounded down to whole shards."""
    max_file_mb: int = 512
    """Larger images are not fetched and do not count towards the bytes of a shard."""


def write_parts(
    run_url: str,
    tables: Iterable[pa.Table],
    layout: ShardLayout,
    *,
    source: dict[str, Any],
    before: Manifest | None = None,
    next_id: int = 1,
) -> Manifest:
    """Append images to a manifest as new parts.

    Args:
        run_url: the run directory. Parts beyond those of `before` come from an unfinished attempt and are replaced.
        tables: the images in order, as `LISTING_SCHEMA`.
        layout: sizes of shards and parts.
        source: what the output carries over: info, licenses, categories.
        before: the manifest to extend; None for the first plan.
        next_id: id of the first image where `image_id` is null; later ids continue from there.

    Returns:
        The whole manifest.

    Raises:
        InputError: there are no images.
        OSError: storage failed.
    """
    parts = list(before.parts) if before is not None else []
    for name in storage.list_names(storage.join(run_url, MANIFEST)):
        if name.split(".")[0] not in {part.file.split(".")[0] for part in parts}:
            storage.remove(storage.join(run_url, MANIFEST, name))
    shards_per_part = max(1, layout.part_images // layout.shard_size)
    shards = _shards(_numbered(tables, next_id), layout.shard_size)
    first = len(parts)
    while (head := next(shards, None)) is not None:
        rest = itertools.islice(shards, shards_per_part - 1)
        parts.append(_write_part(run_url, itertools.chain([head], rest), parts, layout, source))
        source = {}
    if len(parts) == first:
        raise InputError("there are no images to plan")
    return Manifest(run_url, tuple(parts))


def _numbered(tables: Iterable[pa.Table], next_id: int) -> Iterator[pa.Table]:
    """Assign ids to the rows of tables where the source gives none."""
    for table in tables:
        if table["image_id"].null_count:
            ids = pa.array(np.arange(next_id, next_id + table.num_rows), pa.int64())
            table = table.set_column(table.schema.get_field_index("image_id"), table.schema.field("image_id"), ids)
        yield table
        next_id += table.num_rows


def _shards(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Regroup the rows into tables of `size` rows; the last table may be shorter."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        if count < size:
            continue
        joined = pa.concat_tables(waiting)
        whole = count - count % size
        for start in range(0, whole, size):
            yield joined.slice(start, size)
        waiting, count = [joined.slice(whole)], count - whole
    if count:
        yield pa.concat_tables(waiting)


def _write_part(
    run_url: str, shards: Iterable[pa.Table], before: list[ManifestPart], layout: ShardLayout, source: dict[str, Any]
) -> ManifestPart:
    """Write one part: the Parquet file first, then its sidecar, which makes it valid."""
    name = part_name(len(before))
    url = storage.join(run_url, MANIFEST, f"{name}.parquet")
    first_ordinal = 1 + sum(part.num_rows for part in before)
    first_shard = sum(part.num_shards for part in before)
    num_rows = num_shards = max_bytes = 0
    with storage.open_atomic(url) as file, pq.ParquetWriter(file, MANIFEST_SCHEMA, compression="zstd") as writer:
        for listed in shards:
            rows = _rows(listed, first_shard + num_shards)
            writer.write_table(rows, row_group_size=layout.shard_size)
            num_rows, num_shards = num_rows + rows.num_rows, num_shards + 1
            sizes = encoded_bytes(listed)
            max_bytes = max(max_bytes, int(sizes[sizes <= layout.max_file_mb * MEGABYTE].sum()))
    part = ManifestPart(
        file=f"{name}.parquet",
        sha256=file_sha256(url),
        num_rows=num_rows,
        first_ordinal=first_ordinal,
        first_shard=first_shard,
        num_shards=num_shards,
        shard_size=layout.shard_size,
        max_shard_bytes=max_bytes,
        source=source,
        counts_fetched_only=True,
    )
    storage.write_atomic(storage.join(run_url, MANIFEST, f"{name}.json"), json.dumps(asdict(part), indent=1).encode())
    return part


def _rows(listed: pa.Table, shard: int) -> pa.Table:
    """Convert rows of a listing to rows of the manifest."""
    shards = pa.array(np.full(listed.num_rows, shard), pa.int64())
    return pa.table(
        [shards if name == "shard" else listed[name] for name in MANIFEST_SCHEMA.names], schema=MANIFEST_SCHEMA
    )
