"""COCO's compressed RLE read as numbers, without drawing a mask: of one mask, or of many at once.

Letters: N masks. A number is stored in groups of five bits, the lowest first: byte = 48 + bits + 32 if more follow,
two's complement. From the fourth number on it is the difference to the one two places before.
"""

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.ops.compiled import rle_sums

_MOST_GROUPS = 8
"""Longest number that is taken for a run: 40 bits."""


def rle_runs(counts: bytes) -> NDArray[np.int64]:
    """Lengths of the runs of a compressed RLE, zeros first, without drawing the mask.

    Raises:
        ValueError: the text is no compressed RLE.
    """
    groups = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if len(groups) == 0:
        return np.zeros(0, np.int64)
    last = (groups & 0x20) == 0
    if (groups < 0).any() or (groups > 0x3F).any() or not last[-1]:
        raise ValueError(f"{counts[:20]!r}… is no compressed RLE")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff(np.append(starts, len(groups)))
    if lengths.max() > _MOST_GROUPS:
        raise ValueError(f"{counts[:20]!r}… is no compressed RLE: a run of more than 40 bits")
    places = np.arange(len(groups)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((groups & 0x1F) << (5 * places), starts)
    runs -= np.where(groups[last] & 0x10, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def rle_areas(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pixels of many compressed RLEs: what `rle_runs` gives for each, summed, at a hundredth of the time.

    Args:
        data: the texts, one behind the other.
        offsets: (N + 1,) where each begins, and where the last one ends.

    Returns:
        (N, 2): all pixels, and those of the mask; -1 in both where the text is no compressed RLE, or a run is negative.
    """
    return rle_sums(data, offsets)
