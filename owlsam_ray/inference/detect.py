"""Scores of every box and query → the detections worth keeping.

Letters: P proposed boxes, Q queries, L labels that are asked for, N detections.
"""

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.config.settings import DetectorConfig
from owlsam_ray.errors import ImageError
from owlsam_ray.ops.boxes import clip_boxes, has_area
from owlsam_ray.records import Detections


def select_detections(
    boxes_xyxy: NDArray[np.float32],
    scores: NDArray[np.float32],
    *,
    size_hw: tuple[int, int],
    query_labels: NDArray[np.int64],
    settings: DetectorConfig,
) -> Detections:
    """Keep what scores above the floor.

    A box has at most one detection per label, at the label's best query; of equal ones the first counts.

    Args:
        boxes_xyxy: (P, 4) original pixels.
        scores: (P, Q) in [0, 1].
        size_hw: (H, W) of the picture.
        query_labels: (Q,) category index of each query; the queries of one label stand side by side.
        settings: floor, multi-label or best label, clipping, cap.

    Returns:
        At most `max_candidates` detections by falling score; equal scores by rising box, then query. Of equal best
        labels of one box the first counts.

    Raises:
        ImageError: the detector gave NaN or infinite values.
    """
    if not (np.isfinite(boxes_xyxy).all() and np.isfinite(scores).all()):
        raise ImageError("non_finite: the detector gave NaN or infinite values")
    if settings.clip_boxes:
        boxes_xyxy = clip_boxes(boxes_xyxy, size_hw)
        usable = has_area(boxes_xyxy)
    else:
        usable = np.ones(len(boxes_xyxy), np.bool_)

    # The first query of each label; as many as queries where every label has one.
    starts = np.flatnonzero(np.diff(query_labels, prepend=-1))  # (L,)
    by_label = scores if len(starts) == len(query_labels) else np.maximum.reduceat(scores, starts, axis=1)  # (P, L)
    if settings.labels == "best":
        best_labels = by_label.argmax(axis=1)
        best = by_label[np.arange(len(scores)), best_labels]
        box_ids = np.flatnonzero((best > settings.score_floor) & usable)
        label_ids, values = best_labels[box_ids], best[box_ids]
    else:
        box_ids, label_ids = np.nonzero((by_label > settings.score_floor) & usable[:, None])
        values = by_label[box_ids, label_ids]
    # A stable sort of what is ordered by box and label already: ties keep that order, which is the queries' too.
    order = np.argsort(-values, kind="stable")[: settings.max_candidates]
    box_ids, label_ids, values = box_ids[order], label_ids[order], values[order]
    query_ids = _winners(scores, starts, box_ids, label_ids)
    return Detections(
        boxes_xyxy=boxes_xyxy[box_ids],
        scores=values,
        raw_scores=values,
        labels=query_labels[query_ids],
        prompt_ids=query_ids,
        num_merged=np.ones(len(values), np.int64),
    )


def _winners(
    scores: NDArray[np.float32], starts: NDArray[np.int64], box_ids: NDArray[np.int64], label_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(N,) the best query, the first of equal ones, of the label that starts at `starts[label_ids]`."""
    lengths = np.diff(starts, append=scores.shape[1])[label_ids]
    winners = starts[label_ids]
    best = scores[box_ids, winners]
    for offset in range(1, int(lengths.max(initial=1))):
        # Past the end of its label, a detection looks at its first query again, which never beats itself.
        rivals = starts[label_ids] + np.where(offset < lengths, offset, 0)
        better = scores[box_ids, rivals] > best
        winners, best = np.where(better, rivals, winners), np.maximum(best, scores[box_ids, rivals])
    return winners.astype(np.int64)


def cap_detections(detections: Detections, max_detections: int) -> Detections:
    """The best `max_detections` of detections that are ordered by falling score."""
    return detections.take(np.arange(min(len(detections), max_detections)))
