"""Average precision of many resamples of the pictures at once.

Letters: I pictures, R resamples, T IoU thresholds, N predictions of one category by falling score. A resample is a
column of (I, R): how often it holds each picture. What is matched in a picture does not depend on other pictures, so
matching is done once and only the sums are made anew.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from owlsam_ray.coco_files.regions import Region
from owlsam_ray.evaluate.average_precision import Kind
from owlsam_ray.evaluate.ground_truth import GroundTruth
from owlsam_ray.evaluate.matching import match

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, slots=True)
class CategoryMatches:
    """What the average precision of one category is made of."""

    objects: Ints
    """(I,) how many each picture holds."""
    pictures: Ints
    """(N,) where each prediction was made; equal scores by rising picture."""
    hits: Bools
    """(T, N) whether it found an object."""


def resamples(pictures: int, count: int, *, seed: int) -> Ints:
    """(I, 1 + count) how often each picture is drawn, with replacement; in the first column each is there once."""
    random = np.random.default_rng([seed, pictures, count])
    drawn = random.multinomial(pictures, np.full(pictures, 1 / pictures), size=count)
    return np.concatenate([np.ones((1, pictures), np.int64), drawn]).T.copy()


def match_categories(truth: GroundTruth, regions: Sequence[Region], kind: Kind) -> list[CategoryMatches]:
    """Match predictions to objects as COCO does, one entry for each category that has objects.

    No crowd regions, no cap on predictions of one picture and category, and objects of every size.
    """
    if any(each.is_crowd for each in truth.objects) or truth.is_lvis:
        raise ValueError("crowd regions and LVIS are not matched here")
    image_ids = sorted(truth.images)
    place = {image_id: index for index, image_id in enumerate(image_ids)}
    objects, found = _by_cell(truth.objects), _by_cell(regions)
    result = []
    for category_id in sorted({each.category_id for each in truth.objects}):
        counts = np.zeros(len(image_ids), np.int64)
        pictures, scores = [np.zeros(0, np.int64)], [np.zeros(0)]
        hits = [np.zeros((len(IOU_THRESHOLDS), 0), np.bool_)]
        for image_id in image_ids:
            wanted = objects.get((image_id, category_id), [])
            given = sorted(found.get((image_id, category_id), []), key=lambda region: -region.score)
            counts[place[image_id]] = len(wanted)
            pictures.append(np.full(len(given), place[image_id]))
            scores.append(np.array([region.score for region in given], np.float64))
            hits.append(_greedy(_ious(given, wanted, kind)))
        order = np.argsort(-np.concatenate(scores), kind="stable")
        result.append(CategoryMatches(counts, np.concatenate(pictures)[order], np.concatenate(hits, axis=1)[:, order]))
    return result


def _by_cell(regions: Sequence[Region]) -> dict[tuple[int, int], list[Region]]:
    cells: dict[tuple[int, int], list[Region]] = defaultdict(list)
    for region in regions:
        cells[region.image_id, region.category_id].append(region)
    return cells


def _ious(given: list[Region], wanted: list[Region], kind: Kind) -> Floats:
    """(predictions, objects)"""
    if not given or not wanted:
        return np.zeros((len(given), len(wanted)))
    sides = [
        np.array([each.box_xywh for each in side], np.float64) if kind == "bbox" else [each.rle for each in side]
        for side in (given, wanted)
    ]
    return np.asarray(coco_mask.iou(*sides, [0] * len(wanted)), np.float64)


def _greedy(ious: Floats) -> Bools:
    """(predictions by falling score, objects) to (T, predictions): each takes the free object that it overlaps most.

    Of equal ones the last, as pycocotools has it.
    """
    predictions, objects = ious.shape
    hits = np.zeros((len(IOU_THRESHOLDS), predictions), np.bool_)
    free = np.ones((len(IOU_THRESHOLDS), objects), np.bool_)
    every = np.arange(len(IOU_THRESHOLDS))
    limits = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    for index in np.flatnonzero(ious.max(axis=1, initial=0) >= IOU_THRESHOLDS[0]).tolist():
        open_ious = np.where(free & (ious[index] >= limits), ious[index], -1.0)
        best = objects - 1 - open_ious[:, ::-1].argmax(axis=1)
        hits[:, index] = open_ious[every, best] >= 0
        free[every[hits[:, index]], best[hits[:, index]]] = False
    return hits


def average_precision(categories: Sequence[CategoryMatches], weights: Ints) -> Floats:
    """Mean over the categories of the average precision at each threshold.

    Args:
        categories: from `match_categories`.
        weights: (I, R).

    Returns:
        (T, R). A category without an object in a resample does not count there; NaN where none has one.
    """
    counts = weights.astype(np.int32)
    total, defined = np.zeros((len(IOU_THRESHOLDS), weights.shape[1])), np.zeros(weights.shape[1], np.int64)
    for category in categories:
        objects = category.objects @ weights
        total += np.where(objects > 0, _of_category(category, counts, np.maximum(objects, 1)), 0.0)
        defined += objects > 0
    return np.divide(total, defined, out=np.full_like(total, np.nan), where=defined > 0)


def _of_category(category: CategoryMatches, weights: NDArray[np.int32], objects: Ints) -> Floats:
    """(T, R) mean of the interpolated precision at 101 recalls.

    Only hits raise recall, so only at hits is a precision read. A picture that is there several times is as good as one
    that counts several times: between its equal predictions the precision is never higher than after the last. One that
    counts zero times adds no recall, and no precision above that of the hit before it.
    """
    seen = weights[category.pictures].cumsum(axis=0, dtype=np.int32)  # (N, R)
    result = np.zeros((len(category.hits), weights.shape[1]))
    for threshold, hits in enumerate(category.hits):
        index = np.flatnonzero(hits)
        found = weights[category.pictures[index]].cumsum(axis=0, dtype=np.int32)  # (hits, R)
        precision = found / np.maximum(seen[index], 1)
        best_from_here = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        reached = _recalls_up_to(found / objects)
        result[threshold] = (np.diff(reached, axis=0, prepend=0) * best_from_here).sum(axis=0) / len(_RECALLS)
    return result


def _recalls_up_to(recall: Floats) -> NDArray[np.int64]:
    """How many of the 101 recalls are reached, exactly: the nearest one decides."""
    nearest = np.rint(recall * 100).astype(np.int64)
    return nearest + (_RECALLS[nearest] <= recall)


def mean_matched_iou(truth: GroundTruth, regions: Sequence[Region], weights: Ints) -> Floats:
    """(R,) mIoU of the masks of predictions from score 0.5 on, matched at IoU 0.5; NaN where nothing was matched."""
    objects: dict[int, list[Region]] = defaultdict(list)
    found: dict[int, list[Region]] = defaultdict(list)
    for side, of_side in ((objects, truth.objects), (found, regions)):
        for each in of_side:
            side[each.image_id].append(each)
    sums, counts = np.zeros(len(truth.images)), np.zeros(len(truth.images), np.int64)
    for index, image_id in enumerate(sorted(truth.images)):
        alone = replace(truth, images={image_id: truth.images[image_id]}, objects=objects[image_id])
        ious = match(alone, found[image_id], "mask", score_threshold=0.5, iou_threshold=0.5).iou
        sums[index], counts[index] = np.nansum(ious), np.count_nonzero(~np.isnan(ious))
    matched = counts @ weights
    return np.divide(sums @ weights, matched, out=np.full(weights.shape[1], np.nan), where=matched > 0)
