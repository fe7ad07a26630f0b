"""Write JSON lines from columns: COCO images and annotations, without a Python object for each."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray.reduce.formats.text_rows import Piece, join_rows
from owlsam_ray.reduce.labels import ShardLabels

LINE_END = ",\n"
"""Ends each line; removed from the last line of a list."""
_PLAIN_NAME = r"^[ !#-\[\]-~]*$"
_NO_JSON = re.compile(r"\b(NaN|-?Infinity)\b|[0-9][eE]\+?[0-9]{3}")
"""Matches what may be a non-finite number; also matches the same characters inside strings."""


def dump_json(value: Any) -> str:
    """Dump a value in one line; non-finite numbers become null."""
    # ASCII with escapes, like COCO's own files: a lone surrogate in a name must not stop the last step of a run.
    try:
        return json.dumps(value, allow_nan=False, separators=(", ", ": "))
    except ValueError:  # Python's json reads 1e999 and NaN, but other readers reject them
        return json.dumps(without_nan(value), allow_nan=False, separators=(", ", ": "))


def json_strings(texts: pa.Array) -> pa.Array:
    """(N,) JSON strings with their quotes, as `dump_json` writes them; null stays null."""
    if pc.all(pc.match_substring_regex(texts, _PLAIN_NAME), min_count=0).as_py():
        return pc.binary_join_element_wise('"', texts, '"', "")
    return pa.array([None if text is None else dump_json(text) for text in texts.to_pylist()], pa.string())


def image_lines(labels: ShardLabels, more: Sequence[Piece] = (), *, without: Sequence[str] = ()) -> pa.LargeStringArray:
    """Return a line for each image of a shard that did not fail.

    Args:
        labels: labels of the shard.
        more: further fields after the source's own, such as `, "key": ` and a value.
        without: fields of the source to leave out.
    """
    images = labels.images.filter(pa.array(labels.is_labelled)).combine_chunks()
    pieces = [
        Piece('{"id": ', column_of(images, "image_id")),
        Piece(', "file_name": ', json_strings(column_of(images, "file_name"))),
        Piece(', "height": ', column_of(images, "height")),
        Piece(', "width": ', column_of(images, "width")),
        Piece(", ", _fields(column_of(images, "extra"), without)),
        *more,
        literal("}" + LINE_END, images.num_rows),
    ]
    return join_rows(pieces, images.num_rows)


def annotation_lines(
    labels: ShardLabels, *, segmentation: Sequence[Piece] | None = None, more: Sequence[Piece] = ()
) -> pa.LargeStringArray:
    """Return a line for each annotation of a shard.

    Args:
        labels: labels of the shard.
        segmentation: the field of that name, instead of RLE.
        more: further fields at the end.

    `bbox` is the detector's box. `area` counts mask pixels, or is the area of the box if there is no mask.
    """
    table = labels.annotations
    mask_widths, mask_heights = (
        pc.subtract(column_of(table, high), column_of(table, low))
        for high, low in (("mask_x1", "mask_x0"), ("mask_y1", "mask_y0"))
    )
    widths, heights = box_sides(table)
    no_mask = column_of(table, "mask_area").is_null()
    pieces = [
        Piece('{"id": ', column_of(table, "id")),
        Piece(', "image_id": ', column_of(table, "image_id")),
        Piece(', "category_id": ', column_of(table, "category_id")),
        *bbox_pieces(table),
        Piece(', "area": ', column_of(table, "mask_area")),
        Piece(', "area": ', pc.if_else(no_mask, pc.multiply(widths, heights), None)),
        *(rle_pieces(table) if segmentation is None else segmentation),
        Piece(', "iscrowd": 0, "score": ', column_of(table, "score")),
        Piece(', "predicted_iou": ', column_of(table, "predicted_iou")),
        Piece(', "stability": ', column_of(table, "stability")),
        Piece(', "mask_bbox": [', column_of(table, "mask_x0")),
        Piece(", ", column_of(table, "mask_y0")),
        Piece(", ", mask_widths),
        Piece(", ", mask_heights, "]"),
        *_corrected(column_of(table, "corrected")),
        *more,
        literal("}" + LINE_END, table.num_rows),
    ]
    return join_rows(pieces, table.num_rows)


def bbox_pieces(table: pa.Table) -> list[Piece]:
    """The field `bbox`: the detector's box."""
    widths, heights = box_sides(table)
    return [
        Piece(', "bbox": [', column_of(table, "x0")),
        Piece(", ", column_of(table, "y0")),
        Piece(", ", widths),
        Piece(", ", heights, "]"),
    ]


