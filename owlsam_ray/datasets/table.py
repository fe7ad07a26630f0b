"""Rows of Parquet, CSV or JSONL files → listing, column by column."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.datasets.files import check_schemes, expand_files, relative_names
from owlsam_ray.datasets.source import (
    DEFAULTS,
    MAX_IMAGE_ID,
    Container,
    Listing,
    ListingOptions,
    bad_names,
    below,
    file_name_error,
    listing_table,
)
from owlsam_ray.datasets.table_columns import INTEGER, TEXT, TOLD, WAY_OUT, Wanted, refuse_rows
from owlsam_ray.datasets.table_files import check_binary, count_rows, kind_of, read_columns
from owlsam_ray.errors import InputError
from owlsam_ray.settings import ColumnsConfig, DataConfig

_SCHEME = r"^[A-Za-z][A-Za-z0-9+.-]*://"
_LOCAL = r"^(file|local)://"
_OWN_FIELDS = ("id", "file_name", "height", "width")
"""Of an image record of the output."""


def list_table(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List the rows of tables, in the order of the files and of their rows.

    A URI is a URL, or a path below `data.images`: relative, or absolute (also as `file://`) and then below it. The file
    name is, without a column for it, the path below `data.images`; of other URLs host and path. With `columns.bytes`
    the image lies in the row, and the name is that of the table with the number of the row. Rows count from 0, without
    a header.

    Files are read one after the other, whatever `options.workers`: a million rows take about a second.

    Raises:
        InputError: a pattern matches nothing, a name is no table's, an extra column has the name of a field that image
            records have anyway; from the tables: a file cannot be read, lacks a column, or a row has no URI, an odd id
            or size, or a name that leaves the root. Names file and row.
    """
    taken = [name for name in config.columns.extra if name in _OWN_FIELDS]
    if taken:
        raise InputError(
            f"columns.extra holds {taken[0]!r}, and image records have a field of that name already: leave it out, or "
            "rename the column"
        )
    files = expand_files(config.files)
    for url in files:
        kind = kind_of(url)
        if config.columns.bytes is not None and kind != "parquet":
            raise InputError(f"columns.bytes is for Parquet tables, and {url} is {kind}")
    return Listing(tables=_tables(files, config), has_ids=config.columns.id is not None)


def _tables(files: Sequence[str], config: DataConfig) -> Iterator[pa.Table]:
    for url, name in zip(files, relative_names(files), strict=True):
        yield from _TableFile(url, name, config).tables()


