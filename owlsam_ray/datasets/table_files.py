"""Parquet, CSV and JSONL files → record batches of the columns that are wanted, never a whole file at once."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from owlsam_ray import storage
from owlsam_ray.datasets.table_columns import Wanted, check_name, json_texts, one_line
from owlsam_ray.datasets.table_text import read_csv, read_jsonl
from owlsam_ray.errors import InputError

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
    """Columns of a table, some ten thousand rows at a time.

    Args:
        url: the file.
        wanted: columns, at least one; a null or missing value is null.

    Yields:
        One array for each wanted column. Of columns of any kind, CSV gives texts, since it knows nothing else, but for
        those that are wanted as integers as well.

    Raises:
        InputError: the file cannot be read, lacks a column, or holds values of another type; names file, column and
            row, counted from 0 and without a header.
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
        raise InputError(f"cannot read {url}: {error.strerror or error}") from None
    except (pa.ArrowException, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{url} cannot be read as a table: {one_line(error)}") from None


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
        raise InputError(f"{url} cannot be read as a table: {one_line(error)}") from None
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
        raise InputError(f"{url} cannot be read as a table: {one_line(error)}") from None
    kind = _kind_at(url, schema, wanted)
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        inner = f"; did you mean {wanted.path}.bytes?" if pa.types.is_struct(kind) else ""
        raise InputError(f"{url}: {wanted.setting} {wanted.path!r} holds {kind}, not bytes{inner}")


def _parquet(url: str, wanted: Sequence[Wanted]) -> Iterator[list[pa.Array]]:
    with storage.open_input(url) as file:
        table = pq.ParquetFile(file)
        for column in wanted:
            _kind_at(url, table.schema_arrow, column)
        for batch in table.iter_batches(batch_size=_ROWS, columns=list(dict.fromkeys(each.path for each in wanted))):
            yield [_cast(url, column, _at(batch, column.path)) for column in wanted]


def _at(batch: pa.RecordBatch, path: str) -> pa.Array:
    """A column by its path."""
    if path in batch.schema.names:
        return batch.column(path)
    array = batch.column(path.split(".")[0])
    for name in path.split(".")[1:]:
        array = pc.struct_field(array, name)
    return array


def _kind_at(url: str, schema: pa.Schema, column: Wanted) -> pa.DataType:
    """Type of a column by its path.

    Raises:
        InputError: there is none.
    """
    if column.path in schema.names:
        check_name(url, column, column.path, schema.names)
        return schema.field(column.path).type
    names = column.path.split(".")
    check_name(url, column, names[0], schema.names)
    kind = schema.field(names[0]).type
    for name in names[1:]:
        inner = [field.name for field in kind] if pa.types.is_struct(kind) else []
        check_name(url, column, name, inner)
        kind = kind.field(name).type
    return kind


def _cast(url: str, column: Wanted, array: pa.Array) -> pa.Array:
    """An array as the wanted type; text stays text, and no number is made of it or rounded."""
    kind, found = column.kind, array.type
    if pa.types.is_dictionary(found):
        array, found = array.dictionary_decode(), found.value_type
    if kind is None:
        return json_texts(array)
    if pa.types.is_null(found):
        return pa.nulls(len(array), kind)
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
        raise InputError(f"{url}: column {column.path!r} ({column.setting}): {one_line(error)}") from None
