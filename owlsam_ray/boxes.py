"""Box geometry on (N, 4) float32 xyxy arrays, half-open: x1 and y1 are the right and bottom edges."""

import numpy as np
from numpy.typing import NDArray


def clip_boxes(boxes_xyxy: NDArray[np.float32], size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """(N, 4) boxes cut at the border of a picture of (H, W); those outside become empty."""
    height, width = size_hw
    return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], np.float32))


def has_area(boxes_xyxy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(N,) whether a box is wider and higher than nothing."""
    wide: NDArray[np.bool_] = boxes_xyxy[:, 2] > boxes_xyxy[:, 0]
    return wide & (boxes_xyxy[:, 3] > boxes_xyxy[:, 1])
