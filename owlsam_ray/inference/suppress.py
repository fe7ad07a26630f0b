"""Suppress or merge overlapping boxes of one object, or lower their scores (NMS, Soft-NMS, box merging).

Every strategy is greedy and works in rounds. A *group* is the boxes of one label, or all boxes with `across_labels`;
groups do not affect each other. In each group, a round picks the remaining box with the highest current score (ties:
the first in the input). The pick is final; the strategy decides what happens to the other boxes:

- `nms`: boxes whose overlap with the pick is greater than the threshold are removed.
- `soft_nms`: every remaining score is multiplied by exp(-overlap² / sigma), or (linear) by 1 - overlap if the overlap
  is greater than the threshold. Boxes whose score falls to `score_floor` or less in this way are removed.
- `merge`: boxes whose overlap with the pick is greater than the threshold are merged into it. The pick's box becomes
  the mean of the boxes of all members (itself included), weighted by their scores; its score, raw score, label and
  prompt do not change.

Overlaps are IoU or IoS of the input boxes, in float64. The threshold is the one of the group's label.

No loop visits boxes or labels one by one. Boxes that can no longer affect each other advance together, within a group
too: memory grows with the number of overlapping pairs, time with the longest chain of dependent decisions.

Source of Soft-NMS: Bodla et al., 2017.
"""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from owlsam_ray.config.inference import SuppressConfig
from owlsam_ray.errors import InputError, shown
from owlsam_ray.ops.boxes import concatenated_ranges, overlapping_pairs, pair_overlaps
from owlsam_ray.records import Detections

_ROUND_COST = 5000
"""Overhead of a round, expressed as a number of box pairs to compare."""


def label_thresholds(settings: SuppressConfig, names: Sequence[str]) -> NDArray[np.float64]:
    """Return the threshold of every category.

    Args:
        settings: the common threshold, and thresholds per category.
        names: (L,) category names in the order of their indices.

    Returns:
        (L,) float64.

    Raises:
        InputError: `thresholds` names something that is not a category.
    """
    unknown = [name for name in settings.thresholds if name not in set(names)]
    if unknown:
        hints = "; ".join(_hint(name, names) for name in unknown)
        raise InputError(f"suppress.thresholds names unknown categories: {hints}")
    return np.array([settings.thresholds.get(name, settings.common_threshold) for name in names], np.float64)


def _hint(unknown: str, names: Sequence[str]) -> str:
    """An unknown name, with suggestions."""
    near = difflib.get_close_matches(unknown, names)
    if near:
        return f"{shown(unknown)} (did you mean {' or '.join(map(repr, near))}?)"
    some = ", ".join(map(repr, names[:5]))
    return f"{shown(unknown)} (there are {some}{', …' if len(names) > 5 else ''})"


def suppress(
    detections: Detections,
    settings: SuppressConfig,
    *,
    thresholds: NDArray[np.float64] | None = None,
    score_floor: float = 0.0,
) -> Detections:
    """Apply the strategy of the settings, as defined in the module docstring.

    Args:
        detections: detections of one image by descending score; no NaN.
        settings: strategy, overlap, threshold, groups, decay.
        thresholds: (L,) thresholds from `label_thresholds`, covering every label that occurs; default: the threshold of
            the settings for every label.
        score_floor: decayed scores must stay greater than this.

    Returns:
        Detections by descending score; equal scores in input order. `soft_nms` decays scores in float64 and rounds them
        to float32 at the end; all ordering, including that of the result, uses the float64 values. Raw scores do not
        change. `merge` sums `num_merged`; its boxes are averaged in float64, in input order, and rounded to float32.
        Empty input gives empty output.
    """
    if settings.thresholds and thresholds is None:
        raise ValueError("settings with thresholds per category need the thresholds of label_thresholds")
    if settings.strategy == "none" or len(detections) == 0:
        return detections
    if thresholds is None:
        limits = np.full(len(detections), settings.common_threshold)
    else:
        limits = thresholds[detections.labels]
    groups = np.zeros_like(detections.labels)
    if not settings.across_labels:
        _, groups = np.unique(detections.labels, return_inverse=True)
    if settings.strategy == "soft_nms":
        return _soft_nms(detections, _decays(detections, groups, limits, settings), score_floor)
    owners = _owners(detections.boxes_xyxy, groups, limits, settings.overlap)
    if settings.strategy == "nms":
        return detections.take(np.flatnonzero(owners == np.arange(len(owners))))
    return _merge(detections, owners)


def _owners(
    boxes_xyxy: NDArray[np.float32],
    groups: NDArray[np.int64],
    limits: NDArray[np.float64],
    kind: Literal["iou", "ios"],
) -> NDArray[np.int64]:
    """(N,) index of the pick that suppresses each box; a pick is its own owner."""
    owners = np.arange(len(boxes_xyxy))
    # Run literal rounds while each removes many boxes: dense crowds have too many pairs.
    undecided = np.argsort(groups, kind="stable")
    while len(undecided):
        starts = np.flatnonzero(np.diff(groups[undecided], prepend=-1))
        picks = np.repeat(undecided[starts], np.diff(starts, append=len(undecided)))
        goes = pair_overlaps(boxes_xyxy[undecided], boxes_xyxy[picks], kind) > limits[picks]
        owners[undecided[goes]] = picks[goes]
        goes[starts] = True
        num_suppressed = goes.sum() - len(starts)
        undecided, before = undecided[~goes], len(undecided)
        if num_suppressed * before < _ROUND_COST:
            break
    if len(undecided) < 2:
        return owners
    undecided.sort()
    first, second, _ = overlapping_pairs(boxes_xyxy[undecided], groups[undecided], kind, above=limits[undecided])
    owners[undecided] = undecided[_owners_of_pairs(first, second, len(undecided))]
    return owners


