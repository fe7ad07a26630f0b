"""Read a shard and apply all decisions: the resulting labels are what every output is written from."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.reduce.decisions import Columns, Decisions, Pins, decide
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.proof import ShardRules, prove_shard
from owlsam_ray.schema import PREDICTION_SCHEMA
from owlsam_ray.storage.secrets import SUSPECT, masked, masked_tree, published

IMAGE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("uri", pa.string()),  # null if the image is in a tar or Parquet file
        pa.field("ordinal", pa.int64(), nullable=False),  # 1-based position in the manifest
        pa.field("status", pa.string(), nullable=False),  # ok | empty | failed
        pa.field("reason", pa.string()),
        pa.field("status_class", pa.string()),
        pa.field("height", pa.int32()),  # null only for failed images
        pa.field("width", pa.int32()),
        pa.field("extra", pa.string()),  # JSON object of the source's other fields
        # Lowest score where inference kept the maximum number of detections: some below it may have been dropped.
        pa.field("limit_score", pa.float32()),
    ]
)
"""One row for each image of a shard, including failed ones, in manifest order."""

ANNOTATION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),  # ordinal × K + det_index; see overlay.py
        pa.field("image", pa.int32(), nullable=False),  # row of the shard's images
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("category", pa.int32(), nullable=False),  # index into the output's categories
        pa.field("category_id", pa.int64(), nullable=False),
        # The next four are null for annotations drawn by reviewers.
        pa.field("label", pa.int32()),  # index into the run's categories
        pa.field("prompt_id", pa.int32()),  # index into the run's queries
        pa.field("raw_score", pa.float32()),
        pa.field("num_merged", pa.int32()),
        pa.field("x0", pa.float32(), nullable=False),
        pa.field("y0", pa.float32(), nullable=False),
        pa.field("x1", pa.float32(), nullable=False),
        pa.field("y1", pa.float32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("corrected", pa.bool_(), nullable=False),  # drawn or changed by reviewers: see corrections.py
        # Fields of the mask; all null if there is none. Drawn masks have neither predicted IoU nor stability.
        pa.field("predicted_iou", pa.float32()),
        pa.field("stability", pa.float32()),
        pa.field("mask_area", pa.int64()),
        pa.field("mask_x0", pa.int32()),
        pa.field("mask_y0", pa.int32()),
        pa.field("mask_x1", pa.int32()),
        pa.field("mask_y1", pa.int32()),
        pa.field("rle_counts", pa.binary()),
    ]
)
"""One row for each annotation, by image, then by ascending id."""

_OF_A_DETECTION = tuple(each.name for each in PREDICTION_SCHEMA if pa.types.is_list(each.type))
_CARRIED = ("prompt_id", "raw_score", "predicted_iou", "stability", "mask_area", "mask_x0", "mask_y0", "mask_x1",
            "mask_y1", "rle_counts")  # fmt: skip


@dataclass(slots=True)
class LabelCounts:
    """Counts of a reduce; those of several shards add up."""

    status: Counter[str] = field(default_factory=Counter)
    """Number of images by ok, empty, failed."""
    failed: Counter[str] = field(default_factory=Counter)
    """Failed images by the part of the reason before its first colon."""
    flagged: Counter[str] = field(default_factory=Counter)
    """Labelled images with a remark, by the part of the remark before its first colon."""
    detections: int = 0
    """Number that inference kept."""
    annotations: int = 0
    masks: int = 0
    """Annotations with a mask."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of detections by the step that left them out."""
    corrections: Counter[str] = field(default_factory=Counter)
    """Outcome of reviewers' corrections, see corrections.py. `added` ones are annotations but not detections."""

    def add(self, other: "LabelCounts") -> None:
        """Add the counts of another one."""
        for name in ("status", "failed", "flagged", "left_out", "corrections"):
            getattr(self, name).update(getattr(other, name))
        self.detections += other.detections
        self.annotations += other.annotations
        self.masks += other.masks


@dataclass(frozen=True, slots=True)
class ShardLabels:
    """The labels of a shard."""

    shard: int
    images: pa.Table
    """`IMAGE_SCHEMA`, single chunks."""
    annotations: pa.Table
    """`ANNOTATION_SCHEMA`, single chunks."""
    counts: LabelCounts
    remarks: dict[str, bytes] = field(default_factory=dict)
    """Remarks on reviewers' corrections: JSON lines by kind."""
    confirmed: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Ids of annotations that reviewers confirmed unchanged."""

    @property
    def is_labelled(self) -> NDArray[np.bool_]:
        """(images,) False for failed images, which no output lists."""
        return pc.not_equal(self.images["status"], "failed").to_numpy()


@dataclass(frozen=True, slots=True)
class Found:
    """What inference found in one shard."""

    shard: int
    first_ordinal: int
    images: pa.Table
    """`IMAGE_SCHEMA`."""
    detections: pa.Table
    """(D rows) the list columns of `PREDICTION_SCHEMA`, flattened."""
    image: NDArray[np.int64]
    """(D,) row of the shard that each detection belongs to, ascending."""


class Review(Protocol):
    """Reviewers' corrections of one shard."""

    @property
    def pins(self) -> Pins:
        """Input to the decisions."""

    def apply(self, labels: ShardLabels, kept: Columns) -> ShardLabels:
        """Return the shard with reviewers' annotations replacing the model's, by image, then by ascending id, counted.

        Args:
            labels: the shard after the decisions.
            kept: the detections that its annotations were made from, row by row.
        """


class Overlay(Protocol):
    """Reviewers' corrections of a run; sent to other processes."""

    def review(self, found: Found, decisions: Decisions) -> Review | None:
        """Return the corrections of one shard; None: it has none."""


