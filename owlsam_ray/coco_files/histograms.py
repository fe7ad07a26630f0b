"""Counts values in fixed bins, block by block."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE_EDGES = np.round(2 ** (np.arange(0, 27) / 2), 2)
"""Square root of an area, px: 1, 1.41, 2, … 8192."""
RATIO_EDGES = np.round(2 ** (np.arange(-16, 17) / 4), 4)
"""Width / height: 1/16, … 1, 1.19, 1.41, … 16."""
SCORE_EDGES = np.round(np.arange(0, 51) / 50, 2)
"""0, 0.02, … 1."""


class Histogram:
    """K bins, half-open except for the last one, which includes its right edge."""

    def __init__(self, edges: NDArray[np.float64]) -> None:
        self._edges = edges
        self._counts = np.zeros(len(edges) + 1, np.int64)  # below, K bins, above
        self._low, self._high = np.inf, -np.inf

    def add(self, values: NDArray[np.float64]) -> None:
        """Count values; none may be NaN."""
        if len(values):
            places = np.searchsorted(self._edges, values, side="right")
            places[values == self._edges[-1]] -= 1
            self._counts += np.bincount(places, minlength=len(self._counts))
            self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))

    def as_dict(self) -> dict[str, Any]:
        """Edges (K + 1), counts (K), numbers below and above, minimum and maximum value (None without values)."""
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
    """Minimum, median, mean and maximum of N values; None each when N is 0."""
    if not len(values):
        return dict.fromkeys(("min", "median", "mean", "max"))
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
    }


def share(part: int, whole: int) -> float | None:
    """`part` as a fraction of `whole`; None when `whole` is 0."""
    return part / whole if whole else None
