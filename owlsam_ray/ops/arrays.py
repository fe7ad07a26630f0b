"""Searches in long arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def repeats(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions whose value stands at an earlier position as well, rising, and for each of them the first position."""
    order = np.argsort(values, kind="stable")
    again = np.concatenate([[False], values[order[1:]] == values[order[:-1]]]) if len(order) else np.zeros(0, np.bool_)
    heads = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    later, first = order[again], order[heads[again]]
    rising = np.argsort(later)
    return later[rising].astype(np.int64), first[rising].astype(np.int64)
