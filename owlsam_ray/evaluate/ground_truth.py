"""A ground truth, read and checked: what is wrong is told by file, entry and value."""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, TypeGuard

from owlsam_ray import storage
from owlsam_ray.errors import InputError
from owlsam_ray.evaluate.regions import NoOutlineError, Region, Rle, box_of, is_number, rle_area, rle_of

FREQUENCIES = ("r", "c", "f")
"""LVIS: rare, common, frequent."""
NO_GROUP = "(none)"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvaluatedCategory:
    """A category of the ground truth."""

    name: str
    group: str
    """Its supercategory; `NO_GROUP` without one."""
    frequency: str | None
    """LVIS's r, c or f; None for COCO."""


@dataclass(frozen=True, slots=True)
class EvaluatedImage:
    """An image of the ground truth."""

    file_name: str | None
    size_hw: tuple[int, int] | None
    """(H, W); None where the file does not state it."""
    negative: frozenset[int] = frozenset()
    """LVIS: categories that are known to be absent."""
    not_exhaustive: frozenset[int] = frozenset()
    """LVIS: categories of which not every object is annotated."""


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """A COCO or LVIS file."""

    url: str
    images: dict[int, EvaluatedImage]
    """By id."""
    categories: dict[int, EvaluatedCategory]
    """By id, in the file's order."""
    objects: list[Region]
    """In the file's order; at least one."""
    has_masks: bool
    """Whether masks were read; an object whose segmentation encloses nothing has none all the same."""
    is_lvis: bool
    """Whether only some categories were looked for in each image."""

    def with_masks(self) -> Self:
        """Without the objects that have no mask; maybe none is left."""
        return replace(self, objects=[each for each in self.objects if each.rle is not None])


def load_ground_truth(url: str, *, masks: bool, lvis: bool = False) -> GroundTruth:
    """Read a COCO or LVIS file. Ids of annotations are not used: they may be 0 or repeat.

    Args:
        url: path or fsspec URL.
        masks: read the segmentations, unless not one annotation has any. An object of which nothing is drawn (no
            `segmentation`, an empty one, polygons of fewer than three points) is kept for its box, and a log line says
            so. What pycocotools can draw is an object for masks too, be its mask empty.
        lvis: evaluate as LVIS does; without it, that is so when an image has `neg_category_ids`.

    Raises:
        InputError: the file cannot be read, has no annotations, or an entry is malformed; names it.
    """
    tree = read_json(url)
    if not isinstance(tree, dict) or not isinstance(tree.get("images"), list):
        raise InputError(f"{url} is no COCO file: it has no list `images`")
    annotations = tree.get("annotations")
    if not isinstance(annotations, list) or not annotations:
        raise InputError(f"{url} holds no annotations: name a ground truth that has some")
    images = dict(read_images(tree["images"], url))
    is_lvis = lvis or any("neg_category_ids" in image for image in tree["images"])
    categories = dict(read_categories(tree.get("categories"), url, lvis=is_lvis))
    masks = masks and any(isinstance(entry, dict) and entry.get("segmentation") for entry in annotations)
    objects = []
    for where, entry in named_entries(annotations, "annotations", url):
        check_ids(entry, where, images=images, categories=categories)
        objects.append(_object(entry, where, images[entry["image_id"]].size_hw, masks=masks))
    has_masks = any(each.rle is not None for each in objects)
    if has_masks:
        _warn_of_missing_masks(url, annotations, objects)
    return GroundTruth(url, images, categories, objects, has_masks=has_masks, is_lvis=is_lvis)


def read_json(url: str) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it cannot be read or parsed.
    """
    try:
        return json.loads(storage.read_bytes(url))
    except OSError as error:
        raise InputError(f"cannot read {url}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{url} is not valid JSON: {error}") from None


def named_entries(values: list[Any], key: str, url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a list, with the words that name it.

    Raises:
        InputError: one is no object.
    """
    for position, value in enumerate(values):
        where = f"{url}: {key}[{position}]"
        if not isinstance(value, dict):
            raise InputError(f"{where} is a {type(value).__name__}, not an object")
        yield where, value


