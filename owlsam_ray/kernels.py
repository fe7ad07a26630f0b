"""Loops over bytes that neither numpy nor Arrow has, compiled by numba: rows of text from columns, sums over RLEs.

Compiled at the first call, and kept on disk where that can be written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_QUOTE, _BACKSLASH = ord('"'), ord("\\")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(function, nogil=True)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of every row: text before, a value, text behind. Where the value is null, nothing of it stands there."""

    before: str
    values: pa.Array
    """(N,) text or bytes, or numbers: integers in digits, float32 as the shortest decimal that gives the same float
    back, without `.0` (100, 0.25, 1.2e-7)."""
    behind: str = ""
    quoted: bool = False
    """The value is ASCII in a JSON string: `"` and backslashes get a backslash."""


def join_rows(pieces: Sequence[Piece], num_rows: int) -> pa.LargeStringArray:
    """Rows of text, each its pieces one behind the other.

    Args:
        pieces: of every row.
        num_rows: N.

    Returns:
        (N,) texts without null.
    """
    texts = [_as_text(piece.values) for piece in pieces]
    datas, starts, validity = [], np.zeros((len(pieces), num_rows + 1), np.int64), []
    position = 0
    for row, text in enumerate(texts):
        _, offsets, data = text.buffers()
        own = np.frombuffer(offsets, np.int64)[text.offset : text.offset + num_rows + 1]
        chunk = np.frombuffer(data or b"", np.uint8)[own[0] : own[-1]] if num_rows else np.zeros(0, np.uint8)
        starts[row] = own - own[0] + position if num_rows else 0
        datas.append(chunk)
        position += len(chunk)
        validity.append(
            text.is_valid().to_numpy(zero_copy_only=False) if text.null_count else np.ones(num_rows, np.bool_)
        )
    literals = [half.encode() for piece in pieces for half in (piece.before, piece.behind)]
    ends = np.cumsum([0, *(len(each) for each in literals)])
    arguments = (
        np.concatenate([*datas, np.zeros(0, np.uint8)]),
        starts,
        np.array(validity, np.bool_).reshape(len(pieces), num_rows),
        np.frombuffer(b"".join(literals), np.uint8),
        ends.astype(np.int64),
        np.array([piece.quoted for piece in pieces], np.bool_),
    )
    row_ends = np.zeros(num_rows + 1, np.int64)
    _row_ends(*arguments, row_ends)
    out = np.empty(row_ends[-1], np.uint8)
    _fill_rows(*arguments, out)
    return pa.LargeStringArray.from_buffers(num_rows, pa.py_buffer(row_ends), pa.py_buffer(out))


def text_bytes(texts: pa.LargeStringArray) -> memoryview:
    """All texts of an array one behind the other, without a copy."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(data or b"")[ends[0] : ends[-1]] if len(texts) else memoryview(b"")


def _as_text(values: pa.Array) -> pa.LargeStringArray:
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        return values.cast(pa.large_binary()).view(pa.large_string())
    return pc.cast(values, pa.large_string())


@_compiled
def _row_ends(data, starts, valid, literals, literal_ends, quoted, row_ends):  # type: ignore[no-untyped-def]
    """Where each row will end."""
    position = 0
    for row in range(len(row_ends) - 1):
        for piece in range(len(quoted)):
            if not valid[piece, row]:
                continue
            first, last = starts[piece, row], starts[piece, row + 1]
            position += literal_ends[2 * piece + 2] - literal_ends[2 * piece] + last - first
            if quoted[piece]:
                for place in range(first, last):
                    position += (data[place] == _QUOTE) | (data[place] == _BACKSLASH)
        row_ends[row + 1] = position


@_compiled
def _fill_rows(data, starts, valid, literals, literal_ends, quoted, out):  # type: ignore[no-untyped-def]
    """Write the rows."""
    position = 0
    for row in range(valid.shape[1]):
        for piece in range(len(quoted)):
            if not valid[piece, row]:
                continue
            for place in range(literal_ends[2 * piece], literal_ends[2 * piece + 1]):
                out[position] = literals[place]
                position += 1
            first, last = starts[piece, row], starts[piece, row + 1]
            if quoted[piece]:
                for place in range(first, last):
                    byte = data[place]
                    if (byte == _QUOTE) | (byte == _BACKSLASH):
                        out[position] = _BACKSLASH
                        position += 1
                    out[position] = byte
                    position += 1
            else:
                for place in range(first, last):
                    out[position] = data[place]
                    position += 1
            for place in range(literal_ends[2 * piece + 1], literal_ends[2 * piece + 2]):
                out[position] = literals[place]
                position += 1


def rle_sums(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """See `rle.rle_areas`."""
    sums = np.zeros((len(offsets) - 1, 2), np.int64)
    _rle_sums(data, offsets, sums)
    return sums


@_compiled
def _rle_sums(data, offsets, sums):  # type: ignore[no-untyped-def]
    """One mask after the other, one number after the other."""
    for mask in range(len(sums)):
        place, end = offsets[mask], offsets[mask + 1]
        rank, total, covered, before, two_before = 0, 0, 0, 0, 0
        bad = False
        while place < end and not bad:
            groups, more = 0, True
            run: Any = np.int64(0)
            while more and not bad:
                if place >= end or groups == 8:  # cut, or longer than 40 bits
                    bad = True
                    break
                group = np.int64(data[place]) - 48
                place += 1
                if group < 0 or group > 63:
                    bad = True
                    break
                run |= (group & 31) << (5 * groups)
                groups += 1
                more = (group & 32) != 0
                if not more and (group & 16) != 0:
                    run -= np.int64(1) << (5 * groups)
            if rank > 2:
                run += two_before
            bad = bad or run < 0
            two_before, before = before, run
            total += run
            if rank % 2 == 1:
                covered += run
            rank += 1
        if bad:
            sums[mask, 0], sums[mask, 1] = -1, -1
        else:
            sums[mask, 0], sums[mask, 1] = total, covered
