"""Compute overlaps and areas of boxes: (N, 4) xyxy arrays, half-open: x1 and y1 are the right and bottom edges."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_SWEEP_PAIRS = 1 << 14
"""Pairs that the sweep compares at a time (or one box's pairs, if more): what fits a core's cache."""


def clip_boxes(boxes_xyxy: NDArray[np.float32], size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """(N, 4) boxes clipped to an image of (H, W); boxes outside become empty."""
    height, width = size_hw
    return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], np.float32))


def has_area(boxes_xyxy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(N,) whether a box has positive width and height."""
    wide: NDArray[np.bool_] = boxes_xyxy[:, 2] > boxes_xyxy[:, 0]
    return wide & (boxes_xyxy[:, 3] > boxes_xyxy[:, 1])


def pair_overlaps(
    boxes_xyxy: NDArray[np.floating[Any]], others_xyxy: NDArray[np.floating[Any]], kind: Literal["iou", "ios"]
) -> NDArray[np.float64]:
    """Overlap of the two boxes of each pair, in float64.

    Args:
        boxes_xyxy: (..., 4).
        others_xyxy: (..., 4), of a shape that broadcasts with the first.
        kind: `iou`: intersection over union; `ios`: intersection over the smaller of the two areas.

    Returns:
        (...) in [0, 1], the same for both orders of a pair. A box without area has overlap 0 with every box, even with
        itself. Never NaN.
    """
    x0, y0, x1, y1 = np.moveaxis(np.asarray(boxes_xyxy, np.float64), -1, 0)
    u0, v0, u1, v1 = np.moveaxis(np.asarray(others_xyxy, np.float64), -1, 0)
    width = np.minimum(x1, u1) - np.maximum(x0, u0)
    height = np.minimum(y1, v1) - np.maximum(y0, v0)
    common = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    area, other = (x1 - x0) * (y1 - y0), (u1 - u0) * (v1 - v0)
    whole = area + other - common if kind == "iou" else np.minimum(area, other)
    # Only boxes with area have an intersection, so nothing is divided by zero.
    result: NDArray[np.float64] = np.divide(common, whole, out=np.zeros_like(common), where=common > 0)
    return result


def overlapping_pairs(
    boxes_xyxy: NDArray[np.float32],
    groups: NDArray[np.int64],
    kind: Literal["iou", "ios"],
    *,
    above: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """All pairs of boxes of the same group that overlap by more than a limit.

    A sweep along x: a box is compared with the boxes of its group that begin before it ends. Memory grows with the
    number of pairs found (24 bytes each, at most N · (N - 1) / 2 of them), not with N².

    Args:
        boxes_xyxy: (N, 4).
        groups: (N,) small integers from 0.
        kind: see `pair_overlaps`.
        above: (N,) the limit, not negative and the same within a group.

    Returns:
        first, second: (E,) indices of boxes, first < second; overlap: (E,). In no particular order.
    """
    count = len(boxes_xyxy)
    _, ranks = np.unique(boxes_xyxy[:, [0, 2]], return_inverse=True)
    # The begins and ends of each group get a separate range of integers.
    spans = ranks.reshape(count, 2) + 2 * count * groups[:, None]
    order = np.argsort(spans[:, 0], kind="stable")
    begins, ends = spans[order].T
    nearby = np.maximum(np.searchsorted(begins, ends) - np.arange(1, count + 1), 0)
    blocks = np.flatnonzero(np.diff(np.cumsum(nearby) // _SWEEP_PAIRS, prepend=0))
    columns = boxes_xyxy[order].astype(np.float64).T.copy()
    found = []
    for start, stop in zip([0, *blocks], [*blocks, count], strict=True):
        left = np.repeat(np.arange(start, stop), nearby[start:stop])
        right = concatenated_ranges(np.arange(start, stop) + 1, nearby[start:stop])
        overlap = pair_overlaps(columns[:, left].T, columns[:, right].T, kind)
        a, b = order[left], order[right]
        hit = np.flatnonzero(overlap > above[a])
        a, b = a[hit], b[hit]
        found.append((np.minimum(a, b), np.maximum(a, b), overlap[hit]))
    first, second, overlap = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return first, second, overlap


def concatenated_ranges(starts: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """For each start, as many consecutive integers as its length says, one range after another."""
    ends = np.cumsum(lengths)
    result: NDArray[np.int64] = np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
    return result
