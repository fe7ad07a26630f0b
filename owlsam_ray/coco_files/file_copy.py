"""Second pass of cleaning: copies remaining entries as text, and lists removed and changed ones in a table."""

import contextlib
import csv
import errno
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from owlsam_ray.coco_files.cleaning import Change, Rule
from owlsam_ray.coco_files.document import Block, Document
from owlsam_ray.coco_files.file_rules import (
    CROWD_FLAG,
    MALFORMED,
    NEW_ID,
    UNKNOWN_CATEGORY,
    UNKNOWN_IMAGE,
    Judged,
    References,
    check_runs,
)
from owlsam_ray.coco_files.outlines import BadSegmentationError, proper_polygons, read_outline
from owlsam_ray.errors import InputError, shown
from owlsam_ray.terminal import table_cell

TABLE_COLUMNS = ("action", "image_id", "file_name", "annotation_id", "category", "rule", "detail")
"""`action` is `removed` or `changed`; a row for an image has no annotation id. Annotations in the file's order, then
images."""

_NO_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
)  # fmt: skip
"""Errors that retrying the same command does not fix."""

_OF_BOXES = (Rule.NON_FINITE, Rule.ZERO_AREA, Rule.OUTSIDE, Rule.SMALL)


@contextlib.contextmanager
def refuse_no_place(option: str, url: str) -> Iterator[None]:
    """Report a failed write inside this context as a wrong option if the location cannot be written.

    Raises:
        InputError: it is a directory, below a file, read-only, …
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno not in _NO_PLACE:
            raise
        raise InputError(f"{option} {url} cannot be written ({error.strerror or error}): name another place") from None


class RemovalTable:
    """Writes rows of `TABLE_COLUMNS`, as CSV or as one JSON object per line."""

    def __init__(self, file: IO[bytes], *, as_csv: bool) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        self._csv = csv.writer(self._text, lineterminator="\n") if as_csv else None
        if self._csv is not None:
            self._csv.writerow(TABLE_COLUMNS)

    def add(self, *values: Any) -> None:
        """Write one row: a value for each column."""
        if self._csv is not None:
            self._csv.writerow(table_cell(value) for value in values)
        else:
            self._text.write(json.dumps(dict(zip(TABLE_COLUMNS, values, strict=True)), ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """Flush to the file, which stays open."""
        self._text.detach()


@dataclass(frozen=True, slots=True)
class Names:
    """Names of images and categories, for users."""

    images: pa.ChunkedArray
    """(M,) file names."""
    categories: dict[int, str]


@dataclass(frozen=True, slots=True)
class FileCopy:
    """A file, and the decisions on its M images and N annotations."""

    document: Document
    known: References
    names: Names
    judged: Judged
    drop_image: NDArray[np.bool_]
    """(M,) whether the image is removed."""
    table: RemovalTable

    def write(self, file: IO[bytes], *, note: dict[str, Any]) -> None:
        """Write the copy and the rows of the table.

        Args:
            file: the output; `info` comes first if the input has none.
            note: stored as `info.cleaned`; the note of an earlier cleaning becomes its `before`.
        """
        info = self.document.value("info", dict, {})
        before = {"before": info["cleaned"]} if "cleaned" in info else {}
        keys = self.document.names()
        file.write(b"{")
        for place, key in enumerate(keys if "info" in keys else ["info", *keys]):
            file.write((b",\n" if place else b"\n") + _json(key) + b": ")
            if key == "info":
                file.write(_json(info | {"cleaned": note | before}))
            elif key == "annotations":
                _write_list(file, self._annotations())
            elif key == "images" and self.document.has("images"):
                _write_list(file, self._images())
            else:
                file.write(self.document.text(key))
        file.write(b"\n}\n")
        for index in np.flatnonzero(self.drop_image).tolist():
            detail = "all of its annotations are removed" if self.judged.had_entries[index] else "has no annotations"
            number = int(self.known.images.values[index])
            self.table.add(
                "removed", number, self.names.images[index].as_py(), None, None, str(Rule.EMPTY_IMAGE), detail
            )

    def _images(self) -> Iterator[bytes]:
        for block in self.document.blocks("images"):
            yield from (text for index, text in enumerate(_texts(block), block.first) if not self.drop_image[index])

    def _annotations(self) -> Iterator[bytes]:
        judged = self.judged
        changed = judged.clipped.keys() | judged.fixed.keys() | judged.new_ids.keys() | judged.crowd_flags.keys()
        for block in self.document.blocks("annotations"):
            for index, text in enumerate(_texts(block), block.first):
                rule = judged.rules[index]
                if rule is not None:
                    entry = json.loads(text)
                    self._record("removed", entry, rule, self._detail(index, entry, rule))
                elif index in changed:
                    yield _json(self._changed(index, json.loads(text)))
                else:
                    yield text

    def _changed(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry that stays, with its changes applied."""
        judged, fixed = self.judged, dict(entry)
        if index in judged.clipped:
            fixed["bbox"] = judged.clipped[index]
            detail = f"bbox {entry['bbox']} is now {fixed['bbox']}"
            self._record("changed", entry, Change.CLIPPED_BOX, detail)
        if index in judged.fixed:
            fixed["segmentation"] = proper_polygons(entry["segmentation"])
            detail = f"{judged.fixed[index]} of {len(entry['segmentation'])} polygons have no area"
            self._record("changed", entry, Change.DROPPED_POLYGON, detail)
        if index in judged.new_ids:
            fixed["id"] = judged.new_ids[index]
            self._record("changed", entry, NEW_ID, f"id is now {fixed['id']}")
        if index in judged.crowd_flags:
            fixed["iscrowd"] = judged.crowd_flags[index]
            self._record("changed", entry, CROWD_FLAG, f"iscrowd {shown(entry['iscrowd'])} is now {fixed['iscrowd']}")
        return fixed

    def _record(self, action: str, entry: Any, rule: str, detail: str) -> None:
        fields = entry if isinstance(entry, dict) else {}
        number, category = fields.get("image_id"), fields.get("category_id")
        place = int(self.known.images.places([number])[0])
        name = None if place < 0 else self.names.images[place].as_py()
        category_name = self.names.categories.get(category) if type(category) is int else None
        self.table.add(action, number, name, fields.get("id"), category_name, str(rule), detail)

    def _detail(self, index: int, entry: Any, rule: str) -> str:
        """Why an entry is removed, in numbers; empty where the rule says everything."""
        if rule in (MALFORMED, Rule.DUPLICATE):
            return self.judged.details[index]
        if rule == UNKNOWN_IMAGE:
            return f"image_id {shown(entry.get('image_id'), 80)} is not among the {len(self.known.images)} images"
        if rule == UNKNOWN_CATEGORY:
            number = entry.get("category_id")
            return f"category_id {shown(number, 80)} is not among the {len(self.known.categories)} categories"
        place = int(self.judged.objects.image_index[index])
        height, width = self.known.sizes_hw[place].tolist() if place >= 0 else (np.inf, np.inf)
        if rule == Rule.BAD_SEGMENTATION:
            try:
                read_outline(entry["segmentation"], (height, width))
                check_runs(entry["segmentation"])
            except BadSegmentationError as error:
                return str(error)
        if rule in _OF_BOXES:
            image = "" if not np.isfinite([height, width]).all() else f", image {width:g} × {height:g}"
            return f"bbox {shown(entry.get('bbox'), 80)}, area {shown(entry.get('area'), 80)}{image}"
        return ""


def _texts(block: Block) -> list[bytes]:
    """The text of each element."""
    text = block.text
    stops = [*block.piece.separators.tolist(), len(text)]
    starts = [0, *(stop + 1 for stop in stops[:-1])]
    return [text[start:stop].strip() for start, stop in zip(starts, stops, strict=True)]


def _write_list(file: IO[bytes], texts: Iterator[bytes]) -> None:
    file.write(b"[")
    for place, text in enumerate(texts):
        file.write((b",\n" if place else b"\n") + text)
    file.write(b"\n]")


def _json(value: Any) -> bytes:
    """Encode a value; null for numbers beyond the float range, which only the text of the input can hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
        return json.dumps(finite, ensure_ascii=False, allow_nan=False).encode()
