"""Search long arrays for repeated values."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def repeats(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions, rising, whose value also occurs at an earlier position, and the value's first position for each."""
    order = np.argsort(values, kind="stable")
    again = np.concatenate([[False], values[order[1:]] == values[order[:-1]]]) if len(order) else np.zeros(0, np.bool_)
    heads = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    later, first = order[again], order[heads[again]]
    rising = np.argsort(later)
    return later[rising].astype(np.int64), first[rising].astype(np.int64)
