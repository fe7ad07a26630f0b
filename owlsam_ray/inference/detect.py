"""Select detections from the scores of every box and query.

Shapes: P proposed boxes, Q queries, L labels that have queries, N detections.
"""

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.config.inference import DetectorConfig
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
    """Keep detections that score above the floor.

    A box has at most one detection per label, for the label's best query; on ties the first query wins.

    Args:
        boxes_xyxy: (P, 4) boxes in original pixels.
        scores: (P, Q) scores in [0, 1].
        size_hw: (H, W) of the image.
        query_labels: (Q,) category index of each query; queries of one label are adjacent.
        settings: floor, multi-label or best label, clipping, cap.

    Returns:
        At most `max_candidates` detections by descending score; equal scores by ascending box, then query. With
        `labels: best`, the first of a box's equally good labels wins.

    Raises:
        ImageError: the detector returned NaN or infinite values.
    """
    if not (np.isfinite(boxes_xyxy).all() and np.isfinite(scores).all()):
        raise ImageError("non_finite: the detector gave NaN or infinite values")
    if settings.clip_boxes:
        boxes_xyxy = clip_boxes(boxes_xyxy, size_hw)
        usable = has_area(boxes_xyxy)
    else:
        usable = np.ones(len(boxes_xyxy), np.bool_)

    # The first query of each label; L equals Q if every label has one query.
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
    # The input is ordered by box, then label; a stable sort keeps this order on ties, which is also the query order.
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
    """(N,) best query of each detection's label, whose queries start at `starts[label_ids]`; ties: the first."""
    lengths = np.diff(starts, append=scores.shape[1])[label_ids]
    winners = starts[label_ids]
    best = scores[box_ids, winners]
    for offset in range(1, int(lengths.max(initial=1))):
        # Beyond the label's last query, compare with its first query again, which never wins.
        rivals = starts[label_ids] + np.where(offset < lengths, offset, 0)
        better = scores[box_ids, rivals] > best
        winners, best = np.where(better, rivals, winners), np.maximum(best, scores[box_ids, rivals])
    return winners.astype(np.int64)


def cap_detections(detections: Detections, max_detections: int) -> Detections:
    """Keep the best `max_detections` of detections that are ordered by descending score."""
    return detections.take(np.arange(min(len(detections), max_detections)))
