"""Writes a cleaned copy of a COCO file, and a table of every entry that was removed or changed.

The file is read twice: once to decide, once to copy. Entries that stay, and everything other than images and
annotations, keep their values and their order. In memory an annotation costs a few hundred bytes, whatever its
polygons.
"""

import logging
import os
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table

from owlsam_ray import __version__, storage
from owlsam_ray.coco_files.cleaning import Change, Rule
from owlsam_ray.coco_files.document import Document, open_document
from owlsam_ray.coco_files.file_copy import FileCopy, Names, RemovalTable, refuse_no_place
from owlsam_ray.coco_files.file_rules import (
    CHANGES,
    CROWD_FLAG,
    MALFORMED,
    NEW_ID,
    RULES,
    UNKNOWN_CATEGORY,
    UNKNOWN_IMAGE,
    FileCleaning,
    Ids,
    Judged,
    References,
    judge_entries,
)
from owlsam_ray.coco_files.images import image_error, text_of, url_parts
from owlsam_ray.coco_files.stated_size import stated_side
from owlsam_ray.errors import InputError, raise_problems, shown
from owlsam_ray.schema import MAX_IMAGE_ID

DEFAULTS = FileCleaning()

_SUFFIXES = (".csv", ".jsonl")

_log = logging.getLogger(__name__)


def clean_file(url: str, out: str, settings: FileCleaning = DEFAULTS, *, removed: str | None = None) -> dict[str, Any]:
    """Write a cleaned copy of a COCO file, and the table of removed and changed entries.

    `info` gets a note `cleaned`: version, settings, counts (and `before`, the note of an earlier cleaning). Both files
    appear under their names once they are complete; the table first.

    Args:
        url: the input file, a path or an fsspec URL.
        out: the copy.
        settings: which rules apply, and how strictly.
        removed: the table, ending in .csv or .jsonl; default: `out` with the ending `.removed.csv`.

    Returns:
        Counts as plain JSON values: `images_in`, `images_out`, `images_emptied` (images that stay but lost all
        annotations), `annotations_in`, `annotations_out`; `removed` by rule and `changed` by kind, including zeros,
        None for rules that are off; `out`, `table`.

    Raises:
        InputError: the file cannot be read or has no annotations; the id of an image or a category is invalid or occurs
            twice; an image has an invalid size, or a category no name; the rules `malformed`, `unknown_image` and
            `unknown_category` would remove every annotation; `out` or the table would overwrite the input or each
            other, or cannot be a file; or the table has another suffix.
        OSError: a file cannot be written.
    """
    table = removed or f"{out.removesuffix('.json')}.removed.csv"
    _check_places(url, out, table)
    with open_document(url) as document:
        if not document.has("annotations"):
            raise InputError(f"{url} has no list `annotations`: there is nothing to clean")
        known, names = _read_head(document)
        judged = judge_entries(document.batches("annotations"), known, settings)
        _check_something_stays(document, known, judged)
        drop_image = ~judged.has_entries & settings.drop_empty_images
        counts = _counts(judged, drop_image, settings)
        note = {"by": f"owlsam-ray {__version__}", "settings": settings.model_dump(mode="json")} | counts
        with (
            refuse_no_place("--out", out),
            storage.open_atomic(out) as file,
            refuse_no_place("--removed", table),
            storage.open_atomic(table) as lines,
        ):
            removals = RemovalTable(lines, as_csv=table.endswith(".csv"))
            FileCopy(document, known, names, judged, drop_image, removals).write(file, note=note)
            removals.finish()
    _warn(counts, url)
    if len(judged.objects) and judged.objects.crowd.all():
        _log.warning("%s: all %d objects are crowd regions (iscrowd)", url, len(judged.objects))
    return counts | {"out": out, "table": table}


def _check_places(url: str, out: str, table: str) -> None:
    if not table.endswith(_SUFFIXES):
        raise InputError(f"the table of removals {table} must end in {' or '.join(_SUFFIXES)}")
    for one, other, words in ((url, out, "--out"), (url, table, "--removed"), (out, table, "--out and --removed")):
        if _is_same_file(one, other):
            raise InputError(f"{words} would overwrite {one}: name another file")
    for place, option in ((out, "--out"), (table, "--removed")):
        filesystem, path = storage.open_filesystem(place)
        if storage.is_local(filesystem) and os.path.isdir(path):
            raise InputError(f"{option} {place} is a directory: name a file")


def _is_same_file(one: str, other: str) -> bool:
    (filesystem, path), (other_filesystem, other_path) = storage.open_filesystem(one), storage.open_filesystem(other)
    if storage.is_local(filesystem) and storage.is_local(other_filesystem):
        if os.path.exists(path) and os.path.exists(other_path):
            return os.path.samefile(path, other_path)
        return os.path.realpath(path) == os.path.realpath(other_path)
    return type(filesystem) is type(other_filesystem) and path.strip("/") == other_path.strip("/")


