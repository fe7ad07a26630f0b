"""What every source gives: a stream of images in a fixed order, and what the output carries over from it.

A listing of millions of images is never whole in memory: it is a stream of Arrow tables, some thousand rows each, that
the plan spools to a disk before it freezes ids and shards.
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
"""Rows of a table of a listing, about."""


@dataclass(frozen=True, slots=True)
class ListingOptions:
    """How a listing is made; nothing here changes which images it holds, but for damaged files."""

    workers: int = 1
    """Processes that list tar files."""
    keep_whole: bool = False
    """Of a cut or damaged tar file, list the members before the damage instead of refusing it."""


DEFAULTS = ListingOptions()


def address_of(row: Mapping[str, Any]) -> str:
    """Path or URL that the file of a row of a listing or manifest is opened by: `uri`, unless that is escaped."""
    uri, member = str(row["uri"]), row["member"]
    if row["container"] != Container.ESCAPED:
        return uri
    return uri.removesuffix(member) + unquote(member, errors="surrogateescape")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a listing."""

    image_id: int | None
    """None: the plan numbers the images."""
    file_name: str
    """Full path relative to the root of the images."""
    height: int | None = None
    """As the source states it."""
    width: int | None = None
    num_bytes: int | None = None
    """Size of the file, where the storage told it; never what a source states."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The source's other fields of the image, carried into the output."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Images in their final order. Whether ids and names repeat over tables is for the plan to find out."""

    tables: Iterator[pa.Table]
    """`LISTING_SCHEMA`, can be read once. Raises `InputError` where the source is wrong, at the latest at its end."""
    total: int | None = None
    """Images, where that is known before they are listed."""
    has_ids: bool = True
    """Whether the source gives ids; without, `image_id` is null in all rows."""
    info: dict[str, Any] = field(default_factory=dict)
    licenses: list[Any] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    """As in COCO's format; known before the first table is read."""
    annotated: Callable[[], Iterator[pa.Table]] | None = None
    """Streams (image_id, category_id) of every annotation; None for sources without annotations."""
    name_setting: str | None = None
    """The setting that says where names come from, if the source could do without it."""


def tables_of(records: Iterable[ImageRecord], root: str, *, rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """Records as tables of a listing.

    Args:
        records: in order.
        root: path or URL that their names are below.
        rows: of a table.
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
    """Columns as a table of `LISTING_SCHEMA`; those that are not given are null.

    Args:
        columns: lists or Arrow arrays of one length by name; at least `file_name` and `uri`.
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
    """Names joined to a root, as `storage.join` does it; quoted below `http(s)://`, where ? and # are no names.

    Args:
        root: path or URL.
        names: relative.
        are_uris: quoted already, where that is needed.
    """
    if root.startswith(("http://", "https://")) and not are_uris:
        names = pa.array([quote(name) for name in names.to_pylist()], pa.string())
    return pc.binary_join_element_wise(pa.scalar(f"{root.rstrip('/')}/"), names, "")


def file_name_error(name: object) -> str | None:
    """Why a file name cannot be taken; None when it can. A name must stay below the root of the images."""
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
"""What `file_name_error` refuses, for RE2; an Arrow string is valid Unicode anyway."""


def bad_names(names: pa.Array) -> pa.Array:
    """Positions (int64, rising) of the names that `file_name_error` refuses; a null is refused as well."""
    bad = pc.fill_null(pc.match_substring_regex(names, _BAD_NAME), True)
    return pc.indices_nonzero(bad).cast(pa.int64())
