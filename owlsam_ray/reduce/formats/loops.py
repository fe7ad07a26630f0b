"""Compiled (numba) loops of the output formats: outlines of masks, and lists of all but a few strings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from owlsam_ray.ops.compiled import compiled


@dataclass(frozen=True, slots=True)
class Rings:
    """The border of a mask: closed rings along the sides of its pixels, with the mask on the right of each ring."""

    corners: NDArray[np.int64]
    """(P, 2) x, y of the corners, ring by ring, in pixels from the image's upper left corner. Steps alternate between
    horizontal and vertical."""
    ends: NDArray[np.int64]
    """(R + 1,) start of each ring in `corners`, and the end of the last."""
    is_hole: NDArray[np.bool_]
    """(R,) whether each ring is the border of a hole."""
    starts: NDArray[np.int64]
    """(R, 2) x, y in `pixels` of a mask pixel beside each ring."""
    pixels: NDArray[np.uint8]
    """(h + 2, w + 2) the mask in its tight box, with a margin of one pixel."""


def rings_of(counts: bytes, height: int) -> Rings | None:
    """Trace the border of a mask. Mask pixels are 8-connected, hole pixels 4-connected.

    Args:
        counts: compressed RLE of the mask, already validated.
        height: height of the image in pixels.

    Returns:
        Outer rings before the holes in them; None for a mask without pixels.
    """
    runs, (x0, y0, x1, y1) = _runs_and_box(np.frombuffer(counts, np.uint8), height)
    if x0 >= x1:
        return None
    pixels = np.zeros((y1 - y0 + 2, x1 - x0 + 2), np.uint8)
    _draw(runs, height, x0, y0, pixels)
    corners, ends, starts = _trace(pixels)
    corners += (x0, y0)
    return Rings(corners, ends, _turns_left(corners, ends), starts, pixels)


@compiled
def _runs_and_box(data, height):  # type: ignore[no-untyped-def]
    """Ends of the runs, and x0, y0, x1, y1 of the pixels; see `rle.rle_runs`."""
    runs = np.zeros(len(data), np.int64)
    count, place, position = 0, 0, np.int64(0)
    x0, y0, x1, y1 = np.int64(2**40), np.int64(2**40), np.int64(0), np.int64(0)
    lengths = np.zeros(len(data), np.int64)
    while place < len(data):
        run, shift, more = np.int64(0), 0, True
        while more and place < len(data):
            group = np.int64(data[place]) - 48
            place += 1
            run |= (group & 31) << shift
            shift += 5
            more = (group & 32) != 0
            if not more and (group & 16) != 0:
                run -= np.int64(1) << shift
        if count > 2:
            run += lengths[count - 2]
        lengths[count] = run
        first = position
        position += run
        runs[count] = position
        if count % 2 == 1 and run > 0:
            left, right = first // height, (position - 1) // height
            x0, x1 = min(x0, left), max(x1, right + 1)
            if left == right:
                y0, y1 = min(y0, first % height), max(y1, (position - 1) % height + 1)
            else:
                y0, y1 = np.int64(0), np.int64(height)
        count += 1
    return runs[:count], (x0, y0, x1, y1)


@compiled
def _draw(runs, height, x0, y0, pixels):  # type: ignore[no-untyped-def]
    """Set the pixels of every second run, in an array whose origin is x0 - 1, y0 - 1."""
    for index in range(1, len(runs), 2):
        row, column = runs[index - 1] % height, runs[index - 1] // height
        for _ in range(runs[index] - runs[index - 1]):
            pixels[row - y0 + 1, column - x0 + 1] = 1
            row += 1
            if row == height:
                row, column = 0, column + 1


@compiled
def _trace(pixels):  # type: ignore[no-untyped-def]
    """Follow each ring from its first upper side in row order; directions are right, down, left, up."""
    height, width = pixels.shape[0] - 2, pixels.shape[1] - 2
    count = 0
    for y in range(height + 1):
        for x in range(width + 1):
            total = pixels[y, x] + pixels[y, x + 1] + pixels[y + 1, x] + pixels[y + 1, x + 1]
            if total == 1 or total == 3:
                count += 1
            elif total == 2 and pixels[y, x] == pixels[y + 1, x + 1]:
                count += 2
    corners = np.empty((count, 2), np.int64)
    ends = np.zeros(count // 4 + 2, np.int64)
    starts = np.empty((count // 4 + 1, 2), np.int64)
    passed = np.zeros((height, width), np.bool_)
    corner, ring = 0, 0
    for start_y in range(height):
        for start_x in range(width):
            is_upper = pixels[start_y + 1, start_x + 1] == 1 and pixels[start_y, start_x + 1] == 0
            if not is_upper or passed[start_y, start_x]:
                continue
            x, y, direction = start_x, start_y, 0
            while True:
                if direction == 0:
                    passed[y, x] = True
                    x += 1
                    left, right = pixels[y, x + 1], pixels[y + 1, x + 1]
                elif direction == 1:
                    y += 1
                    left, right = pixels[y + 1, x + 1], pixels[y + 1, x]
                elif direction == 2:
                    x -= 1
                    left, right = pixels[y + 1, x], pixels[y, x]
                else:
                    y -= 1
                    left, right = pixels[y, x], pixels[y, x + 1]
                if left == 1 or right == 0:
                    corners[corner, 0], corners[corner, 1] = x, y
                    corner += 1
                    direction = (direction + (3 if left == 1 else 1)) % 4
                if x == start_x and y == start_y and direction == 0:
                    break
            starts[ring, 0], starts[ring, 1] = start_x + 1, start_y + 1
            ring += 1
            ends[ring] = corner
    return corners, ends[: ring + 1], starts[:ring]


@compiled
def _turns_left(corners, ends):  # type: ignore[no-untyped-def]
    """Which rings are the borders of holes."""
    found = np.zeros(len(ends) - 1, np.bool_)
    for ring in range(len(ends) - 1):
        area, before = np.int64(0), ends[ring + 1] - 1
        for place in range(ends[ring], ends[ring + 1]):
            area += corners[before, 0] * corners[place, 1] - corners[place, 0] * corners[before, 1]
            before = place
        found[ring] = area < 0
    return found


def rows_of_all_but(
    words: Sequence[str], left_out: NDArray[np.int64], ends: NDArray[np.int64], *, is_blank: NDArray[np.bool_]
) -> pa.LargeStringArray:
    """List all words except a few in each row, separated by `, `.

    Args:
        words: (W,) ASCII.
        left_out: indices of words that rows leave out, row by row, ascending within each row.
        ends: (N + 1,) start of each row in `left_out`, and the end of the last.
        is_blank: (N,) rows that are to be empty.

    Returns:
        (N,) texts.
    """
    text = np.frombuffer("".join(f"{word}, " for word in words).encode(), np.uint8)
    word_ends = np.cumsum([0, *(len(word) + 2 for word in words)]).astype(np.int64)
    row_ends = np.zeros(len(is_blank) + 1, np.int64)
    _ends_of_all_but(word_ends, left_out, ends, is_blank, row_ends)
    out = np.empty(row_ends[-1], np.uint8)
    _fill_all_but(text, word_ends, left_out, ends, row_ends, out)
    return pa.LargeStringArray.from_buffers(len(is_blank), pa.py_buffer(row_ends), pa.py_buffer(out))


@compiled
def _ends_of_all_but(word_ends, left_out, ends, is_blank, row_ends):  # type: ignore[no-untyped-def]
    for row in range(len(is_blank)):
        length = np.int64(0)
        if not is_blank[row]:
            length = word_ends[-1]
            for place in range(ends[row], ends[row + 1]):
                length -= word_ends[left_out[place] + 1] - word_ends[left_out[place]]
            length = max(length - 2, np.int64(0))
        row_ends[row + 1] = row_ends[row] + length


@compiled
def _fill_all_but(text, word_ends, left_out, ends, row_ends, out):  # type: ignore[no-untyped-def]
    for row in range(len(row_ends) - 1):
        position, end = row_ends[row], row_ends[row + 1]
        place, start = ends[row], np.int64(0)
        while position < end:
            stop = word_ends[left_out[place]] if place < ends[row + 1] else len(text)
            length = min(stop - start, end - position)
            out[position : position + length] = text[start : start + length]
            position += length
            if place < ends[row + 1]:
                start = word_ends[left_out[place] + 1]
                place += 1
