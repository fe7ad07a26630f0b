"""Reads CSV and JSONL files as arrays of the wanted columns, a block of rows at a time."""

import contextlib
import csv
import gzip
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from owlsam_ray import storage
from owlsam_ray.errors import InputError, one_line, shown
from owlsam_ray.sources.table_columns import (
    INTEGER,
    NAMED,
    NUMBER,
    TEXT,
    WAY_OUT,
    Wanted,
    check_name,
    json_texts,
    plain,
    refuse_rows,
)

_BLOCK = 8 * 2**20
_MOST_ROW = 64 * 2**20
"""Maximum bytes of a JSONL row; without a limit, a file without line breaks would fill the memory."""
_LONG_CELL = 4000
"""Bytes from which a value may hold an integer with more digits than Python's json accepts."""
_NULLS = pa.array(pa_csv.ConvertOptions().null_values)
_MISSING = msgspec.Raw(b"null")
_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_AFTER_KEY = re.compile(rb'"\s*:')
_log = logging.getLogger(__name__)
_NUMBER = r"^-?\d{1,300}(\.\d*)?([eE][+-]?\d{1,2})?$"


class _Sizes:
    """Sizes of a file that are not numbers: they count as not stated and are reported at the end.

    A column without any number is refused.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._numbers: Counter[str] = Counter()
        self._odd: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def note(self, column: Wanted, numbers: int, rows: Sequence[int], problems: Sequence[str]) -> None:
        """Count numbers, and rows that hold something else; `problems`: what is wrong with the first of these rows.

        Raises:
            InputError: the column has held no number so far: the setting must mean another column.
        """
        self._numbers[column.path] += numbers
        if not rows:
            return
        if not self._numbers[column.path]:
            refuse_rows(self._url, rows, problems, f"Correct {column.setting}, or leave it out.")
        self._odd[column.path] += len(rows)
        self._first.setdefault(column.path, f"row {rows[0]}: {problems[0]}")

    def warn(self) -> None:
        """Warn about the values that count as not stated."""
        for path, count in self._odd.items():
            _log.warning(
                "%s: %d sizes are not numbers and count as not stated, the first: %s",
                self._url, count, self._first[path],
            )  # fmt: skip


def read_csv(url: str, wanted: Sequence[Wanted], *, delimiter: str) -> Iterator[list[pa.Array]]:
    """Read columns like `table_files.read_columns`, from a file whose first row holds the column names.

    Raises:
        InputError, OSError, EOFError, UnicodeDecodeError, zlib.error, pyarrow.ArrowException: it cannot be read.
    """
    parse = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    # With threads an error does not state the row.
    read = pa_csv.ReadOptions(block_size=_BLOCK, use_threads=False)
    first, sizes = 0, _Sizes(url)
    with _text(url) as file:
        try:
            names = pa_csv.open_csv(file, parse_options=parse, read_options=read).schema.names
        except pa.ArrowInvalid as error:
            raise _csv_error(url, error) from None
    for column in wanted:
        check_name(url, column, column.path, names)
    # Types guessed from the first block might not fit a later one.
    by_path = {column.path: column for column in sorted(wanted, key=lambda each: each.kind in (INTEGER, NUMBER))}
    options = pa_csv.ConvertOptions(include_columns=list(by_path), column_types=dict.fromkeys(by_path, TEXT))
    with _text(url) as file:
        counted = _CountedQuotes(file)
        try:
            for batch in pa_csv.open_csv(counted, parse_options=parse, convert_options=options, read_options=read):
                typed = {
                    path: _from_text(url, each, batch.column(path), first, sizes) for path, each in by_path.items()
                }
                yield [json_texts(typed[each.path]) if each.kind is None else typed[each.path] for each in wanted]
                first += batch.num_rows
        except pa.ArrowInvalid as error:
            raise _csv_error(url, error) from None
    if counted.quotes % 2:
        _check_quotes(url, delimiter)
    sizes.warn()


class _CountedQuotes:
    """A file object that counts the quotes in the bytes read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.quotes = 0

    def read(self, length: int = -1) -> bytes:
        data = self._file.read(length)
        self.quotes += data.count(b'"')
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _check_quotes(url: str, delimiter: str) -> None:
    """Refuse a file whose last quote is not closed: the rows after it would be read as part of one value."""
    with _text(url) as file:
        reader = csv.reader((line.decode("utf-8", "replace") for line in file), delimiter=delimiter, strict=True)
        start = 1
        try:
            for _ in reader:
                start = reader.line_num + 1
        except csv.Error as error:
            if "end of data" in str(error):
                raise InputError(f"{url}: a quote in the record that begins in line {start} is not closed") from None


def _csv_error(url: str, error: pa.ArrowInvalid) -> InputError:
    """Reword an error of Arrow, which counts rows from 1 and includes the header."""
    text = re.sub(r"Row #(\d+)", lambda match: f"row {int(match[1]) - 2} (from 0)", one_line(error))
    if "straddling" in text:
        text = f"a row has more than {_BLOCK} bytes; is a quote not closed?"
    return InputError(f"{url} cannot be read as a table: {text}")


