"""The contract of every source: a stream of images in a fixed order, and what the output carries over from it.

A listing of millions of images is never held in memory as a whole: it is a stream of Arrow tables of some thousand rows
each, which the plan spools to disk before it freezes ids and shards.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray.schema import LISTING_SCHEMA, Container

BATCH_ROWS = 8192
"""Approximate number of rows in a table of a listing."""


@dataclass(frozen=True, slots=True)
class ListingOptions:
    """How a listing is made; except for damaged files, no option changes which images it holds."""

    workers: int = 1
    """Number of processes that list tar files."""
    keep_whole: bool = False
    """List the members of a truncated or damaged tar file that precede the damage, instead of refusing the file."""


DEFAULTS = ListingOptions()


def address_of(row: Mapping[str, Any]) -> str:
    """Path or URL at which the file of a listing or manifest row is opened: `uri`, unescaped if the row says so."""
    uri, member = str(row["uri"]), row["member"]
    if row["container"] != Container.ESCAPED:
        return uri
    return uri.removesuffix(member) + unquote(member, errors="surrogateescape")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a listing."""

    image_id: int | None
    """None: the plan assigns the ids."""
    file_name: str
    """Full path relative to the root of the images."""
    height: int | None = None
    """As the source states it."""
    width: int | None = None
    num_bytes: int | None = None
    """Size of the file if the storage reported it; never a size stated by the source."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The source's other fields of the image, carried over into the output."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Images in their final order. Whether ids and names repeat across tables is checked by the plan."""

    tables: Iterator[pa.Table]
    """`LISTING_SCHEMA`, readable once. Raises `InputError` when the source is invalid, at the latest at its end."""
    total: int | None = None
    """Number of images, if known before they are listed."""
    has_ids: bool = True
    """Whether the source gives ids; if not, `image_id` is null in all rows."""
    info: dict[str, Any] = field(default_factory=dict)
    licenses: list[Any] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    """In COCO's format; known before the first table is read."""
    annotated: Callable[[], Iterator[pa.Table]] | None = None
    """Streams (image_id, category_id) of every annotation; None for sources without annotations."""
    name_setting: str | None = None
    """The setting that says where names come from, if the source could do without it."""


def tables_of(records: Iterable[ImageRecord], root: str, *, rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """Convert records to tables of a listing.

    Args:
        records: in order.
        root: path or URL that the file names are relative to.
        rows: number of rows per table.
    """
    pending: list[ImageRecord] = []
    for record in records:
        pending.append(record)
        if len(pending) == rows:
            yield _table(pending, root)
            pending = []
    if pending:
        yield _table(pending, root)


def _table(records: Sequence[ImageRecord], root: str) -> pa.Table:
    names = pa.array([record.file_name for record in records], pa.string())
    return listing_table(
        {
            "image_id": [record.image_id for record in records],
            "file_name": names,
            "uri": below(root, names),
            "length": [record.num_bytes for record in records],
            "num_bytes": [record.num_bytes for record in records],
            "height": [record.height for record in records],
            "width": [record.width for record in records],
            "extra": [json.dumps(record.extra) if record.extra else None for record in records],
        }
    )


def listing_table(columns: dict[str, Any]) -> pa.Table:
    """Build a table of `LISTING_SCHEMA`; columns that are not given are null.

    Args:
        columns: lists or Arrow arrays of equal length, by name; at least `file_name` and `uri`.
    """
    rows = len(columns["file_name"])
    arrays = []
    for name, kind in zip(LISTING_SCHEMA.names, LISTING_SCHEMA.types, strict=True):
        values = columns.get(name)
        if values is None:
            arrays.append(pa.nulls(rows, kind))
        elif isinstance(values, pa.Array | pa.ChunkedArray):
            arrays.append(values.cast(kind))
        else:
            arrays.append(pa.array(values, kind))
    return pa.table(arrays, schema=LISTING_SCHEMA)


def below(root: str, names: pa.Array, *, are_uris: bool = False) -> pa.Array:
    """Join names to a root like `storage.join`; below `http(s)://` they are quoted, since ? and # end a path there.

    Args:
        root: path or URL.
        names: relative to the root.
        are_uris: the names are quoted already where needed.
    """
    if root.startswith(("http://", "https://")) and not are_uris:
        names = pa.array([quote(name) for name in names.to_pylist()], pa.string())
    return pc.binary_join_element_wise(pa.scalar(f"{root.rstrip('/')}/"), names, "")


def file_name_error(name: object) -> str | None:
    """Why a file name is refused; None when it is valid. A name must stay below the root of the images."""
    if not isinstance(name, str) or not name:
        return "file_name is not a text"
    if "\0" in name or "\\" in name:
        return "file_name holds a NUL or a backslash"
    if "://" in name or name.startswith("/"):
        return "file_name is not relative"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "file_name leaves the root, or holds an empty part"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "file_name is not valid Unicode"
    return None


_BAD_NAME = r"^$|[\\\x00]|://|^/|//|/$|(^|/)\.\.?(/|$)"
"""What `file_name_error` refuses, as an RE2 pattern; an Arrow string is always valid Unicode."""


def bad_names(names: pa.Array) -> pa.Array:
    """Positions (int64, ascending) of the names that `file_name_error` refuses; null is refused as well."""
    bad = pc.fill_null(pc.match_substring_regex(names, _BAD_NAME), True)
    return pc.indices_nonzero(bad).cast(pa.int64())
