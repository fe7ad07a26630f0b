"""Convert object sides in pixels to ranges of box areas."""

from collections.abc import Sequence
from itertools import pairwise

ALL = "all"
"""Every size; also the group of all categories."""
EVERYTHING = 1e10
"""Upper limit of areas in COCO's evaluators."""


def size_ranges(edges_px: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Return half-open ranges of w × h by label: `all`, then `<32`, `32-96`, `>=96` for the edges (32, 96).

    Args:
        edges_px: ascending sides in pixels; without any, there is only `all`.
    """
    ranges = {ALL: (0.0, EVERYTHING)}
    bounds = [0.0, *(edge * edge for edge in edges_px), EVERYTHING]
    names = [f"{edge:g}" for edge in edges_px]
    if names:
        middle = [f"{low}-{high}" for low, high in pairwise(names)]
        labels = [f"<{names[0]}", *middle, f">={names[-1]}"]
        ranges |= dict(zip(labels, pairwise(bounds), strict=True))
    return ranges
