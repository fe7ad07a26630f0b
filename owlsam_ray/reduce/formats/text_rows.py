"""Compiled (numba) conversion of columns to rows of text, byte by byte: what numpy and Arrow lack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.ops.compiled import compiled

_QUOTE, _BACKSLASH = ord('"'), ord("\\")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of every row: text before, a value, text behind. Where the value is null, the whole piece is left out."""

    before: str
    values: pa.Array
    """(N,) text or bytes, or numbers: integers in decimal, float32 as the shortest decimal that gives the same float
    back, without `.0` (100, 0.25, 1.2e-7)."""
    behind: str = ""
    quoted: bool = False
    """The value is ASCII inside a JSON string: `"` and backslashes are escaped by a backslash."""


_TEXT, _INTEGER, _FLOAT = 0, 1, 2


def join_rows(pieces: Sequence[Piece], num_rows: int) -> pa.LargeStringArray:
    """Rows of text, each the concatenation of its pieces.

    Args:
        pieces: the pieces of every row, in order.
        num_rows: N.

    Returns:
        (N,) texts without nulls.
    """
    kinds = [_kind_of(piece.values.type) for piece in pieces]
    places = [kinds[:row].count(kind) for row, kind in enumerate(kinds)]
    texts, integers, floats = (
        [piece.values for piece, of in zip(pieces, kinds, strict=True) if of == kind] for kind in range(3)
    )
    data, bounds = _joined(texts, num_rows)
    digits = np.empty((len(floats), num_rows, _WIDTH), np.uint8)
    lengths = np.empty((len(floats), num_rows), np.int64)
    for row, values in enumerate(floats):
        _write_floats(pc.fill_null(values, 0).to_numpy(), digits[row], lengths[row])
    valid = np.ones((len(pieces), num_rows), np.bool_)
    for row, piece in enumerate(pieces):
        if piece.values.null_count:
            valid[row] = piece.values.is_valid().to_numpy(zero_copy_only=False)
    literals = [half.encode() for piece in pieces for half in (piece.before, piece.behind)]
    arguments = (
        np.array([kinds, places, [piece.quoted for piece in pieces]], np.int64).reshape(3, len(pieces)),
        valid,
        np.frombuffer(b"".join(literals) + bytes(_SLACK), np.uint8),
        np.cumsum([0, *(len(each) for each in literals)]).astype(np.uint64),
        data,
        bounds,
        _stacked([pc.fill_null(values, 0).to_numpy() for values in integers], num_rows),
        digits,
        lengths.astype(np.uint64),
    )
    # An upper bound: how many characters need a backslash is not known yet. Pages that are not written take no memory.
    quoted = sum(
        int(bounds[place, -1] - bounds[place, 0]) for place, piece in zip(places, pieces, strict=True) if piece.quoted
    )
    most = num_rows * (sum(map(len, literals)) + _WIDTH * (len(integers) + len(floats))) + len(data) + quoted + _SLACK
    row_ends, out = np.zeros(num_rows + 1, np.int64), np.empty(most, np.uint8)
    _fill_rows(*arguments, _PAIRS, out, row_ends)
    return pa.LargeStringArray.from_buffers(num_rows, pa.py_buffer(row_ends), pa.py_buffer(out[: row_ends[-1]]))


def _kind_of(kind: pa.DataType) -> int:
    if pa.types.is_float32(kind):
        return _FLOAT
    return _INTEGER if pa.types.is_integer(kind) else _TEXT


def _stacked(arrays: list[NDArray[Any]], num_rows: int) -> NDArray[np.int64]:
    out = np.empty((len(arrays), num_rows), np.int64)
    for row, array in enumerate(arrays):
        out[row] = array
    return out


def _joined(columns: Sequence[pa.Array], num_rows: int) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Bytes of all text columns, and (columns, N + 1) the position in them where each row's text begins."""
    datas, bounds, position = [np.zeros(0, np.uint8)], np.zeros((len(columns), num_rows + 1), np.uint64), 0
    for row, values in enumerate(columns):
        if not (pa.types.is_large_string(values.type) or pa.types.is_large_binary(values.type)):
            values = pc.cast(values, pa.large_binary() if pa.types.is_binary(values.type) else pa.large_string())
        _, offsets, data = values.buffers()
        if num_rows:
            ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + num_rows + 1]
            bounds[row] = ends - (ends[0] - position)
            datas.append(np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]])
            position += int(ends[-1] - ends[0])
    return np.concatenate([*datas, np.zeros(_SLACK, np.uint8)]), bounds


