"""Arrow schemas of the listing, the manifest and the prediction rows, and the conversion of records to rows.

Prediction rows, version 1: one row per image. The lists are parallel, with one entry per detection by falling score,
and are null for failed images. A detection without a mask has null entries in the mask lists.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.records import Prediction
from owlsam_ray.storage.secrets import masked

SCHEMA_VERSION = 1

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("file_name", pa.string(), nullable=False),  # full relative path, never a basename
        pa.field("uri", pa.string(), nullable=False),
        pa.field(
            "container", pa.string()
        ),  # null: the file is the image; tar, parquet: the image is inside; escaped: path is not UTF-8; bad: no image
        pa.field(
            "member", pa.string()
        ),  # tar: name; parquet: column, with dots; escaped: end of `uri`; bad: the reason
        pa.field("offset", pa.int64()),  # tar: first byte of the image; parquet, bad: row of the file, if it has rows
        pa.field("length", pa.int64()),  # bytes of the image, where the storage states them (tar: always)
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("height", pa.int32()),  # as the source states it
        pa.field("width", pa.int32()),
        pa.field("extra", pa.string()),  # JSON object: the source's other fields of the image record
    ]
)

_DETECTION_FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("det_index", pa.int32()),
    ("label", pa.int32()),
    ("prompt_id", pa.int32()),
    ("x0", pa.float32()),
    ("y0", pa.float32()),
    ("x1", pa.float32()),
    ("y1", pa.float32()),
    ("raw_score", pa.float32()),
    ("score", pa.float32()),
    ("num_merged", pa.int32()),
    ("predicted_iou", pa.float32()),
    ("stability", pa.float32()),
    ("mask_area", pa.int64()),
    ("mask_x0", pa.int32()),
    ("mask_y0", pa.int32()),
    ("mask_x1", pa.int32()),
    ("mask_y1", pa.int32()),
    ("rle_counts", pa.binary()),
)

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # ok | empty | failed
        pa.field("reason", pa.string()),  # reason of a failure, or a remark on a labelled image
        pa.field("status_class", pa.string()),  # permanent | transient | quarantined
        pa.field("height", pa.int32()),  # size of the decoded image
        pa.field("width", pa.int32()),
        *(pa.field(name, pa.list_(kind)) for name, kind in _DETECTION_FIELDS),
    ]
)

ROW_GROUP_IMAGES = 64
"""Maximum number of images per row group, which bounds a reader's memory."""


def predictions_to_table(predictions: Sequence[Prediction]) -> pa.Table:
    """Convert predictions to rows of `PREDICTION_SCHEMA`, in the given order."""
    columns: dict[str, list[Any]] = {name: [] for name in PREDICTION_SCHEMA.names}
    for prediction in predictions:
        for name, value in _row(prediction).items():
            columns[name].append(value)
    return pa.table(
        [pa.array(columns[field.name], type=field.type) for field in PREDICTION_SCHEMA],
        schema=PREDICTION_SCHEMA,
    )


def _row(prediction: Prediction) -> dict[str, Any]:
    reason, failure_class = prediction.failure or (prediction.note, None)
    height, width = prediction.size_hw or (None, None)
    row: dict[str, Any] = {
        "image_id": prediction.image_id,
        "status": prediction.status,
        "reason": None if reason is None else masked(reason),  # the error's message may contain a URL
        "status_class": str(failure_class) if failure_class else None,
        "height": height,
        "width": width,
    }
    if prediction.failure is not None:
        return row | {name: None for name, _ in _DETECTION_FIELDS}
    found, segments = prediction.detections, prediction.segments
    boxes = found.boxes_xyxy
    row |= {
        "det_index": list(range(len(found))),
        "label": found.labels.tolist(),
        "prompt_id": found.prompt_ids.tolist(),
        "raw_score": found.raw_scores.tolist(),
        "score": found.scores.tolist(),
        "num_merged": found.num_merged.tolist(),
        "predicted_iou": [None if s is None else s.predicted_iou for s in segments],
        "stability": [None if s is None else s.stability for s in segments],
        "mask_area": [None if s is None else s.area for s in segments],
        "rle_counts": [None if s is None else s.rle_counts for s in segments],
    }
    for position, axis in enumerate(("x0", "y0", "x1", "y1")):
        row[axis] = boxes[:, position].tolist()
        row[f"mask_{axis}"] = [None if s is None else s.box_xyxy[position] for s in segments]
    return row


MAX_IMAGE_ID = 2**53
"""Image ids are below this, so that every JSON reader keeps them exact."""

LISTING_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),  # null in all rows: the plan numbers the images
        pa.field("file_name", pa.string(), nullable=False),  # full relative path, never a basename
        pa.field("uri", pa.string(), nullable=False),  # the file that holds the image
        pa.field("container", pa.string()),  # null: the file is the image; or a `Container`
        pa.field(
            "member", pa.string()
        ),  # tar: name; parquet: column, with dots; escaped: end of `uri`; bad: the reason
        pa.field("offset", pa.int64()),  # tar: first byte of the image; parquet, bad: row of the file, if it has rows
        pa.field("length", pa.int64()),  # bytes of the image, where the storage states them (tar: always)
        pa.field("num_bytes", pa.int64()),  # encoded size, where the storage or the source states it
        pa.field("height", pa.int32()),  # as the source states it
        pa.field("width", pa.int32()),
        pa.field("split", pa.string()),  # null: the first folder of the file name, if it has one
        pa.field("extra", pa.string()),  # JSON object: the source's other fields of the image record
        pa.field("other_name", pa.string()),  # used if another image of the listing has `file_name`; null: none
        pa.field("quoted", pa.string()),  # why `file_name` is quoted; null: it is unchanged from the source
    ]
)
"""The last two columns are for the plan and are not stored."""

_BYTES_PER_PIXEL = 0.5
"""Encoded bytes per pixel, for images of unknown file size: on the safe side of JPEG's usual 0.2 to 0.4."""

_UNKNOWN_BYTES = 200_000


class Container(StrEnum):
    """The kind of file that contains an image which is not a file itself, or why it has none."""

    TAR = "tar"
    PARQUET = "parquet"
    ESCAPED = "escaped"
    """Not a container: a local file whose path is not UTF-8. `uri` ends in `member`, the percent-encoded path below the
    root of the images; `address_of` decodes it."""
    BAD = "bad"
    """Not a container: a row of the source (`uri`, `offset`) without a readable image. It becomes a failed row."""


def encoded_bytes(listed: pa.Table) -> NDArray[np.int64]:
    """(N,) encoded size in bytes of N listed images: known, or estimated from the pixels, or a typical size."""
    pixels = pc.multiply(listed["height"].cast(pa.float64()), listed["width"].cast(pa.float64()))
    estimated = pc.floor(pc.multiply(pixels, _BYTES_PER_PIXEL)).cast(pa.int64())
    sizes = pc.coalesce(listed["num_bytes"], listed["length"], estimated, pa.scalar(_UNKNOWN_BYTES, pa.int64()))
    return sizes.to_numpy()
