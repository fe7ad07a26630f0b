"""Reads a COCO-format JSON file in blocks; its arrays are never whole in memory as Python objects.

The file is mapped, its syntax is checked once as a whole, and its top-level arrays are split between elements
(`blocks.py`), a few megabytes at a time. A block is decoded, or converted to typed Arrow columns, which skips all other
fields without creating objects for them.
"""

import codecs
import contextlib
import json
import logging
import mmap
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from owlsam_ray import storage
from owlsam_ray.coco_files.blocks import Piece, cut_array
from owlsam_ray.coco_files.fields import kind_of, misfit, values_of
from owlsam_ray.errors import InputError, shown

BLOCK_BYTES = 8 * 2**20
_COPY_BYTES = 16 * 2**20
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_SURROGATES = re.compile(
    rb"(?<!\\)(?:\\\\)*(?:(?P<pair>\\u[dD][89abAB]..\\u[dD][c-fC-F]..)|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2}))"
)
_NO_SIZES = re.compile(rb'"(?:height|width)"\s*:\s*(?P<size>NaN)(?=\s*[,}])')
_AFTER_KEY = re.compile(rb'"\s*:')
_KEY = re.compile(rb'[\s,{]*("(?:[^"\\]|\\.)*")\s*:\s*', re.DOTALL)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Block:
    """N consecutive elements of a top-level array."""

    url: str
    key: str
    """Name of the array."""
    first: int
    """Position of the first element in the array."""
    piece: Piece
    """Text and separator positions."""
    stop: int
    """Byte offset in the file just after the block."""

    def __len__(self) -> int:
        return self.piece.count

    @property
    def text(self) -> bytes:
        """JSON of the elements, with the commas between them."""
        return self.piece.text.tobytes()

    def decode(self) -> list[Any]:
        """Decode the elements to plain values, as `json` does."""
        text = b"[%b]" % self.text
        try:
            return list(msgspec.json.decode(text))
        except msgspec.MsgspecError:  # a number beyond the float range, which `json` reads as infinite
            return list(_decode(self.url, self.key, text))

    def repeats(self, elements: Sequence[Any]) -> list[str]:
        """Describe the elements of the block that give a key twice; `decode` kept only the last value.

        Args:
            elements: result of `decode`.

        Returns:
            A line for each, such as `images[3]: gives "id" twice`.
        """
        text = self.text
        if sum(len(each) for each in elements if isinstance(each, dict)) == len(_AFTER_KEY.findall(text)):
            return []  # no key is lost, and no object is nested
        found = []
        for position, raw in enumerate(msgspec.json.decode(b"[%b]" % text, type=list[msgspec.Raw]), self.first):
            repeated: list[str] = []
            json.loads(bytes(raw), object_pairs_hook=partial(_note_repeats, repeated), parse_int=str)
            if repeated:
                found.append(f"{self.key}[{position}]: gives {shown(repeated[0])} twice")
        return found

    def table(self, schema: pa.Schema) -> pa.Table:
        """Convert the elements to N rows of a schema; null where an element lacks the field or has null.

        Raises:
            InputError: an element is not an object, or a field has another type than in the schema; names the element.
        """
        if self.piece.all_objects:
            lines = self.piece.lines()
            # Errors are found below; there may be none: Arrow also refuses 1e999, and a field given twice.
            with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError):
                table = pa_json.read_json(
                    pa.BufferReader(pa.py_buffer(lines)),
                    # Arrow refuses a line longer than a block.
                    read_options=pa_json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
                    parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
                )
                if table.num_rows == len(self) and _null_free(table, schema):
                    return table.select(schema.names).cast(schema)
        return self._plain_table(schema)

    def _plain_table(self, schema: pa.Schema) -> pa.Table:
        elements = self.decode()
        for position, element in enumerate(elements, self.first):
            wrong = misfit(element, schema)
            if wrong is not None:
                raise InputError(f"{self.url}: {self.key}[{position}]{wrong}. Fix the file.")
        return pa.table([values_of(elements, field) for field in schema], schema=schema)


