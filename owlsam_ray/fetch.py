"""Shard number → encoded bytes of its images, from any storage. Whatever goes wrong with one image becomes a reason.

Images in tar and Parquet files are read with their neighbours (`packed.py`). Threads that hang are left behind
(`crew.py`).
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from owlsam_ray import storage
from owlsam_ray.crew import Crew, SilenceError
from owlsam_ray.datasets import Container
from owlsam_ray.errors import FailureClass, ImageError, InputError
from owlsam_ray.manifest import Manifest
from owlsam_ray.packed import (
    MEGABYTE as MEGABYTE,
)
from owlsam_ray.packed import (
    Cell,
    FetchTask,
    Member,
    Outcome,
    Outcomes,
    image_error,
    read_cells,
    tar_tasks,
    too_large,
)
from owlsam_ray.records import EncodedImage
from owlsam_ray.storage.addresses import HostRules, check_by_look_up, data_uri_error, needs_look_up
from owlsam_ray.storage.secrets import masked, masked_url

FETCHED_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("shard_rows", pa.int64()),  # of this table
        pa.field("image_id", pa.int64()),
        pa.field("height", pa.int32()),  # as the source states it
        pa.field("width", pa.int32()),
        pa.field("data", pa.large_binary()),
        pa.field("reason", pa.string()),
        pa.field("status_class", pa.string()),
    ]
)


def fetch_shard(
    manifest: Manifest,
    shard: int,
    *,
    threads: int,
    max_file_mb: int,
    deadline_s: float | None = None,
    positions: Sequence[int] | None = None,
) -> pa.Table:
    """Read the images of one shard.

    Args:
        manifest: of the run.
        shard: its number.
        threads: requests at once.
        max_file_mb: larger images fail as `too_large`, and are read no further.
        deadline_s: as of `fetch_rows`.
        positions: in the shard, of the only images that are wanted; None: all.

    Returns:
        `FETCHED_SCHEMA`, one row per image, in manifest order or in that of `positions`.

    Raises:
        StorageSetupError: no credentials, or no package, to ask the storage with; no property of an image.
        OSError: the manifest cannot be read.
    """
    table = manifest.read_shard(shard)
    rows = (table if positions is None else table.take(pa.array(positions, pa.int64()))).to_pylist()
    fetched = fetch_rows(rows, threads=threads, max_bytes=max_file_mb * MEGABYTE, deadline_s=deadline_s)
    failures = [outcome if isinstance(outcome, ImageError) else None for outcome in fetched]
    columns: dict[str, list[Any]] = {
        "shard": [shard] * len(rows),
        "shard_rows": [len(rows)] * len(rows),
        "image_id": [row["image_id"] for row in rows],
        "height": [row["height"] for row in rows],
        "width": [row["width"] for row in rows],
        "data": [None if isinstance(outcome, ImageError) else outcome for outcome in fetched],
        "reason": [failure.reason if failure else None for failure in failures],
        "status_class": [str(failure.failure_class) if failure else None for failure in failures],
    }
    return pa.table(columns, schema=FETCHED_SCHEMA)


def fetch_rows(
    rows: Sequence[dict[str, Any]], *, threads: int, max_bytes: int, deadline_s: float | None = None
) -> list[Outcome]:
    """Read images wherever they lie.

    Args:
        rows: of a manifest or a listing: `uri`, `container`, `member`, `offset`, `length`.
        threads: requests at once.
        max_bytes: larger images fail as `too_large`, and are read no further.
        deadline_s: when nothing has come for so many seconds, all images that are still out fail as `fetch_timeout`,
            and the threads that wait for them are left behind; None: wait for ever.

    Returns:
        For each row the encoded image, or the error that it fails with.

    Raises:
        StorageSetupError: no credentials, or no package, to ask the storage with.
    """
    outcomes: list[Outcome | None] = [None] * len(rows)
    without = ImageError("missing")
    crew: Crew[Outcomes] = Crew(threads, deadline_s=deadline_s)
    for task in _tasks(rows, max_bytes, crew.add):
        crew.add(task)
    try:
        for some in crew.results():
            for position, outcome in some:
                outcomes[position] = outcome
    except SilenceError:
        without = ImageError(f"fetch_timeout: no answer within {deadline_s:g} s", FailureClass.TRANSIENT)
    return [outcome if outcome is not None else without for outcome in outcomes]


def _tasks(
    rows: Sequence[dict[str, Any]], max_bytes: int, hand_over: Callable[[FetchTask], None]
) -> Iterator[FetchTask]:
    """Tasks that read one file, one span of a tar file, or one footer (and hand over those for its row groups)."""
    members: dict[str, list[Member]] = defaultdict(list)
    cells: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for position, row in enumerate(rows):
        if row["container"] == Container.TAR:
            members[row["uri"]].append(Member(position, row["offset"], row["length"]))
        elif row["container"] == Container.PARQUET:
            cells[row["uri"], row["member"]].append(Cell(position, row["offset"]))
        elif row["container"] == Container.BAD:
            yield partial(list, [[(position, ImageError(row["member"]))]])
        else:
            yield partial(_fetch_plain, position, row["uri"], max_bytes)
    for uri, inside in members.items():
        yield from tar_tasks(uri, inside, max_bytes=max_bytes)
    for (uri, column), inside_table in cells.items():
        yield partial(read_cells, uri, column, inside_table, max_bytes=max_bytes, hand_over=hand_over)


def _fetch_plain(position: int, uri: str, max_bytes: int) -> Iterator[Outcomes]:
    try:
        yield [(position, fetch_file(uri, max_bytes=max_bytes))]
    except ImageError as error:
        yield [(position, error)]


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


def check_data_uri(uri: str) -> None:
    """An address that data names may be opened.

    Raises:
        InputError: it chains file systems, or leads to a host that data may not name.
    """
    rules = HostRules(storage.policy().allowed_hosts)
    error = data_uri_error(uri, rules)
    if error is not None:
        raise InputError(f"cannot open {masked_url(uri)}: {error}")
    if needs_look_up(uri):
        check_by_look_up(uri, rules)


def fetch_file(uri: str, *, max_bytes: int) -> bytes:
    """The bytes of an image that is a file of its own.

    Args:
        uri: path or fsspec URL.
        max_bytes: larger files are refused, and read no further.

    Raises:
        ImageError: `missing`, `forbidden`, `not_a_file`, `bad_uri`, `too_large` or `fetch_failed` (the only transient
            one).
        StorageSetupError: no credentials, or no package, to ask the storage with.
    """
    try:
        check_data_uri(uri)
        filesystem, path = storage.open_filesystem(uri)
        # A named pipe would be waited for.
        if storage.is_local(filesystem) and os.path.exists(path) and not os.path.isfile(path):
            raise ImageError("not_a_file")
        data = storage.read_range(uri, 0, max_bytes + 1)
    except (OSError, InputError) as error:
        raise image_error(error) from None
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        # A library behind fsspec that stumbles over the URL: a matter of this image, not of the run.
        raise ImageError(f"bad_uri: {type(error).__name__}: {masked(str(error))}") from None
    if len(data) > max_bytes:
        raise too_large(max_bytes)
    return data