def text_bytes(texts: pa.LargeStringArray) -> memoryview:
    """All texts of an array, concatenated, without a copy."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(data or b"")[ends[0] : ends[-1]] if len(texts) else memoryview(b"")


_WIDTH = 32
"""Bytes that hold any number's text; a multiple of `_BLOCK`."""


def _write_floats(values: NDArray[np.float32], data: NDArray[np.uint8], lengths: NDArray[np.int64]) -> None:
    """Write the shortest decimal of each number that gives the same float32 back, like Arrow's cast.

    Of equally short ones it is the nearest. Most are computed here, in about half of Arrow's time. Once a number is
    scaled to nine digits, the decimals between the midpoints to both neighbours are integers, and as many last digits
    are dropped as leave at least one candidate in between. Very large and small numbers, and numbers whose scaled
    double is too near a border to decide, are left to Arrow.

    Args:
        values: (N,) finite.
        data: (N, 32) receives ASCII, left-aligned in each row.
        lengths: (N,) receives the number of characters in each row.
    """
    values = np.ascontiguousarray(values)
    bits = values.view(np.uint32)
    _float_texts(values, bits, (bits - 1).view(np.float32), (bits + 1).view(np.float32), _TENS, _PAIRS, data, lengths)
    left = np.flatnonzero(lengths < 0)
    for row, text in zip(left, pc.cast(pa.array(values[left]), pa.string()).to_pylist(), strict=True):
        lengths[row] = len(text)
        data[row, : len(text)] = np.frombuffer(text.encode(), np.uint8)


_SMALLEST = -9
_TENS = np.array([float(f"1e{exponent}") for exponent in range(_SMALLEST, 24)])
"""Powers of ten, from 10^-9 on."""


_PAIRS = np.frombuffer("".join(f"{number:02d}" for number in range(100)).encode(), np.uint8).copy()
"""`00` to `99`: two digits per division."""


@compiled
def _float_texts(values, bits, below, above, tens, pairs, data, lengths):  # type: ignore[no-untyped-def]
    """Write digits left-aligned in each row; the length is -1 where Arrow must decide.

    Numbers of nine digits fit 32 bits, and unsigned ones are divided by a constant in the fewest steps.
    """
    unsure = 1e-5  # far above the error of a scaled double: 1e9 × 2e-16
    ten, hundred = np.uint32(10), np.uint32(100)
    for row in range(len(values)):
        if bits[row] == 0:
            data[row, 0], lengths[row] = 48, 1
            continue
        value = abs(np.float64(values[row]))
        if not (1e-5 <= value < 1e7):
            lengths[row] = -1
            continue
        # log10 from the binary exponent, at most one too small.
        exponent = (((np.int64(bits[row]) >> 23) & 255) - 127) * 1233 >> 12
        exponent += value >= tens[exponent + 1 - _SMALLEST]
        scale = 8 - exponent  # nine digits before the point
        factor = tens[scale - _SMALLEST]
        low = (value + abs(np.float64(below[row]))) * 0.5 * factor
        high = (value + abs(np.float64(above[row]))) * 0.5 * factor
        first, last = np.uint32(np.int64(low)), np.uint32(np.int64(high))
        low_rest, high_rest = low - first, high - last
        if (min(low_rest, high_rest) < unsure) | (max(low_rest, high_rest) > 1 - unsure):
            lengths[row] = -1
            continue
        first += np.uint32(1)
        step, shorter, dropped = np.uint32(1), last, 0
        while dropped < 9:
            shorter //= ten
            if shorter * (step * ten) < first:
                break
            step, dropped = step * ten, dropped + 1
        # The nearest multiple of `step` among the candidates in between.
        quotient = value * factor * tens[-dropped - _SMALLEST] + 0.5
        digits = np.uint32(np.int64(quotient))
        rest = quotient - digits
        if (rest < unsure) | (rest > 1 - unsure):
            lengths[row] = -1
            continue
        if digits * step < first:
            digits += np.uint32(1)
        elif digits * step > last:
            digits -= np.uint32(1)
        place = 0
        if values[row] < 0:
            data[row, place] = 45
            place += 1
        decimals = scale - dropped
        before = 9 - dropped - decimals  # digits before the point; digits has 9 - dropped
        if digits >= np.uint32(tens[9 - dropped - _SMALLEST]):  # 9.99… became 10
            before += 1
        end = place + before if decimals <= 0 else place + max(before, 1) + 1 + decimals
        lengths[row] = end
        if decimals > 0:
            left = decimals
            while left >= 2:
                pair = digits % hundred
                digits //= hundred
                end -= 2
                left -= 2
                data[row, end], data[row, end + 1] = pairs[2 * pair], pairs[2 * pair + 1]
            if left:
                end -= 1
                data[row, end] = 48 + digits % ten
                digits //= ten
            end -= 1
            data[row, end] = 46
        else:
            for _ in range(-decimals):  # trailing zeros before the point that are not among the digits
                end -= 1
                data[row, end] = 48
        while end > place:
            end -= 1
            data[row, end] = 48 + digits % ten
            digits //= ten


