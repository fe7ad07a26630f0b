"""Lists the rows of Parquet, CSV or JSONL files as images, column by column."""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray.coco_files.stated_size import stated_sides
from owlsam_ray.config.data import ColumnsConfig, DataConfig
from owlsam_ray.errors import InputError, shown
from owlsam_ray.schema import MAX_IMAGE_ID, Container
from owlsam_ray.sources.files import expand_files, relative_names
from owlsam_ray.sources.listing import DEFAULTS, Listing, ListingOptions, bad_names, file_name_error, listing_table
from owlsam_ray.sources.row_names import bad_reason, distinct_name, quoted_name, row_name
from owlsam_ray.sources.table_columns import INTEGER, NAMED, NUMBER, TEXT, WAY_OUT, Wanted, refuse_rows
from owlsam_ray.sources.table_files import check_binary, count_rows, kind_of, read_columns, text_id
from owlsam_ray.sources.table_places import TablePlaces

_log = logging.getLogger(__name__)

_KINDS = {"id": INTEGER, "file_name": TEXT, "split": TEXT}
"""Types of columns; columns not listed here hold sizes."""
_OWN_FIELDS = ("id", "file_name", "height", "width")
"""Fields that every image record of the output has."""


def list_table(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List the rows of tables, in the order of the files and of their rows.

    A URI is a URL or a path below `data.images`: relative, or absolute (also as `file://`) and inside that folder.
    Unless a column gives it, the file name is the path below `data.images`; for other URLs it is host and path, without
    user info and query. With `columns.bytes` the image is stored in the row, and its name is the name of the table with
    the number of the row. Rows are counted from 0, without the header.

    Unsafe names are quoted (`row_names`). A row without a usable URI, or without a name where a column should give it,
    is listed as `Container.BAD` with the reason (`bad_uri`, `bad_name`), under the name from the column or as
    `row-<file>-<row>`. Text ids are kept as a field of the image records.

    Files are read one after another, whatever `options.workers`: a million rows take about a second.

    Raises:
        InputError: a pattern matches nothing, a file name is not that of a table, or an extra column has the name of a
            field that every image record has; from the tables: a file cannot be read or lacks a column, or a row has an
            invalid id or size. Names file and row.
    """
    taken = [name for name in config.columns.extra if name in _OWN_FIELDS]
    if taken:
        raise InputError(
            f"columns.extra names {shown(taken[0])}, but image records already have a field of that name: leave it "
            "out, or rename the column"
        )
    files = expand_files(config.files)
    for url in files:
        kind = kind_of(url)
        if config.columns.bytes is not None and kind != "parquet":
            raise InputError(f"columns.bytes is for Parquet tables, and {url} is {kind}")
    wanted = wanted_columns(config.columns)
    has_ids = "id" in wanted
    if has_ids and (example := text_id(files, wanted["id"])) is not None:
        has_ids = False
        key = _keep_ids(wanted, config.columns)
        _log.warning(
            "columns.id %s holds texts, such as %s: they are kept as %s in the image records, and the images are "
            "numbered",
            shown(config.columns.id), example, shown(key),
        )  # fmt: skip
    return Listing(
        tables=_tables(files, config, wanted),
        has_ids=has_ids,
        name_setting="columns.file_name" if config.columns.file_name is not None else None,
    )


def _keep_ids(wanted: dict[str, Wanted], columns: ColumnsConfig) -> str:
    """Keep text ids as a field of the image records; returns the name of that field."""
    path = wanted.pop("id").path
    if path in columns.extra:
        return path
    key = path
    while key in _OWN_FIELDS or (key != path and key in columns.extra):
        key = "source_id" if key == path else f"{key}_"
    wanted[f"extra:{key}"] = Wanted("columns.id", path, None)
    return key


def _tables(files: Sequence[str], config: DataConfig, wanted: dict[str, Wanted]) -> Iterator[pa.Table]:
    for url, name in zip(files, relative_names(files), strict=True):
        yield from _TableFile(url, name, config, dict(wanted)).tables()


class _TableFile:
    """Lists the rows of one file."""

    def __init__(self, url: str, name: str, config: DataConfig, wanted: dict[str, Wanted]) -> None:
        self._url, self._name, self._columns = url, name, config.columns
        self._places = TablePlaces(config.images)
        self._wanted = wanted
        self._first = 0

    def tables(self) -> Iterator[pa.Table]:
        """Yield tables of a listing."""
        if self._columns.bytes is not None:
            check_binary(self._url, Wanted("columns.bytes", self._columns.bytes, None))
        for arrays in self._batches():
            if not len(arrays[0]):  # an empty batch leaves the types of computed columns unknown
                continue
            given = dict(zip(self._wanted, arrays, strict=True))
            yield self._table(given, len(arrays[0]))
            self._first += len(arrays[0])

    def _batches(self) -> Iterator[list[pa.Array]]:
        if self._wanted:
            yield from read_columns(self._url, list(self._wanted.values()))
            return
        self._wanted = {"": Wanted("", "", None)}  # only bytes are wanted: rows are counted, and no column is read
        for rows in count_rows(self._url):
            yield [pa.nulls(rows)]

    def _table(self, given: dict[str, pa.Array], rows: int) -> pa.Table:
        refused = _Refused(self._url, self._first)
        columns: dict[str, Any] = {"split": given.get("split"), "image_id": given.get("id")}
        if "id" in given:
            fits = _between(given["id"], 0, MAX_IMAGE_ID - 1)
            refused.unless(fits, given["id"], "is not an id from 0 to 2^53")
        for key in ("height", "width", "num_bytes"):
            if key in given:
                columns[key], fits = stated_sides(given[key])
                refused.unless(fits, given[key], f"is not a valid {key}")
        without_ids = " Without columns.id the images are numbered." if "id" in given else ""
        refused.raise_if_any(way_out=WAY_OUT + without_ids)
        reasons: dict[int, str] = {}
        if self._columns.bytes is not None:
            columns |= self._cells(rows)
            if "file_name" not in given:
                numbers = range(self._first, self._first + rows)
                columns["file_name"] = pa.array([f"{self._name}/{number:08d}" for number in numbers])
        else:
            places = self._places.columns(given["uri"])
            reasons = places.reasons
            columns |= {key: getattr(places, key) for key in ("uri", "file_name", "other_name", "quoted")}
        if "file_name" in given:
            columns |= self._given_names(given["file_name"], reasons)
        elif self._columns.bytes is not None:
            columns |= _quoted(columns["file_name"])
        if reasons:
            columns |= self._bad_rows(columns, reasons, rows)
        columns["extra"] = _objects({key: values for key, values in given.items() if key.startswith("extra:")})
        return listing_table(columns)

    def _given_names(self, names: pa.Array, reasons: dict[int, str]) -> dict[str, Any]:
        """Names given by a column; rows without a name are bad."""
        without = pc.fill_null(pc.equal(pc.binary_length(names), 0), True)
        for position in pc.indices_nonzero(without).to_pylist():
            word = bad_reason("bad_name", names[position].as_py(), f"in {self._wanted['file_name'].path} is no name")
            reasons.setdefault(position, word)
        return _quoted(names)

    def _bad_rows(self, columns: dict[str, Any], reasons: dict[int, str], rows: int) -> dict[str, Any]:
        """The columns, with the rows that have a reason turned into bad rows."""
        at = sorted(reasons)
        mask = np.zeros(rows, np.bool_)
        mask[at] = True
        named = "file_name" in self._wanted
        names = columns["file_name"].take(pa.array(at, INTEGER)).to_pylist()
        names = [
            name if named and name else row_name(self._name, self._first + position)
            for position, name in zip(at, names, strict=True)
        ]
        texts: dict[str, list[str]] = {
            "uri": [self._url] * len(at),
            "file_name": names,
            "other_name": [
                distinct_name(name, f"{self._url} {position}") for position, name in zip(at, names, strict=True)
            ],
            "container": [str(Container.BAD)] * len(at),
            "member": [reasons[position] for position in at],
        }
        changed: dict[str, Any] = {
            key: pc.replace_with_mask(_texts(columns.get(key), rows), pa.array(mask), pa.array(values, TEXT))
            for key, values in texts.items()
        }
        numbers = columns.get("offset", pa.nulls(rows, INTEGER))
        places = pa.array([self._first + position for position in at], INTEGER)
        return changed | {"offset": pc.replace_with_mask(numbers, pa.array(mask), places)}

    def _cells(self, rows: int) -> dict[str, Any]:
        """Addresses of images that are cells of the table itself."""
        return {
            "uri": pa.array([self._url] * rows),
            "container": pa.array([str(Container.PARQUET)] * rows),
            "member": pa.array([self._columns.bytes] * rows),
            "offset": pa.array(np.arange(self._first, self._first + rows), INTEGER),
        }


class _Refused:
    """Rows of a batch that cause the whole file to be refused, by kind of problem."""

    def __init__(self, url: str, first: int) -> None:
        self._url, self._first = url, first
        self._kinds: list[tuple[list[int], list[str]]] = []

    def unless(self, fits: pa.Array, values: pa.Array, problem: str) -> None:
        """Record the rows whose values do not fit."""
        bad = np.flatnonzero(~pc.fill_null(fits, False).to_numpy(zero_copy_only=False)).tolist()
        if bad:
            first = values.take(pa.array(bad[:NAMED], INTEGER)).to_pylist()
            self._kinds.append((bad, [f"{shown(value)} {problem}" for value in first]))

    def raise_if_any(self, *, way_out: str) -> None:
        """Refuse the file if any row does not fit; later batches are not checked.

        Raises:
            InputError: some rows do not fit; lists at least the first of each kind.
        """
        if not self._kinds:
            return
        pairs = [list(zip(rows, problems, strict=False)) for rows, problems in self._kinds]
        picked = sorted(([each[0] for each in pairs] + [pair for each in pairs for pair in each[1:]])[:NAMED])
        others = sum(len(rows) for rows, _ in self._kinds) - len(picked)
        rows = [self._first + row for row, _ in picked] + [0] * others
        refuse_rows(self._url, rows, [problem for _, problem in picked], way_out)


def _quoted(names: pa.Array) -> dict[str, Any]:
    """Quote the unsafe ones of (N,) names, and return columns of a listing; null and empty names become null."""
    at = bad_names(names)
    if not len(at):
        return {"file_name": names, "other_name": None, "quoted": None}
    given = names.take(at).to_pylist()
    safe = [quoted_name(name) if name else None for name in given]
    others = [distinct_name(quoted, name) if quoted else None for quoted, name in zip(safe, given, strict=True)]
    why = [f"{shown(name)}: {file_name_error(name)}" if name else None for name in given]
    mask = np.zeros(len(names), np.bool_)
    mask[at.to_numpy()] = True
    columns = {"file_name": (names, safe), "other_name": (None, others), "quoted": (None, why)}
    return {
        key: pc.replace_with_mask(_texts(before, len(names)), pa.array(mask), pa.array(values, TEXT))
        for key, (before, values) in columns.items()
    }


def _texts(column: pa.Array | None, rows: int) -> pa.Array:
    return pa.nulls(rows, TEXT) if column is None else column


def wanted_columns(columns: ColumnsConfig) -> dict[str, Wanted]:
    """Columns to read from a table, by purpose."""
    wanted: dict[str, Wanted] = {}
    if columns.bytes is None:
        wanted["uri"] = Wanted("columns.uri", columns.uri or "uri", TEXT)
    for name in ("id", "file_name", "height", "width", "num_bytes", "split"):
        path = getattr(columns, name)
        if path is not None:
            wanted[name] = Wanted(f"columns.{name}", path, _KINDS.get(name, NUMBER))
    for path in columns.extra:
        wanted[f"extra:{path}"] = Wanted("columns.extra", path, None)
    return wanted


def _between(values: pa.Array, low: int, high: int) -> pa.Array:
    return pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))


def _objects(extras: dict[str, pa.Array]) -> pa.Array | None:
    """Join the JSON texts of all columns to one object per row."""
    pieces: list[Any] = []
    for key, values in extras.items():
        name = json.dumps(key.removeprefix("extra:"))
        pieces += [f"{', ' if pieces else '{'}{name}: ", values]
    return pc.binary_join_element_wise(*pieces, "}", "") if pieces else None