def _from_text(url: str, column: Wanted, texts: pa.Array, first: int, sizes: _Sizes) -> pa.Array:
    """Convert a column of texts to the wanted type."""
    if column.kind not in (INTEGER, NUMBER):
        return texts
    word = "an integer" if column.kind == INTEGER else "a number"
    trimmed = pc.utf8_trim_whitespace(texts)
    is_null = pc.is_in(trimmed, value_set=_NULLS)
    bad = pc.invert(are_integers(texts) if column.kind == INTEGER else _are_numbers(trimmed))
    rows = pc.indices_nonzero(bad)
    at = [first + row for row in rows.to_pylist()]
    problems = [
        f"{shown(text)} in {column.path} ({column.setting}) is not {word}"
        for text in texts.take(rows[:NAMED]).to_pylist()
    ]
    if column.kind == NUMBER:
        sizes.note(column, len(texts) - len(at) - pc.sum(is_null, min_count=0).as_py(), at, problems)
        is_null = pc.or_(is_null, bad)
    elif at:
        refuse_rows(url, at, problems, WAY_OUT)
    return pc.if_else(is_null, pa.scalar(None, TEXT), trimmed).cast(column.kind)


def are_integers(texts: pa.Array) -> pa.Array:
    """(N,) which texts of a CSV file are 64-bit integers or represent null."""
    trimmed = pc.utf8_trim_whitespace(texts)
    return pc.or_(pc.is_in(trimmed, value_set=_NULLS), pc.match_substring_regex(trimmed, r"^-?\d{1,18}$"))


def _are_numbers(trimmed: pa.Array) -> pa.Array:
    return pc.or_(pc.is_in(trimmed, value_set=_NULLS), pc.match_substring_regex(trimmed, _NUMBER))


def read_jsonl(url: str, wanted: Sequence[Wanted]) -> Iterator[list[pa.Array]]:
    """Read columns like `table_files.read_columns`, from a file with one JSON object per line.

    A line that is not an object is a row without values, provided that the file has no ids.

    Raises:
        InputError, OSError, EOFError, zlib.error, pyarrow.ArrowException: it cannot be read.
    """
    tops = list(dict.fromkeys(column.path.split(".")[0] for column in wanted))
    fields = {f"field{place}": name for place, name in enumerate(tops)}
    row_type = msgspec.defstruct("Row", [(field, msgspec.Raw, _MISSING) for field in fields], rename=fields)
    decode = msgspec.json.Decoder(row_type).decode
    first, sizes = 0, _Sizes(url)
    num_odd, first_odd = 0, ""
    unseen = dict(enumerate(wanted))
    for lines in _lines(url):
        rows, faults = _decode_lines(lines, first, decode, row_type)
        if faults:
            _check_faults(url, faults, wanted, len(rows))
            number, fault = next(iter(faults.items()))
            num_odd, first_odd = num_odd + len(faults), first_odd or f"row {number}: {fault}"
        cells = {name: [getattr(row, field) for row in rows] for field, name in fields.items()}
        columns = [_inside(cells[name], rest) for name, *rest in (column.path.split(".") for column in wanted)]
        unseen = {place: each for place, each in unseen.items() if all(cell is _MISSING for cell in columns[place])}
        # A wrong name gives no values at all, whereas any number of rows may omit a column that exists.
        for column in unseen.values():
            if column.is_needed:
                check_name(url, column, column.path, _names(lines))
        yield [_from_json(url, column, values, first, sizes) for column, values in zip(wanted, columns, strict=True)]
        first += len(rows)
        names = _names(lines)
    if first == 0:
        raise InputError(f"{url} holds no row")
    for column in unseen.values():
        check_name(url, column, column.path, names)
    sizes.warn()
    if num_odd:
        _log.warning(
            "%s: %d lines are not JSON objects and count as rows without values, the first: %s", url, num_odd, first_odd
        )


def _names(lines: Sequence[bytes]) -> list[str]:
    """Column names in the first readable row."""
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line, parse_int=str)
            if isinstance(value, dict):
                return list(value)
    return []


def _lines(url: str) -> Iterator[list[bytes]]:
    """Yield the non-empty lines, a block of them at a time.

    Raises:
        InputError: a line exceeds the maximum size of a row.
    """
    row = 0
    with _text(url) as file:
        rest = file.read(3).removeprefix(b"\xef\xbb\xbf")
        while True:
            block = file.read(_BLOCK)
            lines = (rest + block).split(b"\n")
            rest = lines.pop() if block else b""
            if lines := [line for line in lines if line.strip()]:
                yield lines
                row += len(lines)
            if len(rest) > _MOST_ROW:
                most = _MOST_ROW // 2**20
                raise InputError(f"{url}: row {row} has more than {most} MB: does each line hold one JSON object?")
            if not block:
                return


def _decode_lines(
    lines: Sequence[bytes], first: int, decode: Callable[[bytes], Any], row_type: Callable[[], Any]
) -> tuple[list[Any], dict[int, ValueError]]:
    """Decode lines to rows; a line that is not an object gives a row without values, and its error by row number."""
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        rows = [decode(line) for line in lines]
        if not any(_may_repeat(line) for line in lines):
            return rows, {}
    rows, faults = [], {}
    for number, line in enumerate(lines, first):
        try:
            rows.append(_decode_line(line, decode))
        except ValueError as error:
            rows.append(row_type())
            faults[number] = error
    return rows, faults


