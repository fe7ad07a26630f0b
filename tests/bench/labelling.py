"""Crowded drawn pictures, labelled by the models that come with the package, once for every variant of what follows.

The detector and the image encoder run once on each picture; boxes that several variants share are decoded once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from owlsam_ray.coco_files.regions import Region
from owlsam_ray.config.inference import DetectorConfig, SegmentConfig, SuppressConfig
from owlsam_ray.config.vocabulary import VocabularyConfig
from owlsam_ray.evaluate.ground_truth import EvaluatedCategory, EvaluatedImage, GroundTruth
from owlsam_ray.inference.detect import cap_detections, select_detections
from owlsam_ray.inference.queries import embed_queries
from owlsam_ray.inference.segment import decode_boxes
from owlsam_ray.inference.suppress import suppress
from owlsam_ray.models.load import find_models, load_detector, load_segmenter
from owlsam_ray.models.sam_frame import boxes_to_sam_frame, input_size_hw
from owlsam_ray.models.shipped import model_settings
from owlsam_ray.models.weights import sha256_of
from owlsam_ray.ops.masks import encode_rle, mask_area, segments_from_logits, tight_box
from owlsam_ray.records import Detections, Segment
from owlsam_ray.sources.drawing import CATEGORIES, SEEN, Drawing
from owlsam_ray.vocabulary import resolve_vocabulary

_SEEN = [label for label, category in enumerate(CATEGORIES) if category.supercategory == SEEN]
_DECODER_BATCH = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table: what differs from the demo's run file."""

    name: str
    suppress: dict[str, Any]
    segment: dict[str, Any] = field(default_factory=dict)


class Labeller:
    """Pictures to the regions of every variant."""

    def __init__(self) -> None:
        settings = model_settings()
        self.detector_settings = DetectorConfig(**settings["detector"])
        self._segment = settings["segment"]
        weights = find_models(self.detector_settings, SegmentConfig(**self._segment))
        self.hashes = {"detector": sha256_of(weights.detector), "segmenter": sha256_of(weights.segmenter)}
        device, dtype = torch.device("cpu"), torch.float32
        self._detector = load_detector(self.detector_settings, weights.detector, device=device, dtype=dtype)
        self._segmenter = load_segmenter(SegmentConfig(**self._segment), weights.segmenter, device=device, dtype=dtype)
        names = tuple(CATEGORIES[label].name for label in _SEEN)
        vocabulary = resolve_vocabulary(VocabularyConfig(categories=names, **settings["vocabulary"]), [])
        self._query_labels = np.array(vocabulary.query_labels, np.int64)
        self._queries = embed_queries(
            vocabulary.queries, detector_weights=weights.detector, settings=self.detector_settings,
            ensemble="embeddings",
        )  # fmt: skip

    def label(self, drawings: Sequence[Drawing], first_id: int, variants: Sequence[Variant]) -> list[list[Region]]:
        """The regions that each variant finds in these pictures, whose ids begin with `first_id`."""
        sizes = [_size(drawing) for drawing in drawings]
        boxes, scores = self._detector.detect(
            torch.stack([self._detector.preprocess(each.pixels) for each in drawings]), self._queries
        )
        found = [
            select_detections(
                self._detector.unscale(boxes[index], size_hw).numpy(), scores[index].numpy(), size_hw=size_hw,
                query_labels=self._query_labels, settings=self.detector_settings,
            )
            for index, size_hw in enumerate(sizes)
        ]  # fmt: skip
        kept = [[self._suppress(each, variant) for each in found] for variant in variants]
        embeddings = self._segmenter.encode(torch.stack([self._segmenter.preprocess(each.pixels) for each in drawings]))
        regions: list[list[Region]] = [[] for _ in variants]
        for options in {json.dumps(variant.segment): variant.segment for variant in variants}.values():
            mine = [index for index, variant in enumerate(variants) if variant.segment == options]
            per_image = [Detections.concatenate([kept[index][image] for index in mine]) for image in range(len(sizes))]
            segments = self._masks(embeddings, per_image, sizes, SegmentConfig(**self._segment, **options))
            for image, size_hw in enumerate(sizes):
                start = 0
                for index in mine:
                    detections = kept[index][image]
                    part = segments[image][start : start + len(detections)]
                    regions[index] += _regions(detections, part, first_id + image, size_hw)
                    start += len(detections)
        return regions

    def _suppress(self, found: Detections, variant: Variant) -> Detections:
        settings = self.detector_settings
        left = suppress(found, SuppressConfig(**variant.suppress), score_floor=settings.score_floor)
        return cap_detections(left, settings.max_detections)

    def _masks(
        self,
        embeddings: torch.Tensor,
        per_image: Sequence[Detections],
        sizes: Sequence[tuple[int, int]],
        settings: SegmentConfig,
    ) -> list[list[Segment]]:
        """The mask of every detection; boxes that several variants share are decoded once."""
        side = self._segmenter.image_size
        inputs = [input_size_hw(size_hw, side) for size_hw in sizes]
        decoded = decode_boxes(
            self._segmenter,
            embeddings,
            [
                boxes_to_sam_frame(each.boxes_xyxy, size_hw=size_hw, image_size=side)
                for each, size_hw in zip(per_image, sizes, strict=True)
            ],
            input_sizes_hw=inputs,
            batch_size=_DECODER_BATCH,
            settings=settings,
        )
        result = []
        for masks, size_hw, input_hw in zip(decoded, sizes, inputs, strict=True):
            different = segments_from_logits(
                masks.logits, masks.predicted_iou, size_hw=size_hw, input_hw=input_hw, image_size=side
            )
            result.append([different[index] for index in masks.index.tolist()])
        return result


def _size(drawing: Drawing) -> tuple[int, int]:
    height, width, _ = drawing.pixels.shape
    return height, width


def _regions(
    detections: Detections, segments: Sequence[Segment], image_id: int, size_hw: tuple[int, int]
) -> list[Region]:
    return [
        Region(
            image_id=image_id,
            category_id=CATEGORIES[_SEEN[label]].id,
            box_xywh=(x0, y0, x1 - x0, y1 - y0),
            area=float(segment.area),
            rle={"size": list(size_hw), "counts": segment.rle_counts},
            score=score,
        )
        for (x0, y0, x1, y1), label, score, segment in zip(
            detections.boxes_xyxy.astype(np.float64).tolist(), detections.labels.tolist(), detections.scores.tolist(),
            segments, strict=True,
        )
    ]  # fmt: skip


def ground_truth(drawings: Sequence[Drawing]) -> GroundTruth:
    """What was drawn; image ids begin with 1."""
    objects = []
    for image_id, drawing in enumerate(drawings, start=1):
        for mask, label in zip(drawing.masks, drawing.labels.tolist(), strict=True):
            x0, y0, x1, y1 = tight_box(mask)
            rle = {"size": list(mask.shape), "counts": encode_rle(mask)}
            box = (float(x0), float(y0), float(x1 - x0), float(y1 - y0))
            objects.append(Region(image_id, CATEGORIES[label].id, box, float(mask_area(mask)), rle))
    return GroundTruth(
        url="drawn",
        images={image_id: EvaluatedImage((), _size(each)) for image_id, each in enumerate(drawings, start=1)},
        categories={CATEGORIES[label].id: EvaluatedCategory(CATEGORIES[label].name, SEEN, None) for label in _SEEN},
        objects=objects,
        has_masks=True,
        is_lvis=False,
    )
