"""A COCO-format JSON file, read in blocks: its arrays are never whole in memory as Python objects.

The file is mapped, its syntax is checked once as a whole, and its top-level arrays are cut between their elements
(`blocks.py`), some megabytes at a time. A block is decoded, or becomes typed Arrow columns, for which the fields that
nobody asked for are skipped without making objects of them.
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
    """N elements of a top-level array, one after another."""

    url: str
    key: str
    """Of the array."""
    first: int
    """Position of the first element in the array."""
    piece: Piece
    """Text and commas."""
    stop: int
    """Byte of the file after the block."""

    def __len__(self) -> int:
        return self.piece.count

    @property
    def text(self) -> bytes:
        """JSON of the elements, with the commas between them."""
        return self.piece.text.tobytes()

    def decode(self) -> list[Any]:
        """The elements as plain values, as `json` gives them."""
        text = b"[%b]" % self.text
        try:
            return list(msgspec.json.decode(text))
        except msgspec.MsgspecError:  # a float beyond all floats, which `json` reads as infinite
            return list(_decode(self.url, self.key, text))

    def repeats(self, elements: Sequence[Any]) -> list[str]:
        """What is wrong with elements of the block that give a key twice, of which `decode` kept only the last value.

        Args:
            elements: as `decode` gave them.

        Returns:
            A line for each, as `images[3]: gives "id" twice`.
        """
        text = self.text
        if sum(len(each) for each in elements if isinstance(each, dict)) == len(_AFTER_KEY.findall(text)):
            return []  # no key is lost, and no object lies inside another
        found = []
        for position, raw in enumerate(msgspec.json.decode(b"[%b]" % text, type=list[msgspec.Raw]), self.first):
            repeated: list[str] = []
            json.loads(bytes(raw), object_pairs_hook=partial(_note_repeats, repeated), parse_int=str)
            if repeated:
                found.append(f"{self.key}[{position}]: gives {shown(repeated[0])} twice")
        return found

    def table(self, schema: pa.Schema) -> pa.Table:
        """N rows of a schema; null where an element does not have the field, or has null.

        Raises:
            InputError: an element is no object, or a field is of another type than the schema says; names the element.
        """
        if self.piece.all_objects:
            lines = self.piece.lines()
            # What is wrong is found below; perhaps nothing is: Arrow refuses 1e999, and a field given twice.
            with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError):
                table = pa_json.read_json(
                    pa.BufferReader(pa.py_buffer(lines)),
                    # A line longer than a block would be refused.
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
                raise InputError(f"{self.url}: {self.key}[{position}]{wrong}. Mend the file.")
        return pa.table([values_of(elements, field) for field in schema], schema=schema)


class Document:
    """An open file; made by `open_document`."""

    def __init__(self, url: str, mapped: mmap.mmap, fields: dict[str, msgspec.Raw]) -> None:
        self.url = url
        self._fields = fields
        self._bytes = np.frombuffer(mapped, np.uint8)
        self._mapped = mapped

    def __len__(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def names(self) -> list[str]:
        """Names of the top-level values, in the file's order."""
        return list(self._fields)

    def text(self, key: str) -> bytes:
        """A top-level value that is there, as the file states it."""
        return bytes(memoryview(self._fields[key]))

    def raw(self, key: str) -> memoryview:
        """As `text`, without a copy."""
        return memoryview(self._fields[key])

    def has(self, key: str) -> bool:
        """Whether a top-level value is there and not null."""
        return key in self._fields and bytes(memoryview(self._fields[key])[:4]) != b"null"

    def num_bytes(self, key: str) -> int:
        """Size of a top-level value as text; 0 when it is not there."""
        return len(memoryview(self._fields[key])) if key in self._fields else 0

    def value(self, key: str, kind: type, default: Any) -> Any:
        """A small top-level value, decoded; the default when it is not there.

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
        """A top-level array in order; nothing when it is empty or not there (`has` tells).

        Args:
            key: of the array.
            max_bytes: of the text of a block, which is larger only when a single element is.

        Raises:
            InputError: it is no array.
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
        """A top-level array, decoded some thousand elements at a time; arguments and errors as `blocks`.

        Yields:
            Position of the first element; the elements.
        """
        for block in self.blocks(key, max_bytes=max_bytes):
            yield block.first, block.decode()

    def columns(self, key: str, schema: pa.Schema, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, pa.Table]]:
        """A top-level array of objects as typed columns; arguments and errors as `blocks` and `Block.table`.

        Yields:
            Position of the first element; a table of the schema with one row an element.
        """
        for block in self.blocks(key, max_bytes=max_bytes):
            yield block.first, block.table(schema)


