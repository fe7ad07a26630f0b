"""Low-resolution mask logits → RLE, area, tight box; then one record per image."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.errors import ImageError
from owlsam_ray.masks import segments_from_logits
from owlsam_ray.models.mobile_sam import input_size_hw
from owlsam_ray.records import Detections, Prediction, Segment


def encode_prediction(
    image_id: int,
    size_hw: tuple[int, int],
    detections: Detections,
    *,
    masked: NDArray[np.int64],
    logits: Tensor,
    predicted_iou: Tensor,
    image_size: int,
    note: str | None = None,
) -> Prediction:
    """Finish one image.

    Args:
        image_id: of the manifest.
        size_hw: (H, W) of the decoded picture.
        detections: N detections by falling score.
        masked: (K,) indices of the detections that were given to the segmenter.
        logits: (K, m, m) float32 low-resolution logits on the CPU.
        predicted_iou: (K,) float32.
        image_size: long side of the sam frame.
        note: remark of the decode stage.

    Raises:
        ImageError: the segmenter gave NaN or infinite values.
    """
    if not (bool(torch.isfinite(logits).all()) and bool(torch.isfinite(predicted_iou).all())):
        raise ImageError("non_finite: the segmenter gave NaN or infinite values")
    segments: list[Segment | None] = [None] * len(detections)
    if len(masked):
        made = segments_from_logits(
            logits,
            predicted_iou,
            size_hw=size_hw,
            input_hw=input_size_hw(size_hw, image_size),
            image_size=image_size,
        )
        for index, segment in zip(masked.tolist(), made, strict=True):
            segments[index] = segment
    return Prediction(image_id=image_id, size_hw=size_hw, detections=detections, segments=tuple(segments), note=note)
