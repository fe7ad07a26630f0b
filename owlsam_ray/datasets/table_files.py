"""Parquet, CSV and JSONL files → record batches of the columns that are wanted, never a whole file at once."""

import contextlib
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from owlsam_ray import storage
from owlsam_ray.errors import InputError

_ROWS = 65536
_BLOCK = 8 * 2**20
_KINDS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A column, by its path with dots into structures."""

    setting: str
    """That names it, for messages: `columns.uri`."""
    path: str
    kind: pa.DataType | None
    """None: as the file has it."""


def kind_of(url: str) -> str:
    """`parquet`, `csv`, `tsv` or `jsonl`.

    Raises:
        InputError: the name has none of the known endings.
    """
    name = url.lower().removesuffix(".gz")
    for suffix, kind in _KINDS.items():
        if name.endswith(suffix):
            return kind
    raise InputError(f"{url} is no table: its name ends in none of {', '.join(_KINDS)} (text also with .gz)")


def read_columns(url: str, wanted: Sequence[Wanted]) -> Iterator[list[pa.Array]]:
    """Columns of a table, some ten thousand rows at a time; without any wanted column, empty lists for a Parquet file.

    Args:
        url: the file.
        wanted: columns; a null or missing value is null.

    Yields:
        One array for each wanted column.

    Raises:
        InputError: the file cannot be read, lacks a column, or holds values of another type; names file and column.
    """
    reader = {"parquet": _parquet, "csv": _csv, "tsv": _csv, "jsonl": _jsonl}[kind_of(url)]
    try:
        yield from reader(url, wanted)
    except OSError as error:
        raise InputError(f"cannot read {url}: {error.strerror or error}") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{url} cannot be read as a table: {_one_line(error)}") from None


def count_rows(url: str) -> Iterator[int]:
    """Rows of each row group of a Parquet file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with storage.open_input(url) as file:
            metadata = pq.read_metadata(file)
    except OSError as error:
        raise InputError(f"cannot read {url}: {error.strerror or error}") from None
    except pa.ArrowException as error:
        raise InputError(f"{url} cannot be read as a table: {_one_line(error)}") from None
    yield from (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


def check_binary(url: str, wanted: Wanted) -> None:
    """A column of a Parquet file holds bytes.

    Raises:
        InputError: the file cannot be read, lacks the column, or has something else in it.
    """
    try:
        with storage.open_input(url) as file:
            schema = pq.ParquetFile(file).schema_arrow
    except OSError as error:
        raise InputError(f"cannot read {url}: {error.strerror or error}") from None
    except pa.ArrowException as error:
        raise InputError(f"{url} cannot be read as a table: {_one_line(error)}") from None
    kind = _kind_at(url, schema, wanted)
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        inner = f"; did you mean {wanted.path}.bytes?" if pa.types.is_struct(kind) else ""
        raise InputError(f"{url}: {wanted.setting} {wanted.path!r} holds {kind}, not bytes{inner}")


def _parquet(url: str, wanted: Sequence[Wanted]) -> Iterator[list[pa.Array]]:
    with storage.open_input(url) as file:
        table = pq.ParquetFile(file)
        for column in wanted:
            _kind_at(url, table.schema_arrow, column)
        for batch in table.iter_batches(batch_size=_ROWS, columns=[column.path for column in wanted]):
            yield [_cast(url, column, _at(batch, column.path)) for column in wanted]


def _csv(url: str, wanted: Sequence[Wanted]) -> Iterator[list[pa.Array]]:
    parse = pa_csv.ParseOptions(delimiter="\t" if kind_of(url) == "tsv" else ",")
    with _text(url) as file:
        names = pa_csv.open_csv(file, parse_options=parse).schema.names
    for column in wanted:
        _check_name(url, column, column.path, names)
    # Once each: two settings may name one column.
    included = list(dict.fromkeys(column.path for column in wanted))
    options = pa_csv.ConvertOptions(
        include_columns=included,
        column_types={column.path: column.kind for column in wanted if column.kind is not None},
    )
    # With threads an error does not tell the row.
    read = pa_csv.ReadOptions(block_size=_BLOCK, use_threads=False)
    with _text(url) as file:
        for batch in pa_csv.open_csv(file, parse_options=parse, convert_options=options, read_options=read):
            yield [_cast(url, column, batch.column(included.index(column.path))) for column in wanted]


def _jsonl(url: str, wanted: Sequence[Wanted]) -> Iterator[list[pa.Array]]:
    with _text(url) as file:
        first = next((line for line in file if line.strip()), b"{}")
    try:
        sample = json.loads(first)
    except ValueError as error:
        raise InputError(f"{url}: its first line is not valid JSON: {error}") from None
    if not isinstance(sample, dict):
        raise InputError(f"{url}: its first line is a {type(sample).__name__}, not an object")
    typed = [column for column in wanted if column.kind is not None]
    for column in typed:
        value: Any = sample
        for name in column.path.split("."):
            _check_name(url, column, name, list(value) if isinstance(value, dict) else [])
            value = value[name]
    parse = pa_json.ParseOptions(
        explicit_schema=pa.schema(_fields([(column.path.split("."), column.kind) for column in typed])),
        unexpected_field_behavior="ignore" if len(typed) == len(wanted) else "infer",
    )
    with _text(url) as file:
        for batch in pa_json.open_json(file, read_options=pa_json.ReadOptions(block_size=_BLOCK), parse_options=parse):
            yield [_cast(url, column, _at(batch, column.path)) for column in wanted]


def _fields(paths: Sequence[tuple[list[str], pa.DataType]]) -> list[pa.Field]:
    """Fields for paths, nested where they have more than one part."""
    names = list(dict.fromkeys(path[0] for path, _ in paths))
    fields = []
    for name in names:
        below = [(path[1:], kind) for path, kind in paths if path[0] == name]
        kind = below[0][1] if not below[0][0] else pa.struct(_fields(below))
        fields.append(pa.field(name, kind))
    return fields


@contextlib.contextmanager
def _text(url: str) -> Iterator[IO[bytes]]:
    with storage.open_input(url) as file:
        if not url.lower().endswith(".gz"):
            yield file
            return
        import gzip

        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]


