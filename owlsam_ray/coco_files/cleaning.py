"""The rules that decide which annotations are fit for training, applied to columns of arrays.

Shapes: M images, N objects. An object is removed by the first rule of `Rule` that it violates, in the order given
there. Boxes are half-open, in original pixels.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from owlsam_ray.coco_files.annotations import Objects
from owlsam_ray.coco_files.outlines import BadSegmentationError, Outline, read_outline
from owlsam_ray.config.base import Fraction, Section


def false_is_off(value: Any) -> Any:
    """Validate the setting of a numeric rule before it is parsed: YAML's `false` or `off` becomes None.

    Raises:
        ValueError: it is true, which gives no number and would count as 1.
    """
    if value is True:
        raise ValueError("true is not a number: give the number, or false (or null) to switch the rule off")
    return None if value is False else value


def _false_is_zero(value: Any) -> Any:
    return 0.0 if value is False else false_is_off(value)


class CleaningSettings(Section):
    """Which annotations are trained on."""

    drop_empty_images: bool = False
    """Drop images without remaining annotations, whether they had any or not; false trains on them as background."""
    duplicate_iou: Annotated[Fraction | None, BeforeValidator(false_is_off)] = 0.9
    """If two boxes of one category in one image have a greater IoU, keep only the one with the lower annotation id;
    null or false keeps all."""
    min_area: Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_false_is_zero)] = 100.0
    """Minimum area in square pixels: drop objects whose stated `area` or whose box inside the image is smaller; 0 or
    false drops none."""
    clip_boxes: bool = True
    """Clip boxes to the image; false leaves boxes that extend beyond it unchanged."""
    drop_bad_masks: bool = True
    """Drop objects whose segmentation is empty, degenerate or damaged; false keeps their boxes. Objects without a
    segmentation stay; so do empty lists if the file has no other segmentations."""


class Rule(StrEnum):
    """Why an object or an image is not trained on."""

    CROWD = "crowd"
    """`iscrowd` is set: the box surrounds many objects."""
    NO_BOX = "no_box"
    """The file gives no `bbox`."""
    NON_FINITE = "non_finite"
    """The box or the stated area holds an infinite number."""
    ZERO_AREA = "zero_area"
    """The box has no width or no height, or the stated area is not positive."""
    OUTSIDE = "outside"
    """The box is entirely outside the image."""
    SMALL = "small"
    """The area is below `min_area`."""
    BAD_SEGMENTATION = "bad_segmentation"
    """The segmentation is of an unknown kind, not finite, or of another size than the image."""
    EMPTY_SEGMENTATION = "empty_segmentation"
    """The segmentation encloses nothing: no polygon, only degenerate ones, or an RLE without a pixel."""
    DUPLICATE = "duplicate"
    """An object of the same category with a lower id has nearly the same box."""
    EMPTY_IMAGE = "empty_image"
    """The image has no remaining annotations."""


class Change(StrEnum):
    """What is fixed on an object that stays."""

    CLIPPED_BOX = "clipped_box"
    """The box was clipped to the image."""
    DROPPED_POLYGON = "dropped_polygon"
    """Some of its polygons had fewer than 3 points or no area."""
    DROPPED_MASK = "dropped_mask"
    """The box stays without its segmentation (`drop_bad_masks: false`)."""


class Removal(NamedTuple):
    """One row of a report's tables."""

    image_id: int
    annotation_id: int | None
    """None for an image."""
    rule: str
    """A `Rule`, or a `Change`."""


@dataclass(frozen=True, slots=True)
class CleaningReport:
    """Results of cleaning."""

    images_in: int
    images_out: int
    annotations_in: int
    annotations_out: int
    removed: tuple[Removal, ...]
    """Objects by position in the file, then images."""
    changed: tuple[Removal, ...]
    """Fixes of objects that stay."""

    def as_dict(self) -> dict[str, Any]:
        """Counts as plain JSON values, of every rule and every change, including zeros."""
        removed, changed = (Counter(line.rule for line in table) for table in (self.removed, self.changed))
        return {
            "images_in": self.images_in,
            "images_out": self.images_out,
            "annotations_in": self.annotations_in,
            "annotations_out": self.annotations_out,
            "removed": {rule.value: removed[rule.value] for rule in Rule},
            "changed": {change.value: changed[change.value] for change in Change},
        }

    def summary(self) -> str:
        """One line for users."""
        counts = self.as_dict()
        parts = [f"{count} {name}" for part in ("removed", "changed") for name, count in counts[part].items() if count]
        return (
            f"training uses {self.annotations_out} of {self.annotations_in} annotations and {self.images_out} of "
            f"{self.images_in} images ({', '.join(parts) or 'nothing removed or changed'})"
        )


