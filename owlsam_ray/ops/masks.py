"""Turn low-resolution mask logits into RLE; convert bool masks to and from RLE; areas, boxes, holes and islands.

Shapes: N masks, m side of the low-resolution logits, H W original pixels, S side of the sam frame, h' w' the part of it
that the image fills. RLE is COCO's, column-major, compressed as pycocotools does. Boxes are half-open.
"""

import math
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn.functional import interpolate

from owlsam_ray.ops.rle import rle_runs
from owlsam_ray.records import Segment

_BAND = 64
"""Rows of a mask that are transposed together."""

cv2.setNumThreads(1)  # Masks are made in the engine's threads; more threads were not faster.


def upsample_logits(low_res: Tensor, *, size_hw: tuple[int, int], input_hw: tuple[int, int], image_size: int) -> Tensor:
    """Logits at the original size, as in SAM's `postprocess_masks`: two bilinear steps with a crop between.

    Args:
        low_res: (N, m, m) float32.
        size_hw: (H, W) of the original image.
        input_hw: (h', w') that the image fills in the sam frame; the rest is padding.
        image_size: S.

    Returns:
        (N, H, W) float32 on the same device; the mask is where it is > 0.

    Source: facebookresearch/segment-anything, `Sam.postprocess_masks`.
    """
    frame = interpolate(low_res[:, None], (image_size, image_size), mode="bilinear", align_corners=False)
    frame = frame[..., : input_hw[0], : input_hw[1]]
    return interpolate(frame, size_hw, mode="bilinear", align_corners=False)[:, 0]


def logits_to_masks(
    low_res: Tensor, *, size_hw: tuple[int, int], input_hw: tuple[int, int], image_size: int
) -> Iterator[NDArray[np.bool_]]:
    """Yield masks at the original size, one after another, so that only one is in memory.

    Args:
        low_res: (N, m, m) float32.
        size_hw: (H, W) of the original image.
        input_hw: (h', w') that the image fills in the sam frame; the rest is padding.
        image_size: S.

    Yields:
        N times (H, W) bool: logits above 0.
    """
    for index in range(len(low_res)):
        one = low_res[index : index + 1]
        # The full-size logits get no variable: it would keep them alive while the next ones are made.
        yield _above_zero(upsample_logits(one, size_hw=size_hw, input_hw=input_hw, image_size=image_size))


def _above_zero(logits: Tensor) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = (logits[0] > 0).cpu().numpy()
    return mask


def mask_area(mask: NDArray[np.bool_]) -> int:
    """Number of pixels in an (H, W) mask."""
    return int(np.count_nonzero(mask))


def encode_rle(mask: NDArray[np.bool_]) -> bytes:
    """(H, W) bool to the counts of its compressed RLE; thread-safe."""
    return bytes(coco_mask.encode(_column_major(mask))["counts"])


