"""Compute all numbers of an evaluation, as plain JSON values: undefined ones are None, never -1 or NaN."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from owlsam_ray.coco_files.regions import Region
from owlsam_ray.config.evaluate import EvaluateConfig
from owlsam_ray.evaluate.average_precision import (
    Kind,
    PrecisionRecall,
    coco_numbers,
    federated,
    lvis_numbers,
    precision_recall,
)
from owlsam_ray.evaluate.ground_truth import NO_GROUP, GroundTruth
from owlsam_ray.evaluate.matching import Matches, Shape, match
from owlsam_ray.evaluate.predictions import Predictions
from owlsam_ray.evaluate.sizes import ALL, EVERYTHING, size_ranges

MAPPED = "(mapped)"
"""Name of the row of all categories that a mapping reaches."""
_SHAPE: dict[Kind, Shape] = {"bbox": "box", "segm": "mask"}


@dataclass(frozen=True, slots=True)
class _Counted:
    """Counts that rows are computed from."""

    ranges: dict[str, tuple[float, float]]
    precision: dict[Shape, PrecisionRecall]
    matches: dict[Shape, Matches]

    def row(self, categories: Collection[int] | None, size: str) -> dict[str, Any]:
        """Compute one row of the report."""
        row: dict[str, Any] = {}
        for shape in ("box", "mask"):
            counted = self.precision.get(shape)
            row[f"{shape}_ap"] = counted.ap(categories, size=size) if counted else None
            row[f"{shape}_ap50"] = counted.ap(categories, size=size, iou=0.5) if counted else None
        boxes, masks = (
            self.matches[shape].tally(categories, self.ranges[size]) if shape in self.matches else None
            for shape in ("box", "mask")
        )
        main = masks or boxes
        if main is None:
            raise ValueError("neither boxes nor masks were matched")
        return row | {
            "miou": masks.miou if masks else None,
            "dice": masks.dice if masks else None,
            "precision": main.precision,
            "recall": main.recall,
            "num_objects": main.num_objects,
            "num_matched": main.num_matched,
            "num_false": main.num_false,
            "box_miou": boxes.miou if boxes else None,
            "box_precision": boxes.precision if boxes else None,
            "box_recall": boxes.recall if boxes else None,
        }


def summarize(
    truth: GroundTruth,
    predictions: Predictions,
    kinds: tuple[Kind, ...],
    settings: EvaluateConfig,
    *,
    num_listed: int,
) -> dict[str, Any]:
    """Evaluate predictions.

    Args:
        truth: ground truth of the scored images; with masks when `segm` is among the kinds. Objects without a mask are
            left out there, so that a prediction of such an object is false in masks.
        predictions: predictions of its images and categories.
        kinds: boxes, masks or both; at least one.
        settings: thresholds and sizes.
        num_listed: number of images of the whole ground truth.

    Returns:
        `box` and `mask`: COCO's twelve or LVIS's thirteen numbers, None for a kind that was not requested.
        `groups[name][size]` and `categories[i]["sizes"][size]`: rows. `name` is `all`, a supercategory or, with a
        mapping, `(mapped)`: the categories that predictions can reach. `size` is `all` or one of `size_ranges`.
        `precision`, `recall`, `num_matched` (objects found) and `num_false` (predictions that found none) are of masks
        if masks are evaluated, else of boxes, at `score_threshold` and `iou_threshold`, over all objects together;
        `miou` and `dice` are means over the matched masks; `box_…` is the same for boxes. AP in a row is a mean over
        categories, over all scores. `mapping`: see `Translation.report`; None without one.

    In rows, sizes are w × h of the object's box; in `box` and `mask`, the ground truth's `area`.
    """
    # Predictions without a mask are left out before LVIS's cap, so that they do not displace masks.
    truths: dict[Kind, GroundTruth] = {kind: truth if kind == "bbox" else truth.with_masks() for kind in kinds}
    regions: dict[Kind, list[Region]] = {
        kind: federated(truths[kind], [each for each in predictions.regions if kind == "bbox" or each.rle is not None])
        for kind in kinds
    }
    official = {kind: precision_recall(truths[kind], regions[kind], kind) for kind in kinds}
    numbers = {
        kind: lvis_numbers(counted, truth) if truth.is_lvis else coco_numbers(counted)
        for kind, counted in official.items()
    }
    ranges = size_ranges(settings.size_edges_px)
    # The evaluator includes both ends of a range; an object at an edge must be in the upper range only.
    closed = {
        label: (low, high if high == EVERYTHING else float(np.nextafter(high, 0)))
        for label, (low, high) in ranges.items()
        if label != ALL
    }
    counted = _Counted(
        ranges=ranges,
        precision={
            _SHAPE[kind]: precision_recall(truths[kind], regions[kind], kind, ranges=closed, by_box_area=True)
            if closed
            else official[kind]
            for kind in kinds
        },
        matches={
            _SHAPE[kind]: match(
                truths[kind],
                regions[kind],
                _SHAPE[kind],
                score_threshold=settings.score_threshold,
                iou_threshold=settings.iou_threshold,
            )
            for kind in kinds
        },
    )
    return {
        "style": "lvis" if truth.is_lvis else "coco",
        "settings": {
            "score_threshold": settings.score_threshold,
            "iou_threshold": settings.iou_threshold,
            "size_edges_px": list(settings.size_edges_px),
            "matched_by": "mask" if "segm" in kinds else "box",
        },
        "counts": _counts(truth, predictions, num_listed),
        "mapping": predictions.translation.report() if predictions.translation else None,
        "box": numbers.get("bbox"),
        "mask": numbers.get("segm"),
        "groups": {
            name: {size: counted.row(categories, size) for size in ranges}
            for name, categories in _groups(truth, predictions).items()
        },
        "categories": _category_rows(truth, predictions, counted),
    }


def _groups(truth: GroundTruth, predictions: Predictions) -> dict[str, Collection[int] | None]:
    """Return `all`, what a mapping reaches, then category ids by supercategory, where categories have one."""
    members: dict[str, set[int]] = defaultdict(set)
    for category_id, category in truth.categories.items():
        members[category.group].add(category_id)
    groups: dict[str, Collection[int] | None] = {ALL: None}
    if predictions.translation:
        groups[MAPPED] = truth.categories.keys() - predictions.translation.unreached.keys()
    if set(members) != {NO_GROUP}:
        groups |= {f"{name} (group)" if name in groups else name: members[name] for name in sorted(members)}
    return groups


def _category_rows(truth: GroundTruth, predictions: Predictions, counted: _Counted) -> list[dict[str, Any]]:
    """Rows of the categories that have an object or a prediction, in the ground truth's order."""
    present = {each.category_id for each in truth.objects} | {each.category_id for each in predictions.regions}
    return [
        {
            "id": category_id,
            "name": category.name,
            "group": category.group,
            "sizes": {size: counted.row({category_id}, size) for size in counted.ranges},
        }
        for category_id, category in truth.categories.items()
        if category_id in present
    ]


def _counts(truth: GroundTruth, predictions: Predictions, num_listed: int) -> dict[str, Any]:
    crowds = sum(each.is_crowd for each in truth.objects)
    is_bare = predictions.labelled is None
    return {
        "images": len(truth.images),
        # Images of the ground truth that are left out; None for a bare list of results, which does not say.
        "images_not_labelled": None if is_bare else num_listed - len(truth.images),
        # Of the scored images.
        "images_failed": len(predictions.failed),
        # Images of the predictions.
        "images_not_in_the_ground_truth": predictions.num_images_left_out,
        "predictions_left_out": predictions.num_left_out,
        "objects": len(truth.objects) - crowds,
        "crowd_regions": crowds,
        # Including crowd regions; None if masks were not read.
        "annotations_without_mask": sum(each.rle is None for each in truth.objects) if truth.has_masks else None,
        "predictions": len(predictions.regions),
        "predictions_without_mask": sum(each.rle is None for each in predictions.regions),
    }
