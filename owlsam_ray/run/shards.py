"""Read and write shard files; the existence of its file alone marks a shard as done (law 2).

A shard's name depends only on the manifest, its file is written atomically, and its existence is the done mark. So
resume is one listing, and two overlapping attempts write the same rows to the same names.

A shard is a Parquet file whose footer holds a JSON description of the file under the key `owlsam`, with two checksums:
one of the data section, and one of everything after it. Together they cover every byte.
"""

import hashlib
import json
import re
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic.dataclasses import dataclass as validated_dataclass

from owlsam_ray import storage
from owlsam_ray.errors import FailureClass, IncompleteError, one_line
from owlsam_ray.run.paths import PREDICTIONS
from owlsam_ray.schema import PREDICTION_SCHEMA, ROW_GROUP_IMAGES, SCHEMA_VERSION

FOOTER_KEY = b"owlsam"
_REPEATING = [
    *("status", "reason", "status_class", "height", "width"),
    *(f"{name}.list.element" for name in ("det_index", "label", "prompt_id", "num_merged")),
]
"""Columns whose values repeat. Dictionaries for the others only take space, and a third of the read time."""
_ZEROS = "0" * 64
_TAIL_READ = 2**16
"""Bytes first read from the end of a file: more than the footer of a shard of a thousand images."""
_FOOTER_SHA256 = re.compile(rb'"footer_sha256": "([0-9a-f]{64})"')
_NAME = re.compile(r"shard-([0-9]{8,})\.parquet")


@validated_dataclass(frozen=True, slots=True)
class ShardFooter:
    """Description of a shard file, stored in its footer."""

    schema_version: int
    shard: int
    num_rows: int
    fingerprint: str
    numerics: str
    counts: dict[str, int]
    """Rows by status: ok, empty, failed."""
    transient: int
    """Failed rows that are worth a retry."""
    num_detections: int
    num_masks: int
    stage_s: dict[str, float]
    """Busy seconds by stage: the only content that may differ between attempts."""
    failures: dict[str, int] | None = None
    """Failed rows by class and reason up to its colon, as `permanent truncated`; None in files of version 0.1."""
    data_sha256: str | None = None
    """SHA-256 of the bytes before the Parquet footer; None in files of version 0.1."""
    footer_sha256: str | None = None
    """SHA-256 of the footer's bytes to the end, with zeros in place of this checksum; None in files of version 0.1."""


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:08d}.parquet"


def shard_url(run_url: str, shard: int) -> str:
    """Path or URL of a shard file."""
    return storage.join(run_url, PREDICTIONS, shard_name(shard))


def done_shards(run_url: str) -> set[int]:
    """Shards whose file exists, from one listing."""
    names = storage.list_names(storage.join(run_url, PREDICTIONS))
    return {shard for name in names if (shard := shard_of(name)) is not None}


