"""Split large images into overlapping tiles, and merge the detections of tiles in the original frame.

Frames: a *view* is a part of the image in original pixels, half-open. The detector sees each view as a separate image,
so its boxes are relative to the view's top left corner.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np

from owlsam_ray.config.inference import TilingConfig
from owlsam_ray.records import Detections


class View(NamedTuple):
    """A part of an image in whole original pixels, half-open."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def size_hw(self) -> tuple[int, int]:
        """(H, W) of the view."""
        return self.y1 - self.y0, self.x1 - self.x0


def tile_views(size_hw: tuple[int, int], settings: TilingConfig) -> list[View]:
    """List the views of an image that the detector runs on, in order.

    Args:
        size_hw: (H, W) of the image.
        settings: tile size, minimum overlap, and whether to add the whole image.

    Returns:
        Only the whole image if tiling is off or the image fits in one tile; otherwise the whole image first (if
        requested), then the tiles row by row. All tiles have the full size (or the image's, if that is smaller) and are
        spaced evenly, so that none extends beyond the border.
    """
    height, width = size_hw
    whole = View(0, 0, width, height)
    if settings.size is None or max(size_hw) <= settings.size:
        return [whole]
    tiles = [
        View(x, y, min(x + settings.size, width), min(y + settings.size, height))
        for y in _starts(height, settings.size, settings.overlap)
        for x in _starts(width, settings.size, settings.overlap)
    ]
    return [whole, *tiles] if settings.full_image else tiles


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """First pixels of the tiles along one axis: the fewest tiles whose neighbours have at least the given overlap."""
    if length <= size:
        return [0]
    most = max(1, int(size * (1 - overlap)))  # the largest step
    steps = ceil((length - size) / most)
    return [(length - size) * step // steps for step in range(steps + 1)]


def merge_views(found: Sequence[Detections], views: Sequence[View], *, max_candidates: int) -> Detections:
    """Merge the detections of all views of one image, in the image's frame.

    Args:
        found: detections of each view by descending score, boxes relative to the view.
        views: the views, one for each entry of `found`.
        max_candidates: maximum number of detections; the best are kept.

    Returns:
        Detections by descending score; equal scores by view, then in the order of the view. No views give no
        detections.
    """
    if len(found) == 1 and views[0][:2] == (0, 0):
        return found[0]
    placed = [each.moved(np.array([view.x0, view.y0], np.float32)) for each, view in zip(found, views, strict=True)]
    together = Detections.concatenate(placed)
    return together.take(np.argsort(-together.scores, kind="stable")[:max_candidates])
