"""A COCO-format JSON file whose arrays are never whole in memory as Python objects.

The file is mapped, its syntax is checked in one pass, and its top-level arrays are cut at the commas between their
entries, some megabytes at a time: either decoded, or read as typed Arrow columns, which skip every field that is not
asked for.
"""

import contextlib
import mmap
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json
from numpy.typing import NDArray

from owlsam_ray import storage
from owlsam_ray.errors import InputError

_BLOCK = 8 * 2**20
_COPY = 16 * 2**20
_QUOTE, _COMMA, _NEWLINE, _SPACE = b'", \n'[0], b","[0], b"\n"[0], b" "[0]
_ESCAPE = re.compile(rb"\\.", re.DOTALL)


class Document:
    """An open file; made by `open_document`."""

    def __init__(self, url: str, fields: dict[str, msgspec.Raw]) -> None:
        self.url = url
        self._fields = fields

    def has(self, key: str) -> bool:
        """Whether a top-level key is there and not null."""
        return key in self._fields and bytes(memoryview(self._fields[key])[:4]) != b"null"

    def num_bytes(self, key: str) -> int:
        """Size of a top-level value as text; 0 when it is not there."""
        return len(memoryview(self._fields[key])) if key in self._fields else 0

    def value(self, key: str, kind: type, default: Any) -> Any:
        """A small top-level value, decoded.

        Raises:
            InputError: it is of another type.
        """
        if not self.has(key):
            return default
        try:
            value = msgspec.json.decode(self._fields[key])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.url}: `{key}` cannot be read: {error}") from None
        if not isinstance(value, kind):
            raise InputError(f"{self.url}: `{key}` is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def batches(self, key: str, *, max_bytes: int = _BLOCK) -> Iterator[tuple[int, list[Any]]]:
        """A top-level array, decoded some entries at a time; nothing when it is not there.

        Args:
            key: of the array.
            max_bytes: of the text of a batch, but for entries that are longer.

        Yields:
            Position of the first entry; the entries.

        Raises:
            InputError: it is no array.
        """
        for first, _, text in self._texts(key, max_bytes):
            yield first, self._decode(key, first, text)

    def columns(self, key: str, schema: pa.Schema, *, max_bytes: int = _BLOCK) -> Iterator[tuple[int, pa.Table]]:
        """A top-level array of objects as typed columns; a field that an entry lacks is null.

        Args:
            key: of the array.
            schema: fields that are wanted; others are skipped.
            max_bytes: of the text of a batch, but for entries that are longer.

        Yields:
            Position of the first entry; the entries.

        Raises:
            InputError: it is no array, an entry is no object, or a field is of another type; names the entry.
        """
        options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        for first, commas, text in self._texts(key, max_bytes):
            lines = np.frombuffer(text, np.uint8).copy()
            lines[(lines == _NEWLINE) | (lines == b"\r"[0])] = _SPACE  # none stands inside of a string
            lines[commas] = _NEWLINE
            try:
                table = pa_json.read_json(
                    pa.BufferReader(lines.tobytes()),
                    parse_options=options,
                    # One block: a line that is longer than a block would be refused.
                    read_options=pa_json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
                )
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise self._misfit(key, schema, first, text, str(error)) from None
            if table.num_rows != len(commas) + 1:
                raise self._misfit(key, schema, first, text, "it is no object")
            yield first, table.select(schema.names).cast(schema)

    def _texts(self, key: str, max_bytes: int) -> Iterator[tuple[int, NDArray[np.int64], bytes]]:
        """Position of the first entry, offsets of the commas between entries, text of some entries with the commas."""
        if not self.has(key):
            return
        raw = memoryview(self._fields[key])
        if raw[0] != b"["[0]:
            kind = type(msgspec.json.decode(raw)).__name__
            raise InputError(f"{self.url}: `{key}` is a {kind}, not a list")
        first = 0
        for start, commas, end in _spans(raw[1:-1], max_bytes):
            text = bytes(raw[1 + start : 1 + end])
            if text.strip():
                yield first, commas, text
                first += len(commas) + 1

    def _decode(self, key: str, first: int, text: bytes) -> list[Any]:
        try:
            entries: list[Any] = msgspec.json.decode(b"[" + text + b"]")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # a text that is no Unicode: seen only when decoded
            raise InputError(f"{self.url}: {key}[{first}] or one of those behind it cannot be read: {error}") from None
        return entries

    def _misfit(self, key: str, schema: pa.Schema, first: int, text: bytes, otherwise: str) -> InputError:
        """What is wrong with a batch that does not fit the schema, found by decoding it plainly."""
        for position, entry in enumerate(self._decode(key, first, text), first):
            if not isinstance(entry, dict):
                return InputError(f"{self.url}: {key}[{position}] is a {type(entry).__name__}, not an object")
            for field in schema:
                value = entry.get(field.name)
                if value is not None and not _fits(value, field.type):
                    told = f" (id {entry['id']!r:.80})" if "id" in entry and field.name != "id" else ""
                    return InputError(
                        f"{self.url}: {key}[{position}]{told}: {field.name} {value!r:.80} is not {_words(field.type)}. "
                        "Mend the file."
                    )
        return InputError(f"{self.url}: {key}[{first}] or one of those behind it cannot be read: {otherwise}")


@contextlib.contextmanager
def open_document(url: str) -> Iterator[Document]:
    """Open a JSON file; one on a remote storage is copied to a temporary file first.

    Raises:
        InputError: it cannot be read, is empty, is not valid JSON (with the offset in bytes), or is no object.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_local_file(url))
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # mmap's word for no bytes
            raise InputError(f"{url} is empty (0 bytes): it was not written or not copied to its end") from None
        yield Document(url, _top_level(url, mapped))
        # Not closed here: values that a caller keeps may still point into it. It goes with the last of them.


def _top_level(url: str, mapped: mmap.mmap) -> dict[str, msgspec.Raw]:
    start = 3 if mapped[:3] == b"\xef\xbb\xbf" else 0  # a byte order mark
    try:
        fields: dict[str, msgspec.Raw] = msgspec.json.decode(memoryview(mapped)[start:], type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        kind = type(msgspec.json.decode(memoryview(mapped)[start:])).__name__
        raise InputError(f"{url} is not a COCO file: it holds a {kind}, not an object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        where = "" if "byte" in str(error) else f" (it has {len(mapped)} bytes)"
        raise InputError(f"{url} is not valid JSON: {error}{where}") from None
    return fields


@contextlib.contextmanager
def _local_file(url: str) -> Iterator[Any]:
    try:
        filesystem, path = storage.open_filesystem(url)
        if storage.is_local(filesystem):
            with open(path, "rb") as file:
                yield file
            return
        with tempfile.TemporaryFile(prefix="owlsam-") as copy:
            with storage.open_input(url) as remote:
                while block := remote.read(_COPY):
                    copy.write(block)
            copy.flush()
            yield copy
    except OSError as error:
        raise InputError(f"cannot read {url}: {error.strerror or error}") from None


def _spans(text: memoryview, max_bytes: int) -> Iterator[tuple[int, NDArray[np.int64], int]]:
    """Cut the inside of an array into runs of whole entries.

    Yields:
        Start of the run; offsets, from there, of the commas between its entries; its end.
    """
    start = at = 0
    depth, in_string = 0, False
    commas: list[NDArray[np.int64]] = []  # of the run that begins at `start`, as places in `text`
    while at < len(text):
        end = min(at + max_bytes, len(text))
        block = bytes(text[at:end])
        while end < len(text) and block.endswith(b"\\"):  # an escape is not cut in two
            end += 1
            block = bytes(text[at:end])
        found, depth, in_string = _outer_commas(block, depth, in_string)
        commas.append(found + at)
        at = end
        places = np.concatenate(commas)
        if at < len(text) and len(places) and at - start >= max_bytes:
            yield start, places[:-1] - start, int(places[-1])
            start, commas = int(places[-1]) + 1, []
    yield start, np.concatenate([*commas, np.empty(0, np.int64)]) - start, len(text)


def _outer_commas(block: bytes, depth: int, in_string: bool) -> tuple[NDArray[np.int64], int, bool]:
    """Offsets of the commas that stand in no string and no inner bracket, and the state after the block.

    Args:
        block: a part of valid JSON that ends in no half escape.
        depth: open brackets before it.
        in_string: whether it begins inside of a string.
    """
    if b"\\" in block:
        block = _ESCAPE.sub(b"__", block)
    letters = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(letters == _QUOTE)
    places = np.flatnonzero(_MARKS[letters])
    # Inside of a string are the places behind an odd number of quotes.
    inside = (np.searchsorted(quotes, places) + in_string) % 2 == 1
    places = places[~inside]
    steps = _STEPS[letters[places]]
    depths = depth + np.cumsum(steps, dtype=np.int64)
    after = int(depths[-1]) if len(depths) else depth
    return places[(steps == 0) & (depths == 0)], after, (len(quotes) + in_string) % 2 == 1


_MARKS = np.zeros(256, np.bool_)
_MARKS[list(b"[]{},")] = True
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


def _fits(value: Any, kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(_fits(each, kind.value_type) for each in value)
    if pa.types.is_integer(kind):
        return type(value) is int and -(2**63) <= value < 2**63
    if pa.types.is_floating(kind):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str)


def _words(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return "a list of numbers"
    if pa.types.is_integer(kind):
        return "an integer"
    return "a number" if pa.types.is_floating(kind) else "a text"
