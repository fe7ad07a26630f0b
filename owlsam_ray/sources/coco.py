"""Lists the images of a COCO JSON file below an image root; annotations are not read (see `annotations.py`).

Layouts: COCO keeps the images of each split in one folder, `val2014/COCO_val2014_000000000073.jpg` or
`val2017/000000000139.jpg`, and file names contain no folder; `data.images` may be that folder or the one above it. The
split is stated in `coco_url`, in the image names of 2014, and in the name of the annotation file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from owlsam_ray.coco_files.document import open_document
from owlsam_ray.coco_files.images import text_of, url_parts
from owlsam_ray.config.data import DataConfig
from owlsam_ray.errors import InputError, raise_problems, shown
from owlsam_ray.sources.image_list import WAY_OUT, Dialect, Placing, list_images_of, spread
from owlsam_ray.sources.layouts import PathLayout, choose_layout
from owlsam_ray.sources.listing import DEFAULTS, ImageRecord, Listing, ListingOptions

_SPLIT_OF_NAME = re.compile(r"^COCO_((?:train|val|test)\d{4})_\d+\.")
_SPLIT_OF_FILE = re.compile(r"(train|val|test|unlabeled)[a-z-]*(20\d\d)")


def list_coco(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List the images of a COCO file, in the file's order.

    `file_name` is the path below `data.images`; it begins with the folder of the split if `data.images` is the folder
    above. Repeated ids and names are found by the plan.

    Raises:
        InputError: see `list_images_of`.
    """
    url, root = config.annotations or "", config.images or ""
    return list_images_of(url, root, coco_dialect(url))


def coco_dialect(url: str) -> Dialect:
    """The layouts of COCO's image folders.

    Args:
        url: the annotation file, whose name may state the split.
    """
    of_file = _split_of_file(url)

    def split_of(image: dict[str, Any]) -> str | None:
        parts, name = url_parts(image), text_of(image, "file_name") or ""
        return parts[0] if parts else _split_of_name(name) or (None if "/" in name else of_file)

    def in_split(image: dict[str, Any]) -> str | None:
        name = text_of(image, "file_name")
        split = split_of(image)
        return f"{split}/{name}" if name and split else None

    def in_named_split(image: dict[str, Any]) -> str | None:
        name = text_of(image, "file_name") or ""
        split = _split_of_name(name) or of_file
        return f"{split}/{name}" if name and split else None

    layouts = (
        PathLayout("<file_name>", lambda image: image.get("file_name")),
        PathLayout("<split>/<file_name>", in_split),
        PathLayout("<end of coco_url>", lambda image: "/".join(url_parts(image) or ()) or None),
        PathLayout("<split by the file's name>/<file_name>", in_named_split),
        PathLayout("<last part of coco_url>", lambda image: (url_parts(image) or (None, None))[1]),
    )
    return Dialect(layouts=layouts, split_of=split_of)


def _split_of_name(name: str) -> str | None:
    """The split in an image name of 2014, such as COCO_val2014_000000000073.jpg."""
    match = _SPLIT_OF_NAME.match(name)
    return match.group(1) if match else None


def _split_of_file(url: str) -> str | None:
    """The split in the name of an annotation file: instances_val2017, image_info_test-dev2017, captions_train2014."""
    match = _SPLIT_OF_FILE.search(url.rstrip("/").rsplit("/", 1)[-1])
    return f"{match.group(1)}{match.group(2)}" if match else None


@dataclass(frozen=True, slots=True)
class ImageList:
    """All images of a COCO file in memory, in the file's order, with unique ids and names."""

    image_ids: Sequence[int]
    records: Sequence[ImageRecord]
    """One for each id."""
    categories: list[dict[str, Any]]


def list_tree(tree: dict[str, Any], *, url: str, root: str) -> ImageList:
    """Check the images of a COCO file that has been read already.

    Args:
        tree: result of `read_tree`.
        url: the file, for messages.
        root: root of the images, as for `list_coco`.

    Raises:
        InputError: the file lists no images; ids or file names repeat, are malformed, or leave the root; or no file of
            a sample exists under the root.
    """
    images = tree.get("images")
    if not isinstance(images, list) or not images:
        raise InputError(f"{url} lists no images: is it a COCO file with a non-empty `images`?")
    layout = choose_layout(root, [spread(images)], coco_dialect(url).layouts, where=url)
    problems: list[str] = []
    name_of: dict[int, str] = {}
    id_of: dict[str, int] = {}
    records = []
    for placed in Placing(url, root, layout).images(images, problems):
        number, path = placed.image["id"], placed.path
        if path is None:
            problems.append(placed.reason or "")
            continue
        if number in name_of:
            problems.append(f"id {number} is given to both {shown(name_of[number])} and {shown(path)}")
        elif path in id_of:
            problems.append(f"{shown(path)} is listed twice, as id {id_of[path]} and as id {number}")
        name_of[number], id_of[path] = path, number
        records.append(ImageRecord(number, path, placed.height, placed.width))
    raise_problems(url, problems, WAY_OUT)
    categories = tree.get("categories") or []
    if not isinstance(categories, list):
        raise InputError(f"{url}: `categories` is a {type(categories).__name__}, not a list")
    return ImageList(list(name_of), records, categories)


def read_tree(url: str) -> dict[str, Any]:
    """Read a COCO file into memory as plain values; nothing is checked yet.

    Raises:
        InputError: see `open_document`.
    """
    with open_document(url) as document:
        return {key: document.value(key, object, None) for key in document.names()}