def _owners_of_pairs(first: NDArray[np.int64], second: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(N,) owners as in `_owners`, from (E,) pairs that overlap too much; first < second, and first is the better box.

    A box that no better undecided box overlaps is picked whatever happens elsewhere. All such boxes are picked at once,
    and the boxes that they overlap are removed.
    """
    kept = np.ones(count, np.bool_)
    better, worse = first, second
    while len(better):
        picked = np.ones(count, np.bool_)
        picked[worse] = False
        kept[worse[picked[better]]] = False
        undecided = kept[better] & kept[worse]
        better, worse = better[undecided], worse[undecided]
    # A removed box belongs to the best kept box that overlaps it, because that one was picked first.
    owners = np.where(kept, np.arange(count), count)
    joins = kept[first] & ~kept[second]
    np.minimum.at(owners, second[joins], first[joins])
    return owners


def _merge(detections: Detections, owners: NDArray[np.int64]) -> Detections:
    """Merge each pick and the boxes it owns into one box."""
    picks = np.flatnonzero(owners == np.arange(len(owners)))
    result = detections.take(picks)
    weights = detections.scores.astype(np.float64)
    totals = np.bincount(owners, weights)[picks]
    columns = detections.boxes_xyxy.astype(np.float64).T
    sums = np.stack([np.bincount(owners, weights * column)[picks] for column in columns], axis=1)
    # If all members score 0, the box stays as it is.
    means = np.divide(sums, totals[:, None], out=result.boxes_xyxy.astype(np.float64), where=totals[:, None] > 0)
    num_merged = np.bincount(owners, detections.num_merged)[picks].astype(np.int64)
    return replace(result, boxes_xyxy=means.astype(np.float32), num_merged=num_merged)


class _Decays(NamedTuple):
    """Decay factors between boxes, as an (N, N) CSR matrix with E entries."""

    starts: NDArray[np.int32]
    """(N + 1,) offset of each pick's first entry."""
    others: NDArray[np.int32]
    """(E,) index of the box whose score is multiplied."""
    factors: NDArray[np.float64]
    """(E,) factor it is multiplied by."""
    clusters: NDArray[np.int32]
    """(N,) cluster number of each box; overlaps never connect boxes of different clusters, not even indirectly."""


def _decays(
    detections: Detections, groups: NDArray[np.int64], limits: NDArray[np.float64], settings: SuppressConfig
) -> _Decays:
    """Compute the factors of all pairs, in both directions."""
    count = len(detections)
    above = limits if settings.decay == "linear" else np.zeros(count)
    first, second, overlap = overlapping_pairs(detections.boxes_xyxy, groups, settings.overlap, above=above)
    ends = (np.concatenate([first, second]), np.concatenate([second, first]))
    pairs = coo_array((np.concatenate([overlap, overlap]), ends), shape=(count, count))
    pairs.has_canonical_format = True  # pairs are unique: no need to sort and sum duplicates
    graph = pairs.tocsr()
    _, clusters = connected_components(graph, connection="strong")  # all edges are bidirectional; "weak" is slower
    if settings.decay == "linear":
        factors = 1.0 - graph.data
    else:
        with np.errstate(over="ignore"):  # for tiny sigmas: exp(-inf) = 0 is intended
            factors = np.exp(-(graph.data * graph.data) / settings.decay_sigma)
    return _Decays(graph.indptr, graph.indices, factors, clusters)


def _soft_nms(detections: Detections, decays: _Decays, score_floor: float) -> Detections:
    """Apply Soft-NMS; each round picks the best box of every cluster (a cluster never exceeds a group)."""
    starts, others, factors, clusters = decays
    scores = detections.scores.astype(np.float64)
    gone = np.zeros(len(scores), np.bool_)
    # Remaining boxes by cluster, then in input order; boxes that overlap nothing are already final.
    remaining = np.argsort(clusters, kind="stable")
    remaining = remaining[np.diff(starts)[remaining] > 0]
    is_open = np.zeros(len(scores), np.bool_)
    is_open[remaining] = True
    while len(remaining):
        picks = remaining[_first_maxima(scores[remaining], clusters[remaining])]
        is_open[picks] = False
        entries = concatenated_ranges(starts[picks], starts[picks + 1] - starts[picks])
        entries = entries[is_open[others[entries]] & (factors[entries] < 1)]
        hit = others[entries]
        scores[hit] *= factors[entries]  # no box is hit twice: the picks are in different clusters
        fallen = hit[scores[hit] <= score_floor]
        gone[fallen], is_open[fallen] = True, False
        remaining = remaining[is_open[remaining]]
    index = np.flatnonzero(~gone)
    index = index[np.argsort(-scores[index], kind="stable")]
    return replace(detections.take(index), scores=scores[index].astype(np.float32))


def _first_maxima(values: NDArray[np.float64], segments: NDArray[np.int32]) -> NDArray[np.int64]:
    """(S,) index of the highest value of each segment (ties: the first); segments are contiguous."""
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    if len(starts) == 1:
        return np.array([values.argmax()])
    highest = np.repeat(np.maximum.reduceat(values, starts), np.diff(starts, append=len(values)))
    maxima = np.flatnonzero(values == highest)
    return maxima[np.flatnonzero(np.diff(segments[maxima], prepend=-1))]