class Document:
    """An open file; created by `open_document`."""

    def __init__(self, url: str, mapped: mmap.mmap, fields: dict[str, msgspec.Raw]) -> None:
        self.url = url
        self._fields = fields
        self._bytes = np.frombuffer(mapped, np.uint8)
        self._mapped = mapped

    def __len__(self) -> int:
        """Size of the file in bytes."""
        return len(self._bytes)

    def names(self) -> list[str]:
        """Names of the top-level values, in the file's order."""
        return list(self._fields)

    def text(self, key: str) -> bytes:
        """JSON text of an existing top-level value, as in the file."""
        return bytes(memoryview(self._fields[key]))

    def raw(self, key: str) -> memoryview:
        """Like `text`, without a copy."""
        return memoryview(self._fields[key])

    def has(self, key: str) -> bool:
        """Whether a top-level value exists and is not null."""
        return key in self._fields and bytes(memoryview(self._fields[key])[:4]) != b"null"

    def num_bytes(self, key: str) -> int:
        """Size of a top-level value's JSON text; 0 when it does not exist."""
        return len(memoryview(self._fields[key])) if key in self._fields else 0

    def value(self, key: str, kind: type, default: Any) -> Any:
        """Decode a small top-level value; the default when it is missing or null.

        Raises:
            InputError: it is of another type.
        """
        if not self.has(key):
            return default
        value = _decode(self.url, key, bytes(memoryview(self._fields[key])))
        if not isinstance(value, kind):
            raise InputError(f"{self.url}: `{key}` is {kind_of(value)}, not {kind_of(kind())}")
        return value

    def blocks(self, key: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """Yield a top-level array in order; nothing when it is empty or missing (`has` distinguishes these).

        Args:
            key: name of the array.
            max_bytes: maximum size of a block's text; only a block of a single element may be larger.

        Raises:
            InputError: it is not an array.
        """
        if not self.has(key):
            return
        raw = np.frombuffer(memoryview(self._fields[key]), np.uint8)
        if raw[0] != b"["[0]:
            raise InputError(f"{self.url}: `{key}` is {kind_of(self.value(key, object, None))}, not a list")
        offset = raw.ctypes.data - self._bytes.ctypes.data + 1
        first = 0
        for piece in cut_array(raw[1:-1], max_bytes):
            block = Block(self.url, key, first, piece, offset + piece.stop)
            yield block
            first += len(block)

    def batches(self, key: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, list[Any]]]:
        """Yield a top-level array, decoded some thousand elements at a time; arguments and errors as for `blocks`.

        Yields:
            Position of the first element; the elements.
        """
        for block in self.blocks(key, max_bytes=max_bytes):
            yield block.first, block.decode()

    def columns(self, key: str, schema: pa.Schema, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, pa.Table]]:
        """Yield an array of objects as typed columns; arguments and errors as for `blocks` and `Block.table`.

        Yields:
            Position of the first element; a table of the schema with one row per element.
        """
        for block in self.blocks(key, max_bytes=max_bytes):
            yield block.first, block.table(schema)


@contextlib.contextmanager
def open_document(url: str) -> Iterator[Document]:
    """Open a JSON file and check its syntax to the end; a remote file is copied to a temporary file first.

    Unpaired surrogates, which no text can hold, are read as U+FFFD, and heights and widths that are NaN as 0, which
    means not stated; both with a warning. A UTF-8 byte order mark is skipped.

    Raises:
        InputError: the file cannot be read, is empty, is not UTF-8, is not valid JSON (names the byte), is not an
            object, or gives a top-level value twice.
    """
    with _local_copy(url) as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # raised by mmap for an empty file
            raise InputError(f"{url} is empty (0 bytes): was it written, or copied, to its end?") from None
        _check_encoding(url, mapped)
        try:
            fields = _top_level(url, mapped)
        except msgspec.DecodeError as error:
            repaired = _repaired(url, file, mapped)
            if repaired is None:
                raise _not_json(url, mapped, error) from None
            mapped = repaired
            try:
                fields = _top_level(url, mapped)
            except msgspec.DecodeError as second:
                raise _not_json(url, mapped, second) from None
        # Never closed: values that the caller keeps may point into it. It is freed with the last of them.
        yield Document(url, mapped, fields)


@contextlib.contextmanager
def _local_copy(url: str) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(storage.open_input(url))
            if not storage.is_local(storage.open_filesystem(url)[0]):
                remote, file = file, stack.enter_context(tempfile.TemporaryFile(prefix="owlsam-"))
                while data := remote.read(_COPY_BYTES):
                    file.write(data)
                file.flush()
        except OSError as error:
            raise InputError(f"cannot read {url}: {error.strerror or error}") from None
        yield file


def _check_encoding(url: str, mapped: mmap.mmap) -> None:
    """Check that the file is UTF-8; the JSON decoder does not validate the strings that it skips."""
    if mapped[:2] == b"\x1f\x8b":
        raise InputError(f"{url} is compressed with gzip: unpack it first")
    decoder, begun = codecs.getincrementaldecoder("utf-8")(), False
    for start in range(0, len(mapped), 2**20):
        data = mapped[start : start + 2**20]
        if begun or not data.isascii():
            before = len(decoder.getstate()[0])
            try:
                decoder.decode(data, final=start + len(data) == len(mapped))
            except UnicodeDecodeError as error:
                place = start - before + error.start
                raise InputError(f"{url} is not valid UTF-8 at byte {place}: write it again as UTF-8") from None
            begun = bool(decoder.getstate()[0])


