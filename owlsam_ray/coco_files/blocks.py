"""A long JSON array, cut between its elements by looking at brackets, quotes and commas only.

The text must be valid JSON already: cutting does not check it.
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
    """N ≥ 1 whole elements of an array, one after another."""

    start: int
    """First byte of the array's text."""
    text: NDArray[np.uint8]
    """Without the brackets of the array, and without a comma at its end. A view."""
    separators: NDArray[np.int64]
    """(N - 1,) places in `text` of the commas between elements."""
    all_objects: bool
    """Whether all elements are objects."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.separators) + 1

    @property
    def stop(self) -> int:
        """Byte of the array's text after the last."""
        return self.start + len(self.text)

    def lines(self) -> NDArray[np.uint8]:
        """The same elements as newline-delimited JSON."""
        lines = self.text.copy()
        lines[(lines == _NEWLINE) | (lines == _RETURN)] = _SPACE  # no string of valid JSON holds either
        lines[self.separators] = _NEWLINE
        return lines


def cut_array(text: NDArray[np.uint8], max_bytes: int) -> Iterator[Piece]:
    """Cut an array into pieces of about `max_bytes`, in order; none when it is empty.

    Args:
        text: what stands between the brackets of the array, valid JSON.
        max_bytes: a piece is larger only when one element is.
    """
    start, wanted = 0, max_bytes
    while start < len(text):
        window = text[start : start + wanted]
        separators, objects = _scan(window)
        if len(separators) and (wanted > max_bytes or start + wanted < len(text)):
            last = 0 if wanted > max_bytes else -1  # the large element alone
            window, separators = window[: separators[last]], separators[:last]
        elif start + wanted < len(text):
            wanted *= 2  # one element is larger than that
            continue
        elif not window.tobytes().strip():
            return
        num_objects = int(np.searchsorted(objects, len(window)))
        yield Piece(start, window, separators, all_objects=num_objects == len(separators) + 1)
        start, wanted = start + len(window) + 1, max_bytes


def _scan(window: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the commas between elements, and of the brackets that open an element which is an object.

    The window begins between two elements and may end anywhere.
    """
    # Brackets, `\` and `|` share all bits but one in two runs of three letters.
    marks = np.flatnonzero((((window & 0xDF) - _OPEN_LIST) < 3) | (window == _QUOTE))
    letters = window[marks]
    quotes = letters == _QUOTE
    if (letters == _BACKSLASH).any():
        quotes &= ~_after_escape(marks, letters)
    inside = np.cumsum(quotes, dtype=np.int32) & 1 != 0  # of a string, after each mark
    opening = ((letters == _OPEN_LIST) | (letters == _OPEN_OBJECT)) & ~inside
    closing = ((letters == _CLOSE_LIST) | (letters == _CLOSE_OBJECT)) & ~inside
    depth = np.cumsum(opening.view(np.int8) - closing.view(np.int8), dtype=np.int32)
    between = (depth == 0) & ~inside
    # Gaps between marks that lie outside all elements, or in one that is a number or a word.
    starts = np.concatenate([[0], marks[between] + 1])
    stops = np.concatenate([marks, [len(window)]])[np.concatenate([[0], np.flatnonzero(between) + 1])]
    commas = np.flatnonzero(window == _COMMA)
    first, last = np.searchsorted(commas, starts), np.searchsorted(commas, stops)
    counts = last - first
    places = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    return commas[places], marks[(letters == _OPEN_OBJECT) & opening & (depth == 1)]


def _after_escape(marks: NDArray[np.int64], letters: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which marks stand directly after a backslash that escapes them: the last of an odd number of backslashes."""
    backslash = letters == _BACKSLASH
    follows = np.zeros(len(marks), np.bool_)  # the mark before is the letter before
    follows[1:] = marks[1:] == marks[:-1] + 1
    heads = backslash.copy()
    heads[1:] &= ~(backslash[:-1] & follows[1:])
    places = np.arange(len(marks))
    head = np.maximum.accumulate(np.where(heads, places, 0))
    odd = backslash & ((places - head) % 2 == 0)
    escaped = np.zeros(len(marks), np.bool_)
    escaped[1:] = odd[:-1] & follows[1:]
    return escaped
