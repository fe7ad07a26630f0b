"""Compute losses of box-prompted masks, at points drawn around each object.

Shapes: M objects, K masks per object, P points, m side of the low-resolution logits, H W original pixels. A point is
the centre of a pixel of the original image, so its target is exact; logits are read there by bilinear interpolation, as
upsampling does. Using all pixels of a 256 × 256 frame took 60 ms per image (9 objects, one CPU core), more than the
rest of a small model's step; points take 3 ms. The low-resolution grid alone cannot resolve an object of 12 pixels.

Source: the losses are those of Segment Anything (Kirillov et al., 2023), the points those of PointRend (Kirillov et
al., 2020), spread evenly instead of by uncertainty.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample

NEAR_SIDE, FAR_SIDE = 28, 12
NEAR_POINTS, FAR_POINTS = NEAR_SIDE**2, FAR_SIDE**2
"""Points per object around it, and anywhere in its image; the first NEAR_POINTS of P are the near ones."""
_MARGIN, _MARGIN_PX = 0.125, 2.0
"""How far the near points' window extends beyond the box on each side: a fraction of the box, and at least this many
pixels."""


@dataclass(frozen=True, slots=True)
class Points:
    """Points at which the masks of N objects of one image are compared."""

    centres_xy: NDArray[np.float32]
    """(N, P, 2) in original pixels, at pixel centres."""
    targets: NDArray[np.bool_]
    """(N, P) whether the point is inside the mask."""
    pixels: NDArray[np.float32]
    """(N, P) number of image pixels that the point represents; sums estimate areas without bias."""


def draw_points(masks: NDArray[np.bool_], boxes_xyxy: NDArray[np.float32], rng: np.random.Generator) -> Points:
    """Draw each object's points: a jittered grid over its surroundings, and a coarse one over the image.

    Args:
        masks: (N, H, W); N may be 0.
        boxes_xyxy: (N, 4) original pixels; the near points are in windows around them.
        rng: the only source of randomness.
    """
    count, height, width = masks.shape
    size = np.array([width, height], np.float32)
    margin = np.maximum(_MARGIN * (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]), _MARGIN_PX)
    low = np.clip(np.floor(boxes_xyxy[:, :2] - margin), 0, size - 1)
    high = np.clip(np.ceil(boxes_xyxy[:, 2:] + margin), low + 1, size)
    near = low[:, None] + _jittered_grid(rng, count, NEAR_SIDE) * (high - low)[:, None]
    far = _jittered_grid(rng, count, FAR_SIDE) * size
    cells = np.minimum(np.concatenate([near, far], axis=1).astype(np.int64), (size - 1).astype(np.int64))
    columns, rows = cells[..., 0], cells[..., 1]

    inside = ((cells >= low[:, None]) & (cells < high[:, None])).all(axis=-1)
    window = (high - low).prod(axis=1, keepdims=True) / NEAR_POINTS
    pixels = np.where(inside, 0.0, height * width / FAR_POINTS)  # near points represent the window
    pixels[:, :NEAR_POINTS] = window
    return Points(
        centres_xy=cells.astype(np.float32) + np.float32(0.5),
        targets=masks[np.arange(count)[:, None], rows, columns],
        pixels=pixels.astype(np.float32),
    )


def _jittered_grid(rng: np.random.Generator, count: int, side: int) -> NDArray[np.float32]:
    """(count, side², 2) in [0, 1): one random point in each cell of a grid."""
    y, x = np.divmod(np.arange(side * side), side)
    corners = np.stack([x, y], axis=-1).astype(np.float32)
    cells: NDArray[np.float32] = (corners + rng.random((count, side * side, 2), np.float32)) / np.float32(side)
    return cells


def logits_at(low_res: Tensor, points: Tensor) -> Tensor:
    """Read logits at points bilinearly; equals upsampling (`align_corners=False`) and reading there.

    Args:
        low_res: (M, K, m, m).
        points: (M, P, 2) as x, y with -1 and 1 at the borders of the sam frame.

    Returns:
        (M, K, P) float32.
    """
    values = grid_sample(low_res.float(), points[:, None], "bilinear", padding_mode="border", align_corners=False)
    return values[:, :, 0]


def focal_loss(logits: Tensor, targets: Tensor, *, gamma: float) -> Tensor:
    """Mean sigmoid focal loss of each mask: (M, K, P) logits and (M, 1, P) float targets to (M, K).

    Without the weight of the rarer class: around an object neither class is rare.
    Source: Lin et al., 2017.
    """
    entropy = binary_cross_entropy_with_logits(logits, targets.expand_as(logits), reduction="none")
    return (entropy * (1 - torch.exp(-entropy)).pow(gamma)).mean(dim=-1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - Dice of each mask's probabilities, smoothed by one point; shapes as in `focal_loss`."""
    probabilities = logits.sigmoid()
    shared = (probabilities * targets).sum(dim=-1)
    return 1 - (2 * shared + 1) / (probabilities.sum(dim=-1) + targets.sum(dim=-1) + 1)


def estimated_iou(logits: Tensor, targets: Tensor, pixels: Tensor) -> Tensor:
    """IoU of each thresholded mask with the target, estimated from the points.

    Args:
        logits: (M, K, P).
        targets: (M, 1, P), 0 or 1.
        pixels: (M, 1, P) pixels that each point represents.

    Returns:
        (M, K) float32 in [0, 1]; 0 where both are empty.
    """
    found, wanted = logits > 0, targets > 0.5
    shared = ((found & wanted) * pixels).sum(dim=-1)
    either = ((found | wanted) * pixels).sum(dim=-1)
    return shared / either.clamp(min=1e-6)