def read_images(values: list[Any], url: str) -> Iterator[tuple[int, EvaluatedImage]]:
    """Images by id.

    Raises:
        InputError: an id is no integer or repeats, or a list of LVIS's is malformed.
    """
    seen: set[int] = set()
    for where, image in named_entries(values, "images", url):
        image_id, name = image.get("id"), image.get("file_name")
        if not _is_id(image_id) or image_id in seen:
            raise InputError(f"{where} has the id {image_id!r}, which is no integer or is given twice")
        seen.add(image_id)
        yield (
            image_id,
            EvaluatedImage(
                file_name=name if isinstance(name, str) else None,
                size_hw=_size(image),
                negative=_ids(image, "neg_category_ids", where),
                not_exhaustive=_ids(image, "not_exhaustive_category_ids", where),
            ),
        )


def read_categories(values: Any, url: str, *, lvis: bool) -> Iterator[tuple[int, EvaluatedCategory]]:
    """Categories by id.

    Raises:
        InputError: there are none, an id is no integer or repeats, a name or (for LVIS) a frequency is missing.
    """
    if not isinstance(values, list) or not values:
        raise InputError(f"{url} has no `categories`")
    seen: set[int] = set()
    for where, category in named_entries(values, "categories", url):
        category_id, name, group = category.get("id"), category.get("name"), category.get("supercategory")
        if not _is_id(category_id) or category_id in seen:
            raise InputError(f"{where} has the id {category_id!r}, which is no integer or is given twice")
        if not isinstance(name, str):
            raise InputError(f"{where} (id {category_id}) has no name")
        frequency = category.get("frequency") if lvis else None
        if lvis and frequency not in FREQUENCIES:
            raise InputError(f"{where} ({name}): LVIS needs a frequency of r, c or f, not {frequency!r}")
        seen.add(category_id)
        yield category_id, EvaluatedCategory(name, group if isinstance(group, str) and group else NO_GROUP, frequency)


def check_ids(
    entry: dict[str, Any],
    where: str,
    *,
    images: Collection[int],
    categories: Collection[int],
    lister: str = "the ground truth",
    names: Mapping[int, str] | None = None,
    hint: str = "",
) -> None:
    """Refuse an annotation of something that is not listed.

    Args:
        entry: the annotation.
        where: words for it.
        images: ids that are listed.
        categories: ids that are listed.
        lister: words for who lists the categories.
        names: of categories that may not be listed.
        hint: what to do about a category that is not listed; the end of the sentence.

    Raises:
        InputError: names the entry.
    """
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if not _is_id(image_id) or image_id not in images:
        raise InputError(f"{where} is of image {image_id!r}, which the ground truth does not list")
    if not _is_id(category_id) or category_id not in categories:
        name = names.get(category_id) if names and _is_id(category_id) else None
        called = f" ({name!r})" if name else ""
        raise InputError(f"{where} is of category {category_id!r}{called}, which {lister} does not list{hint}")


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(image: dict[str, Any], key: str, where: str) -> frozenset[int]:
    values = image.get(key) or []
    if not isinstance(values, list) or not all(_is_id(value) for value in values):
        raise InputError(f"{where}: {key} is not a list of category ids")
    return frozenset(values)


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    if not _is_id(height) or not _is_id(width) or not 0 < height < 2**20 or not 0 < width < 2**20:
        return None
    return (height, width)


def _object(entry: dict[str, Any], where: str, size_hw: tuple[int, int] | None, *, masks: bool) -> Region:
    try:
        box = box_of(entry.get("bbox"))
        rle = _mask(entry.get("segmentation"), size_hw) if masks else None
    except ValueError as error:
        raise InputError(f"{where} (id {entry.get('id')!r}): {error}") from None
    area = entry.get("area")
    if area is None:
        area = rle_area(rle) if rle is not None else box[2] * box[3]
    if not is_number(area):
        raise InputError(f"{where} (id {entry.get('id')!r}): area {area!r} is not a finite number")
    return Region(
        image_id=entry["image_id"],
        category_id=entry["category_id"],
        box_xywh=box,
        area=float(area),
        rle=rle,
        is_crowd=bool(entry.get("iscrowd")),
    )


def _mask(segmentation: object, size_hw: tuple[int, int] | None) -> Rle | None:
    """None where the file draws nothing."""
    if segmentation is None or segmentation == []:
        return None
    try:
        return rle_of(segmentation, size_hw)
    except NoOutlineError:
        return None


def _warn_of_missing_masks(url: str, annotations: list[dict[str, Any]], objects: list[Region]) -> None:
    without = [entry.get("id") for entry, each in zip(annotations, objects, strict=True) if each.rle is None]
    if without:
        _log.warning(
            "%s: the segmentations of %d of %d annotations draw nothing (the first is id %r): boxes count, masks do "
            "without them", url, len(without), len(objects), without[0],
        )  # fmt: skip
