"""Read and check predictions: COCO results, or labels with scores as `reduce` writes them."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from owlsam_ray.coco_files.regions import Region, box_of, is_number, rle_area, rle_box, rle_of
from owlsam_ray.config.vocabulary import MappingName
from owlsam_ray.errors import InputError, shown
from owlsam_ray.evaluate.ground_truth import (
    GroundTruth,
    check_ids,
    is_id,
    named_entries,
    read_categories,
    read_images,
    read_json,
)
from owlsam_ray.evaluate.pairing import contradiction, pair_categories, pair_images
from owlsam_ray.evaluate.translation import Translation, fitting_mapping, translation

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions under the ground truth's ids."""

    url: str
    regions: list[Region]
    """Predictions in the file's order."""
    labelled: frozenset[int] | None = None
    """The ground truth's image ids that the file lists; None for a bare list of results, which lists no images."""
    failed: frozenset[int] = frozenset()
    """The ground truth's image ids that failed in the run."""
    num_images_left_out: int = 0
    """Number of images in the file, or in the entries of a bare list, that the ground truth does not list."""
    num_left_out: int = 0
    """Number of predictions of these images."""
    info: dict[str, Any] = field(default_factory=dict)
    """`info` of a COCO file."""
    translation: Translation | None = None
    """Set if the categories are another dataset's."""


@dataclass(frozen=True, slots=True)
class _Ids:
    """Map ids of the file to ids of the ground truth."""

    images: dict[int, int]
    """Images that the ground truth lists."""
    listed: Collection[int] | None
    """All image ids of the file; None for a bare list, whose entries may be of any image."""
    categories: dict[int, int]
    translation: Translation | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    """Names of the file's categories."""
    hint: str = ""
    """What to do about a category that is not listed."""
    contradictions: Mapping[int, tuple[int, str, str]] = field(default_factory=dict)
    """See `CategoryPairs`."""
    images_left_out: Counter[int] = field(default_factory=Counter)
    """Number of predictions for each image of the file that the ground truth does not list; filled while reading."""

    def left_out(self) -> tuple[dict[int, str], Counter[str], str]:
        """Names by id of the categories to leave out, the counter for them, and the source that lists categories."""
        each = self.translation
        return (each.without, each.left_out, each.lister) if each else ({}, Counter(), "the ground truth")


def load_predictions(
    url: str,
    truth: GroundTruth,
    *,
    masks: bool,
    mapping: MappingName | None = None,
    failed: Mapping[int, str] = MappingProxyType({}),
) -> Predictions:
    """Read COCO results (a list), or a COCO file whose annotations have scores.

    Args:
        url: path or fsspec URL.
        truth: the ground truth whose images and categories the predictions must be of. Images and categories of a COCO
            file are paired by name, so that ids may differ (see `pairing.py`); those of a list have only ids.
        masks: read the segmentations. A prediction without one is kept, without a mask.
        mapping: the predictions are of another dataset's categories and are mapped to the ground truth's. Those of a
            category without a counterpart are left out, counted and logged. See `evaluate.translation`.
        failed: file names by id of images that the file leaves out because the run failed on them.

    Boxes are read if present, else drawn around the masks. A prediction's `area` is, as in pycocotools, w × h of its
    box in a list whose first entry has a box; else the pixels of its mask. Predictions of images that the ground truth
    does not list are counted and left out.

    Raises:
        InputError: the file cannot be read, an entry is malformed or of another dataset, or none of the images is in
            the ground truth; names the entry.
    """
    tree = read_json(url)
    if isinstance(tree, list):
        return _results(tree, url, truth, masks=masks, mapping=mapping)
    if not isinstance(tree, dict) or not isinstance(tree.get("annotations"), list):
        raise InputError(f"{url} is neither a list of COCO results nor a COCO file with `annotations`")
    listed, info = tree.get("images"), tree.get("info")
    images = {each: image.names for each, image in read_images(listed if isinstance(listed, list) else [], url)}
    pairs = pair_images(
        images | {each: (name,) for each, name in failed.items() if each not in images},
        {each: image.names for each, image in truth.images.items()},
        what=f"images of {url}",
        lister=truth.url,
    )
    image_ids = {theirs: ours for theirs, ours in pairs.ids.items() if theirs in images}
    if pairs.num_repeated:
        _log.warning("%d images of %s have the name of an earlier one: only the first counts", pairs.num_repeated, url)
    if not pairs.ids:
        raise InputError(
            f"none of the {len(images)} images of {url} is one of the {len(truth.images)} of {truth.url} "
            f"({_first(images)} against {_first({each: image.names for each, image in truth.images.items()})}): "
            "give the ground truth of these images, with their file names or ids"
        )
    ids = _ids_of(tree, url, truth, image_ids, images, mapping)
    regions = _regions(tree["annotations"], url, "annotations", truth, ids, masks=masks, by_box=False)
    return Predictions(
        url,
        regions,
        labelled=frozenset(image_ids.values()),
        failed=frozenset(pairs.ids.values()) - frozenset(image_ids.values()),
        num_images_left_out=len(images) - len(image_ids),
        num_left_out=ids.images_left_out.total(),
        info=info if isinstance(info, dict) else {},
        translation=ids.translation,
    )


