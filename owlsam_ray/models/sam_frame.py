"""The sam frame: a square of side S, with the image at its top left and padding at the right and bottom."""

import numpy as np
from numpy.typing import NDArray


def input_size_hw(size_hw: tuple[int, ...], image_size: int) -> tuple[int, int]:
    """(h', w') that an image of (H, W) fills in the sam frame: the long side becomes `image_size`.

    At least 1 each, so that a hairline image still has a row or column.
    Source: segment-anything, `ResizeLongestSide.get_preprocess_shape`.
    """
    scale = image_size / max(size_hw)
    height, width = (max(1, int(length * scale + 0.5)) for length in size_hw)
    return height, width


def boxes_to_sam_frame(
    boxes_xyxy: NDArray[np.float32], *, size_hw: tuple[int, int], image_size: int
) -> NDArray[np.float32]:
    """(N, 4) float32 boxes in original pixels to float32 in the sam frame of an image of (H, W); N may be 0.

    Source: segment-anything, `ResizeLongestSide.apply_boxes`: each axis by its own rounded factor.
    """
    (height, width), (new_height, new_width) = size_hw, input_size_hw(size_hw, image_size)
    factors = np.array([new_width / width, new_height / height] * 2)
    scaled: NDArray[np.float32] = (boxes_xyxy * factors).astype(np.float32)
    return scaled
