"""Read and check a ground truth; errors name the file, the entry and the value."""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, TypeGuard

from owlsam_ray import storage
from owlsam_ray.coco_files.fields import flag_of
from owlsam_ray.coco_files.images import text_of, url_parts
from owlsam_ray.coco_files.regions import NoOutlineError, Region, Rle, box_of, is_number, rle_area, rle_of
from owlsam_ray.coco_files.stated_size import stated_side
from owlsam_ray.errors import InputError, shown

FREQUENCIES = ("r", "c", "f")
"""LVIS: rare, common, frequent."""
NO_GROUP = "(none)"
_MAX_SIDE = 2**20
"""In pixels: the code that draws masks counts them in 32 bits."""
_OF_2014 = re.compile(r"(^|/)COCO_(?:train|val|test)2014_(?=\d+\.)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvaluatedCategory:
    """A category of the ground truth."""

    name: str
    group: str
    """Supercategory; `NO_GROUP` if there is none."""
    frequency: str | None
    """LVIS's r, c or f; None for COCO."""


@dataclass(frozen=True, slots=True)
class EvaluatedImage:
    """An image of the ground truth."""

    names: tuple[str, ...]
    """Spellings of its file name, if the file states any: `file_name`, the end of LVIS's `coco_url`, and for names of
    2014 the number alone (COCO_val2014_000000000073.jpg)."""
    size_hw: tuple[int, int] | None
    """(H, W); None if the file does not state it."""
    negative: frozenset[int] = frozenset()
    """LVIS: categories that are known to be absent."""
    not_exhaustive: frozenset[int] = frozenset()
    """LVIS: categories of which not every object is annotated."""


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """A COCO or LVIS file."""

    url: str
    images: dict[int, EvaluatedImage]
    """Images by id."""
    categories: dict[int, EvaluatedCategory]
    """Categories by id, in the file's order."""
    objects: list[Region]
    """Objects in the file's order; at least one."""
    has_masks: bool
    """Whether masks were read; an object whose segmentation encloses nothing has no mask even so."""
    is_lvis: bool
    """Whether only some categories were annotated in each image."""

    def of_images(self, images: Collection[int]) -> Self:
        """Keep only these images and their objects; may leave none."""
        if len(images) == len(self.images):
            return self
        chosen = frozenset(images)
        return replace(
            self,
            images={each: image for each, image in self.images.items() if each in chosen},
            objects=[each for each in self.objects if each.image_id in chosen],
        )

    def with_masks(self) -> Self:
        """Drop the objects that have no mask; may leave none."""
        return replace(self, objects=[each for each in self.objects if each.rle is not None])


def load_ground_truth(url: str, *, masks: bool, lvis: bool = False) -> GroundTruth:
    """Read a COCO or LVIS file. Annotation ids are not used: they may be 0 or repeat.

    Args:
        url: path or fsspec URL.
        masks: read the segmentations, unless no annotation has any. An object without a drawable shape (no
            `segmentation`, an empty one, polygons of fewer than three points) is kept for its box, and this is logged.
            What pycocotools can draw is an object for masks too, even if its mask is empty.
        lvis: evaluate as LVIS does; also set when an image has `neg_category_ids`.

    Raises:
        InputError: the file cannot be read, has no annotations, or an entry is malformed; names the entry.
    """
    tree = read_json(url)
    if not isinstance(tree, dict) or not isinstance(tree.get("images"), list):
        raise InputError(f"{url} is not a COCO file: it has no list `images`")
    annotations = tree.get("annotations")
    if not isinstance(annotations, list) or not annotations:
        raise InputError(f"{url} holds no annotations: give a ground truth that has some")
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
    """Read the content of a JSON file.

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
    """Yield each object of a list, with a description that names it.

    Raises:
        InputError: an element is not an object.
    """
    for position, value in enumerate(values):
        where = f"{url}: {key}[{position}]"
        if not isinstance(value, dict):
            raise InputError(f"{where} is a {type(value).__name__}, not an object")
        yield where, value


def read_images(values: list[Any], url: str) -> Iterator[tuple[int, EvaluatedImage]]:
    """Read images by id.

    Raises:
        InputError: an id is not an integer or repeats, or one of LVIS's lists is malformed.
    """
    seen: set[int] = set()
    for where, image in named_entries(values, "images", url):
        image_id = image.get("id")
        if not is_id(image_id) or image_id in seen:
            raise InputError(f"{where} has the id {shown(image_id)}, which is not an integer or is used twice")
        seen.add(image_id)
        yield (
            image_id,
            EvaluatedImage(
                names=_spellings(image),
                size_hw=_size(image),
                negative=_ids(image, "neg_category_ids", where),
                not_exhaustive=_ids(image, "not_exhaustive_category_ids", where),
            ),
        )


def read_categories(values: Any, url: str, *, lvis: bool) -> Iterator[tuple[int, EvaluatedCategory]]:
    """Read categories by id.

    Raises:
        InputError: there are none, an id is not an integer or repeats, a name or (for LVIS) a frequency is missing.
    """
    if not isinstance(values, list) or not values:
        raise InputError(f"{url} has no `categories`")
    seen: set[int] = set()
    for where, category in named_entries(values, "categories", url):
        category_id, name, group = category.get("id"), category.get("name"), category.get("supercategory")
        if not is_id(category_id) or category_id in seen:
            raise InputError(f"{where} has the id {shown(category_id)}, which is not an integer or is used twice")
        if not isinstance(name, str):
            raise InputError(f"{where} (id {category_id}) has no name")
        frequency = category.get("frequency") if lvis else None
        if lvis and frequency not in FREQUENCIES:
            raise InputError(f"{where} ({shown(name)}): LVIS needs a frequency of r, c or f, not {shown(frequency)}")
        seen.add(category_id)
        yield category_id, EvaluatedCategory(name, group if isinstance(group, str) and group else NO_GROUP, frequency)


def check_ids(
    entry: dict[str, Any],
    where: str,
    *,
    images: Collection[int] | None,
    categories: Collection[int],
    image_lister: str = "the ground truth",
    lister: str = "the ground truth",
    names: Mapping[int, str] | None = None,
    hint: str = "",
) -> None:
    """Refuse an annotation whose image or category is not listed.

    Args:
        entry: the annotation.
        where: description of the annotation.
        images: ids that are listed; None: any integer.
        categories: ids that are listed.
        image_lister: name of the source that lists the images.
        lister: name of the source that lists the categories.
        names: names of categories that may not be listed.
        hint: what to do about a category that is not listed; the end of the sentence.

    Raises:
        InputError: names the entry.
    """
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if not is_id(image_id) or (images is not None and image_id not in images):
        raise InputError(f"{where} has image {shown(image_id)}, which {image_lister} does not list")
    if not is_id(category_id) or category_id not in categories:
        name = names.get(category_id) if names and is_id(category_id) else None
        called = f" ({shown(name)})" if name else ""
        raise InputError(f"{where} has category {shown(category_id)}{called}, which {lister} does not list{hint}")


def is_id(value: object) -> TypeGuard[int]:
    """Whether a JSON value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(image: dict[str, Any], key: str, where: str) -> frozenset[int]:
    values = image.get(key) or []
    if not isinstance(values, list) or not all(is_id(value) for value in values):
        raise InputError(f"{where}: {key} is not a list of category ids")
    return frozenset(values)


def _spellings(image: dict[str, Any]) -> tuple[str, ...]:
    stated, parts = text_of(image, "file_name"), url_parts(image)
    names = [name for name in (stated, "/".join(parts) if parts else None) if name]
    return tuple(dict.fromkeys([*names, *(_OF_2014.sub(r"\1", name) for name in names)]))


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """(H, W); None if the file does not state both in pixels, which only masks need."""
    try:
        height, width = (stated_side(image.get(name)) for name in ("height", "width"))
    except ValueError:
        return None
    if height is None or width is None or max(height, width) >= _MAX_SIDE:
        return None
    return (height, width)


def _object(entry: dict[str, Any], where: str, size_hw: tuple[int, int] | None, *, masks: bool) -> Region:
    try:
        box = box_of(entry.get("bbox"))
        rle = _mask(entry.get("segmentation"), size_hw) if masks else None
    except ValueError as error:
        raise InputError(f"{where} (id {shown(entry.get('id'))}): {error}") from None
    area = entry.get("area")
    if area is None:
        area = rle_area(rle) if rle is not None else box[2] * box[3]
    if not is_number(area):
        raise InputError(f"{where} (id {shown(entry.get('id'))}): area {shown(area)} is not a finite number")
    return Region(
        image_id=entry["image_id"],
        category_id=entry["category_id"],
        box_xywh=box,
        area=float(area),
        rle=rle,
        is_crowd=_crowd(entry, where),
    )


def _crowd(entry: dict[str, Any], where: str) -> bool:
    is_crowd = flag_of(entry.get("iscrowd"))
    if is_crowd is None:
        raise InputError(
            f"{where} (id {shown(entry.get('id'))}): iscrowd {shown(entry['iscrowd'])} is neither 0 nor 1, nor true or "
            "false"
        )
    return is_crowd


def _mask(segmentation: object, size_hw: tuple[int, int] | None) -> Rle | None:
    """None if the file draws nothing."""
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
            "%s: the segmentations of %d of %d annotations are empty (the first: id %r): their boxes count, but "
            "masks are evaluated without them", url, len(without), len(objects), without[0],
        )  # fmt: skip
