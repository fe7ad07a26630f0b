"""Scores of every box and prompt → the detections worth keeping.

Letters: P proposed boxes, Q prompts, N detections.
"""

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.boxes import clip_boxes, has_area
from owlsam_ray.errors import ImageError
from owlsam_ray.records import Detections
from owlsam_ray.settings import DetectorConfig


def select_detections(
    boxes_xyxy: NDArray[np.float32],
    scores: NDArray[np.float32],
    *,
    size_hw: tuple[int, int],
    prompt_labels: NDArray[np.int64],
    settings: DetectorConfig,
) -> Detections:
    """Keep what scores above the floor.

    Args:
        boxes_xyxy: (P, 4) original pixels.
        scores: (P, Q) in [0, 1].
        size_hw: (H, W) of the picture.
        prompt_labels: (Q,) category index of each prompt.
        settings: floor, multi-label or best label, clipping, cap.

    Returns:
        At most `max_candidates` detections by falling score; equal scores by rising box, then prompt. Of equal best
        prompts of one box the first counts.

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

    if settings.labels == "best":
        prompts = scores.argmax(axis=1)
        best = scores[np.arange(len(scores)), prompts]
        box_ids = np.flatnonzero((best > settings.score_floor) & usable)
        prompt_ids, values = prompts[box_ids], best[box_ids]
    else:
        box_ids, prompt_ids = np.nonzero((scores > settings.score_floor) & usable[:, None])
        values = scores[box_ids, prompt_ids]
    # A stable sort of what is ordered by box and prompt already: ties keep that order.
    order = np.argsort(-values, kind="stable")[: settings.max_candidates]
    box_ids, prompt_ids, values = box_ids[order], prompt_ids[order].astype(np.int64), values[order]
    return Detections(
        boxes_xyxy=boxes_xyxy[box_ids],
        scores=values,
        raw_scores=values,
        labels=prompt_labels[prompt_ids],
        prompt_ids=prompt_ids,
        num_merged=np.ones(len(values), np.int64),
    )


def cap_detections(detections: Detections, max_detections: int) -> Detections:
    """The best `max_detections` of detections that are ordered by falling score."""
    return detections.take(np.arange(min(len(detections), max_detections)))
