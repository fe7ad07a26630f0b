"""Compute average precision of boxes and masks with faster-coco-eval, whose numbers equal pycocotools'.

Shapes: T IoU thresholds 0.50…0.95, R recall steps, K categories, A ranges of area, M caps on detections.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from owlsam_ray.coco_files.regions import Region
from owlsam_ray.evaluate.ground_truth import FREQUENCIES, GroundTruth
from owlsam_ray.evaluate.sizes import ALL, EVERYTHING

Kind = Literal["bbox", "segm"]
COCO_RANGES = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, EVERYTHING),
}
"""COCO's areas; both ends are inside a range."""
LVIS_DETECTIONS = 300
_AT_ONCE = 8
"""Number of categories evaluated at once. The evaluator visits all pairs of image and category, empty or not, so
passing few categories, and only their images, saves most of LVIS's time and memory."""


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    """Precision and recall as counted by the evaluator; -1 where there is no object."""

    categories: tuple[int, ...]
    """K category ids."""
    ranges: tuple[str, ...]
    """A labels, `all` first."""
    max_detections: tuple[int, ...]
    """M caps per image and category, ascending."""
    iou_thresholds: NDArray[np.float64]
    """(T,)"""
    precision: NDArray[np.float64]
    """(T, R, K, A, M)"""
    recall: NDArray[np.float64]
    """(T, K, A, M)"""

    def ap(
        self, categories: Collection[int] | None = None, *, size: str = ALL, iou: float | None = None
    ) -> float | None:
        """Return mean average precision with the highest cap; None if no category has an object.

        Args:
            categories: category ids; default: all.
            size: label of a range.
            iou: a single IoU threshold; default: the mean over all.
        """
        values = self.precision[:, :, :, self.ranges.index(size), -1]
        if categories is not None:
            values = values[:, :, [index for index, each in enumerate(self.categories) if each in categories]]
        return _mean(values if iou is None else values[np.isclose(self.iou_thresholds, iou)])

    def ar(self, *, size: str = ALL, cap: int = -1) -> float | None:
        """Return mean recall over categories and thresholds; None if no category has an object.

        Args:
            size: label of a range.
            cap: index into the caps on detections.
        """
        return _mean(self.recall[:, :, self.ranges.index(size), cap])


def federated(truth: GroundTruth, regions: Sequence[Region]) -> list[Region]:
    """Keep what LVIS scores: the 300 best predictions of each image, of categories that were annotated in it.

    Source: lvis-api's `LVISResults` and `LVISEval`. For COCO nothing is left out.
    """
    if not truth.is_lvis:
        return list(regions)
    by_image: dict[int, list[Region]] = defaultdict(list)
    for region in regions:
        by_image[region.image_id].append(region)
    looked_for = {image_id: set(image.negative) for image_id, image in truth.images.items()}
    for each in truth.objects:
        looked_for[each.image_id].add(each.category_id)
    kept = []
    for image_id, found in by_image.items():
        best = found if len(found) <= LVIS_DETECTIONS else sorted(found, key=_falling)[:LVIS_DETECTIONS]
        kept += [region for region in best if region.category_id in looked_for[image_id]]
    return kept


def precision_recall(
    truth: GroundTruth,
    regions: Sequence[Region],
    kind: Kind,
    *,
    ranges: Mapping[str, tuple[float, float]] = COCO_RANGES,
    by_box_area: bool = False,
    categories_at_once: int = _AT_ONCE,
) -> PrecisionRecall:
    """Match predictions to objects as COCO (or LVIS) does.

    Args:
        truth: the ground truth; for `segm`, with a mask of every object.
        regions: predictions, after `federated`; those without a mask are left out of `segm`.
        kind: IoU of boxes or of masks.
        ranges: lowest and highest area, both inclusive, by label; `all` is added. Objects outside are ignored, and so
            are unmatched predictions whose own area is outside.
        by_box_area: areas are w × h of the boxes. Default: the ground truth's `area` and the predictions'; for `bbox`,
            w × h for a prediction that also has a mask.
        categories_at_once: bounds time and memory; does not affect any number.
    """
    if kind == "segm":
        regions = [region for region in regions if region.rle is not None]
    identifiers = sorted(truth.categories)
    objects, found = _by_category(truth.objects), _by_category(regions)
    remaining = iter(identifiers)
    parts = []
    while chunk := list(islice(remaining, categories_at_once)):
        sides = [[each for category in chunk for each in side[category]] for side in (objects, found)]
        parts.append(_evaluate(truth, chunk, *sides, kind=kind, ranges=ranges, by_box_area=by_box_area))
    probe = _evaluator(None, None, kind, truth.is_lvis, ranges)
    return PrecisionRecall(
        categories=tuple(identifiers),
        ranges=tuple(probe.params.areaRngLbl),
        max_detections=tuple(probe.params.maxDets),
        iou_thresholds=probe.params.iouThrs,
        precision=np.concatenate([precision for precision, _ in parts], axis=2),
        recall=np.concatenate([recall for _, recall in parts], axis=1),
    )


