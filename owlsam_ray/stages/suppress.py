"""Overlapping boxes of one label → the ones to keep. One function per strategy, named in `STRATEGIES`."""

from collections.abc import Callable

import numpy as np
import torch
from torchvision.ops import nms

from owlsam_ray.records import Detections
from owlsam_ray.settings import SuppressConfig


def suppress(detections: Detections, settings: SuppressConfig) -> Detections:
    """Apply the strategy of the settings.

    Args:
        detections: by falling score.
        settings: strategy and threshold.

    Returns:
        Detections by falling score; labels never interact.
    """
    return STRATEGIES[settings.strategy](detections, settings)


def _keep_all(detections: Detections, settings: SuppressConfig) -> Detections:
    return detections


def _hard_nms(detections: Detections, settings: SuppressConfig) -> Detections:
    """Greedy: a box goes when its IoU with a better kept one of its label is greater than the threshold.

    Label by label rather than with torchvision's `batched_nms`, which shifts the boxes of each label far apart and
    rounds their coordinates in doing so. Equal scores: the first in the input wins.
    """
    kept = []
    for label in np.unique(detections.labels):
        index = np.flatnonzero(detections.labels == label)
        # Falling ranks instead of scores: distinct, so that no sort inside may reorder ties.
        ranks = torch.arange(len(index), 0, -1, dtype=torch.float32)
        kept.append(index[nms(torch.from_numpy(detections.boxes_xyxy[index]), ranks, settings.iou_threshold).numpy()])
    return detections.take(np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64))


STRATEGIES: dict[str, Callable[[Detections, SuppressConfig], Detections]] = {"none": _keep_all, "nms": _hard_nms}
