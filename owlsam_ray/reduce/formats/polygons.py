"""Convert masks to polygons along their pixel borders; drawing the polygons gives the same pixels back.

Corners are whole pixels. The ring of a hole is joined to the ring around it by a zero-width cut, there and back,
between two nearby corners. Both fill rules, even-odd and winding, leave the hole open.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from owlsam_ray.reduce.formats.json_rows import column_of
from owlsam_ray.reduce.formats.loops import Rings, rings_of
from owlsam_ray.reduce.formats.text_rows import Piece, join_rows

cv2.setNumThreads(1)  # each worker has a core of its own

Ring = NDArray[np.int64]
"""(P, 2) x, y of the corners of a closed polygon, P ≥ 4."""


@dataclass(frozen=True, slots=True)
class Polygons:
    """Polygons of the annotations of a shard."""

    points: NDArray[np.int64]
    """(P, 2) x, y, polygon by polygon."""
    point_ends: NDArray[np.int64]
    """(R + 1,) start of each polygon in `points`, and the end of the last."""
    polygon_ends: NDArray[np.int64]
    """(N + 1,) start of each annotation's polygons among the R, and the end of the last; none without a mask or pixels.
    """
    pixels_off: int
    """Mask pixels that differ when pycocotools draws the polygons."""

    @property
    def has_polygon(self) -> NDArray[np.bool_]:
        """(N,) whether an annotation has a polygon."""
        return np.diff(self.polygon_ends) > 0

    def rows(self, points: pa.LargeStringArray) -> pa.LargeStringArray:
        """(N,) texts of the annotations, joined from the (P,) texts of their points."""
        offsets = np.frombuffer(points.buffers()[1], np.int64)[points.offset :][self.point_ends[self.polygon_ends]]
        return pa.LargeStringArray.from_buffers(
            len(offsets) - 1, pa.py_buffer(np.ascontiguousarray(offsets)), points.buffers()[2]
        )


def trace(annotations: pa.Table, *, join_parts: bool = False, check: bool = True) -> Polygons:
    """Trace the polygons of the masks of a shard.

    Args:
        annotations: (N rows) `ANNOTATION_SCHEMA`.
        join_parts: one polygon for each mask, its parts joined by cuts; else one for each part.
        check: draw them with pycocotools and count the pixels that differ, which takes about as long as the rest.
    """
    found: list[Ring] = []
    polygon_ends = np.zeros(annotations.num_rows + 1, np.int64)
    pixels_off = 0
    columns = (column_of(annotations, name).to_pylist() for name in ("rle_counts", "height", "width"))
    for row, (counts, height, width) in enumerate(zip(*columns, strict=True)):
        rings = None if counts is None else rings_of(counts, height)
        if rings is not None:
            polygons = _polygons(rings, join_parts=join_parts)
            pixels_off += _pixels_off(polygons, counts, height, width) if check else 0
            found += polygons
        polygon_ends[row + 1] = len(found)
    points = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
    point_ends = np.cumsum([0, *map(len, found)]).astype(np.int64)
    return Polygons(points, point_ends, polygon_ends, pixels_off)


def polygon_json(polygons: Polygons) -> pa.Array:
    """(N,) COCO's list of polygons, each a list of x, y, x, y, …; null where there is none."""
    starts = np.full(len(polygons.points), 2)  # for each point: which text precedes it
    starts[polygons.point_ends[:-1]] = 1
    starts[polygons.point_ends[polygons.polygon_ends[:-1][polygons.has_polygon]]] = 0
    ends = np.zeros(len(polygons.points), np.bool_)
    ends[polygons.point_ends[polygons.polygon_ends[1:][polygons.has_polygon]] - 1] = True
    pieces = [
        Piece("", pa.array(["[[", "], [", ", "], pa.string()).take(pa.array(starts))),
        Piece("", pa.array(np.ascontiguousarray(polygons.points[:, 0]))),
        Piece(", ", pa.array(np.ascontiguousarray(polygons.points[:, 1]))),
        Piece("", pa.array(["]]"], pa.string()).take(pa.array(np.zeros(len(ends), np.int32), mask=~ends))),
    ]
    rows = polygons.rows(join_rows(pieces, len(polygons.points)))
    return pc.if_else(pa.array(polygons.has_polygon), rows, pa.scalar(None, pa.large_string()))


def _polygons(rings: Rings, *, join_parts: bool) -> list[Ring]:
    parts = [rings.corners[start:end] for start, end in zip(rings.ends[:-1], rings.ends[1:], strict=True)]
    if len(parts) == 1:
        return parts
    if join_parts or np.count_nonzero(~rings.is_hole) == 1:
        return [_joined(parts)]
    if not rings.is_hole.any():
        return parts
    _, labels = cv2.connectedComponents(rings.pixels, connectivity=8)
    part_of = labels[rings.starts[:, 1], rings.starts[:, 0]]
    # In row order, the outer ring of a part comes before its holes.
    order = [int(part_of[ring]) for ring in np.flatnonzero(~rings.is_hole)]
    return [_joined([parts[ring] for ring in np.flatnonzero(part_of == part)]) for part in order]


def _joined(rings: list[Ring]) -> Ring:
    """Join rings into one: each further ring is entered and left by a short cut between two nearby corners."""
    whole = rings[0]
    for ring in rings[1:]:
        own = _nearest(ring, whole[_nearest(whole, ring[0])])
        near = _nearest(whole, ring[own])
        whole = np.concatenate([whole[: near + 1], ring[own:], ring[: own + 1], whole[near:]])
    return whole


def _nearest(ring: Ring, point: NDArray[np.int64]) -> int:
    return int(((ring - point) ** 2).sum(axis=1).argmin())


def _pixels_off(polygons: list[Ring], counts: bytes, height: int, width: int) -> int:
    """Count the pixels that are in the mask or in the polygons, but not in both."""
    drawn = coco_mask.merge(coco_mask.frPyObjects([ring.ravel().tolist() for ring in polygons], height, width))
    if drawn["counts"] == counts:
        return 0
    mask = {"size": [height, width], "counts": counts}
    both = coco_mask.area(coco_mask.merge([drawn, mask], intersect=True))
    return int(coco_mask.area(drawn)) + int(coco_mask.area(mask)) - 2 * int(both)
