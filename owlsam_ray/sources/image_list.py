"""Streams the `images` of a COCO-like JSON file as a listing; each source's `Dialect` defines what differs."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray.coco_files.document import Document, open_document
from owlsam_ray.coco_files.images import image_error
from owlsam_ray.coco_files.stated_size import stated_side
from owlsam_ray.errors import InputError, raise_problems, shown
from owlsam_ray.schema import Container
from owlsam_ray.sources.files import relative_names
from owlsam_ray.sources.layouts import LOOKED_UP, PathLayout, choose_layout
from owlsam_ray.sources.listing import Listing, below, file_name_error, listing_table
from owlsam_ray.sources.row_names import (
    absolute_root,
    bad_reason,
    distinct_name,
    path_below,
    quoted_name,
    row_name,
)

_log = logging.getLogger(__name__)

WAY_OUT = "Fix the file; ids and file names must be unique."

_TEXT_FOR_ID = re.compile(rb'"id"\s*:\s*"')
_TEXT_ID = "source_id"
"""Field of the output's image records that holds the source's id if that is a text."""
_OWN_FIELDS = {"id", "file_name", "height", "width"}
_COUNTED = 10_000
"""Number of problems after which reading stops."""
_BATCH_BYTES = 2 * 2**20
"""Holds some thousand image records."""
_REFERENCES = pa.schema([("image_id", pa.int64()), ("category_id", pa.int64())])


@dataclass(frozen=True, slots=True)
class Placed:
    """An image record with the path of its file."""

    image: dict[str, Any]
    path: str | None
    """Below the root; None: it has no readable path, and `reason` says why."""
    name: str
    """`file_name` of the listing: the path if that is safe."""
    position: int
    """Index in `images`."""
    other_name: str | None = None
    quoted: str | None = None
    """See `LISTING_SCHEMA`."""
    reason: str | None = None
    height: int | None = None
    """As the record states it."""
    width: int | None = None


Inspect = Callable[[Sequence[Placed], PathLayout], set[str]]
"""Inspects the images that have a path, in order, some thousand at a time; returns the names to leave out of the
listing."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between the formats."""

    layouts: tuple[PathLayout, ...]
    split_of: Callable[[dict[str, Any]], str | None]
    """Split of an image record; None: the first folder of its path, if it has one."""
    inspect: Inspect = lambda placed, layout: set()
    """Created for each listing, since it may keep counts."""


def list_images_of(url: str, root: str, dialect: Dialect) -> Listing:
    """List the images of a file, in the file's order; they are read while the tables are consumed.

    Args:
        url: the JSON file.
        root: root of the images.
        dialect: format of the file.

    Returns:
        The listing. `annotated` does not check that images and categories are in the file (statistics and cleaning do);
        it is None when the file has no `annotations`.

    Raises:
        InputError: the file cannot be read or is not a COCO file, lists no images, or no image of a sample exists; from
            the tables: an id is not an integer from 0 to 2^53 (if no id is a text), or a size is invalid.
    """
    with open_document(url) as document:
        head = next((images for _, images in document.batches("images")), [])
        if not head:
            raise InputError(f"{url} lists no images: is it a COCO file with a non-empty `images`?")
        layout = choose_layout(root, _samples(head, document), dialect.layouts, where=url)
        text_id = _text_id(document)
        has_ids = text_id is None
    if not has_ids:
        _log.warning(
            "%s: image ids are texts, such as %s: they are kept as %r in the image records, and the images are "
            "numbered",
            url, shown(text_id), _TEXT_ID,
        )  # fmt: skip
    # The document stays mapped while the listing is in use: a remote file is copied once.
    return Listing(
        tables=_tables(document, root, dialect, layout, has_ids=has_ids),
        has_ids=has_ids,
        info=document.value("info", dict, {}),
        licenses=document.value("licenses", list, []),
        categories=document.value("categories", list, []),
        annotated=(lambda: _references(document)) if document.has("annotations") else None,
    )


def _text_id(document: Document) -> str | None:
    """An image id that is a text; None where there is none."""
    if not _TEXT_FOR_ID.search(document.raw("images")):
        return None  # most files: nothing is decoded
    ids = (image.get("id") for _, images in document.batches("images") for image in images if isinstance(image, dict))
    return next((each for each in ids if isinstance(each, str)), None)


def _samples(head: Sequence[Any], document: Document) -> Iterator[list[dict[str, Any]]]:
    """Samples of the first images, then of the whole file, since a user may have only part of the images."""
    yield spread(head)
    batches = [[image] for _, images in document.batches("images") for image in spread(images)]
    yield spread([image for images in batches for image in images])


