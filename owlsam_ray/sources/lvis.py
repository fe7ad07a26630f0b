"""Lists the images of an LVIS JSON file below the image folders of COCO 2017.

LVIS v1 gives no file names: `coco_url` (http://images.cocodataset.org/train2017/000000391895.jpg) states folder and
name, and the images of its val set are in val2017 and train2017. v0.5 gives the names of COCO 2014, which `coco_url`
overrules. `neg_category_ids` and `not_exhaustive_category_ids` are kept in the image records.
"""

import logging
from collections.abc import Sequence
from typing import Any

from owlsam_ray.coco_files.images import text_of, url_parts
from owlsam_ray.config.data import DataConfig
from owlsam_ray.errors import InputError
from owlsam_ray.sources.image_list import Dialect, Inspect, Placed, list_images_of
from owlsam_ray.sources.layouts import PathLayout, exist
from owlsam_ray.sources.listing import DEFAULTS, Listing, ListingOptions

_log = logging.getLogger(__name__)


def _by_url(image: dict[str, Any]) -> str | None:
    parts = url_parts(image)
    return "/".join(parts) if parts else text_of(image, "file_name")


def _by_name_alone(image: dict[str, Any]) -> str | None:
    parts = url_parts(image)
    return parts[1] if parts else text_of(image, "file_name")


_IN_FOLDERS = PathLayout("<folder of coco_url>/<name>", _by_url)
_IN_ONE_FOLDER = PathLayout("<name in coco_url>", _by_name_alone)
_BY_FILE_NAME = PathLayout("<file_name>", lambda image: image.get("file_name"))


def list_lvis(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List the images of an LVIS file, v1 or v0.5, in the file's order.

    `data.images` is the folder above train2017 and val2017, or one folder that holds the images of all splits in the
    file. `file_name` is the path below it, and the split is the folder of `coco_url`. A few images of each folder are
    looked up: if none exists, a warning names the folder, and its images become failed rows.

    Raises:
        InputError: see `list_images_of`; or, from the tables, `data.images` is the folder of one split and the file has
            images of another.
    """
    url, root = config.annotations or "", config.images or ""
    dialect = Dialect(
        layouts=(_IN_FOLDERS, _IN_ONE_FOLDER, _BY_FILE_NAME),
        split_of=lambda image: (url_parts(image) or (None,))[0],
        inspect=_look_at_folders(url, root),
    )
    return list_images_of(url, root, dialect)


def _look_at_folders(url: str, root: str) -> Inspect:
    """Look up a few images of each folder when it first occurs."""
    known: set[str] = set()

    def inspect(placed: Sequence[Placed], layout: PathLayout) -> set[str]:
        found: dict[str, list[str]] = {}
        for each in placed:
            folder = (url_parts(each.image) or ("",))[0]
            if folder not in known:
                found.setdefault(folder, []).append(each.path or "")
        known.update(found)
        for folder, names in found.items():
            few = names[:: max(1, -(-len(names) // 5))]
            if any(exist(root, few)):
                continue
            if layout is _IN_ONE_FOLDER:
                raise InputError(
                    f"{url} lists images of {folder or 'no split'}, such as {few[0]}, and data.images {root} holds "
                    "only another split: set data.images to the folder above train2017 and val2017"
                )
            _log.warning(
                "none of %d images of %s looked up exists below %s; the first is %s", len(few), folder, root, few[0]
            )
        return set()

    return inspect
