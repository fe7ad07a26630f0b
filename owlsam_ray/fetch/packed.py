"""Reads images inside other files: members of tar files by byte range, cells of Parquet files by row.

Neighbouring images of one file are read together. A failed read becomes a reason for the images it concerns.
"""

import errno
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from owlsam_ray import storage
from owlsam_ray.config.base import MEGABYTE
from owlsam_ray.errors import FailureClass, ImageError, InputError, StorageSetupError, one_line
from owlsam_ray.storage.arrow_types import extension_of, holds_bytes, shown_type
from owlsam_ray.storage.secrets import masked

Outcome = bytes | ImageError
"""The bytes of one image, or the error that it fails with."""
Outcomes = list[tuple[int, Outcome]]
"""Position of each image, and its outcome."""
FetchTask = Callable[[], Iterable[Outcomes]]
"""Reads some images. An empty list of outcomes only shows progress."""

_GAP = 2**18
"""Largest gap in bytes between two members that is read and discarded to save a second request."""
_SPAN = 16 * 2**20
"""Bytes read at once, unless a single member is larger."""
_STREAM = 4 * 2**20
"""Bytes of a column read at once."""
_CELLS = 32
"""Rows decoded at once."""


@dataclass(frozen=True, slots=True)
class Member:
    """An image in a tar file."""

    position: int
    """Index among the requested images."""
    offset: int
    length: int


@dataclass(slots=True)
class Span:
    """Members of one file that are read together."""

    start: int
    end: int
    members: list[Member] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cell:
    """An image in a column of a Parquet file."""

    position: int
    row: int


class NotSetUpError(ImageError):
    """Fails an image whose storage this machine lacks the credentials or the package for."""

    def __init__(self, reason: str, failure_class: FailureClass = FailureClass.TRANSIENT) -> None:
        super().__init__(reason, failure_class)


def guarded(positions: Iterable[int], task: FetchTask) -> FetchTask:
    """Wrap a task so that any exception it raises becomes the error of its images that have no outcome yet."""
    return partial(_run_guarded, tuple(positions), task)


def _run_guarded(positions: tuple[int, ...], task: FetchTask) -> Iterator[Outcomes]:
    left = dict.fromkeys(positions)
    failure: ImageError
    try:
        for outcomes in task():
            for position, _ in outcomes:
                left.pop(position, None)
            yield outcomes
    except StorageSetupError as error:
        failure = NotSetUpError(f"no_access: {error}")
    except (OSError, InputError) as error:
        failure = image_error(error)
    except Exception as error:  # noqa: BLE001 (any error of a library behind fsspec becomes the row of its images)
        storage.warn_once("a read of images", error)
        failure = ImageError(f"fetch_failed: {storage.described(error)}", FailureClass.TRANSIENT)
    else:
        return
    yield [(position, failure) for position in left]


def image_error(error: OSError | InputError) -> ImageError:
    """The error of an image whose file cannot be read.

    Raises:
        StorageSetupError: `error` is one; it says nothing about the image.
    """
    if isinstance(error, StorageSetupError):
        raise error
    if isinstance(error, InputError):
        return ImageError(f"bad_uri: {masked(str(error))}")
    # Link loops and impossible names lead nowhere either: retrying does not help.
    nowhere = error.errno in (errno.ELOOP, errno.ENAMETOOLONG)
    if isinstance(error, FileNotFoundError | NotADirectoryError) or nowhere:
        return ImageError("missing")
    if isinstance(error, IsADirectoryError):
        return ImageError("not_a_file")
    detail = masked(error.strerror or str(error) or type(error).__name__)
    if isinstance(error, PermissionError):
        return ImageError(f"forbidden: {detail}")
    return ImageError(f"fetch_failed: {detail}", FailureClass.TRANSIENT)


def too_large(max_bytes: int) -> ImageError:
    """The error of an image that exceeds the limit."""
    return ImageError(f"too_large: more than {max_bytes // MEGABYTE} MB")


def join_members(members: Sequence[Member]) -> list[Span]:
    """Group neighbouring members into spans, ordered by offset."""
    spans: list[Span] = []
    for member in sorted(members, key=lambda each: each.offset):
        end = member.offset + member.length
        last = spans[-1] if spans else None
        if last is None or member.offset > last.end + _GAP or max(end, last.end) - last.start > _SPAN:
            spans.append(last := Span(member.offset, end))
        last.members.append(member)
        last.end = max(last.end, end)
    return spans


def tar_tasks(uri: str, members: Sequence[Member], *, max_bytes: int) -> Iterator[FetchTask]:
    """Tasks that read members of one tar file, about `_SPAN` bytes each.

    Args:
        uri: address of the tar file.
        members: in any order.
        max_bytes: larger members fail as `too_large` and are not read.
    """
    large = [member for member in members if member.length > max_bytes]
    if large:
        yield lambda: [[(member.position, too_large(max_bytes)) for member in large]]
    for span in join_members([member for member in members if member.length <= max_bytes]):
        yield guarded((member.position for member in span.members), partial(_read_span, uri, span))