def _results(
    results: list[Any], url: str, truth: GroundTruth, *, masks: bool, mapping: MappingName | None
) -> Predictions:
    """Read a bare list.

    Raises:
        InputError: an entry is malformed or of another dataset, or none is of an image of the ground truth.
    """
    by_box = bool(results) and isinstance(results[0], dict) and bool(results[0].get("bbox"))
    translated = translation(mapping, _used_ids(results), truth, url) if mapping else None
    ids = _Ids(
        images={each: each for each in truth.images},
        listed=None,
        categories=translated.ids if translated else {each: each for each in truth.categories},
        translation=translated,
        hint=translated.hint if translated else "",
    )
    regions = _regions(results, url, "", truth, ids, masks=masks, by_box=by_box)
    strangers = ids.images_left_out
    if results and strangers.total() == len(results):
        first, here = next(iter(strangers)), next(iter(truth.images), None)
        raise InputError(
            f"none of the {len(strangers)} images of {url} is one of the {len(truth.images)} of {truth.url} (the first "
            f"ids: {first} against {here}): give the ground truth of these results, which have only ids"
        )
    without = len(truth.images.keys() - {entry["image_id"] for entry in results})
    if without:
        _log.warning(
            "%d of the ground truth's %d images have no result in %s, and count as images without detections: a list "
            "of results does not say which images were processed", without, len(truth.images), url,
        )  # fmt: skip
    return Predictions(
        url, regions, num_images_left_out=len(strangers), num_left_out=strangers.total(), translation=translated
    )


def _ids_of(
    tree: dict[str, Any],
    url: str,
    truth: GroundTruth,
    image_ids: dict[int, int],
    listed: Collection[int],
    mapping: MappingName | None,
) -> _Ids:
    """Map the ids of a COCO file."""
    names = {each: category.name for each, category in read_categories(tree.get("categories"), url, lvis=False)}
    if mapping:
        translated = translation(mapping, names, truth, url)
        return _Ids(image_ids, listed, translated.ids, translated, names=names)
    pairs = pair_categories(
        names, {each: category.name for each, category in truth.categories.items()}, what=f"categories of {url}"
    )
    fitting = fitting_mapping(names, truth)
    hint = f": its categories are another dataset's, set evaluate.mapping to {fitting}" if fitting else ""
    return _Ids(image_ids, listed, pairs.ids, names=names, hint=hint, contradictions=pairs.contradictions)


def _first(images: Mapping[int, Sequence[str]]) -> str:
    """Describe the first image, for a message."""
    for each, names in images.items():
        return f"id {each} {shown(names[0], 80)}" if names else f"id {each}"
    return "none"


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
    _refuse_contradictions(entries, url, truth, ids)
    for where, entry in named_entries(entries, key, url):
        # An image that is not in the ground truth may show categories that are not in it either.
        if is_id(entry.get("image_id")) and entry["image_id"] not in ids.images and _may_be_of(entry, ids.listed):
            ids.images_left_out[entry["image_id"]] += 1
            continue
        check_ids(
            entry, where, images=ids.images, image_lister="the file", categories=known, lister=lister, names=ids.names,
            hint=ids.hint,
        )  # fmt: skip
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
        ids.translation.log_left_out(url, num_kept=len(regions))
    return regions


def _may_be_of(entry: dict[str, Any], listed: Collection[int] | None) -> bool:
    return listed is None or entry["image_id"] in listed


def _refuse_contradictions(entries: list[Any], url: str, truth: GroundTruth, ids: _Ids) -> None:
    """Refuse predictions of categories whose ids and names contradict each other.

    Raises:
        InputError: names three of them.
    """
    if not ids.contradictions:
        return
    used = {each for each in _used_ids(entries) if each in ids.contradictions}
    if used:
        way_out = "give both the same names, or ids that differ" if not ids.hint else ids.hint.removeprefix(": ")
        raise InputError(
            contradiction(
                [ids.contradictions[each] for each in sorted(used)],
                what=f"categories of {url}", lister=truth.url, way_out=way_out,
            )
        )  # fmt: skip


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
        raise ValueError(f"score {shown(value)} is not a finite number, and every prediction needs one")
    return float(value)
