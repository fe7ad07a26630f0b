"""Lists the images of an Objects365 JSON file, v1 or v2, below its image folders.

File names of v2 say `images/v1/patch8/objects365_v1_00420917.jpg`, while the archives unpack to patch8/…, and the usual
trees are train/patch8/… and val/images/v1/patch8/…. File names of v1 say `obj365_train_000000000001.jpg`, below train/
or val/.

A few images of the annotation files are in none of the archives. Source of the list: loaders of public projects, among
them open-mmlab/mmdetection.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from owlsam_ray.coco_files.images import text_of
from owlsam_ray.config.data import DataConfig
from owlsam_ray.sources.image_list import Dialect, Inspect, Placed, list_images_of
from owlsam_ray.sources.layouts import PathLayout, exist
from owlsam_ray.sources.listing import DEFAULTS, Listing, ListingOptions

MISSING = frozenset(
    {
        "patch6/objects365_v1_00320532.jpg",
        "patch6/objects365_v1_00320534.jpg",
        "patch15/objects365_v1_00712985.jpg",
        "patch16/objects365_v2_00908726.jpg",
        "patch21/objects365_v2_01118660.jpg",
        "patch44/objects365_v2_02024631.jpg",
        "patch45/objects365_v2_02081009.jpg",
    }
)
"""Images that the annotation files list but the archives lack, as patch and name."""

_PATCH = re.compile(r"(?:^|/)(patch\d+)/[^/]+$")

_log = logging.getLogger(__name__)


def list_objects365(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List the images of an Objects365 file, in the file's order.

    `data.images` is any folder from the root of the data down to the folder of the split (or of a single patch), and
    `file_name` is the path below it; the split is the patch. Images of `MISSING` are looked up; absent ones are left
    out of the listing, with a warning that names them.

    Raises:
        InputError: see `list_images_of`.
    """
    url, root = config.annotations or "", config.images or ""
    names = [("<file_name>", "", _name), ("<patch>/<name>", "", _in_patch)]
    for folder in ("train", "val"):
        names += [(f"{folder}/<patch>/<name>", folder, _in_patch), (f"{folder}/<file_name>", folder, _name)]
    names += [("<name>", "", _alone), ("train/<name>", "train", _alone), ("val/<name>", "val", _alone)]
    layouts = tuple(PathLayout(caption, _below(folder, place)) for caption, folder, place in names)
    return list_images_of(url, root, Dialect(layouts=layouts, split_of=_patch, inspect=_leave_out_missing(url, root)))


def _name(image: dict[str, Any]) -> str | None:
    return text_of(image, "file_name")


def _alone(image: dict[str, Any]) -> str | None:
    name = text_of(image, "file_name")
    return name.rsplit("/", 1)[-1] if name else None


def _patch(image: dict[str, Any]) -> str | None:
    match = _PATCH.search(text_of(image, "file_name") or "")
    return match.group(1) if match else None


def _in_patch(image: dict[str, Any]) -> str | None:
    patch = _patch(image)
    return f"{patch}/{_alone(image)}" if patch else None


def _below(folder: str, place: Any) -> Any:
    def placed(image: dict[str, Any]) -> str | None:
        name = place(image)
        return f"{folder}/{name}" if folder and name is not None else name

    return placed


def _leave_out_missing(url: str, root: str) -> Inspect:
    def inspect(placed: Sequence[Placed], layout: PathLayout) -> set[str]:
        names = [each.name for each in placed if _in_patch(each.image) in MISSING]
        absent = [name for name, there in zip(names, exist(root, names), strict=True) if not there]
        if absent:
            _log.warning(
                "%s: %d images that are missing from the archives of Objects365 are left out of the listing: %s",
                url, len(absent), ", ".join(absent),
            )  # fmt: skip
        return set(absent)

    return inspect
