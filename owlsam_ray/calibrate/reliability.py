"""Compute reliability curves: the fraction of correct detections in each bin of scores."""

from typing import Any

import numpy as np

from owlsam_ray.calibrate.curves import wilson
from owlsam_ray.calibrate.samples import Sample

BINS = 10
"""Number of bins of equal width between 0 and 1; a bin includes its upper end."""


def reliability(sample: Sample) -> dict[str, Any]:
    """Return the curve of a sample as JSON values.

    Returns:
        `bins`, without empty ones, by ascending score: `low`, `high`, `count`, `mean_score`, `precision`,
        `precision_interval` (Wilson). `ece`: the mean difference between score and precision of the bins, weighted by
        the number of detections; None without any.
    """
    score = sample.score.astype(np.float64)
    place = np.clip(np.ceil(score * BINS).astype(np.int64) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS).astype(np.float64)
    total = np.bincount(place, weights=score, minlength=BINS)
    right = np.bincount(place, weights=sample.right, minlength=BINS)
    filled = np.flatnonzero(count)
    precision, mean = right[filled] / count[filled], total[filled] / count[filled]
    lows, highs = wilson(precision, count[filled])
    bins = [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "count": int(count[number]),
            "mean_score": float(mean[at]),
            "precision": float(precision[at]),
            "precision_interval": [float(lows[at]), float(highs[at])],
        }
        for at, number in enumerate(filled.tolist())
    ]
    gap = float(np.abs(mean - precision) @ count[filled] / len(score)) if bins else None
    return {"ece": gap, "bins": bins}
