"""Encode low-resolution mask logits as RLE, area and tight box, and build one record per image."""

import numpy as np
import torch
from numpy.typing import NDArray

from owlsam_ray.config.inference import SegmentConfig
from owlsam_ray.errors import ImageError
from owlsam_ray.inference.segment import DecodedMasks
from owlsam_ray.models.sam_frame import input_size_hw
from owlsam_ray.ops.masks import segments_from_logits
from owlsam_ray.records import Detections, Prediction, Segment


def encode_prediction(
    image_id: int,
    size_hw: tuple[int, int],
    detections: Detections,
    *,
    masked: NDArray[np.int64],
    decoded: DecodedMasks | None,
    image_size: int,
    settings: SegmentConfig,
    note: str | None = None,
) -> Prediction:
    """Build the record of one image; detections with the same box share one segment.

    Args:
        image_id: image id in the manifest.
        size_hw: (H, W) of the decoded image.
        detections: N detections by descending score.
        masked: (K,) indices of the detections that were segmented.
        decoded: masks of these K boxes; may be None if K is 0.
        image_size: long side of the sam frame in pixels.
        settings: cleaning of masks, and the minimum mask area in pixels. Detections without a mask are kept.
        note: remark of the decode stage.

    Raises:
        ImageError: the segmenter returned NaN or infinite values.
    """
    segments: list[Segment | None] = [None] * len(detections)
    if decoded is not None and len(masked):
        if not (bool(torch.isfinite(decoded.logits).all()) and bool(torch.isfinite(decoded.predicted_iou).all())):
            raise ImageError("non_finite: the segmenter gave NaN or infinite values")
        made = segments_from_logits(
            decoded.logits,
            decoded.predicted_iou,
            size_hw=size_hw,
            input_hw=input_size_hw(size_hw, image_size),
            image_size=image_size,
            fill_holes=settings.fill_holes,
            remove_islands=settings.remove_islands,
        )
        for detection, mask in zip(masked.tolist(), decoded.index.tolist(), strict=True):
            segments[detection] = made[mask]
    large = [segment is None or segment.area >= settings.min_area for segment in segments]
    if not all(large):
        detections = detections.take(np.flatnonzero(large))
        segments = [segment for segment, stays in zip(segments, large, strict=True) if stays]
    return Prediction(image_id=image_id, size_hw=size_hw, detections=detections, segments=tuple(segments), note=note)
