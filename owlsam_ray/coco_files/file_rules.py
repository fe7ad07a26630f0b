"""The rules of `owlsam clean`: finds wrong entries of a COCO file in one pass over its annotations.

Shapes: M images, N entries of `annotations`. The rules are those of fine-tuning (`cleaning.py`) and three more for what
fine-tuning refuses; each can be switched off. An entry is removed by the first rule that it violates, in the order of
`RULES`.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from owlsam_ray.coco_files.annotations import Objects, is_number, make_objects, structure_error
from owlsam_ray.coco_files.cleaning import Change, Rule, false_is_off, find_duplicates, judge_boxes
from owlsam_ray.coco_files.fields import flag_of
from owlsam_ray.coco_files.outlines import BadSegmentationError, read_outline
from owlsam_ray.config.base import Fraction, Section
from owlsam_ray.errors import shown

MALFORMED = "malformed"
UNKNOWN_IMAGE = "unknown_image"
UNKNOWN_CATEGORY = "unknown_category"
RULES: tuple[str, ...] = (MALFORMED, UNKNOWN_IMAGE, UNKNOWN_CATEGORY, *Rule)
NEW_ID = "new_id"
CROWD_FLAG = "crowd_flag"
CHANGES: tuple[str, ...] = (Change.CLIPPED_BOX, Change.DROPPED_POLYGON, NEW_ID, CROWD_FLAG)

_MAX_ID = 2**53
"""Every reader represents integers below this exactly, even as floats."""

_PLAIN, _BAD, _EMPTY, _EMPTY_LIST = range(4)
"""Codes of a segmentation: valid or missing, violating one of the two rules, or `[]`, which may mean missing."""


class FileCleaning(Section):
    """What `owlsam clean` removes and fixes. A violation of a rule that is off is kept unchanged."""

    malformed: bool = True
    """Remove entries that are not objects, whose id is not an integer, or whose `bbox`, `area`, `iscrowd` or `score`
    has a wrong type. An `iscrowd` of true, 1.0, "1" or "true" is written as 1; of false, 0.0, "0", "false" or "" as
    0."""
    unknown_image: bool = True
    """Remove annotations whose image is not in the file."""
    unknown_category: bool = True
    """Remove annotations whose category is not in the file."""
    crowd: bool = False
    """Remove crowd regions (`iscrowd`), which evaluation needs."""
    no_box: bool = True
    """Remove objects without a `bbox`."""
    non_finite: bool = True
    """Remove objects with numbers beyond the float range in `bbox` or `area`."""
    zero_area: bool = True
    """Remove objects whose box has no width or height, or whose stated area is not positive."""
    outside: bool = True
    """Remove objects whose box is entirely outside the image."""
    min_area: Annotated[Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, BeforeValidator(false_is_off)] = None
    """Minimum area in square pixels: remove objects whose stated `area` or whose box inside the image is smaller.
    Default: none."""
    bad_segmentation: bool = True
    """Remove objects whose segmentation is of an unknown kind, not finite, or of another size than the image."""
    empty_segmentation: bool = True
    """Remove objects whose segmentation encloses nothing. Objects without a segmentation stay; so do empty lists if the
    file has no other segmentations."""
    duplicate_iou: Annotated[Fraction | None, BeforeValidator(false_is_off)] = 0.9
    """If two boxes of one category in one image have a greater IoU, keep only the one with the lower id; null or false:
    no rule. Crowd regions are neither removed as duplicates nor cause removals."""
    drop_empty_images: bool = False
    """Remove images without remaining annotations, whether they had any or not: they serve as background."""
    degenerate_polygons: bool = True
    """Remove polygons with fewer than 3 points or no area from objects with several polygons."""
    clip_boxes: bool = False
    """Clip boxes to the image."""
    new_ids: bool = True
    """If an annotation id occurs twice, give the later entry a new id above all others, or the lowest free one if that
    would be 2^53 or more."""

    def is_off(self, rule: str) -> bool:
        """Whether a rule is switched off."""
        named = {Rule.SMALL: self.min_area is not None, Rule.DUPLICATE: self.duplicate_iou is not None}
        named[Rule.EMPTY_IMAGE] = self.drop_empty_images
        return not (named[Rule(rule)] if rule in named else getattr(self, rule))


class Ids:
    """Distinct ids and their positions."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.values = np.array(ids, np.int64)
        """In the file's order."""
        self._order = np.argsort(self.values, kind="stable")

    def __len__(self) -> int:
        return len(self.values)

    def places(self, values: Sequence[Any]) -> NDArray[np.int64]:
        """(N,) positions of N JSON values among the ids; -1 for values that are not among them."""
        fits = np.array([type(value) is int and 0 <= value < 2**63 for value in values], np.bool_)
        if not len(self):
            return np.full(len(values), -1, np.int64)
        numbers = np.array([value if fit else 0 for value, fit in zip(values, fits.tolist(), strict=True)], np.int64)
        near = np.searchsorted(self.values, numbers, sorter=self._order)
        place = self._order[np.minimum(near, len(self) - 1)]
        return np.where(fits & (self.values[place] == numbers), place, -1)


