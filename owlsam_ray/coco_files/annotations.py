"""Reads the annotations of a COCO file as columns and checks their structure; `cleaning.py` judges values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.coco_files.fields import flag_of
from owlsam_ray.errors import InputError, raise_problems, shown

_NO_BOX = (math.nan,) * 4


@dataclass(frozen=True, slots=True)
class Objects:
    """N annotated objects in the file's order, with the file's values."""

    ids: NDArray[np.int64]
    """(N,) unique annotation ids."""
    image_index: NDArray[np.int64]
    """(N,) position of the object's image in the listing."""
    labels: NDArray[np.int64]
    """(N,) index into the categories."""
    bboxes: NDArray[np.float64]
    """(N, 4) xywh, original pixels; four NaN where the file gives no box."""
    areas: NDArray[np.float64]
    """(N,) stated area in pixels; NaN where the file states none."""
    crowd: NDArray[np.bool_]
    """(N,) whether `iscrowd` is set."""
    segmentations: Sequence[Any]
    """N values from the file; None where there is none."""

    def __len__(self) -> int:
        return len(self.ids)


def read_objects(tree: dict[str, Any], *, url: str, image_ids: Sequence[int], category_ids: Sequence[int]) -> Objects:
    """Read the `annotations` of a COCO file.

    Args:
        tree: result of `sources.coco.read_tree`.
        url: the file, for messages.
        image_ids: ids in the listing; their order defines `image_index`.
        category_ids: their order defines `labels`.

    Raises:
        InputError: `annotations` is not a list; the id of an entry is invalid or occurs twice, its image or category is
            not in the file, or a field has a wrong type. Names the first problems.
    """
    entries = tree.get("annotations")
    if not isinstance(entries, list):
        raise InputError(f"{url} holds no annotations: training needs a COCO file with a list `annotations`")
    image_at = {number: index for index, number in enumerate(image_ids)}
    label_of = {number: label for label, number in enumerate(category_ids)}
    problems: list[str] = []
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        problem = structure_error(entry) or _repeat_error(entry, seen) or _reference_error(entry, image_at, label_of)
        if problem is not None:
            problems.append(f"annotations[{position}]{problem}")
        else:
            seen.add(entry["id"])
    way_out = (
        "Fix the file: ids must be unique integers, and every annotation must refer to an image and a category of the "
        "file."
    )
    raise_problems(url, problems, way_out, use="trained on")
    return make_objects(
        entries,
        image_index=np.array([image_at[entry["image_id"]] for entry in entries], np.int64),
        labels=np.array([label_of[entry["category_id"]] for entry in entries], np.int64),
        segmentations=[entry.get("segmentation") for entry in entries],
    )


def make_objects(
    entries: Sequence[dict[str, Any]],
    *,
    image_index: NDArray[np.int64],
    labels: NDArray[np.int64],
    segmentations: Sequence[Any],
) -> Objects:
    """Convert N entries that `structure_error` accepts to columns."""
    boxes = [[as_float(value) for value in entry["bbox"]] if entry.get("bbox") else _NO_BOX for entry in entries]
    areas = [math.nan if entry.get("area") is None else as_float(entry["area"]) for entry in entries]
    return Objects(
        ids=np.array([entry["id"] for entry in entries], np.int64),
        image_index=image_index,
        labels=labels,
        bboxes=np.array(boxes, np.float64).reshape(-1, 4),
        areas=np.array(areas, np.float64),
        crowd=np.array([bool(flag_of(entry.get("iscrowd"))) for entry in entries], np.bool_),
        segmentations=segmentations,
    )


def as_float(value: float) -> float:
    """Convert a JSON number; infinite when it is an integer beyond the float range."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def is_number(value: object) -> bool:
    """Whether a value is a JSON number; `true` is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def structure_error(entry: Any) -> str | None:
    """What is wrong with one entry, apart from its references; None when it is valid."""
    if not isinstance(entry, dict):
        return f" is a {type(entry).__name__}, not an object"
    number, bbox, area = entry.get("id"), entry.get("bbox"), entry.get("area")
    if not isinstance(number, int) or isinstance(number, bool) or not -(2**63) <= number < 2**63:
        return f": id {shown(number)} is not an integer"
    if bbox and not (isinstance(bbox, list) and len(bbox) == 4 and all(is_number(value) for value in bbox)):
        return f" (id {number}): bbox {shown(bbox, 80)} is not [x, y, width, height]"
    if area is not None and not is_number(area):
        return f" (id {number}): area {shown(area, 80)} is not a number"
    if flag_of(entry.get("iscrowd")) is None:
        return f" (id {number}): iscrowd {shown(entry['iscrowd'], 80)} is neither 0 nor 1, nor true or false"
    return None


def _repeat_error(entry: dict[str, Any], seen: set[int]) -> str | None:
    return f": id {entry['id']} is given twice" if entry["id"] in seen else None


def _reference_error(entry: dict[str, Any], image_at: dict[int, int], label_of: dict[int, int]) -> str | None:
    """Which id of one entry refers to an unknown image or category; None when both are in the file."""
    for key, known in (("image_id", image_at), ("category_id", label_of)):
        value = entry.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value not in known:
            where = "images" if key == "image_id" else "categories"
            return f" (id {entry['id']}): {key} {shown(value, 80)} is not among the {len(known)} {where} of the file"
    return None
