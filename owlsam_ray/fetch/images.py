"""Reads the encoded images of one shard from any storage; a failed read becomes a reason in the image's row.

Images in tar and Parquet files are read together with their neighbours (`packed.py`). Stuck threads are abandoned
(`deadline_pool.py`).
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from owlsam_ray import storage
from owlsam_ray.config.base import MEGABYTE
from owlsam_ray.errors import FailureClass, ImageError, InputError, StorageSetupError
from owlsam_ray.fetch.deadline_pool import DeadlinePool, StalledError
from owlsam_ray.fetch.packed import (
    Cell,
    FetchTask,
    Member,
    NotSetUpError,
    Outcome,
    Outcomes,
    guarded,
    image_error,
    read_cells,
    tar_tasks,
    too_large,
)
from owlsam_ray.records import EncodedImage
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.schema import Container
from owlsam_ray.sources.listing import address_of
from owlsam_ray.storage.addresses import HostRules, check_by_look_up, container_error, data_uri_error, needs_look_up
from owlsam_ray.storage.secrets import masked_url

FETCHED_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("shard_rows", pa.int64()),  # number of rows of this table
        pa.field("image_id", pa.int64()),
        pa.field("height", pa.int32()),  # as the source states it
        pa.field("width", pa.int32()),
        pa.field("data", pa.large_binary()),
        pa.field("reason", pa.string()),
        pa.field("status_class", pa.string()),
        pa.field("note", pa.string()),  # a remark on an image that was read
    ]
)
_MOST_PROBES = 3
"""Shards from which images are read to find out whether any storage of the run is accessible."""
_PROBE_S = 60.0


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
        manifest: the run's manifest.
        shard: number of the shard.
        threads: number of parallel requests.
        max_file_mb: larger images fail as `too_large`, and reading stops at the limit.
        deadline_s: see `fetch_rows`.
        positions: positions within the shard of the images to read; None: all.

    Returns:
        `FETCHED_SCHEMA`, one row per image, in manifest order or in the order of `positions`.

    Raises:
        StorageSetupError: this machine lacks the credentials or the package for every storage of the run. If another
            storage works, the images without access fail as `no_access`.
        OSError: the manifest cannot be read.
    """
    table = manifest.read_shard(shard)
    rows = (table if positions is None else table.take(pa.array(positions, pa.int64()))).to_pylist()
    notes: dict[int, str] = {}
    fetched = fetch_outcomes(rows, notes, threads=threads, max_bytes=max_file_mb * MEGABYTE, deadline_s=deadline_s)
    # With `positions`, images of finished shards are retried: they keep their rows.
    error = setup_error(rows, fetched) if positions is None else None
    if error is not None and not _another_storage_works(manifest, {_root(row["uri"]) for row in rows}):
        raise error
    _warn_of_missing_setup(rows, fetched)
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
        "note": [None if failure else notes.get(position) for position, failure in enumerate(failures)],
    }
    return pa.table(columns, schema=FETCHED_SCHEMA)


def fetch_rows(
    rows: Sequence[dict[str, Any]], *, threads: int, max_bytes: int, deadline_s: float | None = None
) -> list[Outcome]:
    """Read images from any kind of container.

    Args:
        rows: rows of a manifest or a listing: `uri`, `container`, `member`, `offset`, `length`.
        threads: number of parallel requests.
        max_bytes: larger images fail as `too_large`, and reading stops at the limit.
        deadline_s: seconds without any result after which all outstanding images fail as `fetch_timeout` and the
            threads that wait for them are abandoned; None: wait forever.

    Returns:
        For each row the encoded image, or the error that it fails with.

    Raises:
        StorageSetupError: this machine lacks the credentials or the package for all of them. If another storage works,
            the images without access fail as `no_access`.
    """
    outcomes = fetch_outcomes(rows, {}, threads=threads, max_bytes=max_bytes, deadline_s=deadline_s)
    if (error := setup_error(rows, outcomes)) is not None:
        raise error
    return outcomes


def fetch_outcomes(
    rows: Sequence[dict[str, Any]],
    notes: dict[int, str],
    *,
    threads: int,
    max_bytes: int,
    deadline_s: float | None = None,
) -> list[Outcome]:
    """Read images like `fetch_rows`, except that all of them may fail as `no_access`.

    Remarks on images are added to `notes`, by position.
    """
    outcomes: list[Outcome | None] = [None] * len(rows)
    without = ImageError("missing")
    pool: DeadlinePool[Outcomes] = DeadlinePool(threads, deadline_s=deadline_s)
    not_set_up: dict[str, NotSetUpError] = {}
    for task in _tasks(rows, max_bytes, pool.add, notes, not_set_up):
        pool.add(task)
    try:
        for some in pool.results():
            for position, outcome in some:
                outcomes[position] = outcome
                if isinstance(outcome, NotSetUpError):
                    not_set_up[_root(rows[position]["uri"])] = outcome
    except StalledError:
        without = ImageError(f"fetch_timeout: no answer within {deadline_s:g} s", FailureClass.TRANSIENT)
    return [outcome if outcome is not None else without for outcome in outcomes]