def coco_numbers(counted: PrecisionRecall) -> dict[str, float | None]:
    """Return COCO's twelve numbers, in its order; counted with `COCO_RANGES`."""
    first, second, last = counted.max_detections
    return {
        **_ap_numbers(counted),
        f"AR@{first}": counted.ar(cap=0),
        f"AR@{second}": counted.ar(cap=1),
        f"AR@{last}": counted.ar(),
        **_ar_numbers(counted),
    }


def lvis_numbers(counted: PrecisionRecall, truth: GroundTruth) -> dict[str, float | None]:
    """Return LVIS's thirteen numbers; counted with `COCO_RANGES`."""
    by_frequency = {
        f"AP{letter}": counted.ap({each for each, found in truth.categories.items() if found.frequency == letter})
        for letter in FREQUENCIES
    }
    return {**_ap_numbers(counted), **by_frequency, f"AR@{LVIS_DETECTIONS}": counted.ar(), **_ar_numbers(counted)}


def _ap_numbers(counted: PrecisionRecall) -> dict[str, float | None]:
    sizes = {f"AP{label[0]}": counted.ap(size=label) for label in COCO_RANGES}
    return {"AP": counted.ap(), "AP50": counted.ap(iou=0.5), "AP75": counted.ap(iou=0.75), **sizes}


def _ar_numbers(counted: PrecisionRecall) -> dict[str, float | None]:
    return {f"AR{label[0]}@{counted.max_detections[-1]}": counted.ar(size=label) for label in COCO_RANGES}


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _falling(region: Region) -> float:
    return -region.score


def _by_category(regions: Sequence[Region]) -> dict[int, list[Region]]:
    """Group regions by category, keeping their order."""
    found: dict[int, list[Region]] = defaultdict(list)
    for region in regions:
        found[region.category_id].append(region)
    return found


def _evaluate(
    truth: GroundTruth,
    categories: list[int],
    objects: list[Region],
    found: list[Region],
    *,
    kind: Kind,
    ranges: Mapping[str, tuple[float, float]],
    by_box_area: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute precision and recall of some categories, on the images that have any of their objects or predictions."""
    image_ids = {each.image_id for each in objects} | {each.image_id for each in found}
    head = {
        "images": [_image(truth, image_id) for image_id in sorted(image_ids)],
        "categories": [{"id": each, "frequency": truth.categories[each].frequency} for each in categories],
    }
    gt, dt = COCO(), COCO()
    # For a prediction with both, the box is compared, so the box's area counts, not the mask's.
    by_box = by_box_area or (kind == "bbox" and any(each.rle is not None for each in found))
    for coco, of_side, box_area in ((gt, objects, by_box_area), (dt, found, by_box)):
        # Numbered from 1: the evaluator treats an annotation with the id 0 as unmatched.
        annotations = [_annotation(number, each, kind, box_area) for number, each in enumerate(of_side, start=1)]
        coco.dataset = head | {"annotations": annotations}
        coco.createIndex()
    evaluator = _evaluator(gt, dt, kind, truth.is_lvis, ranges)
    if not image_ids:
        sides = (len(evaluator.params.iouThrs), len(evaluator.params.recThrs), len(categories))
        shape = (*sides, len(evaluator.params.areaRngLbl), len(evaluator.params.maxDets))
        return np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _evaluator(gt: Any, dt: Any, kind: Kind, is_lvis: bool, ranges: Mapping[str, tuple[float, float]]) -> Any:
    evaluator = COCOeval_faster(
        gt,
        dt,
        kind,
        ranges={label: list(bounds) for label, bounds in ranges.items()},
        print_function=_silent,
        lvis_style=is_lvis,
    )
    if is_lvis:
        evaluator.params.maxDets = [LVIS_DETECTIONS]
    return evaluator


def _silent(*_: object) -> None:
    """Swallow the evaluator's progress output."""


def _image(truth: GroundTruth, image_id: int) -> dict[str, Any]:
    image = truth.images[image_id]
    height, width = image.size_hw or (0, 0)
    return {
        "id": image_id,
        "height": height,
        "width": width,
        "neg_category_ids": list(image.negative),
        "not_exhaustive_category_ids": list(image.not_exhaustive),
    }


def _annotation(number: int, region: Region, kind: Kind, box_area: bool) -> dict[str, Any]:
    annotation = {
        "id": number,
        "image_id": region.image_id,
        "category_id": region.category_id,
        "bbox": list(region.box_xywh),
        "area": region.box_area if box_area else region.area,
        "iscrowd": int(region.is_crowd),
        "score": region.score,
    }
    return annotation if kind == "bbox" else annotation | {"segmentation": region.rle}