def read_labels(
    manifest: Manifest,
    shard: int,
    rules: ShardRules,
    decisions: Decisions,
    overlay: Overlay | None = None,
) -> ShardLabels:
    """Read a shard, prove it, and decide.

    Raises:
        IncompleteError: the shard cannot be trusted.
        OSError: storage gave up.
    """
    sources = manifest.read_shard(shard)
    _, rows = prove_shard(manifest.run_url, shard, sources["image_id"], rules)
    first_ordinal, _ = manifest.shard_span(shard)
    lengths = pc.fill_null(pc.list_value_length(rows["det_index"]), 0).to_numpy()
    image = np.repeat(np.arange(rows.num_rows), lengths)
    detections = pa.table({name: pc.list_flatten(rows[name]).combine_chunks() for name in _OF_A_DETECTION})
    limits = np.full(rows.num_rows, np.nan, np.float32)
    is_last = detections["det_index"].to_numpy() == rules.ids_per_image - 1
    limits[image[is_last]] = detections["score"].to_numpy()[is_last]
    images = images_of(sources, rows, first_ordinal, limits)
    found = Found(shard, first_ordinal, images, detections, image)
    review = None if overlay is None else overlay.review(found, decisions)
    kept, left_out = decide(detections, image, decisions, None if review is None else review.pins)
    annotations = annotations_of(found, kept, decisions, rules.ids_per_image)
    counts = LabelCounts(
        detections=len(image),
        annotations=len(kept),
        masks=len(kept) - annotations["rle_counts"].null_count,
        left_out=Counter(left_out),
    )
    _count_images(images, counts)
    labels = ShardLabels(shard, images, annotations, counts)
    return labels if review is None else review.apply(labels, kept)


def annotations_of(found: Found, kept: Columns, decisions: Decisions, ids_per_image: int) -> pa.Table:
    """Make `ANNOTATION_SCHEMA` rows of the detections of a shard that are kept."""
    images = found.images
    ids = np.array([category.id for category in decisions.categories], np.int64)
    carried = found.detections
    if len(kept) < len(found.image):
        carried = carried.select(_CARRIED).take(pa.array(kept.place))
    own = {
        "id": (found.first_ordinal + kept.image) * ids_per_image + kept.det_index,
        "image": kept.image,
        "image_id": images["image_id"].to_numpy()[kept.image],
        "category": kept.category,
        "category_id": ids[kept.category],
        "label": kept.label,
        **dict(zip(("x0", "y0", "x1", "y1"), kept.boxes_xyxy.T, strict=True)),
        "score": kept.score,
        "num_merged": kept.num_merged,
        "corrected": np.zeros(len(kept), np.bool_),
        **{side: images[side].combine_chunks().take(pa.array(kept.image)) for side in ("height", "width")},
    }
    return pa.table(
        [
            _single(carried[each.name]) if each.name in _CARRIED else _array(own[each.name], each.type)
            for each in ANNOTATION_SCHEMA
        ],
        schema=ANNOTATION_SCHEMA,
    )


def images_of(sources: pa.Table, rows: pa.Table, first_ordinal: int, limits: NDArray[np.float32]) -> pa.Table:
    """Make `IMAGE_SCHEMA` rows of a shard from its rows of the manifest and of the predictions."""
    ordinals = pa.array(np.arange(first_ordinal, first_ordinal + rows.num_rows), pa.int64())
    made = {
        "ordinal": ordinals,
        # Runs planned or labelled by an earlier version may hold secrets here.
        "reason": _masked(rows["reason"], masked, suspect="[/@=]|(?i)bearer"),
        "file_name": _masked(sources["file_name"], published),
        "extra": _masked(sources["extra"], _published_json),
        "uri": pc.if_else(_single(sources["container"]).is_null(), _masked(sources["uri"], published), None),
        "limit_score": pa.array(limits, from_pandas=True),
    }
    from_rows = ("status", "reason", "status_class", "height", "width")
    return pa.table(
        [
            made[each.name] if each.name in made else _single((rows if each.name in from_rows else sources)[each.name])
            for each in IMAGE_SCHEMA
        ],
        schema=IMAGE_SCHEMA,
    )


def _masked(column: pa.ChunkedArray, how: Callable[[str], str], *, suspect: str = SUSPECT) -> pa.Array:
    """Mask secrets in texts; returns the same array if no text looks like one, which is the usual case."""
    texts = _single(column)
    found = pc.fill_null(pc.match_substring_regex(texts, suspect), False)
    if not pc.any(found, min_count=0).as_py():
        return texts
    return pc.replace_with_mask(texts, found, pa.array(map(how, texts.filter(found).to_pylist()), texts.type))


def _published_json(text: str) -> str:
    """Remove secrets from the texts of a JSON object; returned unchanged, byte for byte, if it has none."""
    tree = json.loads(text)
    without = masked_tree(tree, published)
    return text if without == tree else json.dumps(without)


def _array(values: NDArray[np.generic] | pa.Array, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(np.ascontiguousarray(values), kind, safe=False)


def _single(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _count_images(images: pa.Table, counts: LabelCounts) -> None:
    for entry in images["status"].value_counts().to_pylist():
        counts.status[entry["values"]] += entry["counts"]
    if images["reason"].null_count == images.num_rows:
        return
    for status, reason in zip(images["status"].to_pylist(), images["reason"].to_pylist(), strict=True):
        if reason is None:
            continue
        if status == "failed":
            counts.failed[reason.split(":")[0]] += 1
        else:
            counts.flagged.update(note.split(":")[0] for note in reason.split("; "))