@dataclass(frozen=True, slots=True)
class References:
    """Images and categories that annotations may refer to."""

    images: Ids
    """M ids."""
    sizes_hw: NDArray[np.float64]
    """(M, 2); infinite where a size is not stated."""
    categories: Ids


@dataclass(slots=True)
class Judged:
    """The decision on each of N entries of `annotations`."""

    objects: Objects
    """N entries without segmentations; -1 for an image or category that is not in the file, and for the id of a
    malformed entry."""
    rules: list[str | None]
    """N times the rule that removes the entry; None: it stays."""
    details: dict[int, str]
    """Details on the decision, by position of the entry, where there are any."""
    clipped: dict[int, list[float]]
    """New `bbox` of remaining entries."""
    fixed: dict[int, int]
    """Number of polygons removed from remaining entries."""
    new_ids: dict[int, int]
    """New ids of remaining entries."""
    crowd_flags: dict[int, int]
    """New `iscrowd` of remaining entries."""
    had_entries: NDArray[np.bool_]
    """(M,) whether the image has annotations in the input."""
    has_entries: NDArray[np.bool_]
    """(M,) whether any of its annotations stays."""


@dataclass(frozen=True, slots=True)
class _Survey:
    """Columns of N entries, before the rules are applied."""

    objects: Objects
    outlines: NDArray[np.int8]
    degenerate: NDArray[np.int32]
    """Number of polygons without an area."""
    malformed: dict[int, str]
    crowd_flags: dict[int, int]
    """The integer value of an `iscrowd` that is a flag but not an integer."""
    only_empty_lists: bool


def judge_entries(batches: Iterable[tuple[int, list[Any]]], known: References, settings: FileCleaning) -> Judged:
    """Apply all rules to the annotations of a file.

    Args:
        batches: position of the first entry and the entries, in order.
        known: images and categories of the file.
        settings: which rules apply, and how strictly.
    """
    survey = _survey(batches, known)
    objects = survey.objects
    off = {rule for rule in Rule if settings.is_off(rule)}
    has_image = objects.image_index >= 0
    boxes, inside, by_box = judge_boxes(
        objects, _sizes_of(objects.image_index, known), min_area=settings.min_area or 0.0, off=off
    )
    rules: list[str | None] = list(by_box)
    _judge_outlines(survey, rules, settings)
    for index in np.flatnonzero(objects.labels < 0).tolist() if settings.unknown_category else ():
        rules[index] = UNKNOWN_CATEGORY
    for index in np.flatnonzero(~has_image).tolist() if settings.unknown_image else ():
        rules[index] = UNKNOWN_IMAGE
    for index in survey.malformed:
        rules[index] = MALFORMED if settings.malformed else None
    named = [np.zeros(len(known.images), np.bool_) for _ in range(2)]
    judged = Judged(objects, rules, dict(survey.malformed), {}, {}, {}, {}, *named)
    if settings.clip_boxes:
        cut = (
            np.isfinite(boxes).all(axis=1) & (inside[:, 2:] > inside[:, :2]).all(axis=1) & (inside != boxes).any(axis=1)
        )
        judged.clipped = {i: _xywh(inside[i]) for i in np.flatnonzero(cut).tolist() if rules[i] is None}
        boxes = np.where(cut[:, None], inside, boxes)
    if settings.duplicate_iou is not None:
        _judge_duplicates(judged, boxes, settings.duplicate_iou)
    _fix(judged, survey, settings)
    stays = np.array([rule is None for rule in rules], np.bool_)
    judged.had_entries[objects.image_index[has_image]] = True
    judged.has_entries[objects.image_index[has_image & stays]] = True
    return judged


