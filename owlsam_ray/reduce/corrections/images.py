"""Match the images of a COCO file that comes back from review to the images of the run."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.coco_files.document import Document
from owlsam_ray.coco_files.fields import flag_field
from owlsam_ray.errors import InputError
from owlsam_ray.run.manifest import Manifest

REVIEWED = "owlsam_reviewed"
"""Field of an image: true if a reviewer looked at it."""

_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("file_name", pa.string()),
        flag_field(REVIEWED),
    ]
)


@dataclass(frozen=True, slots=True)
class ReviewedImages:
    """N images of the file, by ascending id."""

    ids: NDArray[np.int64]
    """(N,) ids in the file."""
    ordinals: NDArray[np.int64]
    """(N,) ordinals in the run; 0: the run has no such image."""
    reviewed: NDArray[np.bool_]
    """(N,) marked as reviewed; all True in a file without any mark."""

    def place(self, image_id: int) -> int | None:
        """Return the position of an image of the file; None: the file has no such image."""
        place = int(np.searchsorted(self.ids, image_id))
        return place if place < len(self.ids) and self.ids[place] == image_id else None


def read_images(document: Document, manifest: Manifest) -> ReviewedImages:
    """Read the images of a file and match them to the run's.

    An image matches the image of the run with the same id and file name. Tools renumber images and strip folders, so
    where the names disagree, an image is matched by its whole name, if exactly one image of the run has it; else by its
    id, if the last parts of both names agree; else it has no match.

    Raises:
        InputError: the list is malformed, an id repeats, or two images match the same image of the run.
    """
    tables = [table for _, table in document.columns("images", _SCHEMA)]
    table = pa.concat_tables([*tables, _SCHEMA.empty_table()]).sort_by("id").combine_chunks()
    ids = table["id"].to_numpy()
    repeated = ids[1:][np.diff(ids) == 0]
    if len(repeated):
        raise InputError(f"{document.url} lists image {repeated[0]} twice: fix the file")
    marks = table[REVIEWED]
    ordinals = _ordinals(manifest.iter_names(), ids, _single(table["file_name"]))
    order = np.argsort(ordinals, kind="stable")
    again = order[1:][(np.diff(ordinals[order]) == 0) & (ordinals[order][1:] > 0)]
    if len(again):
        first, second = ids[ordinals == ordinals[again[0]]][:2]
        raise InputError(
            f"{document.url} lists an image of the run twice, as images {first} and {second}: fix the file"
        )
    reviewed = np.ones(len(ids), np.bool_)
    if marks.null_count < len(marks):
        flags = pc.fill_null(marks, 0).to_numpy()
        odd = np.flatnonzero((flags != 0) & (flags != 1))
        if len(odd):
            raise InputError(
                f"{document.url}: {REVIEWED} of image {ids[odd[0]]} is neither true nor false: fix the file"
            )
        reviewed = flags == 1
    return ReviewedImages(ids, ordinals, reviewed)


def _ordinals(run: Iterable[pa.Table], ids: NDArray[np.int64], names: pa.Array) -> NDArray[np.int64]:
    """(N,) 1-based ordinals of N images in a run, 0 for none."""
    by_id, likeness = np.zeros((2, len(ids)), np.int64)
    last_parts = _last_part(names)
    different = pc.unique(names.drop_null())
    of_name, times = np.zeros((2, len(different)), np.int64)
    first = 1
    for table in run:
        theirs = _single(table["file_name"])
        rows, at = _hits(_single(table["image_id"]), pa.array(ids, pa.int64()))
        same, at_names = theirs.take(pa.array(rows)), pa.array(at)
        by_id[at] = first + rows
        likeness[at] = np.where(
            _equal(same, names.take(at_names)), 2, _equal(_last_part(same), last_parts.take(at_names))
        )
        rows, at = _hits(theirs, different)
        of_name[at] = first + rows
        np.add.at(times, at, 1)
        first += table.num_rows
    of_name[times != 1] = 0
    by_name = np.zeros(len(ids), np.int64)
    known = names.is_valid().to_numpy(zero_copy_only=False)
    by_name[known] = of_name[pc.index_in(names.drop_null(), different).to_numpy()]
    return np.select([likeness == 2, by_name > 0, likeness == 1], [by_id, by_name, by_id], 0)


def _hits(values: pa.Array, wanted: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows whose value is in `wanted`, and its index there."""
    places = pc.index_in(values, wanted)
    rows = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
    return rows, places.drop_null().to_numpy().astype(np.int64)


def _equal(texts: pa.Array, others: pa.Array) -> NDArray[np.bool_]:
    """Whether texts are equal; True where either is null."""
    same: NDArray[np.bool_] = pc.equal(texts, others).fill_null(True).to_numpy(zero_copy_only=False)
    return same


def _last_part(names: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(names, r"(?s)^.*/", "")


def _single(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()
