"""Write COCO results: the list of detections with scores that evaluators read."""

from dataclasses import dataclass

from owlsam_ray.reduce.formats.coco import write_lines
from owlsam_ray.reduce.formats.json_rows import LINE_END, bbox_pieces, column_of, literal, rle_pieces
from owlsam_ray.reduce.formats.protocol import Parts, Rendered
from owlsam_ray.reduce.formats.text_rows import Piece, join_rows, text_bytes
from owlsam_ray.reduce.labels import ShardLabels

RESULTS = "results.json"


@dataclass(frozen=True, slots=True)
class CocoResultsOutput:
    """Write `results.json`: `image_id`, `category_id`, `bbox`, `score` and `segmentation` (RLE), by ascending id.

    A detection without a mask has no `segmentation`: pycocotools and lvis then use its box as its mask. Both decide by
    the first entry of a list, which always has a `bbox`, like all others. They take areas from `bbox` even when masks
    are evaluated (drop `bbox` first to get AP by mask size), and pycocotools cannot read an empty list.
    """

    name: str = "coco_results"

    def render(self, labels: ShardLabels) -> Rendered:
        """Render a line for each annotation."""
        table = labels.annotations
        pieces = [
            Piece('{"image_id": ', column_of(table, "image_id")),
            Piece(', "category_id": ', column_of(table, "category_id")),
            *bbox_pieces(table),
            Piece(', "score": ', column_of(table, "score")),
            *rle_pieces(table),
            literal("}" + LINE_END, table.num_rows),
        ]
        return Rendered({"results": text_bytes(join_rows(pieces, table.num_rows))})

    def assemble(self, parts: Parts) -> list[str]:
        """Write one file."""
        with parts.open(RESULTS) as out:
            out.write(b"[\n")
            write_lines(out, "results", parts)
            out.write(b"]\n")
        return [RESULTS]
