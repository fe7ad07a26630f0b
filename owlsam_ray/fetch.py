"""Shard number → encoded bytes of its images, through fsspec. Whatever goes wrong with one file becomes a reason."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from owlsam_ray import storage
from owlsam_ray.errors import FailureClass, ImageError, InputError
from owlsam_ray.manifest import Manifest
from owlsam_ray.records import EncodedImage

FETCHED_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("shard_rows", pa.int64()),
        pa.field("image_id", pa.int64()),
        pa.field("height", pa.int32()),  # as the source states it
        pa.field("width", pa.int32()),
        pa.field("data", pa.large_binary()),
        pa.field("reason", pa.string()),
        pa.field("status_class", pa.string()),
    ]
)

MEGABYTE = 10**6


def fetch_shard(manifest: Manifest, shard: int, *, threads: int, max_file_mb: int) -> pa.Table:
    """Read the files of one shard.

    Args:
        manifest: of the run.
        shard: its number.
        threads: files read at once.
        max_file_mb: larger files fail as `too_large`, and are read no further.

    Returns:
        `FETCHED_SCHEMA`, one row per image in manifest order.
    """
    rows = manifest.read_shard(shard).to_pylist()
    with ThreadPoolExecutor(max(1, min(threads, len(rows)))) as pool:
        fetched = list(pool.map(lambda row: _fetch(row, max_file_mb * MEGABYTE), rows))
    columns: dict[str, list[Any]] = {
        "shard": [shard] * len(rows),
        "shard_rows": [len(rows)] * len(rows),
        "image_id": [row["image_id"] for row in rows],
        "height": [row["height"] for row in rows],
        "width": [row["width"] for row in rows],
        "data": [data for data, _, _ in fetched],
        "reason": [reason for _, reason, _ in fetched],
        "status_class": [failure_class for _, _, failure_class in fetched],
    }
    return pa.table(columns, schema=FETCHED_SCHEMA)


def to_images(fetched: pa.Table) -> list[EncodedImage]:
    """Rows of `FETCHED_SCHEMA` as the engine takes them; the bytes are not copied."""
    images = []
    data = fetched["data"].combine_chunks()
    for position, row in enumerate(fetched.drop_columns(["data"]).to_pylist()):
        stated = (row["height"], row["width"]) if row["height"] is not None and row["width"] is not None else None
        failure = (row["reason"], FailureClass(row["status_class"])) if row["reason"] is not None else None
        buffer = data[position].as_buffer()
        images.append(
            EncodedImage(
                image_id=row["image_id"],
                data=memoryview(buffer) if buffer is not None else None,
                stated_hw=stated,
                failure=failure,
            )
        )
    return images


def fetch_file(uri: str, *, max_bytes: int, start: int = 0, length: int | None = None) -> bytes:
    """The bytes of one image.

    Args:
        uri: path or fsspec URL.
        max_bytes: larger files are refused, and read no further.
        start: where the image begins in the file.
        length: bytes that it has; None: up to the end of the file.

    Raises:
        ImageError: `missing`, `not_a_file`, `bad_uri`, `too_large` or `fetch_failed` (the only transient one).
    """
    length = length if length is not None else max_bytes + 1
    try:
        filesystem, path = storage.open_filesystem(uri)
        # A named pipe would be waited for.
        if storage.is_local(filesystem) and os.path.exists(path) and not os.path.isfile(path):
            raise ImageError("not_a_file")
        data = filesystem.cat_file(path, start=start, end=start + min(length, max_bytes + 1))
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("missing") from None
    except InputError as error:
        raise ImageError(f"bad_uri: {error}") from None
    except OSError as error:
        detail = error.strerror or str(error) or type(error).__name__
        raise ImageError(f"fetch_failed: {detail}", FailureClass.TRANSIENT) from None
    if len(data) > max_bytes:
        raise ImageError(f"too_large: more than {max_bytes // MEGABYTE} MB")
    return bytes(data)


def _fetch(row: dict[str, Any], max_bytes: int) -> tuple[bytes | None, str | None, str | None]:
    """The bytes of one image; or None, a reason and its class."""
    try:
        data = fetch_file(row["uri"], max_bytes=max_bytes, start=row["offset"] or 0, length=row["length"])
    except ImageError as error:
        return None, error.reason, str(error.failure_class)
    return data, None, None
