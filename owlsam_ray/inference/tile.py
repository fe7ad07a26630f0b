"""Large images → overlapping tiles, and the detections of tiles → one list in the original frame.

Frames: a *view* is a part of the picture in original pixels, half-open; the detector sees each view as a picture of its
own, so its boxes are relative to the view's top left corner.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np

from owlsam_ray.config.settings import TilingConfig
from owlsam_ray.records import Detections


class View(NamedTuple):
    """A part of a picture: whole original pixels, half-open."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def size_hw(self) -> tuple[int, int]:
        """(H, W) of the part."""
        return self.y1 - self.y0, self.x1 - self.x0


def tile_views(size_hw: tuple[int, int], settings: TilingConfig) -> list[View]:
    """What the detector looks at, one after another.

    Args:
        size_hw: (H, W) of the picture.
        settings: tile size, least overlap, and whether the whole picture is looked at too.

    Returns:
        Only the whole picture when there are no tiles or when it fits one; else the whole one first (if asked for),
        then the tiles row by row. All tiles have the full size (or the picture's, where that is less) and are spread
        evenly, so that none hangs over the border.
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
    """First pixels of the fewest tiles along one axis whose neighbours share at least the overlap."""
    if length <= size:
        return [0]
    most = max(1, int(size * (1 - overlap)))  # the farthest step
    steps = ceil((length - size) / most)
    return [(length - size) * step // steps for step in range(steps + 1)]


def merge_views(found: Sequence[Detections], views: Sequence[View], *, max_candidates: int) -> Detections:
    """Detections of the views of one picture, in its own frame.

    Args:
        found: of each view, boxes relative to it, by falling score.
        views: as many.
        max_candidates: the best that are kept.

    Returns:
        By falling score; equal scores by view, then as they stood there. No view, no detection.
    """
    if len(found) == 1 and views[0][:2] == (0, 0):
        return found[0]
    placed = [each.moved(np.array([view.x0, view.y0], np.float32)) for each, view in zip(found, views, strict=True)]
    together = Detections.concatenate(placed)
    return together.take(np.argsort(-together.scores, kind="stable")[:max_candidates])
