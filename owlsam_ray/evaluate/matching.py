"""Match predictions to objects at one score and one IoU: precision, recall, mIoU, Dice."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from owlsam_ray.coco_files.regions import Region
from owlsam_ray.evaluate.ground_truth import GroundTruth

Shape = Literal["box", "mask"]
Outcome = tuple[int, float, bool, float | None]
"""(category; w × h of the object's box, or of the prediction's if it found none; whether there is an object; IoU, or
None if nothing was paired)."""
FALSE, IGNORED = -1, -2
"""Outcomes of a prediction that found no object: counted as false, or not counted."""


@dataclass(frozen=True, slots=True)
class MatchCounts:
    """Counts and means over some categories and sizes; None where there is nothing to count."""

    num_objects: int
    num_matched: int
    num_false: int
    """Number of predictions that found no object."""
    miou: float | None
    """Mean IoU of the matched pairs."""
    dice: float | None
    """Mean of 2 |A ∩ B| / (|A| + |B|) over the matched pairs, which is 2 IoU / (1 + IoU) of each."""

    @property
    def precision(self) -> float | None:
        """Fraction of the predictions that are matched."""
        return _ratio(self.num_matched, self.num_matched + self.num_false)

    @property
    def recall(self) -> float | None:
        """Fraction of the objects that are matched."""
        return _ratio(self.num_matched, self.num_objects)


@dataclass(frozen=True, slots=True)
class Matches:
    """One row for each object, and for each prediction that found no object; ignored predictions have no row."""

    category: NDArray[np.int64]
    """(N,) category ids."""
    area: NDArray[np.float64]
    """(N,) w × h of the object's box, or of the prediction's if it found none."""
    is_object: NDArray[np.bool_]
    """(N,) False for a prediction that found no object."""
    iou: NDArray[np.float64]
    """(N,) IoU of a matched pair; NaN elsewhere."""

    def tally(self, categories: Collection[int] | None, area_range: tuple[float, float]) -> MatchCounts:
        """Count these categories (default: all) within a half-open range of areas.

        A pair counts by the area of its object, a prediction that found none by its own.
        """
        low, high = area_range
        chosen = (self.area >= low) & (self.area < high)
        if categories is not None:
            chosen &= np.isin(self.category, list(categories))
        ious = self.iou[chosen & ~np.isnan(self.iou)]
        objects = int(np.count_nonzero(chosen & self.is_object))
        return MatchCounts(
            num_objects=objects,
            num_matched=len(ious),
            num_false=int(np.count_nonzero(chosen)) - objects,
            miou=float(ious.mean()) if len(ious) else None,
            dice=float((2 * ious / (1 + ious)).mean()) if len(ious) else None,
        )


def match(
    truth: GroundTruth, regions: Sequence[Region], by: Shape, *, score_threshold: float, iou_threshold: float
) -> Matches:
    """Pair predictions with objects of the same image and category.

    Args:
        truth: the ground truth; for `mask`, with a mask of every object.
        regions: predictions, after `federated`; those without a mask are left out of `mask`.
        by: shape whose IoU is compared.
        score_threshold: minimum score of predictions.
        iou_threshold: minimum IoU of a pair.

    In order of descending score, ties in the file's order, each prediction takes the free object with the highest IoU,
    the first one in case of ties. A prediction that finds none is ignored when a crowd region covers at least
    `iou_threshold` of it, or (LVIS) when its image does not list every object of the category; otherwise it is false.
    Crowd regions do not count as objects here.
    """
    kept = [
        each for each in regions if each.score >= score_threshold and (by == "box" or each.rle is not None)
    ]  # fmt: skip
    objects, predictions = _by_cell(truth.objects), _by_cell(kept)
    rows: list[Outcome] = []
    for image_id, category_id in sorted({*objects, *predictions}):
        cell = (image_id, category_id)
        rows += _match_cell(
            objects.get(cell, []),
            sorted(predictions.get(cell, []), key=lambda region: -region.score),
            by,
            iou_threshold=iou_threshold,
            exhaustive=category_id not in truth.images[image_id].not_exhaustive,
        )
    return Matches(
        category=np.array([row[0] for row in rows], np.int64),
        area=np.array([row[1] for row in rows], np.float64),
        is_object=np.array([row[2] for row in rows], np.bool_),
        iou=np.array([np.nan if row[3] is None else row[3] for row in rows], np.float64),
    )


def _by_cell(regions: Sequence[Region]) -> dict[tuple[int, int], list[Region]]:
    """Group regions by image and category, keeping their order."""
    cells: dict[tuple[int, int], list[Region]] = defaultdict(list)
    for region in regions:
        cells[region.image_id, region.category_id].append(region)
    return cells


def _match_cell(
    objects: list[Region], predictions: list[Region], by: Shape, *, iou_threshold: float, exhaustive: bool
) -> list[Outcome]:
    """Match one image and category; predictions by descending score."""
    outcomes, ious = pair_cell(objects, predictions, by, iou_threshold=iou_threshold, exhaustive=exhaustive)
    pairs = {int(found): float(iou) for found, iou in zip(outcomes, ious, strict=True) if found >= 0}
    rows: list[Outcome] = [
        (region.category_id, region.box_area, False, None)
        for region, outcome in zip(predictions, outcomes, strict=True)
        if outcome == FALSE
    ]
    return rows + [
        (each.category_id, each.box_area, True, pairs.get(index))
        for index, each in enumerate(objects)
        if not each.is_crowd
    ]


def pair_cell(
    objects: Sequence[Region], predictions: Sequence[Region], by: Shape, *, iou_threshold: float, exhaustive: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the outcome of each prediction of one image and category, by the rules of `match`.

    Args:
        objects: the objects, including crowd regions.
        predictions: by descending score. Each outcome depends only on the predictions before it.
        by: shape whose IoU is compared.
        iou_threshold: minimum IoU of a pair.
        exhaustive: whether every object is listed.

    Returns:
        (N,) the index of the object that each finds, `FALSE` or `IGNORED`; and (N,) its IoU with the object, else NaN.
    """
    ious = _ious(predictions, objects, by)
    crowd = np.array([each.is_crowd for each in objects], np.bool_)
    free = ~crowd
    outcomes = np.full(len(predictions), IGNORED, np.int64)
    found = np.full(len(predictions), np.nan)
    for position in range(len(predictions)):
        candidates = np.where(free, ious[position], -1.0)
        best = int(candidates.argmax()) if len(objects) else -1
        if best >= 0 and free[best] and candidates[best] >= iou_threshold:
            free[best] = False
            outcomes[position], found[position] = best, candidates[best]
        elif exhaustive and not (ious[position, crowd] >= iou_threshold).any():
            outcomes[position] = FALSE
    return outcomes, found


def _ious(predictions: Sequence[Region], objects: Sequence[Region], by: Shape) -> NDArray[np.float64]:
    """(predictions, objects) IoU; for a crowd region, the fraction of the prediction that it covers."""
    if not predictions or not objects:
        return np.zeros((len(predictions), len(objects)))
    left, right = (_shapes(side, by) for side in (predictions, objects))
    crowd = [int(each.is_crowd) for each in objects]
    return np.nan_to_num(np.asarray(coco_mask.iou(left, right, crowd), np.float64))


def _shapes(regions: Sequence[Region], by: Shape) -> Any:
    if by == "mask":
        return [region.rle for region in regions]
    return np.array([region.box_xywh for region in regions], np.float64)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