def _read_span(uri: str, span: Span) -> Iterator[Outcomes]:
    try:
        data = memoryview(storage.read_range(uri, span.start, span.end - span.start))
    except (OSError, InputError) as error:
        failure = image_error(error)
        if failure.failure_class is FailureClass.PERMANENT or len(span.members) == 1:
            yield [(member.position, failure) for member in span.members]
            return
        # One by one, so that only the unreadable members fail.
        for member in span.members:
            yield from _read_span(uri, Span(member.offset, member.offset + member.length, [member]))
        return
    outcomes: Outcomes = []
    for member in span.members:
        start = member.offset - span.start
        image = bytes(data[start : start + member.length])
        if len(image) == member.length:
            outcomes.append((member.position, image))
        else:
            where = f"the tar file ends {member.length - len(image)} bytes before the image does"
            outcomes.append((member.position, ImageError(f"truncated: {where}")))
    yield outcomes


def read_cells(
    uri: str, column: str, cells: Sequence[Cell], *, max_bytes: int, hand_over: Callable[[FetchTask], None]
) -> Iterator[Outcomes]:
    """Read the footer of a Parquet file and add a task per row group that reads cells of one column.

    Args:
        uri: address of the Parquet file.
        column: path of a column of binary values, with dots into structures.
        cells: in any order.
        max_bytes: larger images fail as `too_large`.
        hand_over: called with each task.
    """
    footer = _read_footer(uri, column)
    if isinstance(footer, ImageError):
        yield [(cell.position, footer) for cell in cells]
        return
    ends = list(accumulate(footer.row_group(number).num_rows for number in range(footer.num_row_groups)))
    rows = sorted(cells, key=lambda cell: cell.row)
    for group, inside in groupby(rows, key=lambda cell: bisect_right(ends, cell.row)):
        wanted = list(inside)
        if group == len(ends):
            yield [
                (cell.position, ImageError(f"truncated: row {cell.row} of a table of {footer.num_rows} rows"))
                for cell in wanted
            ]
            continue
        first = ends[group] - footer.row_group(group).num_rows
        local = [Cell(cell.position, cell.row - first) for cell in wanted]
        task = partial(_read_row_group, uri, footer, column, group, local, max_bytes)
        hand_over(guarded((cell.position for cell in local), task))


def _read_footer(uri: str, column: str) -> Any:
    """Parquet metadata, or the reason why the column cannot be read."""
    try:
        with storage.open_input(uri) as file:
            footer = pq.read_metadata(file)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError, InputError) as error:
        return _table_error(error)
    found = _field_at(schema, column)
    if found is None or (pa.types.is_nested(found.type) and not extension_of(found)):
        return ImageError(f"bad_table: no column {column:.200}")
    if not holds_bytes(found):
        why = f"holds {shown_type(found)}, not bytes" if extension_of(found) else "holds no bytes"
        return ImageError(f"bad_table: column {column:.200} {why}")
    return footer


def _field_at(schema: pa.Schema, column: str) -> pa.Field | None:
    """The only field at a path with dots into structures; None when there is none or it is ambiguous."""
    if column in schema.names:
        return schema.field(column) if schema.names.count(column) == 1 else None
    first, *rest = column.split(".")
    found = schema.field(first) if schema.names.count(first) == 1 else None
    for name in rest:
        if found is None or not pa.types.is_struct(found.type):
            return None
        place = found.type.get_field_index(name)
        found = found.type.field(place) if place >= 0 else None
    return found


def _table_error(error: Exception) -> ImageError:
    """The image error for an exception of storage or of Arrow, whose errors about a file's content have no errno."""
    if isinstance(error, InputError) or (isinstance(error, OSError) and not _is_of_arrow(error)):
        return image_error(error)
    return ImageError(f"bad_table: {one_line(masked((str(error).splitlines() or [type(error).__name__])[0]))}")


def _is_of_arrow(error: OSError) -> bool:
    return type(error) is OSError and error.errno is None


def _read_row_group(
    uri: str, footer: Any, column: str, group: int, cells: Sequence[Cell], max_bytes: int
) -> Iterator[Outcomes]:
    """Read cells, sorted by row within the row group. The column is streamed only up to the last of them."""
    left = deque(cells)
    try:
        with storage.open_input(uri) as file:
            reader = pq.ParquetFile(file, metadata=footer, buffer_size=_STREAM, pre_buffer=False)
            start = 0
            for batch in reader.iter_batches(_CELLS, row_groups=[group], columns=[column], use_threads=False):
                values = _leaf(batch.column(0))
                outcomes: Outcomes = []
                while left and left[0].row < start + len(values):
                    cell = left.popleft()
                    outcomes.append((cell.position, _value(values[cell.row - start], max_bytes)))
                yield outcomes  # even when empty, to show progress: a large row group takes long
                start += len(values)
                if not left:
                    break
            else:
                raise pa.ArrowInvalid(f"row group {group} ends after {start} rows")
    except (pa.ArrowException, OSError, InputError) as error:
        failure = _table_error(error)
        yield [(cell.position, failure) for cell in left]


def _leaf(values: pa.Array) -> pa.Array:
    while pa.types.is_struct(values.type):  # only the requested field was read
        values = pc.struct_field(values, 0)
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _value(value: pa.Scalar, max_bytes: int) -> Outcome:
    buffer = value.as_buffer()
    if buffer is None:
        return ImageError("missing: the table holds no image in this row")
    return too_large(max_bytes) if buffer.size > max_bytes else buffer.to_pybytes()
