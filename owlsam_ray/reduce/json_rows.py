"""Lines of JSON from columns: images and annotations as COCO has them, without a Python object for each."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray.kernels import Piece, join_rows
from owlsam_ray.reduce.labels import ShardLabels

LINE_END = ",\n"
"""Behind each line; the last one of a list loses it."""
_PLAIN_NAME = r"^[ !#-\[\]-~]*$"
_NO_JSON = re.compile(r"\b(NaN|-?Infinity)\b")


def dump_json(value: Any) -> str:
    """A value in one line."""
    # ASCII with escapes, as COCO's own files: half of a surrogate pair in a name must not stop the last step of a run.
    return json.dumps(value, allow_nan=False, separators=(", ", ": "))


def json_strings(texts: pa.Array) -> pa.Array:
    """(N,) JSON strings with their quotes, as `dump_json` has them; null stays null."""
    if pc.all(pc.match_substring_regex(texts, _PLAIN_NAME), min_count=0).as_py():
        return pc.binary_join_element_wise('"', texts, '"', "")
    return pa.array([None if text is None else dump_json(text) for text in texts.to_pylist()], pa.string())


def image_lines(labels: ShardLabels, more: Sequence[Piece] = ()) -> pa.LargeStringArray:
    """A line for each image of a shard that did not fail.

    Args:
        labels: of the shard.
        more: further fields behind the source's own, such as `, "key": ` and a value.
    """
    images = labels.images.filter(pa.array(labels.is_labelled)).combine_chunks()
    pieces = [
        Piece('{"id": ', _column(images, "image_id")),
        Piece(', "file_name": ', json_strings(_column(images, "file_name"))),
        Piece(', "height": ', _column(images, "height")),
        Piece(', "width": ', _column(images, "width")),
        Piece(", ", _fields(_column(images, "extra"))),
        *more,
        literal("}" + LINE_END, images.num_rows),
    ]
    return join_rows(pieces, images.num_rows)


def annotation_lines(
    labels: ShardLabels, *, segmentation: pa.Array | None = None, more: Sequence[Piece] = ()
) -> pa.LargeStringArray:
    """A line for each annotation of a shard.

    Args:
        labels: of the shard.
        segmentation: (N,) JSON of each instead of the RLE; null: none.
        more: further fields at the end.

    `bbox` is the detector's box, `area` counts mask pixels, or is the box's where there is no mask.
    """
    table = labels.annotations
    widths, heights, mask_widths, mask_heights = (
        pc.subtract(_column(table, high), _column(table, low))
        for high, low in (("x1", "x0"), ("y1", "y0"), ("mask_x1", "mask_x0"), ("mask_y1", "mask_y0"))
    )
    counts = _column(table, "rle_counts")
    areas = pc.coalesce(
        pc.cast(_column(table, "mask_area"), pa.string()), pc.cast(pc.multiply(widths, heights), pa.string())
    )
    has_mask = counts.is_valid()
    sizes = [pc.if_else(has_mask, _column(table, side), None) for side in ("height", "width")]
    shape = (
        [
            Piece(', "segmentation": {"size": [', sizes[0]),
            Piece(", ", sizes[1]),
            Piece('], "counts": "', counts, '"}', quoted=True),
        ]
        if segmentation is None
        else [Piece(', "segmentation": ', segmentation)]
    )
    pieces = [
        Piece('{"id": ', _column(table, "id")),
        Piece(', "image_id": ', _column(table, "image_id")),
        Piece(', "category_id": ', _column(table, "category_id")),
        Piece(', "bbox": [', _column(table, "x0")),
        Piece(", ", _column(table, "y0")),
        Piece(", ", widths),
        Piece(", ", heights),
        Piece('], "area": ', areas),
        *shape,
        Piece(', "iscrowd": 0, "score": ', _column(table, "score")),
        Piece(', "predicted_iou": ', _column(table, "predicted_iou")),
        Piece(', "stability": ', _column(table, "stability")),
        Piece(', "mask_bbox": [', _column(table, "mask_x0")),
        Piece(", ", _column(table, "mask_y0")),
        Piece(", ", mask_widths),
        Piece(", ", mask_heights, "]"),
        *_corrected(_column(table, "corrected")),
        *more,
        literal("}" + LINE_END, table.num_rows),
    ]
    return join_rows(pieces, table.num_rows)


def _corrected(which: pa.Array) -> list[Piece]:
    """A field of those that people drew or changed."""
    return [Piece(', "corrected": ', pc.if_else(which, "true", None))] if pc.any(which).as_py() else []


def provenance_pieces(labels: ShardLabels, prompts: Sequence[str]) -> list[Piece]:
    """Fields that tell where each annotation comes from.

    Args:
        labels: of the shard.
        prompts: (Q,) text of each query.
    """
    table = labels.annotations
    texts = pa.array([dump_json(prompt) for prompt in prompts], pa.string())
    return [
        Piece(', "prompt": ', texts.take(_column(table, "prompt_id"))),
        Piece(', "raw_score": ', _column(table, "raw_score")),
        Piece(', "num_merged": ', _column(table, "num_merged")),
    ]


def literal(text: str, num_rows: int) -> Piece:
    """The same text in every row."""
    return Piece(text, pa.repeat(pa.scalar("", pa.string()), num_rows))


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _fields(extra: pa.Array) -> pa.Array:
    """JSON objects without their braces; those without fields become null."""
    inside = pc.utf8_slice_codeunits(extra, 1, -1)
    inside = pc.if_else(pc.equal(inside, ""), None, inside)
    odd = pc.fill_null(pc.match_substring_regex(inside, _NO_JSON.pattern), False)
    if pc.any(odd, min_count=0).as_py():  # Python's json reads and writes these, no other does
        inside = pa.array([_without_nan(text) for text in inside.to_pylist()], pa.string())
    return inside


def _without_nan(text: str | None) -> str | None:
    """The same fields, with null for what is no number."""
    if text is None or not _NO_JSON.search(text):
        return text
    return dump_json(json.loads("{" + text + "}", parse_constant=lambda _: None))[1:-1]