def shard_of(name: str) -> int | None:
    """Shard number from a file name; None if it is not the name of a shard file."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match is not None and shard_name(int(match[1])) == name else None


def write_shard(
    run_url: str, shard: int, rows: pa.Table, *, fingerprint: str, numerics: str, stage_s: dict[str, float]
) -> None:
    """Write the rows of a whole shard atomically.

    Args:
        run_url: the run directory.
        shard: the shard's number.
        rows: rows as `PREDICTION_SCHEMA`, one per image of the shard, in manifest order.
        fingerprint: the label fingerprint.
        numerics: the numerics id.
        stage_s: busy seconds by stage.

    Raises:
        OSError: storage failed; no partial file is left behind.
    """
    data = encode_shard(shard, rows, fingerprint=fingerprint, numerics=numerics, stage_s=stage_s)
    storage.write_atomic(shard_url(run_url, shard), data)


def encode_shard(
    shard: int, rows: pa.Table, *, fingerprint: str, numerics: str, stage_s: dict[str, float]
) -> memoryview:
    """Encode a shard file; arguments are the same as for `write_shard`."""
    footer = _footer_of(rows) | {
        "shard": shard,
        "fingerprint": fingerprint,
        "numerics": numerics,
        "stage_s": {stage: round(seconds, 4) for stage, seconds in stage_s.items()},
        # Last, so that the placeholders can be found in the encoded bytes and replaced with the checksums.
        "data_sha256": _ZEROS,
        "footer_sha256": _ZEROS,
    }
    table = rows.cast(PREDICTION_SCHEMA).replace_schema_metadata(None)
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", use_dictionary=_REPEATING) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP_IMAGES)
        writer.add_key_value_metadata({FOOTER_KEY: json.dumps(footer).encode()})
    data = memoryview(bytearray(memoryview(buffer.getvalue())))
    tail = data[len(data) - _tail_bytes(data, len(data)) :]
    for key, covered in (("data_sha256", data[: len(data) - len(tail)]), ("footer_sha256", tail)):
        start = bytes(tail).rfind(f'"{key}": "{_ZEROS}"'.encode()) + len(f'"{key}": "')
        tail[start : start + len(_ZEROS)] = hashlib.sha256(covered).hexdigest().encode()
    return data


def _footer_of(rows: pa.Table) -> dict[str, Any]:
    """Footer fields that follow from the rows alone."""
    failed = pc.equal(rows["status"], "failed")
    transient = pc.fill_null(pc.equal(rows["status_class"], str(FailureClass.TRANSIENT)), False)
    why = rows.select(["status_class", "reason"]).filter(failed).to_pylist()
    failures = Counter(f"{row['status_class']} {(row['reason'] or '').split(':')[0]}" for row in why)
    return {
        "schema_version": SCHEMA_VERSION,  # first: readers find the JSON by this key
        "num_rows": rows.num_rows,
        "counts": {
            status: pc.sum(pc.equal(rows["status"], status)).as_py() or 0 for status in ("ok", "empty", "failed")
        },
        "transient": pc.sum(pc.and_(failed, transient)).as_py() or 0,
        "failures": dict(sorted(failures.items())),
        "num_detections": pc.sum(pc.list_value_length(rows["label"])).as_py() or 0,
        "num_masks": pc.count(pc.list_flatten(rows["mask_area"])).as_py(),
    }


def _tail_bytes(end: bytes | memoryview, size: int) -> int:
    """Number of bytes after the data section of a Parquet file: metadata, its length, and the magic.

    Args:
        end: the last bytes of the file, at least 8.
        size: size of the file in bytes.

    Raises:
        ValueError: the file is not a Parquet file, or is truncated.
    """
    length = int.from_bytes(end[-8:-4], "little") + 8
    if size < 12 or bytes(end[-4:]) != b"PAR1" or length > size - 4:
        raise ValueError(f"its {size} bytes do not end like a Parquet file")
    return length


def footer_bytes(data: bytes | memoryview) -> int:
    """Number of bytes after the data section of a shard file."""
    return _tail_bytes(data[-8:], len(data))


def read_footer(run_url: str, shard: int) -> ShardFooter:
    """Read the footer of a finished shard without its rows, and check the footer's checksum.

    Raises:
        IncompleteError: the file is damaged or foreign; the message names it and how to redo it.
        OSError: storage failed, which says nothing about the file.
    """
    url = shard_url(run_url, shard)
    with storage.open_input(url) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_READ))
        end = file.read()
        try:
            length = _tail_bytes(end, size)
        except ValueError as error:
            raise corrupt_shard(url, str(error)) from None
        if length > len(end):
            file.seek(size - length)
            end = file.read()
    return _parse_footer(url, shard, end[-length:])


def _parse_footer(url: str, shard: int, tail: bytes) -> ShardFooter:
    try:
        text = _checked_text(tail)
        if text is not None:  # intact, so nothing else of the footer needs parsing: a fifth of the time
            footer = ShardFooter(**json.loads(text))
            num_rows = footer.num_rows
        else:
            metadata = pq.read_metadata(pa.BufferReader(tail))
            footer = ShardFooter(**json.loads((metadata.metadata or {})[FOOTER_KEY]))
            num_rows = metadata.num_rows
        if (text is None) != (footer.footer_sha256 is None) or (text is None) != (footer.data_sha256 is None):
            raise ValueError("one of its two checksums is missing")
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise corrupt_shard(url, f"{type(error).__name__}: {one_line(error)}") from None
    if footer.shard != shard or footer.num_rows != num_rows:
        what = f"its footer states shard {footer.shard} with {footer.num_rows} rows, but it has {num_rows}"
        raise corrupt_shard(url, what)
    return footer


def _checked_text(tail: bytes) -> bytes | None:
    """Return the JSON of a footer whose checksum matches; None if it holds no checksum.

    Raises:
        ValueError: the checksum does not match.
    """
    places = [match.span(1) for match in _FOOTER_SHA256.finditer(tail)]
    if not places:
        return None
    start, end = places[-1]  # the last: failure reasons before it are untrusted text
    if hashlib.sha256(tail[:start] + _ZEROS.encode() + tail[end:]).hexdigest().encode() != tail[start:end]:
        raise ValueError("the checksum of its footer does not match")
    return tail[tail.rindex(b'{"schema_version"', 0, start) : end + len('"}')]


def load_shard(run_url: str, shard: int) -> tuple[ShardFooter, pa.Table]:
    """Read a whole shard file and check both checksums.

    Returns:
        The footer, and the rows as `PREDICTION_SCHEMA`.

    Raises:
        IncompleteError: the file is damaged or foreign; the message names it and how to redo it.
        OSError: storage failed, which says nothing about the file.
    """
    url = shard_url(run_url, shard)
    data = storage.read_bytes(url)
    try:
        length = _tail_bytes(data, len(data))
    except ValueError as error:
        raise corrupt_shard(url, str(error)) from None
    footer = _parse_footer(url, shard, data[-length:])
    if footer.data_sha256 not in (None, hashlib.sha256(memoryview(data)[:-length]).hexdigest()):
        raise corrupt_shard(url, "the checksum of its data does not match")
    try:
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        if not file.schema_arrow.equals(PREDICTION_SCHEMA):  # checked before any value is read
            raise corrupt_shard(url, f"its columns are not those of schema version {SCHEMA_VERSION}")
        return footer, file.read().replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise corrupt_shard(url, f"{type(error).__name__}: {one_line(error)}") from None


def corrupt_shard(url: str, what: str) -> IncompleteError:
    """Create the error for a shard file that cannot be trusted."""
    return IncompleteError(
        f"{url} is not a whole shard of this run ({what}). Delete or move this file and run `owlsam annotate` "
        "again: only its images are labelled again."
    )
