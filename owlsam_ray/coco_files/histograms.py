"""Counts of values in fixed bins, added to block by block."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE_EDGES = np.round(2 ** (np.arange(0, 27) / 2), 2)
"""Square root of an area, px: 1, 1.41, 2, … 8192."""
RATIO_EDGES = np.round(2 ** (np.arange(-16, 17) / 4), 4)
"""Width by height: 1/16, … 1, 1.19, 1.41, … 16."""
SCORE_EDGES = np.round(np.arange(0, 51) / 50, 2)
"""0, 0.02, … 1."""


class Histogram:
    """K bins, half-open but for the last, which holds its right edge as well."""

    def __init__(self, edges: NDArray[np.float64]) -> None:
        self._edges = edges
        self._counts = np.zeros(len(edges) + 1, np.int64)  # below, K bins, above
        self._low, self._high = np.inf, -np.inf

    def add(self, values: NDArray[np.float64]) -> None:
        """Count values, none of which is NaN."""
        if len(values):
            places = np.searchsorted(self._edges, values, side="right")
            places[values == self._edges[-1]] -= 1
            self._counts += np.bincount(places, minlength=len(self._counts))
            self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))

    def as_dict(self) -> dict[str, Any]:
        """Edges (K + 1), counts (K), how many lie below and above, least and greatest value (None without values)."""
        any_value = bool(self._counts.any())
        return {
            "edges": self._edges.tolist(),
            "counts": self._counts[1:-1].tolist(),
            "below": int(self._counts[0]),
            "above": int(self._counts[-1]),
            "min": self._low if any_value else None,
            "max": self._high if any_value else None,
        }


def spread_of(values: NDArray[np.int64]) -> dict[str, Any]:
    """Least, median, mean and greatest of N values; None without any."""
    if not len(values):
        return dict.fromkeys(("min", "median", "mean", "max"))
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
    }


def share(part: int, whole: int) -> float | None:
    """A part of 1; None of nothing."""
    return part / whole if whole else None