def rle_pieces(table: pa.Table, which: pa.Array | None = None) -> list[Piece]:
    """The field `segmentation` as RLE, for all annotations with a mask or only some (boolean); empty for the others."""
    counts = column_of(table, "rle_counts")
    if which is not None:
        counts = pc.if_else(which, counts, None)
    has_mask = counts.is_valid()
    sizes = [pc.if_else(has_mask, column_of(table, side), None) for side in ("height", "width")]
    return [
        Piece(', "segmentation": {"size": [', sizes[0]),
        Piece(", ", sizes[1]),
        Piece('], "counts": "', counts, '"}', quoted=True),
    ]


def box_outline_pieces(table: pa.Table, which: pa.Array) -> list[Piece]:
    """The field `segmentation` with the box as a polygon, for some annotations (boolean); empty for the others.

    Corners are in the order in which LVIS's and COCO's readers of results make such a polygon for a detection without a
    mask.
    """
    x0, y0, x1, y1 = (pc.if_else(which, column_of(table, name), None) for name in ("x0", "y0", "x1", "y1"))
    first, *others, last = (x0, y0, x0, y1, x1, y1, x1, y0)
    return [
        Piece(', "segmentation": [[', first),
        *(Piece(", ", value) for value in others),
        Piece(", ", last, "]]"),
    ]


def box_sides(table: pa.Table) -> tuple[pa.Array, pa.Array]:
    """(N,) widths and heights of the detector's boxes, float32."""
    return (
        pc.subtract(column_of(table, "x1"), column_of(table, "x0")),
        pc.subtract(column_of(table, "y1"), column_of(table, "y0")),
    )


def _corrected(which: pa.Array) -> list[Piece]:
    """The field that marks annotations drawn or changed by reviewers."""
    return [Piece(', "corrected": ', pc.if_else(which, "true", None))] if pc.any(which).as_py() else []


def provenance_pieces(labels: ShardLabels, prompts: Sequence[str]) -> list[Piece]:
    """Fields that state where each annotation comes from.

    Args:
        labels: labels of the shard.
        prompts: (Q,) text of each query.
    """
    table = labels.annotations
    texts = pa.array([dump_json(prompt) for prompt in prompts], pa.string())
    return [
        Piece(', "prompt": ', texts.take(column_of(table, "prompt_id"))),
        Piece(', "raw_score": ', column_of(table, "raw_score")),
        Piece(', "num_merged": ', column_of(table, "num_merged")),
    ]


def literal(text: str, num_rows: int) -> Piece:
    """The same text in every row."""
    return Piece(text, pa.repeat(pa.scalar("", pa.string()), num_rows))


def column_of(table: pa.Table, name: str) -> pa.Array:
    """A column as a single array."""
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _fields(extra: pa.Array, without: Sequence[str] = ()) -> pa.Array:
    """JSON objects without their braces and without the given fields; objects without fields become null."""
    if without and pc.any(pc.match_substring_regex(extra, f'"({"|".join(without)})"'), min_count=0).as_py():
        trees = [None if text is None else json.loads(text) for text in extra.to_pylist()]
        kept = [tree and {key: value for key, value in tree.items() if key not in without} for tree in trees]
        extra = pa.array([None if tree is None else json.dumps(tree) for tree in kept], pa.string())
    inside = pc.utf8_slice_codeunits(extra, 1, -1)
    inside = pc.if_else(pc.equal(inside, ""), None, inside)
    odd = pc.fill_null(pc.match_substring_regex(inside, _NO_JSON.pattern), False)
    if pc.any(odd, min_count=0).as_py():  # Python's json reads and writes these, other readers do not
        inside = pa.array([_without_nan(text) for text in inside.to_pylist()], pa.string())
    return inside


def without_nan(value: Any) -> Any:
    """Replace non-finite numbers in a tree of JSON values by null; Python's json keeps them, others do not."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def _without_nan(text: str | None) -> str | None:
    """The same fields, with non-finite numbers replaced by null."""
    if text is None or not _NO_JSON.search(text):
        return text
    return dump_json(json.loads("{" + text + "}"))[1:-1]