def _at(batch: pa.RecordBatch, path: str) -> pa.Array:
    """A column by its path; nulls where a structure or a field is not there."""
    names = path.split(".")
    if names[0] not in batch.schema.names:
        return pa.nulls(batch.num_rows)
    array = batch.column(names[0])
    for name in names[1:]:
        if not pa.types.is_struct(array.type) or array.type.get_field_index(name) < 0:
            return pa.nulls(batch.num_rows)
        array = pc.struct_field(array, name)
    return array


def _kind_at(url: str, schema: pa.Schema, column: Wanted) -> pa.DataType:
    """Type of a column by its path.

    Raises:
        InputError: there is none.
    """
    names = column.path.split(".")
    _check_name(url, column, names[0], schema.names)
    kind = schema.field(names[0]).type
    for name in names[1:]:
        inner = [field.name for field in kind] if pa.types.is_struct(kind) else []
        _check_name(url, column, name, inner)
        kind = kind.field(name).type
    return kind


def _check_name(url: str, column: Wanted, name: str, names: Sequence[str]) -> None:
    if name in names:
        return
    usual = [each for each in ("url", "image_url", "path", "image_path", "file_name", "uri") if each in names]
    close = difflib.get_close_matches(name, names, n=1) or usual[:1]
    hint = f"; did you mean {column.setting}={close[0]}?" if close else ""
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    raise InputError(f"{url} has no column {column.path!r} ({column.setting}){hint} It has: {listed or 'none'}")


def _cast(url: str, column: Wanted, array: pa.Array) -> pa.Array:
    """An array as the wanted type; text stays text, and no number is made of it or rounded."""
    kind, found = column.kind, array.type
    if kind is None or pa.types.is_null(found):
        return array if kind is None else pa.nulls(len(array), kind)
    if pa.types.is_dictionary(found):
        array, found = array.dictionary_decode(), found.value_type
    fits = (
        pa.types.is_integer(found)
        if pa.types.is_integer(kind)
        else pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    )
    if not fits:
        words = "integers" if pa.types.is_integer(kind) else "texts"
        raise InputError(f"{url}: column {column.path!r} ({column.setting}) holds {found}, not {words}")
    try:
        return array.cast(kind)
    except pa.ArrowInvalid as error:
        raise InputError(f"{url}: column {column.path!r} ({column.setting}): {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