def _survey(batches: Iterable[tuple[int, list[Any]]], known: References) -> _Survey:
    parts: list[Objects] = []
    outlines: list[NDArray[np.int8]] = []
    degenerate: list[NDArray[np.int32]] = []
    malformed: dict[int, str] = {}
    crowd_flags: dict[int, int] = {}
    any_outline = False
    for first, entries in batches:
        sound: list[dict[str, Any]] = []
        for place, entry in enumerate(entries):
            wrong = structure_error(entry) or _score_error(entry)
            if wrong is not None:
                malformed[first + place] = f"annotations[{first + place}]{wrong}"
                entry = _hollow(entry)
            elif type(entry.get("iscrowd")) in (bool, float, str):
                crowd_flags[first + place] = int(bool(flag_of(entry["iscrowd"])))
            sound.append(entry)
        images = known.images.places([entry.get("image_id") for entry in sound])
        labels = known.categories.places([entry.get("category_id") for entry in sound])
        parts.append(make_objects(sound, image_index=images, labels=labels, segmentations=()))
        sizes = _sizes_of(images, known)
        codes, counts = np.zeros(len(sound), np.int8), np.zeros(len(sound), np.int32)
        for place, entry in enumerate(sound):
            segmentation = entry.get("segmentation")
            any_outline = any_outline or bool(segmentation)
            codes[place], counts[place] = _judge_segmentation(segmentation, sizes[place].tolist())
        outlines.append(codes)
        degenerate.append(counts)
    return _Survey(
        objects=_joined(parts),
        outlines=np.concatenate([np.zeros(0, np.int8), *outlines]),
        degenerate=np.concatenate([np.zeros(0, np.int32), *degenerate]),
        malformed=malformed,
        crowd_flags=crowd_flags,
        only_empty_lists=not any_outline,
    )


def _sizes_of(image_index: NDArray[np.int64], known: References) -> NDArray[np.float64]:
    """(N, 2) image size of each entry; infinite for entries without an image."""
    sizes = np.full((len(image_index), 2), np.inf)
    there = image_index >= 0
    sizes[there] = known.sizes_hw[image_index[there]]
    return sizes


def _score_error(entry: dict[str, Any]) -> str | None:
    score = entry.get("score")
    if score is None or is_number(score):
        return None
    return f" (id {entry['id']}): score {shown(score, 80)} is not a number"


def _hollow(entry: Any) -> dict[str, Any]:
    """Keep only the fields of a malformed entry that other rules may check."""
    named = {key: entry.get(key) for key in ("image_id", "category_id")} if isinstance(entry, dict) else {}
    return {"id": -1, **named}


def _joined(parts: Sequence[Objects]) -> Objects:
    none = make_objects(
        [], image_index=np.zeros(0, np.int64), labels=np.zeros(0, np.int64), segmentations=()
    )  # so that a file without annotations has columns as well
    names = ("ids", "image_index", "labels", "bboxes", "areas", "crowd")
    columns = {name: np.concatenate([getattr(part, name) for part in (none, *parts)]) for name in names}
    return Objects(**columns, segmentations=())


def _judge_segmentation(segmentation: Any, size_hw: list[float]) -> tuple[int, int]:
    """The code of a segmentation, and its number of polygons without an area."""
    if segmentation is None:
        return _PLAIN, 0
    if segmentation == []:
        return _EMPTY_LIST, 0
    try:
        outline, degenerate = read_outline(segmentation, (size_hw[0], size_hw[1]))
        check_runs(segmentation)
    except BadSegmentationError:
        return _BAD, 0
    return (_EMPTY, 0) if outline is None else (_PLAIN, degenerate)