def _column_major(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(H, W) uint8 in Fortran order, copied in bands of rows that fit the cache: a quarter of a plain copy's time."""
    columns = np.empty(mask.shape, np.uint8, order="F")
    for top in range(0, len(mask), _BAND):
        columns[top : top + _BAND] = mask[top : top + _BAND]
    return columns


def decode_rle(counts: bytes, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Counts of a compressed RLE to its (H, W) bool mask, in Fortran order.

    Does not use pycocotools: its `decode` trusts the counts, and warns with numpy 2.

    Raises:
        ValueError: the counts are damaged, or belong to a mask of another size.
    """
    runs = rle_runs(counts)
    height, width = size_hw
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(f"RLE of {len(counts)} bytes does not describe a mask of {height} × {width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def tight_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of the smallest half-open box around an (H, W) mask; zeros when it is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    if len(rows) == 0:
        return (0, 0, 0, 0)
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return (int(columns[0]), top, int(columns[-1]) + 1, bottom)


def clean_mask(mask: NDArray[np.bool_], *, fill_holes: int, remove_islands: int) -> NDArray[np.bool_]:
    """Fill small holes, then remove small islands.

    Pixels that touch at a side or a corner are connected, in islands and in holes alike, as in the source. The source
    also counts a small piece of background at the image border as a hole; here it is not one: a hole is enclosed by
    mask.

    Args:
        mask: (H, W); not changed.
        fill_holes: holes with fewer pixels are filled; 0 fills none.
        remove_islands: connected parts with fewer pixels are removed, but never the largest (of equally large ones the
            first in row order); 0 removes none. Filled holes count towards a part's pixels.

    Returns:
        (H, W); the mask itself if there is nothing to do.

    Source: segment-anything, `remove_small_regions` and `postprocess_small_regions`.
    """
    x0, y0, x1, y1 = tight_box(mask) if fill_holes or remove_islands else (0, 0, 0, 0)
    if x0 == x1:
        return mask
    # A ring of background around the tight box connects all background that is not a hole into one component.
    part = np.zeros((y1 - y0 + 2, x1 - x0 + 2), np.uint8)
    part[1:-1, 1:-1] = mask[y0:y1, x0:x1]
    if fill_holes:
        _fill_holes(part, fill_holes)
    if remove_islands:
        _remove_islands(part, remove_islands)
    cleaned = np.zeros_like(mask)
    cleaned[y0:y1, x0:x1] = part[1:-1, 1:-1]
    return cleaned


def _fill_holes(part: NDArray[np.uint8], threshold: int) -> None:
    """Fill holes with fewer pixels, in a mask of 0 and 1 whose outermost rows and columns are 0."""
    labels, stats = _components(1 - part)
    small = stats[:, cv2.CC_STAT_AREA] < threshold
    small[[0, labels[0, 0]]] = False
    _paint(part, 1, np.flatnonzero(small), labels, stats)


def _remove_islands(part: NDArray[np.uint8], threshold: int) -> None:
    """Clear connected parts with fewer pixels, but not the largest, in a mask of 0 and 1 that has at least one 1."""
    labels, stats = _components(part)
    areas = stats[:, cv2.CC_STAT_AREA]
    areas[0] = 0
    largest = np.flatnonzero(areas == areas.max())
    # Of equally large parts the first in row order stays, whatever order the labels have.
    kept = largest[0] if len(largest) == 1 else labels.ravel()[np.isin(labels, largest).argmax()]
    small = areas < threshold
    small[[0, kept]] = False
    _paint(part, 0, np.flatnonzero(small), labels, stats)


def _components(part: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(H, W) component of each nonzero pixel, from 1 on; (L, 5) left, top, width, height, pixels of each component."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(part, connectivity=8)
    return labels, stats


def _paint(
    part: NDArray[np.uint8],
    value: int,
    which: NDArray[np.int64],
    labels: NDArray[np.int32],
    stats: NDArray[np.int32],
) -> None:
    """Set components to a value, each within its box: small ones in a large mask cost next to nothing."""
    for label in which.tolist():
        left, top, width, height, _ = stats[label].tolist()
        box = (slice(top, top + height), slice(left, left + width))
        part[box][labels[box] == label] = value


def stability_score(low_res: Tensor, *, input_hw: tuple[int, int], image_size: int, offset: float = 1.0) -> Tensor:
    """IoU of each mask at a higher threshold with the mask at a lower one.

    Args:
        low_res: (N, m, m) float32 logits.
        input_hw: (h', w') that the image fills in the sam frame; only that part counts.
        image_size: S.
        offset: thresholds are +offset and -offset.

    Returns:
        (N,) float32 in [0, 1]; 0 where not even the lower threshold leaves a pixel.

    Source: segment-anything's `calculate_stability_score`; here on the low-resolution logits, which costs nothing.
    """
    side = low_res.shape[-1]
    height, width = (math.ceil(length * side / image_size) for length in input_hw)
    valid = low_res[:, :height, :width]
    strict = (valid > offset).sum(dim=(1, 2)).float()
    loose = (valid > -offset).sum(dim=(1, 2)).float()
    return strict / loose.clamp(min=1)


def segments_from_logits(
    low_res: Tensor,
    predicted_iou: Tensor,
    *,
    size_hw: tuple[int, int],
    input_hw: tuple[int, int],
    image_size: int,
    fill_holes: int = 0,
    remove_islands: int = 0,
) -> list[Segment]:
    """Clean and encode the masks of one image; predicted IoU and stability are those of the logits.

    One mask at a time: an image of 108 megapixels needs 0.5 GB for each, and a result must not depend on other masks.

    Args:
        low_res: (N, m, m) float32 logits.
        predicted_iou: (N,) float32.
        size_hw: (H, W) of the original image.
        input_hw: (h', w') that the image fills in the sam frame.
        image_size: S.
        fill_holes: see `clean_mask`.
        remove_islands: see `clean_mask`.

    Returns:
        N segments in the order of `low_res`; none for N = 0.
    """
    stability = stability_score(low_res, input_hw=input_hw, image_size=image_size)
    masks = logits_to_masks(low_res, size_hw=size_hw, input_hw=input_hw, image_size=image_size)
    cleaned = (clean_mask(mask, fill_holes=fill_holes, remove_islands=remove_islands) for mask in masks)
    return [
        Segment(
            rle_counts=encode_rle(mask),
            area=mask_area(mask),
            box_xyxy=tight_box(mask),
            predicted_iou=quality,
            stability=stable,
        )
        for mask, quality, stable in zip(cleaned, predicted_iou.tolist(), stability.tolist(), strict=True)
    ]
