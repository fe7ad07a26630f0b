"""Reads columns of Parquet, CSV and JSONL files in batches; a file is never held in memory as a whole."""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from owlsam_ray import storage
from owlsam_ray.errors import InputError, one_line, shown
from owlsam_ray.sources.table_columns import INTEGER, NUMBER, TEXT, Wanted, check_name, json_texts
from owlsam_ray.sources.table_text import are_integers, read_csv, read_jsonl
from owlsam_ray.storage.arrow_types import extension_of, holds_bytes, shown_type

_ROWS = 65536
_KINDS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


def kind_of(url: str) -> str:
    """Format of a table file: `parquet`, `csv`, `tsv` or `jsonl`.

    Raises:
        InputError: the name has none of the known endings.
    """
    name = url.lower().removesuffix(".gz")
    for suffix, kind in _KINDS.items():
        if name.endswith(suffix):
            return kind
    raise InputError(f"{url} is not a table: its name ends in none of {', '.join(_KINDS)} (text also with .gz)")


def read_columns(url: str, wanted: Sequence[Wanted]) -> Iterator[list[pa.Array]]:
    """Read columns of a table, some ten thousand rows at a time.

    Args:
        url: the file.
        wanted: columns, at least one; a null or missing value is null.

    Yields:
        One array for each wanted column. CSV has no types: a column of any type holds texts, unless it is also wanted
        as integers or numbers.

    Raises:
        InputError: the file cannot be read, lacks a column, or holds values of another type; names file, column and
            row, counted from 0 without the header.
    """
    readers: dict[str, Callable[[str, Sequence[Wanted]], Iterator[list[pa.Array]]]] = {
        "parquet": _parquet,
        "csv": partial(read_csv, delimiter=","),
        "tsv": partial(read_csv, delimiter="\t"),
        "jsonl": read_jsonl,
    }
    try:
        yield from readers[kind_of(url)](url, wanted)
    except OSError as error:
        raise InputError(f"cannot read {url}: {one_line(error.strerror or error)}") from None
    except (pa.ArrowException, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{url} cannot be read as a table: {one_line(error)}") from None


def text_id(urls: Sequence[str], column: Wanted) -> str | None:
    """The first id that is a text instead of an integer, with its place; None when no table has one.

    Parquet files are checked by their types; in text files the column is read once for this.

    Raises:
        InputError: see `read_columns`.
    """
    for url in urls:
        kind, first = kind_of(url), 0
        if kind == "parquet" and not _is_text(_field_at(url, _schema(url), column).type):
            continue
        as_json = kind == "jsonl"
        for (values,) in read_columns(url, [Wanted(column.setting, column.path, None if as_json else TEXT)]):
            found = pc.starts_with(values, '"') if as_json else pc.invert(are_integers(values))
            found = pc.is_valid(values) if kind == "parquet" else found
            at = pc.indices_nonzero(found)
            if len(at):
                text = values[at[0].as_py()].as_py()
                return f"{shown(json.loads(text) if as_json else text)} in row {first + at[0].as_py()} of {url}"
            first += len(values)
    return None


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _schema(url: str) -> pa.Schema:
    """Arrow schema of a Parquet file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with storage.open_input(url) as file:
            return pq.ParquetFile(file).schema_arrow
    except OSError as error:
        raise InputError(f"cannot read {url}: {one_line(error.strerror or error)}") from None
    except pa.ArrowException as error:
        raise InputError(f"{url} cannot be read as a table: {one_line(error)}") from None


def count_rows(url: str) -> Iterator[int]:
    """Yield the number of rows of each row group of a Parquet file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with storage.open_input(url) as file:
            metadata = pq.read_metadata(file)
    except OSError as error:
        raise InputError(f"cannot read {url}: {one_line(error.strerror or error)}") from None
    except pa.ArrowException as error:
        raise InputError(f"{url} cannot be read as a table: {one_line(error)}") from None
    yield from (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


def check_binary(url: str, wanted: Wanted) -> None:
    """Check that a column of a Parquet file holds bytes.

    Raises:
        InputError: the file cannot be read, lacks the column, or has another type in it.
    """
    field = _field_at(url, _schema(url), wanted)
    if not holds_bytes(field):
        way_out = _way_to_bytes(wanted, field.type)
        raise InputError(f"{url}: {wanted.setting} {shown(wanted.path)} holds {shown_type(field)}, not bytes{way_out}")


def _way_to_bytes(wanted: Wanted, kind: pa.DataType) -> str:
    """Advice on a column that does not hold bytes; empty where there is none."""
    if pa.types.is_struct(kind):
        inner = [field.name for field in kind if holds_bytes(field)]
        return f"; did you mean {wanted.path}.{shown(inner[0])[1:-1]}?" if inner else ""
    if pa.types.is_map(kind) or pa.types.is_nested(kind):
        return (
            "; each row must be one image: write a table with one row per image (explode the column), with its bytes "
            "in a separate column"
        )
    return ""


def _parquet(url: str, wanted: Sequence[Wanted]) -> Iterator[list[pa.Array]]:
    with storage.open_input(url) as file:
        table = pq.ParquetFile(file)
        for column in wanted:
            _field_at(url, table.schema_arrow, column)
        for batch in table.iter_batches(batch_size=_ROWS, columns=list(dict.fromkeys(each.path for each in wanted))):
            yield [_cast(url, column, _at(batch, column.path)) for column in wanted]


def _at(batch: pa.RecordBatch, path: str) -> pa.Array:
    """A column of a batch, by its path."""
    if path in batch.schema.names:
        return batch.column(path)
    array = batch.column(path.split(".")[0])
    for name in path.split(".")[1:]:
        array = pc.struct_field(array, name)
    return array


def _field_at(url: str, schema: pa.Schema, column: Wanted) -> pa.Field:
    """The field of a plain type at a column's path.

    Raises:
        InputError: there is no such field, or its type is an extension whose class would create the values: the class
            of Ray Data unpickles them.
    """
    names = [column.path] if column.path in schema.names else column.path.split(".")
    check_name(url, column, names[0], schema.names)
    field = schema.field(names[0])
    for name in names[1:]:
        if not pa.types.is_struct(field.type) or extension_of(field) is not None:
            way_out = _way_to_bytes(column, field.type) if column.setting == "columns.bytes" else ""
            raise InputError(
                f"{url} has no column {shown(column.path)} ({column.setting}): {shown(field.name)} holds "
                f"{shown_type(field)}{way_out}"
            )
        inner = list(field.type)
        check_name(url, column, name, [each.name for each in inner])
        field = next(each for each in inner if each.name == name)
    extension = extension_of(field)
    if extension is not None:
        raise InputError(
            f"{url}: column {shown(column.path)} ({column.setting}) has the Arrow extension type {shown(extension)}, "
            "whose values only the code of another library can read: write the column as a plain type, or leave it out"
        )
    return field


def _cast(url: str, column: Wanted, array: pa.Array) -> pa.Array:
    """Convert an array to the wanted type; texts are not parsed as numbers, and numbers are not rounded."""
    kind, found = column.kind, array.type
    if isinstance(found, pa.BaseExtensionType) and kind is not None:  # one of Arrow's own extension types
        array, found = array.storage, found.storage_type
    if pa.types.is_dictionary(found):
        array, found = array.dictionary_decode(), found.value_type
    if kind is None:
        return json_texts(array)
    if pa.types.is_null(found):
        return pa.nulls(len(array), kind)
    fits, words = {
        TEXT: (_is_text(found), "texts"),
        INTEGER: (pa.types.is_integer(found), "integers"),
        NUMBER: (pa.types.is_integer(found) or pa.types.is_floating(found), "numbers"),
    }[kind]
    if not fits:
        way_out = "; without it the images are numbered" if column.setting == "columns.id" else ""
        raise InputError(
            f"{url}: column {shown(column.path)} ({column.setting}) holds {found!s:.200}, not {words}{way_out}"
        )
    try:
        return array.cast(kind, safe=kind != NUMBER)  # an integer that a float rounds is not a valid size anyway
    except pa.ArrowInvalid as error:
        raise InputError(f"{url}: column {shown(column.path)} ({column.setting}): {one_line(error)}") from None
