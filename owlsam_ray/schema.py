"""What is stored: Arrow schemas of manifest and prediction rows; records ↔ rows.

Prediction rows, version 1: one row per image; the lists are parallel, one entry per detection by falling score, and are
null for failed images. A detection without a mask has null entries in the mask lists.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

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
        ),  # null: the file is the image; tar or parquet: it lies in one; escaped: its path is no UTF-8; bad: no image
        pa.field(
            "member", pa.string()
        ),  # tar: name; parquet: column, with dots; escaped: end of `uri`; bad: the reason
        pa.field("offset", pa.int64()),  # tar: first byte of the image; parquet, bad: row of the file, if it has rows
        pa.field("length", pa.int64()),  # bytes of the image, where the storage told them (tar: always)
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
        pa.field("reason", pa.string()),  # of a failure; or a remark on a labelled image
        pa.field("status_class", pa.string()),  # permanent | transient | quarantined
        pa.field("height", pa.int32()),  # of the decoded picture
        pa.field("width", pa.int32()),
        *(pa.field(name, pa.list_(kind)) for name, kind in _DETECTION_FIELDS),
    ]
)

ROW_GROUP_IMAGES = 64
"""A row group holds at most this many images, so that a reader's memory is bounded."""


def predictions_to_table(predictions: Sequence[Prediction]) -> pa.Table:
    """Rows of `PREDICTION_SCHEMA`, in the given order."""
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
        "reason": None if reason is None else masked(reason),  # whoever raised the error may have told a URL
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
