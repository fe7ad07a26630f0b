"""Splits a long JSON array between its elements by scanning only for brackets, quotes and commas.

The text must already be valid JSON: splitting does not check it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_QUOTE, _COMMA, _BACKSLASH = b'",\\'
_OPEN_LIST, _CLOSE_LIST, _OPEN_OBJECT, _CLOSE_OBJECT = b"[]{}"
_NEWLINE, _RETURN, _SPACE = b"\n\r "


@dataclass(frozen=True, slots=True)
class Piece:
    """N ≥ 1 whole, consecutive elements of an array."""

    start: int
    """Offset of the first byte in the array's text."""
    text: NDArray[np.uint8]
    """A view, without the brackets of the array and without a trailing comma."""
    separators: NDArray[np.int64]
    """(N - 1,) positions in `text` of the commas between elements."""
    all_objects: bool
    """Whether all elements are objects."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.separators) + 1

    @property
    def stop(self) -> int:
        """Offset in the array's text just after the last byte."""
        return self.start + len(self.text)

    def lines(self) -> NDArray[np.uint8]:
        """The elements as newline-delimited JSON."""
        lines = self.text.copy()
        lines[(lines == _NEWLINE) | (lines == _RETURN)] = _SPACE  # a string of valid JSON contains neither
        lines[self.separators] = _NEWLINE
        return lines


def cut_array(text: NDArray[np.uint8], max_bytes: int) -> Iterator[Piece]:
    """Split an array into pieces of about `max_bytes`, in order; yields nothing for an empty array.

    Args:
        text: valid JSON between the brackets of the array.
        max_bytes: only a piece of a single element may be larger.
    """
    start, wanted = 0, max_bytes
    while start < len(text):
        window = text[start : start + wanted]
        separators, objects = _scan(window)
        if len(separators) and (wanted > max_bytes or start + wanted < len(text)):
            last = 0 if wanted > max_bytes else -1  # the large element alone
            window, separators = window[: separators[last]], separators[:last]
        elif start + wanted < len(text):
            wanted *= 2  # a single element is larger
            continue
        elif not window.tobytes().strip():
            return
        num_objects = int(np.searchsorted(objects, len(window)))
        yield Piece(start, window, separators, all_objects=num_objects == len(separators) + 1)
        start, wanted = start + len(window) + 1, max_bytes


def _scan(window: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the commas between elements, and of the brackets that open an element that is an object.

    The window begins between two elements and may end anywhere.
    """
    # `[\]` and `{|}` are runs of three characters, equal but for one bit that the mask clears.
    marks = np.flatnonzero((((window & 0xDF) - _OPEN_LIST) < 3) | (window == _QUOTE))
    letters = window[marks]
    quotes = letters == _QUOTE
    if (letters == _BACKSLASH).any():
        quotes &= ~_after_escape(marks, letters)
    inside = np.cumsum(quotes, dtype=np.int32) & 1 != 0  # whether the position after each mark is inside a string
    opening = ((letters == _OPEN_LIST) | (letters == _OPEN_OBJECT)) & ~inside
    closing = ((letters == _CLOSE_LIST) | (letters == _CLOSE_OBJECT)) & ~inside
    depth = np.cumsum(opening.view(np.int8) - closing.view(np.int8), dtype=np.int32)
    between = (depth == 0) & ~inside
    # Gaps between marks that are outside all elements, or inside a number or a literal.
    starts = np.concatenate([[0], marks[between] + 1])
    stops = np.concatenate([marks, [len(window)]])[np.concatenate([[0], np.flatnonzero(between) + 1])]
    commas = np.flatnonzero(window == _COMMA)
    first, last = np.searchsorted(commas, starts), np.searchsorted(commas, stops)
    counts = last - first
    places = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    return commas[places], marks[(letters == _OPEN_OBJECT) & opening & (depth == 1)]


def _after_escape(marks: NDArray[np.int64], letters: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which marks are escaped, that is, directly follow the last of an odd number of backslashes."""
    backslash = letters == _BACKSLASH
    follows = np.zeros(len(marks), np.bool_)  # whether the previous mark is the previous character
    follows[1:] = marks[1:] == marks[:-1] + 1
    heads = backslash.copy()
    heads[1:] &= ~(backslash[:-1] & follows[1:])
    places = np.arange(len(marks))
    head = np.maximum.accumulate(np.where(heads, places, 0))
    odd = backslash & ((places - head) % 2 == 0)
    escaped = np.zeros(len(marks), np.bool_)
    escaped[1:] = odd[:-1] & follows[1:]
    return escaped