def _top_level(url: str, mapped: mmap.mmap) -> dict[str, msgspec.Raw]:
    """The values of the file's top-level object, as views into the file.

    Raises:
        InputError: it is not an object, is nested too deeply, or repeats a key.
        msgspec.DecodeError: it is not valid JSON.
    """
    start = len(_BYTE_ORDER_MARK) if mapped[: len(_BYTE_ORDER_MARK)] == _BYTE_ORDER_MARK else 0
    try:
        fields: dict[str, msgspec.Raw] = msgspec.json.decode(memoryview(mapped)[start:], type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        way_out = (
            " (is it a list of results? a COCO file also holds images and categories)" if _begins_list(mapped) else ""
        )
        kind = "a list" if _begins_list(mapped) else "a single value"
        raise InputError(f"{url} is not a COCO file: it holds {kind}, not an object{way_out}") from None
    except RecursionError:
        raise InputError(f"{url} is nested too deeply to be a COCO file") from None
    _check_repeats(url, mapped, fields)
    return fields


def _begins_list(mapped: mmap.mmap) -> bool:
    return mapped[:4096].removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _check_repeats(url: str, mapped: mmap.mmap, fields: dict[str, msgspec.Raw]) -> None:
    """Check that exactly one key precedes each value: of repeated keys, a dictionary keeps only the last."""
    base = np.frombuffer(mapped, np.uint8).ctypes.data
    views = [np.frombuffer(memoryview(raw), np.uint8) for raw in fields.values()]
    spans = sorted((view.ctypes.data - base, len(view)) for view in views)
    before = len(_BYTE_ORDER_MARK) if mapped[: len(_BYTE_ORDER_MARK)] == _BYTE_ORDER_MARK else 0
    for start, length in spans:
        key = _KEY.match(mapped, before, start)
        if key is not None and key.end() != start:
            raise InputError(
                f"{url} gives {key[1].decode()} twice, first at byte {key.start(1)}: merge them, or delete one"
            )
        before = start + length


def _repaired(url: str, file: IO[bytes], mapped: mmap.mmap) -> mmap.mmap | None:
    """A private copy of the mapping with harmless defects repaired; only the pages that change take memory.

    Returns:
        None where there is nothing to repair.
    """
    changes = [(match.span("half"), rb"\ufffd") for match in _SURROGATES.finditer(mapped) if match["half"]]
    if halves := len(changes):
        _log.warning(
            "%s holds %d unpaired surrogates, the first at byte %d, which are read as U+FFFD",
            url,
            halves,
            changes[0][0][0],
        )
    changes += [(match.span("size"), b"0  ") for match in _NO_SIZES.finditer(mapped)]
    if sizes := len(changes) - halves:
        _log.warning(
            "%s: %d heights or widths are NaN, which is not valid JSON, and are read as not stated", url, sizes
        )
    if not changes:
        return None
    copied = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for (start, stop), text in changes:
        copied[start:stop] = text
    return copied


def _not_json(url: str, mapped: mmap.mmap, error: msgspec.DecodeError) -> InputError:
    shift = len(_BYTE_ORDER_MARK) if mapped[: len(_BYTE_ORDER_MARK)] == _BYTE_ORDER_MARK else 0
    match = re.fullmatch(r"(?:JSON is malformed: )?(.*) \(byte (\d+)\)", str(error))
    if match is None:  # it is truncated
        return InputError(f"{url} is not valid JSON: it ends too early, at byte {len(mapped)}; was it copied whole?")
    place = int(match[2]) + shift - match[1].startswith("trailing")  # msgspec counts this position from 1
    near = mapped[max(0, place - 20) : place + 20].decode("utf-8", "replace")
    return InputError(f"{url} is not valid JSON: {match[1]} at byte {place}, near {near!r}")


def _decode(url: str, key: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # an integer of thousands of digits; the syntax has been checked
        raise InputError(f"{url}: `{key}` cannot be read: {error}") from None


def _note_repeats(repeated: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, and add its repeated keys to `repeated`."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated += [name for name in found if names.count(name) > 1]
    return found


def _null_free(table: pa.Table, schema: pa.Schema) -> bool:
    """Whether the non-nullable columns hold no null."""
    return all(field.nullable or not table[field.name].null_count for field in schema)
