"""Write COCO: images, categories and annotations in one or more files, and a file of failed images."""

import logging
from dataclasses import dataclass
from typing import IO, Any

import pyarrow.compute as pc

from owlsam_ray.config.vocabulary import Category
from owlsam_ray.reduce.formats.json_rows import (
    LINE_END,
    annotation_lines,
    dump_json,
    image_lines,
    provenance_pieces,
    rle_pieces,
)
from owlsam_ray.reduce.formats.protocol import FileSpan, Head, Parts, Rendered
from owlsam_ray.reduce.formats.text_rows import Piece, text_bytes
from owlsam_ray.reduce.labels import ShardLabels
from owlsam_ray.run.paths import FAILURES

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CocoOutput:
    """Write `annotations.json`.

    Annotations have `bbox` (the detector's box), `segmentation`, `area` (mask pixels), `mask_bbox`, `score`,
    `predicted_iou`, `stability`. A detection under the mask floor has no mask fields, and the area of its box. Failed
    images do not appear (they would train as background); empty ones do.

    `segmentation` is RLE, or polygons; with polygons, only a mask without pixels is RLE, because readers reject an
    empty list. The proof in `info` states how many pixels the polygons lost or gained.
    """

    prompts: tuple[str, ...] | None = None
    """(Q,) texts of the queries, to state in each annotation which one matched, its raw score, and how many boxes were
    merged; None: not stated."""
    polygons: bool = False
    """Write polygons instead of RLE."""
    name: str = "coco"

    def render(self, labels: ShardLabels) -> Rendered:
        """Render the lines of images and annotations."""
        more = [] if self.prompts is None else provenance_pieces(labels, self.prompts)
        segmentation, counts = _polygons(labels) if self.polygons else (None, {})
        return Rendered(
            {
                "images": text_bytes(image_lines(labels)),
                "annotations": text_bytes(annotation_lines(labels, segmentation=segmentation, more=more)),
            },
            counts=counts,
        )

    def assemble(self, parts: Parts) -> list[str]:
        """Write one file for each span."""
        names = []
        for span in parts.spans:
            names.append(span.name("annotations", ".json"))
            with parts.open(names[-1]) as out:
                write_document(out, parts, span, output=self.name, categories=category_entries(parts.head))
        if self.polygons:
            counts = parts.head.format_counts.get(self.name, {})
            _log.info(
                "polygons of %d masks with %d pixels: %d pixels differ from the masks",
                *(counts.get(key, 0) for key in ("polygon_masks", "polygon_pixels", "polygon_pixels_off")),
            )
        return names


def _polygons(labels: ShardLabels) -> tuple[list[Piece], dict[str, int]]:
    """Return the field `segmentation` as polygons, and counts of what is lost by the conversion."""
    # Imported here: other formats need neither OpenCV nor pycocotools.
    from owlsam_ray.reduce.formats.polygons import polygon_json, trace

    table = labels.annotations
    polygons = trace(table)
    segmentation = polygon_json(polygons)
    counts = {
        "polygon_masks": len(segmentation) - segmentation.null_count,
        "polygon_pixels": pc.sum(table["mask_area"]).as_py() or 0,
        "polygon_pixels_off": polygons.pixels_off,
    }
    return [Piece(', "segmentation": ', segmentation), *rle_pieces(table, pc.is_null(segmentation))], counts


def write_document(
    out: IO[bytes], parts: Parts, span: FileSpan | None, *, output: str, categories: list[dict[str, Any]]
) -> None:
    """Write a COCO document of the sections `images` and `annotations`."""
    head = parts.head
    out.write(b"{\n")
    for key, value in (("info", head.info_of(output)), ("licenses", head.licenses)):
        out.write(f'"{key}": {dump_json(value)},\n'.encode())
    write_list(out, "images", parts, span)
    out.write(f'"categories": {dump_json(categories)},\n'.encode())
    write_list(out, "annotations", parts, span, end="\n")
    out.write(b"}\n")


def write_list(out: IO[bytes], key: str, parts: Parts, span: FileSpan | None, *, end: str = LINE_END) -> None:
    """Write the lines of a section as a JSON list, with its key."""
    out.write(f'"{key}": [\n'.encode())
    write_lines(out, key, parts, span)
    out.write(f"]{end}".encode())


def write_lines(out: IO[bytes], key: str, parts: Parts, span: FileSpan | None = None) -> None:
    """Write the lines of a section, the last one without its comma."""
    if parts.size(key, span):
        parts.copy(key, out, span, without_last=len(LINE_END))
        out.write(b"\n")


def category_entries(head: Head) -> list[dict[str, Any]]:
    """The list `categories`."""
    return [category_entry(category) for category in head.categories]


def category_entry(category: Category) -> dict[str, Any]:
    """Id, name and supercategory; synonyms and frequency where known, in LVIS's form."""
    synonyms = {"synonyms": list(category.synonyms)} if category.synonyms else {}
    frequency = {"frequency": category.frequency} if category.frequency else {}
    return {"id": category.id, "name": category.name, "supercategory": category.supercategory} | synonyms | frequency


@dataclass(frozen=True, slots=True)
class FailuresOutput:
    """Write `failures.jsonl`: a line for each image that failed. Part of every reduce."""

    name: str = "failures"

    def render(self, labels: ShardLabels) -> Rendered:
        """Render the lines of the failed images."""
        failed = labels.images.filter(pc.equal(labels.images["status"], "failed"))
        lines = [
            dump_json({key: row[key] for key in ("image_id", "file_name", "reason")} | {"class": row["status_class"]})
            for row in failed.to_pylist()
        ]
        return Rendered({"lines": "".join(line + "\n" for line in lines).encode()})

    def assemble(self, parts: Parts) -> list[str]:
        """Write the file, which is empty when nothing failed."""
        with parts.open(FAILURES) as out:
            parts.copy("lines", out)
        return [FAILURES]
