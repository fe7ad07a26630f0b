"""Validates boxes and segmentations of COCO files before any C code sees them."""

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

from pycocotools import mask as coco_mask

from owlsam_ray.ops.rle import rle_runs

Rle = dict[str, Any]
"""{"size": [H, W], "counts": compressed bytes}, column-major."""

_FAR = 1e6
"""Pixels. Polygons with a larger coordinate are refused: their edges are walked in steps of a fifth of a pixel."""


class NoOutlineError(ValueError):
    """A segmentation that is well formed but encloses nothing: it has no polygon of three or more points."""


@dataclass(frozen=True, slots=True)
class Region:
    """A ground truth object or a prediction."""

    image_id: int
    category_id: int
    box_xywh: tuple[float, float, float, float]
    """Original pixels."""
    area: float
    """Area by which COCO assigns small, medium and large."""
    rle: Rle | None
    """None where masks are not compared, or where the region has none."""
    score: float = 1.0
    is_crowd: bool = False
    """A region of many objects: predictions inside it count as neither right nor wrong."""

    @property
    def box_area(self) -> float:
        """Width × height of the box; an object's side in pixels is the square root."""
        return self.box_xywh[2] * self.box_xywh[3]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def box_of(value: object) -> tuple[float, float, float, float]:
    """Validate COCO's [x, y, w, h].

    Raises:
        ValueError: it is invalid; says why.
    """
    if not isinstance(value, list) or len(value) != 4 or not all(is_number(number) for number in value):
        raise ValueError(f"bbox {_short(value)} is not four finite numbers")
    x, y, width, height = (float(number) for number in value)
    if width < 0 or height < 0:
        raise ValueError(f"bbox {_short(value)} has a negative side")
    return (x, y, width, height)


def rle_of(segmentation: object, size_hw: tuple[int, int] | None) -> Rle:
    """Convert polygons, uncompressed or compressed RLE to compressed RLE of the image's size.

    Args:
        segmentation: as in a COCO file. Polygons of fewer than three points cover nothing and are left out.
        size_hw: (H, W) of the image.

    Raises:
        NoOutlineError: it has no polygon of three or more points.
        ValueError: it is invalid in another way; says why.

    Source: pycocotools' `COCO.annToRLE`.
    """
    if size_hw is None:
        raise ValueError("masks need the height and width of its image, which the ground truth does not state")
    if isinstance(segmentation, list):
        return _from_polygons(segmentation, size_hw)
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise ValueError(f"segmentation {_short(segmentation)} is neither polygons nor RLE")
    if segmentation["size"] != list(size_hw):
        raise ValueError(f"its mask has the size {segmentation['size']}, its image {list(size_hw)}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return _from_runs(counts, size_hw)
    if not isinstance(counts, str) or not counts.isascii():
        raise ValueError(f"RLE counts {_short(counts)} are neither a text nor a list")
    runs = rle_runs(counts.encode("ascii"))
    if (runs < 0).any() or int(runs.sum()) != size_hw[0] * size_hw[1]:
        raise ValueError(f"RLE of {len(counts)} characters does not describe a mask of {size_hw[0]}×{size_hw[1]}")
    return {"size": list(size_hw), "counts": counts.encode("ascii")}


def _from_polygons(polygons: list[Any], size_hw: tuple[int, int]) -> Rle:
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(is_number(number) for number in polygon):
            raise ValueError(f"polygon {_short(polygon)} is not an even number of finite coordinates")
        if any(abs(number) > _FAR for number in polygon):
            raise ValueError(f"polygon {_short(polygon)} has a coordinate beyond {_FAR:.0f} pixels")
    closed = [polygon for polygon in polygons if len(polygon) >= 6]
    if not closed:
        raise NoOutlineError("segmentation holds no polygon of three or more points")
    rle: Rle = coco_mask.merge(coco_mask.frPyObjects(closed, *size_hw))
    return rle


def _from_runs(counts: list[Any], size_hw: tuple[int, int]) -> Rle:
    whole = all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in counts)
    if not whole or sum(counts) != size_hw[0] * size_hw[1]:
        raise ValueError(f"RLE of {len(counts)} runs does not describe a mask of {size_hw[0]}×{size_hw[1]}")
    rle: Rle = coco_mask.frPyObjects({"size": list(size_hw), "counts": counts}, *size_hw)
    return rle


def rle_area(rle: Rle) -> float:
    """Number of pixels of a mask."""
    return float(coco_mask.area(rle))


def rle_box(rle: Rle) -> tuple[float, float, float, float]:
    """[x, y, w, h] of the smallest box around a mask; zeros when it is empty."""
    x, y, width, height = (float(number) for number in coco_mask.toBbox(rle))
    return (x, y, width, height)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:50] + "…"