def check_runs(segmentation: Any) -> None:
    """Check that the text of a compressed RLE fills its size, which `read_outline` does not.

    Args:
        segmentation: a segmentation that `read_outline` accepts.

    Raises:
        BadSegmentationError: a run is negative, or the runs do not add up.
    """
    if not isinstance(segmentation, dict) or not isinstance(segmentation["counts"], str):
        return
    # Groups of five bits, the lowest first; 32 is set where more follow, and 16 of the last group is the sign. From
    # the fourth number on, each is the difference to the number two places before.
    groups = np.frombuffer(segmentation["counts"].encode(), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((groups & 0x20) == 0)
    starts = np.concatenate([[0], last[:-1] + 1])
    lengths = last - starts + 1
    height, width = segmentation["size"]
    if lengths.max() <= 8:  # 40 bits: more than any image has pixels
        runs = np.add.reduceat((groups & 0x1F) << (5 * (np.arange(len(groups)) - np.repeat(starts, lengths))), starts)
        runs -= np.where(groups[last] & 0x10, 1 << (5 * lengths), 0)
        runs[1::2] = np.cumsum(runs[1::2])
        runs[2::2] = np.cumsum(runs[2::2])
        if runs.min() >= 0 and int(runs.sum()) == height * width:
            return
    raise BadSegmentationError(f"the runs of an RLE do not add up to {height} × {width}")


def _judge_outlines(survey: _Survey, rules: list[str | None], settings: FileCleaning) -> None:
    found: list[tuple[NDArray[np.bool_], str]] = []
    if settings.bad_segmentation:
        found.append((survey.outlines == _BAD, Rule.BAD_SEGMENTATION))
    if settings.empty_segmentation:
        empty = survey.outlines == _EMPTY
        if not survey.only_empty_lists:
            empty |= survey.outlines == _EMPTY_LIST
        found.append((empty, Rule.EMPTY_SEGMENTATION))
    for mask, rule in found:
        for index in np.flatnonzero(mask).tolist():
            rules[index] = rules[index] or rule


def _judge_duplicates(judged: Judged, boxes: NDArray[np.float64], iou: float) -> None:
    objects = judged.objects
    with np.errstate(invalid="ignore"):
        alive = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    alive &= ~objects.crowd & (objects.image_index >= 0) & (objects.labels >= 0)
    alive &= np.array([rule is None for rule in judged.rules], np.bool_)
    for index, stays, overlap in find_duplicates(objects, boxes, alive, iou):
        judged.rules[index] = Rule.DUPLICATE
        judged.details[index] = f"IoU {overlap:.4f} with annotation {objects.ids[stays]}"


def _fix(judged: Judged, survey: _Survey, settings: FileCleaning) -> None:
    """Decide the changes to the polygons, flags and ids of remaining entries."""
    judged.clipped = {index: box for index, box in judged.clipped.items() if judged.rules[index] is None}
    if settings.malformed:
        judged.crowd_flags = {i: flag for i, flag in survey.crowd_flags.items() if judged.rules[i] is None}
    if settings.degenerate_polygons:
        for index in np.flatnonzero(survey.degenerate).tolist():
            if judged.rules[index] is None:
                judged.fixed[index] = int(survey.degenerate[index])
    if settings.new_ids:
        stays = np.array([rule is None for rule in judged.rules], np.bool_)
        stays[list(survey.malformed)] = False
        places = np.flatnonzero(stays)
        ids = judged.objects.ids[places]
        order = np.argsort(ids, kind="stable")
        again = order[1:][ids[order[1:]] == ids[order[:-1]]]
        later = sorted(places[again].tolist())
        judged.new_ids = dict(zip(later, _free_ids(judged.objects.ids, len(later)), strict=False))


def _free_ids(ids: NDArray[np.int64], count: int) -> Iterable[int]:
    """At least `count` ids that are not among N others."""
    first = int(ids[ids < _MAX_ID].max(initial=0)) + 1
    if first + count <= _MAX_ID:
        return range(first, first + count)
    taken = set(ids.tolist())
    return (number for number in itertools.count(1) if number not in taken)


def _xywh(box_xyxy: NDArray[np.float64]) -> list[float]:
    x0, y0, x1, y1 = box_xyxy.tolist()
    return [x0, y0, x1 - x0, y1 - y0]
