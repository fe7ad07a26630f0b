"""Predictions, read and checked: COCO results, or labels with scores as `reduce` writes them."""

import logging
from collections.abc import Callable
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

_log = logging.getLogger(__name__)


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


def load_predictions(url: str, truth: GroundTruth, *, masks: bool) -> Predictions:
    """Read COCO results (a list), or a COCO file whose annotations have scores.

    Args:
        url: path or fsspec URL.
        truth: whose images and categories the predictions must be of. Those of a COCO file go by file name and by
            category name, so that ids may differ; where the names tell nothing, by id.
        masks: read the segmentations. A prediction without one is kept, without a mask.

    Boxes are read where they stand; else they are drawn around the masks. A prediction's `area` is, as in pycocotools,
    w × h of its box in a list whose first entry has a box; else the pixels of its mask.

    Raises:
        InputError: the file cannot be read, or an entry is malformed or of another dataset; names it.
    """
    tree = read_json(url)
    if isinstance(tree, list):
        by_box = bool(tree) and isinstance(tree[0], dict) and bool(tree[0].get("bbox"))
        image_ids, category_ids = {each: each for each in truth.images}, {each: each for each in truth.categories}
        return Predictions(url, _regions(tree, url, "", truth, image_ids, category_ids, masks, by_box))
    if not isinstance(tree, dict) or not isinstance(tree.get("annotations"), list):
        raise InputError(f"{url} is neither a list of COCO results nor a COCO file with `annotations`")
    listed, info = tree.get("images"), tree.get("info")
    images = dict(read_images(listed if isinstance(listed, list) else [], url))
    image_ids = _same_things(
        {each: image.file_name or "" for each, image in images.items()},
        {each: image.file_name or "" for each, image in truth.images.items()},
        canonical=str,
        what=f"images of {url}",
    )
    category_ids = _same_things(
        {each: category.name for each, category in read_categories(tree.get("categories"), url, lvis=False)},
        {each: category.name for each, category in truth.categories.items()},
        canonical=_canonical,
        what=f"categories of {url}",
    )
    regions = _regions(tree["annotations"], url, "annotations", truth, image_ids, category_ids, masks, False)
    return Predictions(
        url, regions, labelled=frozenset(image_ids.values()), info=info if isinstance(info, dict) else {}
    )


def _regions(
    entries: list[Any],
    url: str,
    key: str,
    truth: GroundTruth,
    image_ids: dict[int, int],
    category_ids: dict[int, int],
    masks: bool,
    by_box: bool,
) -> list[Region]:
    regions = []
    for where, entry in named_entries(entries, key, url):
        check_ids(entry, where, images=image_ids, categories=category_ids)
        image_id = image_ids[entry["image_id"]]
        try:
            box, area, rle = _shape(entry, truth.images[image_id].size_hw, masks=masks, by_box=by_box)
            score = _score(entry.get("score"))
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        regions.append(Region(image_id, category_ids[entry["category_id"]], box, area, rle, score))
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


def _same_things(
    theirs: dict[int, str], ours: dict[int, str], *, canonical: Callable[[str], str], what: str
) -> dict[int, int]:
    """Their ids → ours, by name.

    Args:
        theirs: names by id.
        ours: names by id; of a name that repeats, the first id counts.
        canonical: names are the same when this makes them equal.
        what: words for the log.

    A name that we lack goes by its id, unless another name showed that the ids differ. What has no partner is absent.
    """
    by_name: dict[str, int] = {}
    for each, name in ours.items():
        by_name.setdefault(canonical(name), each)
    found: dict[int, int] = {}
    for each, name in theirs.items():
        if each in ours and canonical(ours[each]) == canonical(name):
            found[each] = each
        elif name and canonical(name) in by_name:
            found[each] = by_name[canonical(name)]
    if any(their_id != our_id for their_id, our_id in found.items()):
        _log.info("%s go by their names: the ids are not the ground truth's", what)
        return found
    renamed = [each for each in theirs if each not in found and each in ours]
    if renamed:
        _log.warning(
            "%d %s go by their ids: the ground truth has other names (id %d is %r there and %r here)",
            len(renamed), what, renamed[0], ours[renamed[0]], theirs[renamed[0]],
        )  # fmt: skip
    return found | {each: each for each in renamed}


def _canonical(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())