def _read_head(document: Document) -> tuple[References, Names]:
    ids: list[int] = []
    sizes: list[tuple[float, float]] = []
    names: list[pa.Array] = []
    problems: list[str] = []
    others: list[str] = []
    for first, images in document.batches("images"):
        for position, image in enumerate(images, first):
            # Sizes are checked separately from ids: the advice differs.
            problem = image_error({"id": image.get("id")} if isinstance(image, dict) else image)
            size = None if problem is not None else _size_error(image)
            if problem is not None:
                problems.append(f"images[{position}]{problem}")
            elif size is not None:
                others.append(f"images[{position}] (id {image['id']}): {size}")
        if not (problems or others):
            ids += [image["id"] for image in images]
            sizes += [_size(image) for image in images]
            names.append(pa.array([_name(image) for image in images], pa.string()))
    problems += [f"images: id {number} is given {count} times" for number, count in Counter(ids).items() if count > 1]
    categories: dict[int, str] = {}
    for position, category in enumerate(document.value("categories", list, [])):
        number = category.get("id") if isinstance(category, dict) else None
        if type(number) is not int or not 0 <= number < MAX_IMAGE_ID:
            problems.append(f"categories[{position}]: id {shown(number, 80)} is not an integer from 0 to 2^53")
        elif number in categories:
            problems.append(f"categories[{position}]: id {number} is given twice")
        else:
            name = category.get("name")
            if not isinstance(name, str) or not name.strip():
                others.append(f"categories[{position}] (id {number}): name {shown(name, 80)} is not a text")
            categories[number] = str(name)
    way_out = "Fix the file: annotations name images and categories by their ids, so these must be unique integers."
    raise_problems(document.url, problems, way_out, use="cleaned")
    way_out = (
        "Fix the file: heights and widths must be whole numbers of pixels, or not stated (null, 0 or -1), and every "
        "category must have a name."
    )
    raise_problems(document.url, others, way_out, use="cleaned")
    known = References(
        images=Ids(ids), sizes_hw=np.array(sizes, np.float64).reshape(-1, 2), categories=Ids(list(categories))
    )
    return known, Names(pa.chunked_array(names, pa.string()), categories)


def _size_error(image: dict[str, Any]) -> str | None:
    for side in ("height", "width"):
        try:
            stated_side(image.get(side))
        except ValueError as error:
            return f"{side} {shown(image.get(side), 80)} {error}"
    return None


def _size(image: dict[str, Any]) -> tuple[float, float]:
    """(H, W) of an image in which `_size_error` finds nothing wrong; infinite where a side is not stated."""
    height, width = (stated_side(image.get(side)) for side in ("height", "width"))
    return height or np.inf, width or np.inf


def _check_something_stays(document: Document, known: References, judged: Judged) -> None:
    """Refuse a file if all its annotations are malformed or refer to unknown ids: the file itself is at fault."""
    taken = Counter(rule for rule in judged.rules if rule in (MALFORMED, UNKNOWN_IMAGE, UNKNOWN_CATEGORY))
    if not judged.rules or taken.total() < len(judged.rules):
        return
    reasons = [f"{rule} {count}" for rule, count in taken.items() if rule is not None]
    rule = judged.rules[0]
    _, entries = next(document.batches("annotations"))
    missing = [key for key, ids in (("images", known.images), ("categories", known.categories)) if not len(ids)]
    if missing:
        first = " and ".join(f"it has no `{key}`" for key in missing)
    elif rule == MALFORMED:
        first = f"the first: {judged.details[0]}"
    else:
        key = "image_id" if rule == UNKNOWN_IMAGE else "category_id"
        first = f"the first has the {key} {shown(entries[0].get(key), 80)}"
    switches = " ".join(f"--set {rule}=false" for rule in taken)
    raise InputError(
        f"{document.url}: all {len(judged.rules)} annotations would be removed ({', '.join(reasons)}; {first}), so "
        f"nothing was written. Fix the file, or keep them with {switches}"
    )


def _name(image: dict[str, Any]) -> str:
    return text_of(image, "file_name") or "/".join(url_parts(image) or ())


def _counts(judged: Judged, drop_image: NDArray[np.bool_], settings: FileCleaning) -> dict[str, Any]:
    removed = Counter(rule for rule in judged.rules if rule is not None)
    removed[Rule.EMPTY_IMAGE] = int(drop_image.sum())
    off = {rule for rule in RULES if settings.is_off(rule)}
    changed = {
        Change.CLIPPED_BOX: len(judged.clipped) if settings.clip_boxes else None,
        Change.DROPPED_POLYGON: len(judged.fixed) if settings.degenerate_polygons else None,
        NEW_ID: len(judged.new_ids) if settings.new_ids else None,
        CROWD_FLAG: len(judged.crowd_flags) if settings.malformed else None,
    }
    return {
        "images_in": len(drop_image),
        "images_out": int((~drop_image).sum()),
        "images_emptied": int((judged.had_entries & ~judged.has_entries & ~drop_image).sum()),
        "annotations_in": len(judged.rules),
        "annotations_out": sum(rule is None for rule in judged.rules),
        "removed": {str(rule): None if rule in off else removed[rule] for rule in RULES},
        "changed": {str(change): changed[change] for change in CHANGES},
    }


def _warn(counts: dict[str, Any], url: str) -> None:
    for kind in ("annotations", "images"):
        if counts[f"{kind}_out"] == 0:
            _log.warning("%s: none of %d %s is left", url, counts[f"{kind}_in"], kind)
    if counts["images_emptied"]:
        _log.warning(
            "%s: %d images lost all of their annotations and stay as background; drop_empty_images removes them",
            url, counts["images_emptied"],
        )  # fmt: skip


def cleaning_table(counts: dict[str, Any]) -> RenderableType:
    """Format the result of `clean_file` for users: every rule with its count, or that it is off."""
    table = Table(
        title=f"{counts['annotations_out']} of {counts['annotations_in']} annotations and {counts['images_out']} of "
        f"{counts['images_in']} images stay",
        title_justify="left",
    )
    table.add_column("rule")
    table.add_column("removed", justify="right")
    table.add_column("changed", justify="right")
    for rule, count in counts["removed"].items():
        table.add_row(rule, "off" if count is None else str(count), "")
    for change, count in counts["changed"].items():
        table.add_row(change, "", "off" if count is None else str(count))
    return table
