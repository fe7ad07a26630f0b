"""Choose annotations for review: some of each category and score bin, or the least certain of each category.

Ties are broken by a hash of the id and a seed, so the choice is the same for any number of workers and any order. A
smaller sample is contained in a larger one.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SampleBy = Literal["score", "uncertain", "predicted_iou", "stability"]


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """Which annotations a review list holds."""

    by: SampleBy = "score"
    """`score`: equally many from each score bin of each category; `uncertain`: those nearest to the category's
    threshold; `predicted_iou`, `stability`: the lowest, among those with a mask."""
    per_cell: int = 10
    """Annotations for each category and score bin, or for each category."""
    bins: int = 10
    """Number of score bins, equally wide between 0 and 1."""
    whole_images: bool = False
    """List all annotations of the images that hold a chosen one."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Picks:
    """N candidates."""

    cell: NDArray[np.int64]
    key: NDArray[np.float64]
    """(N,) sort key; in each cell the smallest come first."""
    hash: NDArray[np.uint64]
    """(N,) breaks ties between equal keys."""
    id: NDArray[np.int64]
    shard: NDArray[np.int64]

    @staticmethod
    def joined(parts: "list[Picks]") -> "Picks":
        """Concatenate several."""
        kinds = (np.int64, np.float64, np.uint64, np.int64, np.int64)
        return Picks(
            *(
                np.concatenate([*(getattr(part, name) for part in parts), np.zeros(0, kind)])
                for name, kind in zip(Picks.__slots__, kinds, strict=True)
            )
        )

    def first(self, per_cell: int) -> "Picks":
        """Keep the first `per_cell` of each cell, ordered by cell."""
        order = np.lexsort((self.id, self.hash, self.key, self.cell))
        cell = self.cell[order]
        starts = np.flatnonzero(np.diff(cell, prepend=-1))
        rank = np.arange(len(cell)) - np.repeat(starts, np.diff(np.append(starts, len(cell))))
        return Picks(*(getattr(self, name)[order[rank < per_cell]] for name in self.__slots__))

    def __len__(self) -> int:
        return len(self.id)


def pick(annotations: pa.Table, shard: int, options: SampleOptions, thresholds: NDArray[np.float64]) -> Picks:
    """Choose candidates from a shard; annotations drawn or changed by reviewers are excluded.

    Args:
        annotations: (N rows) `ANNOTATION_SCHEMA`, without annotations that reviewers confirmed.
        shard: number of the shard.
        options: which annotations to choose.
        thresholds: (L,) score threshold of each label of the run; not finite: no threshold.
    """
    wanted = ~annotations["corrected"].to_numpy()
    if options.by in ("predicted_iou", "stability"):
        wanted &= annotations[options.by].is_valid().to_numpy()
    table = annotations.filter(pa.array(wanted))
    score, ids = table["score"].to_numpy().astype(np.float64), table["id"].to_numpy()
    cell = table["category"].to_numpy().astype(np.int64)
    if options.by == "score":
        cell = cell * options.bins + score_bin(score, options.bins)
        key = np.zeros(len(ids))
    elif options.by == "uncertain":
        key = np.abs(score - _threshold_of(table, thresholds))
    else:
        key = table[options.by].to_numpy().astype(np.float64)
    shards = np.full(len(ids), shard, np.int64)
    return Picks(cell, key, mix(ids, options.seed), ids, shards).first(options.per_cell)


def score_bin(score: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """(N,) index among bins of equal width between 0 and 1; a score of 1 is in the last bin."""
    return np.clip((score * bins).astype(np.int64), 0, bins - 1)


def why(annotations: pa.Table, options: SampleOptions, thresholds: NDArray[np.float64]) -> list[str]:
    """(N,) the reason for choosing each of these annotations, as text."""
    score = annotations["score"].to_numpy().astype(np.float64)
    if options.by == "score":
        bins = score_bin(score, options.bins).tolist()
        return [f"score in {each / options.bins:.4g}–{(each + 1) / options.bins:.4g}" for each in bins]
    if options.by == "uncertain":
        limits = _threshold_of(annotations, thresholds).tolist()
        return [f"score {one - limit:.3g} from {limit:.4g}" for one, limit in zip(score.tolist(), limits, strict=True)]
    return [f"{options.by} {value:.3g}" for value in annotations[options.by].to_pylist()]


def _threshold_of(annotations: pa.Table, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    limits = thresholds[annotations["label"].to_numpy().astype(np.int64)]
    return np.where(np.isfinite(limits), limits, 0.0)


def mix(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """(N,) pseudo-random numbers, determined by each id and the seed.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014).
    """
    value = ids.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return value ^ (value >> np.uint64(31))
