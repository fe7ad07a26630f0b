"""Converts COCO's three kinds of segmentation to one compact form.

Polygons are lists of x, y, x, y, … in original pixels; RLE is column-major, uncompressed (a list of run lengths) or
compressed (a text).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from owlsam_ray.coco_files.annotations import as_float, is_number

Outline = tuple[NDArray[np.float64], ...] | bytes
"""Polygons, each (2·P,) with P ≥ 3; or the counts of a compressed RLE."""

_NO_AREA = 1e-6
"""Square pixels: area that rounding may leave for points on a line."""

_MAX_PIXELS = 2**32 - 1
"""pycocotools counts with 32 bits."""


class BadSegmentationError(ValueError):
    """A segmentation that cannot be drawn."""


def read_outline(segmentation: Any, size_hw: tuple[float, float]) -> tuple[Outline | None, int]:
    """Convert one object's segmentation to the compact form.

    Args:
        segmentation: the file's value; not None.
        size_hw: (H, W) of the image; infinite where it is not stated.

    Returns:
        The outline, or None when it encloses nothing (no polygon, only degenerate ones, an RLE without a pixel); and
        the number of polygons left out because they have fewer than 3 points or no area.

    Raises:
        BadSegmentationError: the value is of none of the three kinds, holds a value that is not a finite number, or is
            an RLE of another size than the image. The counts of a compressed RLE are not fully checked; decoders check
            them.
    """
    if isinstance(segmentation, list):
        kept = tuple(polygon for polygon in map(_polygon, segmentation) if _has_area(polygon))
        return kept or None, len(segmentation) - len(kept)
    counts = _rle(segmentation, size_hw)
    return (counts if int(coco_mask.area({"size": segmentation["size"], "counts": counts})) > 0 else None), 0


def proper_polygons(segmentation: list[Any]) -> list[Any]:
    """Select the polygons with at least 3 points and an area, as the file states them.

    Args:
        segmentation: a list that `read_outline` accepts.
    """
    return [values for values in segmentation if _has_area(_polygon(values))]


def _has_area(polygon: NDArray[np.float64]) -> bool:
    return abs(_signed_area(polygon)) > _NO_AREA


def _polygon(values: Any) -> NDArray[np.float64]:
    if not isinstance(values, list) or len(values) % 2 or not all(map(is_number, values)):
        raise BadSegmentationError("a polygon is not a list of x, y, x, y, …")
    polygon = np.array([as_float(value) for value in values], np.float64)
    if not np.isfinite(polygon).all():
        raise BadSegmentationError("a polygon holds a number that is not finite")
    return polygon


def _signed_area(polygon: NDArray[np.float64]) -> float:
    """Shoelace formula; 0 for fewer than 3 points."""
    if len(polygon) < 6:
        return 0.0
    # Relative to the first point, so that no precision is lost far from the origin.
    x, y = polygon[0::2] - polygon[0], polygon[1::2] - polygon[1]
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2


def _rle(segmentation: Any, size_hw: tuple[float, float]) -> bytes:
    """Counts of a compressed RLE that are safe to pass to pycocotools."""
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise BadSegmentationError("neither polygons nor an RLE with a size")
    if size[0] * size[1] > _MAX_PIXELS:
        raise BadSegmentationError(f"an RLE of {size[0]} × {size[1]} has more than {_MAX_PIXELS} pixels")
    if any(side != stated for side, stated in zip(size, size_hw, strict=True) if np.isfinite(stated)):
        raise BadSegmentationError(f"an RLE of {size[0]} × {size[1]} does not have the size of the image")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        return _checked_text(counts)
    pixels = size[0] * size[1]
    if (
        not isinstance(counts, list)
        or not all(type(run) is int and 0 <= run <= pixels for run in counts)
        or sum(counts) != pixels
    ):
        raise BadSegmentationError(f"the runs of an RLE do not add up to {size[0]} × {size[1]}")
    return bytes(coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"])


def _checked_text(counts: str) -> bytes:
    """Check that the last number of the text is complete; otherwise pycocotools reads beyond its end."""
    groups = np.frombuffer(counts.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if len(groups) == 0 or groups.min() < 0 or groups.max() > 0x3F or groups[-1] & 0x20:
        raise BadSegmentationError(f"{counts[:20]!r}… is not a compressed RLE")
    return counts.encode()
