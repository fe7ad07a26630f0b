"""What every source gives: a stream of images in a fixed order, and what the output carries over from it.

A listing of millions of images is never whole in memory: it is a stream of Arrow tables, some thousand rows each, that
the plan spools to a disk before it freezes ids and shards.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.errors import InputError

MAX_IMAGE_ID = 2**53
"""Ids stay below, so that every JSON reader takes them as they are."""

LISTING_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),  # null in all rows: the plan numbers the images
        pa.field("file_name", pa.string(), nullable=False),  # full relative path, never a basename
        pa.field("uri", pa.string(), nullable=False),  # of the file that holds the image
        pa.field("container", pa.string()),  # null: the file is the image; or a `Container`
        pa.field(
            "member", pa.string()
        ),  # tar: name; parquet: column, with dots; escaped: end of `uri`; bad: the reason
        pa.field("offset", pa.int64()),  # tar: first byte of the image; parquet, bad: row of the file, if it has rows
        pa.field("length", pa.int64()),  # bytes of the image, where the storage told them (tar: always)
        pa.field("num_bytes", pa.int64()),  # encoded size, where the storage or the source tells it
        pa.field("height", pa.int32()),  # as the source states it
        pa.field("width", pa.int32()),
        pa.field("split", pa.string()),  # null: the first folder of the file name, if it has one
        pa.field("extra", pa.string()),  # JSON object: the source's other fields of the image record
        pa.field("other_name", pa.string()),  # taken where another image of the listing has `file_name`; null: none
        pa.field("quoted", pa.string()),  # why `file_name` is quoted; null: it is as the source gives it
    ]
)
"""The last two are for the plan, and are not stored."""

BATCH_ROWS = 8192
"""Rows of a table of a listing, about."""

_BYTES_PER_PIXEL = 0.5
"""Encoded size of a photograph where only its pixels are known: on the safe side of JPEG's usual 0.2 to 0.4."""
_UNKNOWN_BYTES = 200_000


@dataclass(frozen=True, slots=True)
class ListingOptions:
    """How a listing is made; nothing here changes which images it holds, but for damaged files."""

    workers: int = 1
    """Processes that list tar files."""
    keep_whole: bool = False
    """Of a cut or damaged tar file, list the members before the damage instead of refusing it."""


DEFAULTS = ListingOptions()


class Container(StrEnum):
    """What kind of file an image lies in, when it is no file of its own."""

    TAR = "tar"
    PARQUET = "parquet"
    ESCAPED = "escaped"
    """None: a file of this machine whose path is no UTF-8. `uri` ends in `member`, the percent-encoded path below the
    root of the images; `address_of` undoes that."""
    BAD = "bad"
    """None: a row of the source (`uri`, `offset`) that no image can be read by. It becomes a failed row."""


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


def encoded_bytes(listed: pa.Table) -> NDArray[np.int64]:
    """(N,) encoded size of N images of a listing: known, or estimated from the pixels, or a usual one."""
    pixels = pc.multiply(listed["height"].cast(pa.float64()), listed["width"].cast(pa.float64()))
    estimated = pc.floor(pc.multiply(pixels, _BYTES_PER_PIXEL)).cast(pa.int64())
    sizes = pc.coalesce(listed["num_bytes"], listed["length"], estimated, pa.scalar(_UNKNOWN_BYTES, pa.int64()))
    return sizes.to_numpy()


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


def raise_offences(where: str, offences: Sequence[str], way_out: str, *, use: str = "labelled") -> None:
    """Refuse a file, naming the first offences.

    Raises:
        InputError: when there is any.
    """
    if offences:
        more = f"\n  … and {len(offences) - 5} more" if len(offences) > 5 else ""
        listed = "\n  ".join(offences[:5])
        count = "1 offence" if len(offences) == 1 else f"{len(offences)} offences"
        raise InputError(f"{where} cannot be {use} as it is ({count}):\n  {listed}{more}\n{way_out}")
