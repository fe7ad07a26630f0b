"""Lists every image file under a folder."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray import storage
from owlsam_ray.config.data import DataConfig
from owlsam_ray.errors import InputError, shown
from owlsam_ray.schema import Container
from owlsam_ray.sources.files import ending_of, warn_of_left_out
from owlsam_ray.sources.listing import DEFAULTS, ImageRecord, Listing, ListingOptions, below, file_name_error, tables_of
from owlsam_ray.sources.row_names import bad_reason, distinct_name, quoted_name

_log = logging.getLogger(__name__)
_LOGGED_EVERY = 100_000

_Found = tuple[str, int | None]
"""Path below the root, and size in bytes if the storage reported it."""


def list_folder(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List image files recursively, ordered by their full relative path.

    Files and folders whose name begins with a dot are left out. Linked folders are not entered, so link loops do no
    harm; linked files are listed.

    Unsafe names are quoted (`row_names`). Local files are read whatever bytes their names have (`Container.ESCAPED`). A
    key of another storage that cannot be requested literally (`.` or `..` between slashes, NUL, unpaired surrogates) is
    listed as `Container.BAD` with the reason (`bad_name`).

    Raises:
        OSError: a folder cannot be listed; its images are not silently left out.
        InputError: the folder does not exist, or holds no image file.
    """
    root = config.images or ""
    if not storage.is_directory(root):
        if not storage.exists(root):
            raise InputError(f"data.images {root} does not exist")
        raise InputError(f"data.images {root} is not a folder; for a single file, name the folder that holds it")
    suffixes = tuple(suffix.lower() for suffix in config.suffixes)
    found: list[_Found] = []
    others: Counter[str] = Counter()
    for name, num_bytes in storage.walk_files(root):
        if name.lower().endswith(suffixes):
            found.append((name, num_bytes))
            if len(found) % _LOGGED_EVERY == 0:
                _log.info("found %s image files so far", f"{len(found):,}")
        else:
            others[ending_of(name)] += 1
    if not found:
        raise InputError(
            f"data.images {root} holds no image file: {others.total()} files, none ending in {', '.join(suffixes)} "
            "(data.suffixes)"
        )
    warn_of_left_out(f"data.images {root}", others)
    found.sort()
    is_local = storage.is_local(storage.open_filesystem(root)[0])
    return Listing(tables=_tables(found, root, is_local=is_local), total=len(found), has_ids=False)


def _tables(found: Sequence[_Found], root: str, *, is_local: bool) -> Iterator[pa.Table]:
    records = (ImageRecord(image_id=None, file_name=quoted_name(name), num_bytes=size) for name, size in found)
    first = 0
    for table in tables_of(records, root):
        odd = {
            position: _odd_row(name, size, root, is_local=is_local)
            for position, (name, size) in enumerate(found[first : first + table.num_rows])
            if file_name_error(name) is not None
        }
        yield _with_rows(table, odd) if odd else table
        first += table.num_rows


def _with_rows(table: pa.Table, rows: dict[int, dict[str, Any]]) -> pa.Table:
    """Replace the rows of a table at some positions."""
    mask = np.zeros(table.num_rows, np.bool_)
    mask[list(rows)] = True
    others = pa.Table.from_pylist(list(rows.values()), schema=table.schema)
    columns = [
        pc.replace_with_mask(column.combine_chunks(), pa.array(mask), other.combine_chunks())
        for column, other in zip(table.columns, others.columns, strict=True)
    ]
    return pa.table(columns, schema=table.schema)


def _odd_row(name: str, size: int | None, root: str, *, is_local: bool) -> dict[str, Any]:
    """The row of a file with an unsafe name: under a quoted name, or bad."""
    safe, error = quoted_name(name), file_name_error(name)
    row: dict[str, Any] = {"file_name": safe, "other_name": distinct_name(safe, name), "uri": _joined(root, safe)}
    sized = {"length": size, "num_bytes": size, "quoted": f"{shown(name)}: {error}"}
    is_text = not any("\ud800" <= letter <= "\udfff" for letter in name)
    if is_local and not is_text:
        return row | sized | {"container": str(Container.ESCAPED), "member": safe}
    why = "is not valid Unicode" if not is_text else _unaddressable(name)
    if why is not None:
        return row | {"container": str(Container.BAD), "member": bad_reason("bad_name", name, why)}
    return row | sized | {"uri": _joined(root, name)}


def _unaddressable(name: str) -> str | None:
    """Why a storage cannot be asked for a key literally; None when it can."""
    if "\0" in name:
        return "holds a NUL"
    if any(part in (".", "..") for part in name.split("/")):  # store clients resolve them to another key
        return "holds a part . or .."
    return None


def _joined(root: str, name: str) -> str:
    return str(below(root, pa.array([name], pa.string()))[0].as_py())