def _check_faults(url: str, faults: Mapping[int, ValueError], wanted: Sequence[Wanted], num_rows: int) -> None:
    """Check that the lines that are not objects may become rows without values, block by block.

    Raises:
        InputError: they may not: the file has ids, no line of the block is a row (the file is of another kind, or its
            last line is truncated), or a line gives a key twice.
    """
    has_ids = any(column.setting == "columns.id" for column in wanted)
    if has_ids or len(faults) == num_rows or any(isinstance(fault, _RepeatedKeyError) for fault in faults.values()):
        problems = [str(fault) for fault in faults.values()]
        refuse_rows(url, list(faults), problems, "Every line must be one JSON object.")


def _decode_line(line: bytes, decode: Callable[[bytes], Any]) -> Any:
    """Decode one row.

    Raises:
        ValueError: the line is not a row; says why.
    """
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        row = decode(line)
        if not _may_repeat(line):
            return row
        json.loads(line, object_pairs_hook=_without_repeats, parse_int=str)
        return row
    try:
        value = json.loads(line, object_pairs_hook=_without_repeats)
        if isinstance(value, dict):
            return decode(json.dumps(plain(value)).encode())  # NaN, which JSON does not have, is null
    except _RepeatedKeyError:
        raise
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {one_line(error)}") from None
    raise ValueError(f"is a {type(value).__name__}, not an object")


class _RepeatedKeyError(ValueError):
    """An object gives a key twice."""


def _may_repeat(line: bytes) -> bool:
    """Whether an object of a row may give a key twice: the colons after strings outnumber the top-level keys."""
    try:
        return len(_KEYS.decode(line)) != len(_AFTER_KEY.findall(line))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False  # a name that is not UTF-8 is never requested


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of the row.

    Raises:
        _RepeatedKeyError: a key repeats, and nothing says which of its values to keep.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKeyError(f"gives the key {shown(repeated)} twice")
    return found


def _inside(cells: list[msgspec.Raw], path: Sequence[str]) -> list[msgspec.Raw]:
    """The values at a path inside JSON texts."""
    decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
    for name in path:
        cells = [decode(cell).get(name, _MISSING) if bytes(cell)[:1] == b"{" else _MISSING for cell in cells]
    return cells


def _from_json(url: str, column: Wanted, cells: Sequence[msgspec.Raw], first: int, sizes: _Sizes) -> pa.Array:
    """Convert JSON texts to the wanted type."""
    if column.kind is None:
        _refuse_endless(url, column, cells, first)
        return pa.array([bytes(cell) for cell in cells], pa.binary()).cast(TEXT)
    kind, word = {INTEGER: (int, "an integer"), NUMBER: (float, "a number"), TEXT: (str, "a text")}[column.kind]
    try:
        values = msgspec.json.decode(b"[" + b",".join(cells) + b"]", type=list[kind | None])  # type: ignore[valid-type]
        found = pa.array(values, column.kind)
        sizes.note(column, len(found) - found.null_count, [], [])
        return found
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError):
        values, bad, problems = [], [], []
        for row, cell in enumerate(cells, first):
            try:
                value = json.loads(bytes(cell))
            except ValueError:  # not UTF-8, or an integer of thousands of digits
                value = bytes(cell)
            values.append(value if _is_of(value, kind) else None)
            if value is not None and not _is_of(value, kind):
                bad.append(row)
                problems.append(f"{shown(value)} in {column.path} ({column.setting}) is not {word}")
        if column.kind == NUMBER:
            sizes.note(column, sum(value is not None for value in values), bad, problems)
        elif bad and not column.may_be_odd:
            refuse_rows(url, bad, problems, WAY_OUT)
        return pa.array(values, column.kind)


def _is_of(value: Any, kind: type) -> bool:
    """Whether a value fits into a column of texts, or of 64-bit numbers."""
    if kind is str or type(value) not in (int, float):
        return kind is str and type(value) is str
    return type(value) is int and abs(value) < 2**63 if kind is int else -(2**63) <= value <= 2**63


def _refuse_endless(url: str, column: Wanted, cells: Sequence[msgspec.Raw], first: int) -> None:
    """Refuse rows with a value that no JSON reader would accept later, in the labels."""
    bad, problems = [], []
    for row, cell in enumerate(cells, first):
        if len(memoryview(cell)) > _LONG_CELL:
            try:
                json.loads(bytes(cell))
            except ValueError as error:
                bad.append(row)
                problems.append(f"the value in {column.path} ({column.setting}) cannot be read: {one_line(error, 80)}")
    if bad:
        refuse_rows(url, bad, problems, WAY_OUT)


@contextlib.contextmanager
def _text(url: str) -> Iterator[IO[bytes]]:
    with storage.open_input(url) as file:
        if not url.lower().endswith(".gz"):
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]