def _root(uri: str) -> str:
    """Scheme and bucket or host of a URI, without any part of its path."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if separator else ""


def _missing(rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome | None]) -> dict[str, str]:
    """What this machine lacks to access each storage, by scheme and bucket; the text is that of its first image."""
    found: dict[str, str] = {}
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, NotSetUpError):
            found.setdefault(_root(row["uri"]), outcome.reason.removeprefix("no_access: "))
    return found


def setup_error(rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome | None]) -> StorageSetupError | None:
    """Everything that this machine lacks, if that is why none of the images could be read; None otherwise."""
    asked = [outcome for row, outcome in zip(rows, outcomes, strict=True) if row["container"] != Container.BAD]
    if not asked or not all(isinstance(outcome, NotSetUpError) for outcome in asked):
        return None
    return StorageSetupError("\n".join(_missing(rows, outcomes).values()))


def _warn_of_missing_setup(rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome]) -> None:
    for root, what in _missing(rows, outcomes).items():
        storage.warn_once(root, StorageSetupError(what))


def _another_storage_works(manifest: Manifest, broken: set[str]) -> bool:
    """Whether an image of the run in another storage can be read."""
    probes = 0
    for shard, uris in manifest.uri_bounds():
        if probes == _MOST_PROBES:
            break
        if {_root(uri) for uri in uris} <= broken:
            continue
        probes += 1
        rows = manifest.read_shard(shard).to_pylist()
        elsewhere = [row for row in rows if _root(row["uri"]) not in broken and row["container"] != Container.BAD]
        outcomes = fetch_outcomes(elsewhere[:4], {}, threads=4, max_bytes=MEGABYTE, deadline_s=_PROBE_S)
        # An image that is too large is readable, too.
        if any(isinstance(each, bytes) or each.reason.startswith("too_large") for each in outcomes):
            return True
    return False


def _tasks(
    rows: Sequence[dict[str, Any]],
    max_bytes: int,
    hand_over: Callable[[FetchTask], None],
    notes: dict[int, str],
    not_set_up: Mapping[str, NotSetUpError],
) -> Iterator[FetchTask]:
    """Tasks that each read one file, one span of a tar file, or one footer.

    A footer's task adds the tasks for the row groups.
    """
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
            listed = row.get("length")
            task = partial(_fetch_plain, position, address_of(row), max_bytes, listed, notes, not_set_up)
            yield guarded([position], task)
    for uri, inside in members.items():
        if (error := _container_error(uri)) is not None:
            yield partial(list, [[(member.position, error) for member in inside]])
        else:
            yield from tar_tasks(uri, inside, max_bytes=max_bytes)
    for (uri, column), inside_table in cells.items():
        if (error := _container_error(uri)) is not None:
            yield partial(list, [[(cell.position, error) for cell in inside_table]])
            continue
        footer = partial(read_cells, uri, column, inside_table, max_bytes=max_bytes, hand_over=hand_over)
        yield guarded((cell.position for cell in inside_table), footer)


def _fetch_plain(
    position: int,
    uri: str,
    max_bytes: int,
    listed: int | None,
    notes: dict[int, str],
    not_set_up: Mapping[str, NotSetUpError],
) -> Iterator[Outcomes]:
    if not_set_up and (failure := not_set_up.get(_root(uri))) is not None:  # already failed for another image
        yield [(position, failure)]
        return
    try:
        body = _read_file(uri, max_bytes=max_bytes, listed=listed)
    except ImageError as error:
        yield [(position, error)]
        return
    if listed is not None and body.size is not None and body.size != listed:
        notes[position] = f"size_changed: {listed} bytes listed, {body.size} found"
    yield [(position, body.data)]


def to_images(fetched: pa.Table) -> list[EncodedImage]:
    """Convert rows of `FETCHED_SCHEMA` to the engine's input; the bytes are not copied."""
    images = []
    data = fetched["data"].combine_chunks()
    for position, row in enumerate(fetched.drop_columns(["data"]).to_pylist()):
        outcome: memoryview | ImageError
        if row["reason"] is not None:
            outcome = ImageError(row["reason"], FailureClass(row["status_class"]))
        else:
            outcome = memoryview(data[position].as_buffer())
        described = {name: row[name] for name in ("image_id", "height", "width", "note")}
        images.append(EncodedImage.of(outcome, **described))
    return images


def _container_error(uri: str) -> ImageError | None:
    """The error of all images inside a file whose address may not be opened; None when it may."""
    error = container_error(uri, HostRules(storage.policy().allowed_hosts))
    return None if error is None else ImageError(f"bad_uri: cannot open {masked_url(uri)}: {error}")


def check_data_uri(uri: str) -> None:
    """Check that an address found in data may be opened.

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
    """Read an image that is stored as a separate file.

    Args:
        uri: path or fsspec URL.
        max_bytes: larger files are refused, and reading stops at the limit.

    Raises:
        ImageError: `missing`, `forbidden`, `not_a_file`, `bad_uri`, `too_large` or `fetch_failed` (the only transient
            one).
        StorageSetupError: this machine lacks the credentials or the package for the storage.
    """
    return _read_file(uri, max_bytes=max_bytes, listed=None).data


def _read_file(uri: str, *, max_bytes: int, listed: int | None) -> storage.Body:
    """Read the file like `fetch_file`, and return its size as well; `listed` is the size in the listing."""
    try:
        check_data_uri(uri)
        filesystem, path = storage.open_filesystem(uri)
        # Opening a named pipe would block.
        if storage.is_local(filesystem) and os.path.exists(path) and not os.path.isfile(path):
            raise ImageError("not_a_file")
        return storage.read_whole(uri, limit=max_bytes, listed=listed)
    except storage.TooLargeError:
        raise too_large(max_bytes) from None
    except (OSError, InputError) as error:
        raise image_error(error) from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        # A library behind fsspec cannot handle the URL: this fails the image, not the run.
        raise ImageError(f"bad_uri: {storage.described(error)}") from None
