"""Columns of table sources: which ones are read, their values as JSON, and errors about rows and columns."""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray.errors import InputError, one_line, shown

TEXT, INTEGER, NUMBER = pa.string(), pa.int64(), pa.float64()
NAMED = 5
"""Number of problems that a message lists; the others are counted."""
WAY_OUT = "Fix or remove these rows."


@dataclass(frozen=True, slots=True)
class Wanted:
    """A column to read, given by its path with dots into structures."""

    setting: str
    """The setting that names the column, for messages: `columns.uri`."""
    path: str
    kind: pa.DataType | None
    """`TEXT`, `INTEGER`, `NUMBER` (whole or not), or None for any type, delivered as JSON texts."""

    @property
    def is_needed(self) -> bool:
        """Whether each row must have a value."""
        return self.setting in ("columns.uri", "columns.id", "columns.file_name")

    @property
    def may_be_odd(self) -> bool:
        """Whether a value of another type is read as null, since it makes only its own row bad and not the table."""
        return self.setting in ("columns.uri", "columns.file_name")


def check_name(url: str, column: Wanted, name: str, names: Sequence[str]) -> None:
    """Check that one part of a column's path is among the names at its level.

    Raises:
        InputError: it is missing or occurs more than once; a missing name is reported with the existing ones.
    """
    if list(names).count(name) == 1:
        return
    if name in names:
        raise InputError(f"{url} has the column {shown(name)} ({column.setting}) more than once: rename one of them")
    usual = ("url", "image_url", "path", "image_path", "file_name", "uri") if column.setting == "columns.uri" else ()
    close = [each for each in usual if each in names] or difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {' or '.join(f'{column.setting}={each:.60}' for each in close)}?" if close else "."
    if len(names) == 1 and (marks := [mark for mark in ";|\t," if mark in names[0]]):
        hint = f"; is it separated by {marks[0]!r}? A .csv file has commas, a .tsv file tabs."
    listed = ", ".join(f"{each:.60}" for each in names[:20]) + (", …" if len(names) > 20 else "")
    raise InputError(f"{url} has no column {shown(column.path)} ({column.setting}){hint} It has: {listed or 'none'}")


def refuse_rows(url: str, rows: Sequence[int], problems: Sequence[str], way_out: str) -> NoReturn:
    """Refuse a file because of some of its rows.

    Args:
        url: the file.
        rows: all the bad rows known so far.
        problems: what is wrong with the first of them.
        way_out: what the user can do.

    Raises:
        InputError: always.
    """
    listed = [f"row {row}: {what:.200}" for row, what in zip(rows, problems[:NAMED], strict=False)]
    more = [f"and {len(rows) - len(listed)} more"] if len(rows) > len(listed) else []
    head = f"{url} cannot be labelled as it is (rows count from 0):"
    raise InputError("\n  ".join([head, *listed, *more]) + f"\n{way_out}")


def json_texts(array: pa.Array) -> pa.Array:
    """Convert values to JSON texts: non-finite numbers become null; dates, decimals and bytes become text."""
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        return pc.fill_null(array.cast(TEXT), "null")
    return pa.array([json.dumps(plain(value)) for value in _python_values(array)], TEXT)


def _python_values(array: pa.Array) -> list[Any]:
    """Convert an array to plain values; a map becomes an object or, when a key repeats, a list of its pairs.

    Raises:
        InputError: Python cannot represent a value: a date after the year 9999, or an unknown time zone.
    """
    try:
        try:
            return list(array.to_pylist(maps_as_pydicts="strict"))
        except KeyError:
            return list(array.to_pylist())
    except (ValueError, OverflowError, LookupError) as error:
        raise InputError(
            f"a column of type {array.type!s:.200} cannot be converted to JSON: {one_line(error)}"
        ) from None


def plain(value: Any) -> Any:
    """Convert a value to its JSON equivalent."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(plain(key)): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, str | int | bool) else str(value)