_BLOCK = 16
"""Bytes that are copied at once: a compile-time constant makes the copy one instruction."""
_SLACK = 2 * _BLOCK
"""Spare bytes after what is read and written."""


@compiled
def _put(out, position, source, start, length):  # type: ignore[no-untyped-def]
    """Copy in whole blocks, also beyond the end: those bytes are overwritten later."""
    done = np.uint64(0)
    while done < length:
        for index in range(_BLOCK):
            out[position + done + np.uint64(index)] = source[start + done + np.uint64(index)]
        done += np.uint64(_BLOCK)


@compiled
def _specials(data, start, length):  # type: ignore[no-untyped-def]
    """Number of characters that need a backslash."""
    count = np.uint64(0)
    for index in range(start, start + length):
        count += np.uint64((data[index] == _QUOTE) | (data[index] == _BACKSLASH))
    return count


@compiled
def _fill_rows(table, valid, literals, ends, data, bounds, integers, floats, float_ends, pairs, out, row_ends):  # type: ignore[no-untyped-def]
    """Write the rows, and where each ends. Positions are unsigned: signed ones may be negative and slow the loops."""
    position, one, two, ten, hundred = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(10), np.uint64(100)
    for row in range(valid.shape[1]):
        for piece in range(table.shape[1]):
            if not valid[piece, row]:
                continue
            kind, place = table[0, piece], table[1, piece]
            start, end = ends[2 * piece], ends[2 * piece + 1]
            _put(out, position, literals, start, end - start)
            position += end - start
            if kind == _INTEGER:
                number = integers[place, row]
                if number < 0:
                    out[position] = 45
                    position += one
                rest, width = np.uint64(abs(number)), one
                limit = ten
                while rest >= limit and width < np.uint64(19):
                    limit *= ten
                    width += one
                position += width
                back = position
                while rest >= ten:
                    pair = rest % hundred
                    rest //= hundred
                    back -= two
                    out[back], out[back + one] = pairs[two * pair], pairs[two * pair + one]
                if width & one:
                    out[back - one] = np.uint64(48) + rest
            elif kind == _FLOAT:
                length = float_ends[place, row]
                _put(out, position, floats[place, row], np.uint64(0), length)
                position += length
            else:
                first = bounds[place, row]
                length = bounds[place, row + 1] - first
                if table[2, piece] == 0 or _specials(data, first, length) == 0:
                    _put(out, position, data, first, length)
                    position += length
                else:
                    for index in range(first, first + length):
                        byte = data[index]
                        if (byte == _QUOTE) | (byte == _BACKSLASH):
                            out[position] = _BACKSLASH
                            position += one
                        out[position] = byte
                        position += one
            start, end = ends[2 * piece + 1], ends[2 * piece + 2]
            _put(out, position, literals, start, end - start)
            position += end - start
        row_ends[row + 1] = position