@dataclass(frozen=True, slots=True)
class Cleaned:
    """The result: K objects by image, then by annotation id."""

    kept: NDArray[np.int64]
    """(K,) position of each object in the input."""
    boxes_xyxy: NDArray[np.float64]
    """(K, 4) original pixels."""
    outlines: Sequence[Outline | None]
    """K entries; None where an object has no mask."""
    images: NDArray[np.int64]
    """Positions of the images that stay, ascending."""
    report: CleaningReport


def clean(
    objects: Objects, *, image_ids: Sequence[int], sizes_hw: NDArray[np.float64], settings: CleaningSettings
) -> Cleaned:
    """Apply all rules.

    Args:
        objects: annotated objects of a COCO file.
        image_ids: M ids, which `objects.image_index` refers to.
        sizes_hw: (M, 2); infinite where a size is not stated, which leaves the right and bottom border unchecked.
        settings: which rules apply, and how strictly.
    """
    sizes = sizes_hw[objects.image_index].reshape(-1, 2)
    boxes, inside, broken = judge_boxes(objects, sizes, min_area=settings.min_area)
    changes: list[tuple[int, Change]] = []
    if settings.clip_boxes:
        changes += [(index, Change.CLIPPED_BOX) for index in np.flatnonzero((inside != boxes).any(axis=1)).tolist()]
        boxes = inside
    outlines = _judge_outlines(objects, sizes, settings, broken, changes)
    if settings.duplicate_iou is not None:
        alive = np.array([rule is None for rule in broken], np.bool_)
        for index, _, _ in find_duplicates(objects, boxes, alive, settings.duplicate_iou):
            broken[index] = Rule.DUPLICATE
    kept = np.array([index for index, rule in enumerate(broken) if rule is None], np.int64)
    kept = kept[np.lexsort((objects.ids[kept], objects.image_index[kept]))]
    has_objects = np.zeros(len(image_ids), np.bool_)
    has_objects[objects.image_index[kept]] = True
    images = np.flatnonzero(has_objects | (not settings.drop_empty_images))

    def line(index: int, rule: str) -> Removal:
        return Removal(image_ids[int(objects.image_index[index])], int(objects.ids[index]), str(rule))

    removed = [line(index, rule) for index, rule in enumerate(broken) if rule is not None]
    if settings.drop_empty_images:
        removed += [Removal(image_ids[i], None, str(Rule.EMPTY_IMAGE)) for i in np.flatnonzero(~has_objects).tolist()]
    return Cleaned(
        kept=kept,
        boxes_xyxy=boxes[kept],
        outlines=[outlines[index] for index in kept.tolist()],
        images=images,
        report=CleaningReport(
            images_in=len(image_ids),
            images_out=len(images),
            annotations_in=len(objects),
            annotations_out=len(kept),
            removed=tuple(removed),
            changed=tuple(line(index, change) for index, change in sorted(changes) if broken[index] is None),
        ),
    )


