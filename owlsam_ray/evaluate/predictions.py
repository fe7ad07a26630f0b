"""Predictions, read and checked: COCO results, or labels with scores as `reduce` writes them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from owlsam_ray.errors import InputError
from owlsam_ray.evaluate.ground_truth import (
    GroundTruth,
    check_ids,
    named_entries,
    read_categories,
    read_images,
    read_json,
)
from owlsam_ray.evaluate.regions import Region, box_of, is_number, rle_area, rle_box, rle_of
from owlsam_ray.evaluate.translation import Translation, fitting_mapping, translation
from owlsam_ray.settings import MappingName
from owlsam_ray.vocabulary.names import fold_category, same_things


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions under the ground truth's ids."""

    url: str
    regions: list[Region]
    """In the file's order."""
    labelled: frozenset[int] | None = None
    """The ground truth's image ids that the file lists; None for a bare list of results."""
    info: dict[str, Any] = field(default_factory=dict)
    """`info` of a COCO file."""
    translation: Translation | None = None
    """Where the categories were another dataset's."""


@dataclass(frozen=True, slots=True)
class _Ids:
    """Ids of the file → ids of the ground truth."""

    images: dict[int, int]
    categories: dict[int, int]
    translation: Translation | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    """Of the file's categories."""
    hint: str = ""
    """What to do about a category that is not listed."""

    def left_out(self) -> tuple[dict[int, str], Counter[str], str]:
        """Category ids of what is left out, with names; where it is counted; who lists the categories."""
        each = self.translation
        return (each.without, each.left_out, each.lister) if each else ({}, Counter(), "the ground truth")


def load_predictions(url: str, truth: GroundTruth, *, masks: bool, mapping: MappingName | None = None) -> Predictions:
    """Read COCO results (a list), or a COCO file whose annotations have scores.

    Args:
        url: path or fsspec URL.
        truth: whose images and categories the predictions must be of. Those of a COCO file go by file name and by
            category name, so that ids may differ; where the names tell nothing, by id.
        masks: read the segmentations. A prediction without one is kept, without a mask.
        mapping: the predictions are of another dataset's categories; they get the ground truth's. Those of a category
            without a counterpart are left out, counted, and told in the log. See `evaluate.translation`.

    Boxes are read where they stand; else they are drawn around the masks. A prediction's `area` is, as in pycocotools,
    w × h of its box in a list whose first entry has a box; else the pixels of its mask.

    Raises:
        InputError: the file cannot be read, or an entry is malformed or of another dataset; names it.
    """
    tree = read_json(url)
    if isinstance(tree, list):
        by_box = bool(tree) and isinstance(tree[0], dict) and bool(tree[0].get("bbox"))
        translated = translation(mapping, _used_ids(tree), truth, url) if mapping else None
        ids = _Ids(
            images={each: each for each in truth.images},
            categories=translated.ids if translated else {each: each for each in truth.categories},
            translation=translated,
            hint=translated.hint if translated else "",
        )
        regions = _regions(tree, url, "", truth, ids, masks=masks, by_box=by_box)
        return Predictions(url, regions, translation=translated)
    if not isinstance(tree, dict) or not isinstance(tree.get("annotations"), list):
        raise InputError(f"{url} is neither a list of COCO results nor a COCO file with `annotations`")
    listed, info = tree.get("images"), tree.get("info")
    images = dict(read_images(listed if isinstance(listed, list) else [], url))
    image_ids = same_things(
        {each: image.file_name or "" for each, image in images.items()},
        {each: image.file_name or "" for each, image in truth.images.items()},
        fold=str,
        what=f"images of {url}",
    )
    names = {each: category.name for each, category in read_categories(tree.get("categories"), url, lvis=False)}
    translated = translation(mapping, names, truth, url) if mapping else None
    category_ids = (
        translated.ids
        if translated
        else same_things(
            names,
            {each: category.name for each, category in truth.categories.items()},
            fold=fold_category,
            what=f"categories of {url}",
        )
    )
    fitting = None if translated else fitting_mapping(names, truth)
    hint = f": its categories are another dataset's, set evaluate.mapping to {fitting}" if fitting else ""
    ids = _Ids(image_ids, category_ids, translated, names=names, hint=hint)
    return Predictions(
        url,
        _regions(tree["annotations"], url, "annotations", truth, ids, masks=masks, by_box=False),
        labelled=frozenset(image_ids.values()),
        info=info if isinstance(info, dict) else {},
        translation=translated,
    )


def _used_ids(results: list[Any]) -> frozenset[int]:
    ids = (entry.get("category_id") for entry in results if isinstance(entry, dict))
    return frozenset(each for each in ids if isinstance(each, int))


def _regions(
    entries: list[Any],
    url: str,
    key: str,
    truth: GroundTruth,
    ids: _Ids,
    *,
    masks: bool,
    by_box: bool,
) -> list[Region]:
    regions = []
    without, left_out, lister = ids.left_out()
    known = ids.categories.keys() | without.keys()
    for where, entry in named_entries(entries, key, url):
        check_ids(entry, where, images=ids.images, categories=known, lister=lister, names=ids.names, hint=ids.hint)
        image_id, category_id = ids.images[entry["image_id"]], entry["category_id"]
        if category_id in without:
            left_out[without[category_id]] += 1
            continue
        try:
            box, area, rle = _shape(entry, truth.images[image_id].size_hw, masks=masks, by_box=by_box)
            score = _score(entry.get("score"))
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        regions.append(Region(image_id, ids.categories[category_id], box, area, rle, score))
    if ids.translation:
        ids.translation.tell(url, num_kept=len(regions))
    return regions


def _shape(
    entry: dict[str, Any], size_hw: tuple[int, int] | None, *, masks: bool, by_box: bool
) -> tuple[tuple[float, float, float, float], float, dict[str, Any] | None]:
    bbox, segmentation = entry.get("bbox"), entry.get("segmentation")
    if not bbox and not segmentation:
        raise ValueError("neither bbox nor segmentation")
    rle = rle_of(segmentation, size_hw) if segmentation and (masks or not bbox) else None
    if rle is None:
        box = box_of(bbox)
        return box, box[2] * box[3], None
    box = box_of(bbox) if bbox else rle_box(rle)
    return box, box[2] * box[3] if by_box else rle_area(rle), rle if masks else None


def _score(value: object) -> float:
    if not is_number(value):
        raise ValueError(f"score {value!r} is not a finite number, and every prediction needs one")
    return float(value)
