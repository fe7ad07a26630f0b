"""Write Parquet: flat tables of annotations and images, for DuckDB, Polars, Spark."""

import io
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from owlsam_ray.reduce.formats.json_rows import box_sides, column_of, dump_json
from owlsam_ray.reduce.formats.protocol import Parts, Rendered
from owlsam_ray.reduce.labels import ShardLabels

ANNOTATION_TABLE, IMAGE_TABLE = "annotations.parquet", "images.parquet"

ANNOTATION_COLUMNS = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # of the image
        pa.field("width", pa.int32(), nullable=False),
        pa.field("category_id", pa.int64(), nullable=False),
        pa.field("category", pa.dictionary(pa.int32(), pa.string()), nullable=False),  # its name
        pa.field("bbox_x", pa.float32(), nullable=False),  # the detector's box, in pixels
        pa.field("bbox_y", pa.float32(), nullable=False),
        pa.field("bbox_w", pa.float32(), nullable=False),
        pa.field("bbox_h", pa.float32(), nullable=False),
        pa.field("area", pa.float64(), nullable=False),  # mask pixels, or the area of the box if there is no mask
        pa.field("score", pa.float32(), nullable=False),
        pa.field("raw_score", pa.float32()),  # the detector's own
        pa.field("num_merged", pa.int32()),  # boxes merged into this one
        pa.field("prompt", pa.dictionary(pa.int32(), pa.string())),  # the query that matched
        pa.field("corrected", pa.bool_(), nullable=False),  # drawn or changed by reviewers
        # Fields of the mask; null without a mask.
        pa.field("predicted_iou", pa.float32()),
        pa.field("stability", pa.float32()),
        pa.field("mask_bbox_x", pa.int32()),
        pa.field("mask_bbox_y", pa.int32()),
        pa.field("mask_bbox_w", pa.int32()),
        pa.field("mask_bbox_h", pa.int32()),
        pa.field("rle_counts", pa.string()),  # COCO's compressed RLE; its size is height, width
    ]
)
"""Schema of `annotations.parquet`: a row for each annotation, by ascending id."""

IMAGE_COLUMNS = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("height", pa.int32()),  # null only for failed images
        pa.field("width", pa.int32()),
        pa.field("status", pa.string(), nullable=False),  # ok | empty | failed
        pa.field("reason", pa.string()),  # of a failure, or a remark
        pa.field("status_class", pa.string()),  # permanent | transient | quarantined
        pa.field("num_annotations", pa.int32(), nullable=False),  # after all decisions
    ]
)
"""Schema of `images.parquet`: a row for each image of the run, including failed ones, in manifest order."""

ROW_GROUP = 2**16
"""Rows per row group; the last group of a file has fewer."""
_LENGTH = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class ParquetOutput:
    """Write `annotations.parquet` (`ANNOTATION_COLUMNS`) and `images.parquet` (`IMAGE_COLUMNS`).

    Row groups have `ROW_GROUP` rows regardless of the size of shards, compressed with zstd. The metadata of both files
    has `info`, as JSON under the key `info`.
    """

    categories: tuple[str, ...]
    """(C,) names of the output's categories."""
    prompts: tuple[str, ...]
    """(Q,) texts of the queries."""
    name: str = "parquet"

    def render(self, labels: ShardLabels) -> Rendered:
        """Render the rows of both tables as Arrow streams."""
        return Rendered(
            {"annotations": _stream(self._annotations(labels)), "images": _stream(_images(labels))},
        )

    def assemble(self, parts: Parts) -> list[str]:
        """Write both files."""
        for name, section, schema in (
            (ANNOTATION_TABLE, "annotations", ANNOTATION_COLUMNS),
            (IMAGE_TABLE, "images", IMAGE_COLUMNS),
        ):
            with parts.open(name) as out:
                _write(out, parts, section, schema, info=dump_json(parts.head.info))
        return [ANNOTATION_TABLE, IMAGE_TABLE]

    def _annotations(self, labels: ShardLabels) -> pa.Table:
        table = labels.annotations
        widths, heights = box_sides(table)
        areas = pc.multiply(widths, heights).cast(pa.float64())
        made = {
            "file_name": column_of(labels.images, "file_name").take(column_of(table, "image")),
            "category": _of_dictionary(column_of(table, "category"), self.categories),
            "prompt": _of_dictionary(column_of(table, "prompt_id"), self.prompts),
            "bbox_x": column_of(table, "x0"),
            "bbox_y": column_of(table, "y0"),
            "bbox_w": widths,
            "bbox_h": heights,
            "area": pc.coalesce(pc.cast(column_of(table, "mask_area"), pa.float64()), areas),
            "mask_bbox_x": column_of(table, "mask_x0"),
            "mask_bbox_y": column_of(table, "mask_y0"),
            "mask_bbox_w": pc.subtract(column_of(table, "mask_x1"), column_of(table, "mask_x0")),
            "mask_bbox_h": pc.subtract(column_of(table, "mask_y1"), column_of(table, "mask_y0")),
            "rle_counts": column_of(table, "rle_counts").cast(pa.string()),
        }
        return pa.table(
            [made[name] if name in made else column_of(table, name) for name in ANNOTATION_COLUMNS.names],
            schema=ANNOTATION_COLUMNS,
        )


def _images(labels: ShardLabels) -> pa.Table:
    counts = np.bincount(labels.annotations["image"].to_numpy(), minlength=labels.images.num_rows)
    made = {"num_annotations": pa.array(counts, pa.int32())}
    return pa.table(
        [made[name] if name in made else column_of(labels.images, name) for name in IMAGE_COLUMNS.names],
        schema=IMAGE_COLUMNS,
    )


def _of_dictionary(places: pa.Array, texts: tuple[str, ...]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(places, pa.array(texts, pa.string()))


def _stream(table: pa.Table) -> bytes:
    """Serialize a table to an Arrow stream, preceded by its length."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return _LENGTH.pack(sink.tell()) + sink.getvalue()


def _write(out: IO[bytes], parts: Parts, section: str, schema: pa.Schema, *, info: str) -> None:
    """Write the rows of all shards in groups of one size, with one group in memory."""
    with ExitStack() as stack:
        writer = stack.enter_context(pq.ParquetWriter(out, schema, compression="zstd"))
        writer.add_key_value_metadata({"info": info})
        waiting: list[pa.Table] = []

        def flush(least: int) -> None:
            rows = pa.concat_tables([schema.empty_table(), *waiting])
            start = 0
            while rows.num_rows - start >= max(1, least):
                group = rows.slice(start, ROW_GROUP).unify_dictionaries().combine_chunks()
                writer.write_table(group, row_group_size=ROW_GROUP)
                start += group.num_rows
            waiting[:] = [rows.slice(start)]

        def take(file: IO[bytes]) -> None:
            for table in _tables(file):
                waiting.append(table)
                if sum(each.num_rows for each in waiting) >= ROW_GROUP:
                    flush(ROW_GROUP)

        parts.read(section, take)
        flush(1)


def _tables(file: IO[bytes]) -> Iterator[pa.Table]:
    while length := file.read(_LENGTH.size):
        yield pa.ipc.open_stream(file.read(*_LENGTH.unpack(length))).read_all()
