"""Compare drawn boxes and masks with the model's, and convert them to columns.

Tools round numbers and write masks as polygons. Differences that come from this alone are not changes: boxes within
0.05 px, and polygons that differ from the model's mask only in pixels along its outline and have an IoU of at least
0.75 with it (a mask one pixel thin is all outline).
"""

from dataclasses import dataclass
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from owlsam_ray.coco_files.regions import box_of, rle_area, rle_box, rle_of
from owlsam_ray.ops.rle import rle_runs

SAME_PX = 0.05
"""Box sides that differ by less, in pixels, are the same side, rounded by a tool."""

SAME_IOU = 0.75
"""Minimum IoU of a mask and the polygons that a tool made of it."""
_FAR = 1e9
"""Exclusive limit of coordinates and sides of a box, in pixels."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask of the same size as the image."""

    counts: bytes
    """Compressed RLE."""
    area: int
    """Number of pixels."""
    box_xyxy: tuple[int, int, int, int]
    """Tight box."""
    is_polygon: bool = False
    """Drawn from polygons."""


@dataclass(frozen=True, slots=True)
class Shape:
    """An entry's box and mask."""

    box_xyxy: Box | None
    """Original pixels; None: the entry has no box."""
    mask: Mask | None
    """None: the entry has no mask."""

    def box_columns(self) -> dict[str, float]:
        """The box as columns of `ANNOTATION_SCHEMA`; without a box, that of the mask."""
        box = self.box_xyxy or (self.mask.box_xyxy if self.mask is not None else (0.0, 0.0, 0.0, 0.0))
        return dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))

    def mask_columns(self) -> dict[str, Any]:
        """The mask as columns of `ANNOTATION_SCHEMA`; all null without a mask.

        Drawn masks have no predicted IoU and no stability.
        """
        names = ("mask_x0", "mask_y0", "mask_x1", "mask_y1")
        estimates = {"predicted_iou": None, "stability": None}
        if self.mask is None:
            return dict.fromkeys(("rle_counts", "mask_area", *names)) | estimates
        box = dict(zip(names, self.mask.box_xyxy, strict=True))
        return {"rle_counts": self.mask.counts, "mask_area": self.mask.area} | box | estimates


def pack_shape(entry: dict[str, Any]) -> bytes:
    """Serialize the shape of a COCO entry without interpreting it."""
    return msgspec.json.encode([entry.get("bbox"), entry.get("segmentation")])


def read_shape(packed: bytes, size_hw: tuple[int, int]) -> Shape:
    """Read a shape written by `pack_shape`.

    Args:
        packed: bytes of `pack_shape`.
        size_hw: (H, W) of the image.

    Raises:
        ValueError: the shape is invalid: neither box nor mask, not numbers, or a mask of another size. The message says
            which.
    """
    bbox, segmentation = msgspec.json.decode(packed)
    box = _read_box(bbox) if bbox else None
    mask = None
    if segmentation:
        rle = rle_of(segmentation, size_hw)
        area = round(rle_area(rle))
        x, y, width, height = (round(number) for number in rle_box(rle))
        mask = Mask(rle["counts"], area, (x, y, x + width, y + height), isinstance(segmentation, list))
    if box is None and mask is None:
        raise ValueError("it has neither bbox nor segmentation")
    return Shape(box, mask)


def _read_box(bbox: Any) -> Box:
    x, y, width, height = box_of(bbox)
    if not max(abs(x), abs(y), width, height) < _FAR:
        raise ValueError(f"bbox {bbox} lies beyond any image")
    return (x, y, x + width, y + height)


def empty_part(shape: Shape, size_hw: tuple[int, int]) -> str | None:
    """Why a shape is invisible: no area, no pixel, outside the image of (H, W); None: it is visible."""
    if shape.mask is not None and shape.mask.area == 0:
        return "its mask has no pixel"
    if shape.box_xyxy is None:
        return None
    x0, y0, x1, y1 = np.array(shape.box_xyxy, np.float32).tolist()
    if x0 >= x1 or y0 >= y1:
        return "its bbox has no area"
    outside = x0 >= size_hw[1] or y0 >= size_hw[0] or x1 <= 0 or y1 <= 0
    return f"its bbox lies outside the image of {size_hw[0]}×{size_hw[1]}" if outside else None


def same_boxes(box_xyxy: Box, others_xyxy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(...) whether each side of a box is within `SAME_PX` of that of each of (..., 4) boxes."""
    same: NDArray[np.bool_] = np.abs(others_xyxy.astype(np.float64) - np.array(box_xyxy)).max(axis=-1) < SAME_PX
    return same


def same_mask(mask: Mask, counts: bytes | None, size_hw: tuple[int, int]) -> bool:
    """Whether a mask is the model's.

    Args:
        mask: the drawn mask.
        counts: RLE of the model's mask; None: it has none.
        size_hw: (H, W) of the image.

    Returns:
        True for the same pixels; for polygons also when the masks differ only within one pixel of the outline of the
        model's mask, and overlap by `SAME_IOU`.
    """
    if counts is None or mask.counts == counts:
        return counts is not None
    if not mask.is_polygon:
        return False
    ours, machine = _pixels(mask.counts, size_hw), _pixels(counts, size_hw)
    if np.count_nonzero(ours & machine) < SAME_IOU * np.count_nonzero(ours | machine):
        return False
    differs = np.flatnonzero((ours != machine).any(axis=0))
    if len(differs) == 0:
        return True
    part = slice(max(0, int(differs[0]) - 1), int(differs[-1]) + 2)  # beyond this slice the masks are equal
    ours, machine = np.ascontiguousarray(ours[:, part]), np.ascontiguousarray(machine[:, part])
    around = np.ones((3, 3), np.uint8)
    outline = cv2.dilate(machine, around) != cv2.erode(machine, around)
    return not bool(((ours != machine) & ~outline).any())


def _pixels(counts: bytes, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W) of 0 and 1; the counts must be those of an image of that size."""
    runs = rle_runs(counts)
    height, width = size_hw
    return np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs).reshape(width, height).T