def spread(images: Sequence[Any]) -> list[dict[str, Any]]:
    """Select up to `LOOKED_UP` records, evenly spaced."""
    step = max(1, -(-len(images) // LOOKED_UP))
    return [image for image in images[::step] if isinstance(image, dict)]


def _tables(
    document: Document, root: str, dialect: Dialect, layout: PathLayout, *, has_ids: bool
) -> Iterator[pa.Table]:
    problems: list[str] = []
    place = Placing(document.url, root, layout, has_ids=has_ids)
    for block in document.blocks("images", max_bytes=_BATCH_BYTES):
        images = block.decode()
        problems += block.repeats(images)
        placed = list(place.images(images, problems, first=block.first))
        if not problems:
            usable = [each for each in placed if each.path is not None]
            left_out = dialect.inspect(usable, layout)
            kept = [each for each in placed if each.name not in left_out] if left_out else placed
            yield _table(kept, document.url, root, dialect, has_ids=has_ids)
        if len(problems) > _COUNTED:
            break
    raise_problems(document.url, problems, WAY_OUT)


class Placing:
    """Finds the path and the name of each image record's file.

    Args:
        url: the file that lists the records.
        root: root of the images.
        layout: layout of the files.
        has_ids: ids must be integers; if false, texts are accepted as well, and the plan numbers the images.
    """

    def __init__(self, url: str, root: str, layout: PathLayout, *, has_ids: bool = True) -> None:
        self._file = relative_names([url])[0]
        self._url = url
        self._begin = absolute_root(root)
        self._layout, self._has_ids = layout, has_ids

    def images(self, images: Iterable[Any], problems: list[str], *, first: int = 0) -> Iterator[Placed]:
        """Yield the records that can be planned; add what is wrong with the others to `problems`.

        Repeated ids and names are not checked.

        Args:
            images: entries of `images`.
            problems: problems of this file so far.
            first: position of the first entry.
        """
        for position, image in enumerate(images, first):
            problem = image_error(image, has_ids=self._has_ids)
            if problem is not None:
                problems.append(f"images[{position}]{problem}")
                continue
            sides = [stated_side(image.get(side)) for side in ("height", "width")]
            yield replace(self._place(image, position), height=sides[0], width=sides[1])

    def _place(self, image: dict[str, Any], position: int) -> Placed:
        given = self._layout.place(image)
        if file_name_error(given) is None:
            return Placed(image, given, given, position)
        path = path_below(self._begin, given)
        if path is None:
            value = image.get("file_name") if given is None else given
            why = f"in images[{position}] {_name_problem(value)}{_hint(image)}"
            name = row_name(self._file, position)
            reason = bad_reason("bad_name", value, why)
            return Placed(image, None, name, position, other_name=distinct_name(name, self._url), reason=reason)
        name = quoted_name(path)
        if name == path:  # the same path, written differently
            return Placed(image, path, name, position, other_name=quoted_name(given))
        other = distinct_name(name, given)
        return Placed(image, path, name, position, other_name=other, quoted=f"{shown(path)}: {file_name_error(path)}")


def _name_problem(value: object) -> str:
    if not isinstance(value, str) or not value:
        return "is no file name"
    if "\0" in value:
        return "holds a NUL"
    return "does not lie below data.images"


def _hint(image: dict[str, Any]) -> str:
    return " (did you mean data.source: lvis?)" if "file_name" not in image and "coco_url" in image else ""


def other_fields(image: dict[str, Any]) -> dict[str, Any]:
    """Fields of an image record that the output carries over."""
    return {key: value for key, value in image.items() if key not in _OWN_FIELDS}


def _table(placed: Sequence[Placed], url: str, root: str, dialect: Dialect, *, has_ids: bool) -> pa.Table:
    extras = [other_fields(each.image) for each in placed]
    if not has_ids:
        extras = [{_TEXT_ID: each.image["id"]} | extra for each, extra in zip(placed, extras, strict=True)]
    bad = [each.path is None for each in placed]
    paths = below(root, pa.array([each.path for each in placed], pa.string()))
    return listing_table(
        {
            "image_id": [each.image["id"] if has_ids else None for each in placed],
            "file_name": [each.name for each in placed],
            "uri": pc.if_else(pa.array(bad, pa.bool_()), url, paths) if any(bad) else paths,
            "container": [str(Container.BAD) if each else None for each in bad],
            "member": [each.reason for each in placed],
            "offset": [each.position if is_bad else None for each, is_bad in zip(placed, bad, strict=True)],
            "height": [each.height for each in placed],
            "width": [each.width for each in placed],
            "split": [dialect.split_of(each.image) for each in placed],
            "extra": [json.dumps(extra) if extra else None for extra in extras],
            "other_name": [each.other_name for each in placed],
            "quoted": [each.quoted for each in placed],
        }
    )


def _references(document: Document) -> Iterator[pa.Table]:
    return (table for _, table in document.columns("annotations", _REFERENCES))
