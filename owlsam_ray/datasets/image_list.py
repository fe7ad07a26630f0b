"""The `images` of a COCO-like JSON file → a listing, streamed; `coco`, `lvis` and `objects365` say what differs."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from owlsam_ray.datasets.document import Document, open_document
from owlsam_ray.datasets.layouts import LOOKED_UP, Layout, choose_layout
from owlsam_ray.datasets.source import (
    MAX_IMAGE_ID,
    Listing,
    below,
    file_name_error,
    listing_table,
    raise_offences,
)
from owlsam_ray.errors import InputError

WAY_OUT = "Mend the file; ids and file names must be unique, and names stay below data.images."

_OWN_FIELDS = {"id", "file_name", "height", "width"}
_COUNTED = 10_000
"""Offences after which reading on is of no use."""
_BATCH_BYTES = 2 * 2**20
"""Some thousand image records."""
_REFERENCES = pa.schema([("image_id", pa.int64()), ("category_id", pa.int64())])

Placed = tuple[str, dict[str, Any]]
"""Path below the root, and the image record that it belongs to."""
Inspect = Callable[[Sequence[Placed], Layout], set[str]]
"""Looks at some thousand images at a time, in order; returns the paths that do not belong into the listing."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between the formats."""

    layouts: tuple[Layout, ...]
    split_of: Callable[[dict[str, Any]], str | None]
    """Split of an image record; None: the first folder of its path, if it has one."""
    inspect: Inspect = lambda placed, layout: set()
    """Made anew for every listing, since it may count."""


def list_images_of(url: str, root: str, dialect: Dialect) -> Listing:
    """List the images of a file, in its order; they are read as the tables are asked for.

    Args:
        url: the JSON file.
        root: of the images.
        dialect: of the file.

    Returns:
        `annotated` does not check that images and categories are in the file (statistics and cleaning tell); None when
        the file has no `annotations`.

    Raises:
        InputError: the file cannot be read or is no such file, lists no images, or none of a sample of them exists;
            from the tables: an id is no integer from 0 to 2^53, a size is none, a name leaves the root.
    """
    with open_document(url) as document:
        head = next((images for _, images in document.batches("images")), [])
        if not head:
            raise InputError(f"{url} lists no images: is it a COCO file with a non-empty `images`?")
        layout = choose_layout(root, _samples(head, document), dialect.layouts, where=url)
    # The document stays mapped as long as the listing is held: a remote file is copied once.
    return Listing(
        tables=_tables(document, root, layout, dialect),
        info=document.value("info", dict, {}),
        licenses=document.value("licenses", list, []),
        categories=document.value("categories", list, []),
        annotated=(lambda: _references(document)) if document.has("annotations") else None,
    )


def _samples(head: Sequence[Any], document: Document) -> Iterator[list[dict[str, Any]]]:
    """From the first images; then from the whole file, since a user may hold a part of the images only."""
    yield spread(head)
    batches = [[image] for _, images in document.batches("images") for image in spread(images)]
    yield spread([image for images in batches for image in images])


def spread(images: Sequence[Any]) -> list[dict[str, Any]]:
    """Up to `LOOKED_UP` records, evenly from all."""
    step = max(1, -(-len(images) // LOOKED_UP))
    return [image for image in images[::step] if isinstance(image, dict)]


def _tables(document: Document, root: str, layout: Layout, dialect: Dialect) -> Iterator[pa.Table]:
    offences: list[str] = []
    for first, images in document.batches("images", max_bytes=_BATCH_BYTES):
        placed = list(place_images(images, layout, offences, first=first))
        if not offences:
            yield _table(placed, dialect.inspect(placed, layout), root, dialect)
        if len(offences) > _COUNTED:
            break
    raise_offences(document.url, offences, WAY_OUT)


def place_images(images: Iterable[Any], layout: Layout, offences: list[str], *, first: int = 0) -> Iterator[Placed]:
    """Valid images; what is wrong with the others is added to `offences`. Repeated ids and names are not looked for.

    Args:
        images: entries of `images`.
        layout: of the files.
        offences: of this file so far.
        first: position of the first entry.
    """
    for position, image in enumerate(images, first):
        offence = image_error(image)
        if offence is not None:
            offences.append(f"images[{position}]{offence}")
            continue
        name = layout.place(image)
        wrong = file_name_error(name)
        if wrong is None:
            yield name, image
        else:
            told = repr(image.get("file_name") if name is None else name)
            offences.append(f"images[{position}] (id {image['id']}): {wrong}: {told}{_hint(image)}")


def image_error(image: Any) -> str | None:
    """What is wrong with an image record, but for its name; None when nothing is."""
    if not isinstance(image, dict):
        return f" is a {type(image).__name__}, not an object"
    number = image.get("id")
    if type(number) is not int or not 0 <= number < MAX_IMAGE_ID:
        return f": id {number!r:.80} is not an integer from 0 to 2^53"
    if not (_is_length(image.get("height")) and _is_length(image.get("width"))):
        name = image.get("file_name")
        return f" ({name!r}): height {image.get('height')!r:.80} or width {image.get('width')!r:.80} is odd"
    return None


def _is_length(value: object) -> bool:
    """Pixels, or not stated."""
    return value is None or (type(value) is int and 0 < value < 2**31)


def _hint(image: dict[str, Any]) -> str:
    return ": did you mean data.source: lvis?" if "file_name" not in image and "coco_url" in image else ""


def other_fields(image: dict[str, Any]) -> dict[str, Any]:
    """What the output carries over of an image record."""
    return {key: value for key, value in image.items() if key not in _OWN_FIELDS}


def _table(placed: Sequence[Placed], left_out: set[str], root: str, dialect: Dialect) -> pa.Table:
    kept = [pair for pair in placed if pair[0] not in left_out] if left_out else placed
    images = [image for _, image in kept]
    names = pa.array([name for name, _ in kept], pa.string())
    extras = [other_fields(image) for image in images]
    return listing_table(
        {
            "image_id": [image["id"] for image in images],
            "file_name": names,
            "uri": below(root, names),
            "height": [image.get("height") for image in images],
            "width": [image.get("width") for image in images],
            "split": [dialect.split_of(image) for image in images],
            "extra": [json.dumps(extra) if extra else None for extra in extras],
        }
    )


def _references(document: Document) -> Iterator[pa.Table]:
    return (table for _, table in document.columns("annotations", _REFERENCES))


def text_of(image: dict[str, Any], key: str) -> str | None:
    """A field that is a non-empty text; None otherwise."""
    value = image.get(key)
    return value if isinstance(value, str) and value else None


def url_parts(image: dict[str, Any]) -> tuple[str, str] | None:
    """Folder and name that `coco_url` ends in, as ("val2017", "000000000139.jpg"); None without."""
    parts = (text_of(image, "coco_url") or "").split("?")[0].split("/")
    return (parts[-2], parts[-1]) if len(parts) >= 4 and parts[-2] and parts[-1] else None