def judge_boxes(
    objects: Objects, sizes_hw: NDArray[np.float64], *, min_area: float, off: Collection[Rule] = ()
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Rule | None]]:
    """Apply the rules for boxes, `CROWD` to `SMALL`; segmentations are not checked.

    Args:
        objects: N objects.
        sizes_hw: (N, 2) size of each object's image; infinite where it is not stated.
        min_area: threshold of `SMALL`.
        off: rules that are not applied. Objects that violate one of them are judged by the others.

    Returns:
        (N, 4) boxes, original pixels, NaN without one; (N, 4) their parts inside the image; N times the first rule that
        is violated.
    """
    bboxes, areas = objects.bboxes, objects.areas
    with np.errstate(invalid="ignore", over="ignore"):
        boxes = np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)
        limits = sizes_hw[:, [1, 0, 1, 0]]
        inside = np.clip(boxes, 0, limits)
        sides = inside[:, 2:] - inside[:, :2]
        none = np.isnan(bboxes).all(axis=1)
        broken = {
            Rule.CROWD: objects.crowd,
            Rule.NO_BOX: none,
            Rule.NON_FINITE: ~(none | np.isfinite(boxes).all(axis=1) & np.isfinite(bboxes).all(axis=1))
            | np.isinf(areas),
            Rule.ZERO_AREA: (bboxes[:, 2:] <= 0).any(axis=1)
            | (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
            | (areas <= 0),
            Rule.OUTSIDE: (boxes[:, :2] >= limits[:, :2]).any(axis=1) | (boxes[:, 2:] <= 0).any(axis=1),
            Rule.SMALL: np.fmin(areas, sides[:, 0] * sides[:, 1]) < min_area,  # fmin ignores NaN: not stated
        }
    first: list[Rule | None] = [None] * len(objects)
    for rule in reversed([rule for rule in broken if rule not in off]):
        for index in np.flatnonzero(broken[rule]).tolist():
            first[index] = rule
    return boxes, inside, first


def _judge_outlines(
    objects: Objects,
    sizes_hw: NDArray[np.float64],
    settings: CleaningSettings,
    broken: list[Rule | None],
    changes: list[tuple[int, Change]],
) -> list[Outline | None]:
    """Convert N outlines; adds to `broken` and `changes`. Objects already removed by another rule are skipped."""
    outlines: list[Outline | None] = [None] * len(objects)
    boxes_only = not any(objects.segmentations)  # all are missing or empty
    for index, segmentation in enumerate(objects.segmentations):
        if broken[index] is not None or segmentation is None or (boxes_only and segmentation == []):
            continue
        height, width = sizes_hw[index].tolist()
        try:
            outlines[index], degenerate = read_outline(segmentation, (height, width))
            rule = Rule.EMPTY_SEGMENTATION if outlines[index] is None else None
        except BadSegmentationError:
            rule, degenerate = Rule.BAD_SEGMENTATION, 0
        if rule is not None and settings.drop_bad_masks:
            broken[index] = rule
        elif rule is not None:
            changes.append((index, Change.DROPPED_MASK))
        elif degenerate:
            changes.append((index, Change.DROPPED_POLYGON))
    return outlines


def find_duplicates(
    objects: Objects, boxes_xyxy: NDArray[np.float64], alive: NDArray[np.bool_], iou: float
) -> Iterator[tuple[int, int, float]]:
    """Find objects whose box repeats that of an object of the same image and category that stays.

    Args:
        objects: N objects.
        boxes_xyxy: (N, 4) original pixels.
        alive: (N,) which objects take part; the others are neither duplicates nor cause duplicates.
        iou: boxes with a greater IoU are duplicates.

    Yields:
        Position of the duplicate, position of the remaining object that overlaps it most, their IoU. Objects are
        visited by ascending annotation id; one is a duplicate if its IoU with an object that stayed is greater than
        `iou`.
    """
    index = np.flatnonzero(alive)
    order = index[np.lexsort((objects.ids[index], objects.labels[index], objects.image_index[index]))]
    keys = np.stack([objects.image_index[order], objects.labels[order]], axis=1)
    borders = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    for group in np.split(order, borders):
        if len(group) < 2:
            continue
        overlaps = _iou_matrix(boxes_xyxy[group])
        if np.count_nonzero(overlaps > iou) <= len(group):  # each box with itself
            continue
        stays = np.ones(len(group), np.bool_)
        for place in range(1, len(group)):
            with_stayers = np.where(stays[:place], overlaps[place, :place], 0.0)
            most = int(with_stayers.argmax())
            if with_stayers[most] > iou:
                stays[place] = False
                yield int(group[place]), int(group[most]), float(with_stayers[most])


def _iou_matrix(boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, N) IoU of (N, 4) boxes with area."""
    top_left = np.maximum(boxes_xyxy[:, None, :2], boxes_xyxy[None, :, :2])
    bottom_right = np.minimum(boxes_xyxy[:, None, 2:], boxes_xyxy[None, :, 2:])
    shared = np.clip(bottom_right - top_left, 0, None).prod(axis=2)  # (N, N)
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    union: NDArray[np.float64] = area[:, None] + area[None, :] - shared
    return shared / union