class _TableFile:
    """One file."""

    def __init__(self, url: str, name: str, config: DataConfig) -> None:
        self._url, self._name, self._columns = url, name, config.columns
        self._root = config.images
        self._wanted = wanted_columns(config.columns)
        self._first = 0
        self._schemes: set[str] = set()

    def tables(self) -> Iterator[pa.Table]:
        """Tables of a listing."""
        if self._columns.bytes is not None:
            check_binary(self._url, Wanted("columns.bytes", self._columns.bytes, None))
        for arrays in self._batches():
            if not len(arrays[0]):  # a part, or a row group, without rows: nothing tells the types of made columns
                continue
            given = dict(zip(self._wanted, arrays, strict=True))
            yield self._table(given, len(arrays[0]))
            self._first += len(arrays[0])

    def _batches(self) -> Iterator[list[pa.Array]]:
        if self._wanted:
            yield from read_columns(self._url, list(self._wanted.values()))
            return
        self._wanted = {"": Wanted("", "", None)}  # nothing but bytes: no column is read, only counted
        for rows in count_rows(self._url):
            yield [pa.nulls(rows)]

    def _table(self, given: dict[str, pa.Array], rows: int) -> pa.Table:
        columns: dict[str, Any] = {key: given.get(key) for key in ("height", "width", "num_bytes", "split")}
        columns["image_id"] = given.get("id")
        if "id" in given:
            self._refuse_unless(_between(given["id"], 0, MAX_IMAGE_ID - 1), given["id"], "is no id from 0 to 2^53")
        for key in ("height", "width", "num_bytes"):
            if key in given:
                fits = pc.or_kleene(pc.is_null(given[key]), _between(given[key], 1, 2**31 - 1))
                self._refuse_unless(fits, given[key], f"is no {key}")
        if self._columns.bytes is not None:
            columns |= self._cells(rows)
        else:
            columns["uri"], columns["file_name"] = self._places(given["uri"])
        if "file_name" in given:
            columns["file_name"] = given["file_name"]
        elif self._columns.bytes is not None:
            numbers = range(self._first, self._first + rows)
            columns["file_name"] = pa.array([f"{self._name}/{number:08d}" for number in numbers])
        bad = bad_names(columns["file_name"])
        if len(bad):
            shown = columns["file_name"].take(bad.slice(0, TOLD)).to_pylist()
            told = [f"{name!r}: {file_name_error(name)}" for name in shown]
            more = "" if "file_name" in given else " A column of names to use instead: columns.file_name."
            self._refuse(bad.to_numpy(), told, WAY_OUT + more)
        columns["extra"] = _objects({key: values for key, values in given.items() if key.startswith("extra:")})
        return listing_table(columns)

    def _cells(self, rows: int) -> dict[str, Any]:
        """Where images lie that are cells of the table itself."""
        return {
            "uri": pa.array([self._url] * rows),
            "container": pa.array([str(Container.PARQUET)] * rows),
            "member": pa.array([self._columns.bytes] * rows),
            "offset": pa.array(np.arange(self._first, self._first + rows), INTEGER),
        }

    def _places(self, uris: pa.Array) -> tuple[pa.Array, pa.Array]:
        """URIs made whole, and the names that follow from them."""
        self._refuse_unless(
            pc.fill_null(pc.greater(pc.binary_length(uris), 0), False), uris, f"in {self._wanted['uri'].path} is no URI"
        )
        paths = pc.replace_substring_regex(uris, _LOCAL, "")
        is_absolute = pc.starts_with(paths, "/")
        is_whole = pc.or_(is_absolute, pc.invert(pc.match_substring_regex(uris, _LOCAL)))
        self._refuse_unless(is_whole, uris, "is no file on this machine: three slashes follow file:")
        self._refuse_unless(pc.invert(pc.match_substring(paths, "::")), uris, "is a chain of file systems (::)")
        is_url = pc.match_substring_regex(paths, _SCHEME)
        self._check_schemes(paths.filter(is_url))
        if self._root is None:
            self._refuse_unless(is_url, uris, "is no URL: set data.images to the folder that it lies below")
        root = _absolute(self._root or "")
        paths = pc.if_else(is_absolute, pc.replace_substring_regex(paths, r"/{2,}", "/"), paths)
        inside = pc.starts_with(paths, root) if self._root is not None else pc.less(pc.binary_length(uris), 0)
        self._refuse_unless(
            pc.or_(pc.invert(is_absolute), inside),
            uris,
            f"does not lie below data.images {self._root}",
            "Set data.images to the folder that all images lie below, or mend or remove these rows.",
        )
        relative = pc.and_(pc.invert(is_url), pc.invert(is_absolute))
        rest = pc.utf8_slice_codeunits(paths, start=len(root))
        # Without scheme, user and password.
        bare = pc.replace_substring_regex(paths, _SCHEME + r"([^/?#@]*@)?", "")
        bare = pc.replace_substring_regex(bare, r"/{2,}", "/")
        names = pc.if_else(inside, rest, pc.if_else(relative, pc.replace_substring_regex(paths, r"^(\./)+", ""), bare))
        # A name of its own must not hide a path that leaves the root; of other URLs the path is their server's matter.
        at = pc.indices_nonzero(pc.or_(inside, relative)).cast(INTEGER)
        bad = at.take(bad_names(names.take(at)))
        if len(bad):
            told = [
                f"{uri!r}: {file_name_error(name)}"
                for uri, name in zip(
                    *(each.take(bad.slice(0, TOLD)).to_pylist() for each in (uris, names)), strict=True
                )
            ]
            self._refuse(bad.to_numpy(), told, WAY_OUT)
        whole = pc.if_else(relative, below(self._root or "", names, are_uris=True), uris)
        return whole, names

    def _check_schemes(self, urls: pa.Array) -> None:
        """Each scheme once, with the first URL that has it."""
        schemes = pc.struct_field(pc.extract_regex(urls, r"^(?P<scheme>[^:]+)://"), "scheme")
        new = [scheme for scheme in pc.unique(schemes).to_pylist() if scheme not in self._schemes]
        check_schemes(urls[schemes.index(scheme).as_py()].as_py() for scheme in new)
        self._schemes.update(new)

    def _refuse_unless(self, fits: pa.Array, values: pa.Array, offence: str, way_out: str = WAY_OUT) -> None:
        bad = np.flatnonzero(~pc.fill_null(fits, False).to_numpy(zero_copy_only=False))
        if len(bad):
            told = [f"{value!r} {offence}" for value in values.take(pa.array(bad[:TOLD])).to_pylist()]
            self._refuse(bad, told, way_out)

    def _refuse(self, rows: NDArray[np.int64], told: Sequence[str], way_out: str) -> None:
        """Refuse the file for some rows; those of further batches are not looked at."""
        refuse_rows(self._url, [self._first + row for row in rows.tolist()], told, way_out)


def _absolute(root: str) -> str:
    """What the paths and URLs of files below a root begin with."""
    path = re.sub(_LOCAL, "", root)
    return f"{(path if '://' in path else os.path.abspath(path)).rstrip('/')}/"


def wanted_columns(columns: ColumnsConfig) -> dict[str, Wanted]:
    """What is read of a table, by what it is for."""
    wanted: dict[str, Wanted] = {}
    if columns.bytes is None:
        wanted["uri"] = Wanted("columns.uri", columns.uri or "uri", TEXT)
    for name in ("id", "file_name", "height", "width", "num_bytes", "split"):
        path = getattr(columns, name)
        if path is not None:
            wanted[name] = Wanted(f"columns.{name}", path, TEXT if name in ("file_name", "split") else INTEGER)
    for path in columns.extra:
        wanted[f"extra:{path}"] = Wanted("columns.extra", path, None)
    return wanted


def _between(values: pa.Array, low: int, high: int) -> pa.Array:
    return pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))


def _objects(extras: dict[str, pa.Array]) -> pa.Array | None:
    """JSON texts of each column joined to an object a row."""
    pieces: list[Any] = []
    for key, values in extras.items():
        name = json.dumps(key.removeprefix("extra:"))
        pieces += [f"{', ' if pieces else '{'}{name}: ", values]
    return pc.binary_join_element_wise(*pieces, "}", "") if pieces else None