@contextlib.contextmanager
def open_document(url: str) -> Iterator[Document]:
    """Open a JSON file, and check its syntax to the end; one in remote storage is copied to a temporary file first.

    Halves of surrogate pairs, which no text can hold, are read as U+FFFD, and heights and widths that are NaN as 0,
    which means that they are not stated; both with a warning. A UTF-8 byte order mark is skipped.

    Raises:
        InputError: it cannot be read, is empty, is no UTF-8, no valid JSON (with the byte), or no object, or gives a
            top-level value twice.
    """
    with _local_copy(url) as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # what mmap says to a file without bytes
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
        # Never closed: values that a caller keeps may point into it. It goes with the last of them.
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
    """The JSON decoder does not look into texts that it passes over."""
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
    """The values of the object that the file holds, as views into it.

    Raises:
        InputError: it is no object, nested too deeply, or a key repeats.
        msgspec.DecodeError: it is not valid JSON.
    """
    start = len(_BYTE_ORDER_MARK) if mapped[: len(_BYTE_ORDER_MARK)] == _BYTE_ORDER_MARK else 0
    try:
        fields: dict[str, msgspec.Raw] = msgspec.json.decode(memoryview(mapped)[start:], type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        way_out = " (a list of results? it needs the images and categories around it)" if _begins_list(mapped) else ""
        kind = "a list" if _begins_list(mapped) else "a single value"
        raise InputError(f"{url} is not a COCO file: it holds {kind}, not an object{way_out}") from None
    except RecursionError:
        raise InputError(f"{url} is nested too deeply to be a COCO file") from None
    _check_repeats(url, mapped, fields)
    return fields


def _begins_list(mapped: mmap.mmap) -> bool:
    return mapped[:4096].removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _check_repeats(url: str, mapped: mmap.mmap, fields: dict[str, msgspec.Raw]) -> None:
    """Between two values stands nothing but one key: a dictionary keeps only the last of those that repeat."""
    base = np.frombuffer(mapped, np.uint8).ctypes.data
    views = [np.frombuffer(memoryview(raw), np.uint8) for raw in fields.values()]
    spans = sorted((view.ctypes.data - base, len(view)) for view in views)
    before = len(_BYTE_ORDER_MARK) if mapped[: len(_BYTE_ORDER_MARK)] == _BYTE_ORDER_MARK else 0
    for start, length in spans:
        key = _KEY.match(mapped, before, start)
        if key is not None and key.end() != start:
            raise InputError(
                f"{url} gives {key[1].decode()} twice, first at byte {key.start(1)}: put both into one, or delete one"
            )
        before = start + length


def _repaired(url: str, file: IO[bytes], mapped: mmap.mmap) -> mmap.mmap | None:
    """A private copy of the mapping without what is known not to matter; only the pages that change take memory.

    Returns:
        None where there is nothing of the kind.
    """
    changes = [(match.span("half"), rb"\ufffd") for match in _SURROGATES.finditer(mapped) if match["half"]]
    if halves := len(changes):
        _log.warning(
            "%s holds %d halves of surrogate pairs, the first at byte %d: read as U+FFFD", url, halves, changes[0][0][0]
        )
    changes += [(match.span("size"), b"0  ") for match in _NO_SIZES.finditer(mapped)]
    if sizes := len(changes) - halves:
        _log.warning("%s: %d heights or widths are NaN, which JSON does not have: read as not stated", url, sizes)
    if not changes:
        return None
    copied = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for (start, stop), text in changes:
        copied[start:stop] = text
    return copied


def _not_json(url: str, mapped: mmap.mmap, error: msgspec.DecodeError) -> InputError:
    shift = len(_BYTE_ORDER_MARK) if mapped[: len(_BYTE_ORDER_MARK)] == _BYTE_ORDER_MARK else 0
    told = re.fullmatch(r"(?:JSON is malformed: )?(.*) \(byte (\d+)\)", str(error))
    if told is None:  # it is cut
        return InputError(f"{url} is not valid JSON: it ends too early, at byte {len(mapped)}; was it copied whole?")
    place = int(told[2]) + shift - told[1].startswith("trailing")  # that one is counted from 1
    near = mapped[max(0, place - 20) : place + 20].decode("utf-8", "replace")
    return InputError(f"{url} is not valid JSON: {told[1]} at byte {place}, near {near!r}")


def _decode(url: str, key: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # an integer of thousands of digits; the syntax is checked
        raise InputError(f"{url}: `{key}` cannot be read: {error}") from None


def _note_repeats(repeated: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; its keys that repeat are added to `repeated`."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated += [name for name in found if names.count(name) > 1]
    return found


def _null_free(table: pa.Table, schema: pa.Schema) -> bool:
    """Whether the columns that may hold no null hold none."""
    return all(field.nullable or not table[field.name].null_count for field in schema)
