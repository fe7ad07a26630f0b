"""Estimate by resampling images how much thresholds, precision and recall would differ on other images.

All categories share the resamples. Shapes: B resamples, I images, G cuts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from owlsam_ray.calibrate.curves import CONFIDENCE, NOTHING, CurveCounts, Cuts, Target, blended, choose, cuts_of
from owlsam_ray.calibrate.pooling import GRID, Basis
from owlsam_ray.calibrate.samples import Sample

Floats = NDArray[np.float64]
_AT_ONCE = 2**23
"""Most entries of the matrix of how often each image is drawn."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentile intervals (low, high) of one category over the resamples; None where no resample defines the value."""

    threshold: tuple[float, float]
    precision: tuple[float, float] | None
    """Precision above the chosen threshold."""
    recall: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class _Bins:
    """A sample as the number of detections of each image between successive cuts."""

    right: csr_array
    """(G, I) right detections; `found` has all detections."""
    found: csr_array
    objects: NDArray[np.float64]
    """(I,) objects of each image."""

    @staticmethod
    def of(sample: Sample, cuts: Cuts, num_images: int) -> "_Bins":
        bins = np.searchsorted(-cuts.lowest, -sample.score.astype(np.float64))
        shape = (len(cuts.lowest), num_images)

        def matrix(chosen: NDArray[np.bool_]) -> csr_array:
            entries = (np.ones(int(chosen.sum())), (bins[chosen], sample.image[chosen]))
            return csr_array(entries, shape=shape)

        return _Bins(
            matrix(sample.right),
            matrix(np.ones(len(bins), np.bool_)),
            np.bincount(sample.object_image, minlength=num_images).astype(np.float64),
        )

    def counts(self, times: Floats) -> CurveCounts:
        """Count detections above each cut, (B, G), when images are repeated as often as `times`, (I, B), says."""
        right, found = (np.cumsum((side @ times).T, axis=1) for side in (self.right, self.found))
        return CurveCounts.plain(right, found, (self.objects @ times)[:, None])


def spreads(
    chosen: Sequence[tuple[Basis, int]], target: Target, *, num_images: int, resamples: int, seed: int
) -> list[Spread]:
    """Compute the intervals of each category.

    Args:
        chosen: for each category, what its threshold was chosen from, and the chosen cut.
        target: target of the choice, which is repeated in each resample.
        num_images: number of images of the samples.
        resamples: number of resamples; each draws `num_images` images with replacement.
        seed: seed of the draws.

    There are at most a few hundred cuts, so the threshold's interval has no finer steps.
    """
    prepared = [_prepare(basis, cut, num_images) for basis, cut in chosen]
    pools = {basis.pool.name: basis.pool for basis, _ in chosen if basis.pool is not None}
    pool_bins = {name: _Bins.of(pool.sample, pool.cuts, num_images) for name, pool in pools.items()}
    parts: list[list[tuple[NDArray[np.int64], Floats, Floats]]] = [[] for _ in chosen]
    for times in _draws(num_images, resamples, seed):
        of_pools = {name: bins.counts(times) for name, bins in pool_bins.items()}
        for part, (basis, _), (_, bins, place) in zip(parts, chosen, prepared, strict=True):
            counts = bins.counts(times)
            if basis.pool is not None:
                counts = blended(counts, of_pools[basis.pool.name], basis.weight)
            part.append(_resampled(counts, place, target))
    return [
        _spread(cuts, *(np.concatenate(column) for column in zip(*part, strict=True)))
        for part, (cuts, _, _) in zip(parts, prepared, strict=True)
    ]


def _prepare(basis: Basis, cut: int, num_images: int) -> tuple[Cuts, _Bins, int]:
    """Thin out the cuts, keeping the chosen one; return them, the counts between them, and the chosen cut's index."""
    cuts = basis.cuts
    if basis.pool is None and len(cuts.lowest) > GRID:
        few = cuts_of(basis.sample.score, cuts.floor, GRID)
        places = np.searchsorted(-cuts.lowest, -few.lowest)
        places = np.unique(np.append(places, cut) if cut != NOTHING else places)
        if cut != NOTHING:
            cut = int(np.searchsorted(places, cut))
        cuts = Cuts(cuts.lowest[places], cuts.below[places], cuts.floor)
    return cuts, _Bins.of(basis.sample, cuts, num_images), cut


def _draws(num_images: int, resamples: int, seed: int) -> Iterator[Floats]:
    """(I, part of B) how often each image is drawn."""
    random = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // num_images)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = random.integers(num_images, size=(count, num_images))
        flat = (drawn + np.arange(count)[:, None] * num_images).ravel()
        yield np.bincount(flat, minlength=count * num_images).reshape(count, num_images).T.astype(np.float64)


def _resampled(counts: CurveCounts, place: int, target: Target) -> tuple[NDArray[np.int64], Floats, Floats]:
    """(B,) the cut that each resample chooses; precision and recall above `place`, NaN where not defined."""
    size = len(counts.right)
    if counts.right.shape[1] == 0:
        return np.full(size, NOTHING), np.full(size, np.nan), np.full(size, np.nan)
    cut, _ = choose(counts, target)
    has_object = counts.objects[:, 0] > 0
    if place == NOTHING:
        return cut, np.full(size, np.nan), np.where(has_object, 0.0, np.nan)
    precision = np.where(counts.found[:, place] > 0, counts.precision[:, place], np.nan)
    return cut, precision, np.where(has_object, counts.recall[:, place], np.nan)


def _spread(cuts: Cuts, chosen: NDArray[np.int64], precision: Floats, recall: Floats) -> Spread:
    low, high = np.quantile(chosen, _ENDS, method="inverted_cdf")
    return Spread((cuts.threshold(int(high)), cuts.threshold(int(low))), _ends(precision), _ends(recall))


def _ends(values: Floats) -> tuple[float, float] | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, _ENDS)
    return float(low), float(high)


_ENDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
