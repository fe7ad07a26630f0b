"""COCO: images, categories and annotations in one file, or in several; and the images that failed in another."""

from dataclasses import dataclass
from typing import IO, Any

import pyarrow.compute as pc

from owlsam_ray.kernels import text_bytes
from owlsam_ray.reduce.json_rows import LINE_END, annotation_lines, dump_json, image_lines, provenance_pieces
from owlsam_ray.reduce.labels import ShardLabels
from owlsam_ray.reduce.outputs import FileSpan, Head, Parts, Rendered
from owlsam_ray.settings import Category

ANNOTATIONS = "annotations.json"
FAILURES = "failures.jsonl"


@dataclass(frozen=True, slots=True)
class CocoOutput:
    """`annotations.json`.

    Annotations carry `bbox` (the detector's box), `segmentation` (RLE), `area` (mask pixels), `mask_bbox`, `score`,
    `predicted_iou`, `stability`. A detection under the mask floor has no mask fields, and its box's area. Failed images
    do not appear (they would train as background); empty ones do.
    """

    prompts: tuple[str, ...] | None = None
    """(Q,) texts of the queries, to tell in each annotation which one matched, its raw score, and how many boxes were
    merged; None: not told."""
    name: str = "coco"

    def render(self, labels: ShardLabels) -> Rendered:
        """Lines of images and annotations."""
        more = [] if self.prompts is None else provenance_pieces(labels, self.prompts)
        return Rendered(
            {
                "images": text_bytes(image_lines(labels)),
                "annotations": text_bytes(annotation_lines(labels, more=more)),
            }
        )

    def assemble(self, parts: Parts) -> list[str]:
        """One file for each span."""
        names = []
        for span in parts.spans:
            names.append(span.name("annotations", ".json"))
            with parts.open(names[-1]) as out:
                write_document(out, parts, span)
        return names


def write_document(out: IO[bytes], parts: Parts, span: FileSpan | None) -> None:
    """A COCO document of the sections `images` and `annotations`."""
    head = parts.head
    out.write(b"{\n")
    for key, value in (("info", head.info), ("licenses", head.licenses)):
        out.write(f'"{key}": {dump_json(value)},\n'.encode())
    _write_list(out, "images", parts, span)
    out.write(f'"categories": {dump_json(category_entries(head))},\n'.encode())
    _write_list(out, "annotations", parts, span, end="\n")
    out.write(b"}\n")


def _write_list(out: IO[bytes], key: str, parts: Parts, span: FileSpan | None, *, end: str = LINE_END) -> None:
    out.write(f'"{key}": [\n'.encode())
    if parts.size(key, span):
        parts.copy(key, out, span, without_last=len(LINE_END))
        out.write(b"\n")
    out.write(f"]{end}".encode())


def category_entries(head: Head) -> list[dict[str, Any]]:
    """The list `categories`."""
    return [category_entry(category) for category in head.categories]


def category_entry(category: Category) -> dict[str, Any]:
    """Id, name and supercategory; synonyms and frequency where they are known, as LVIS has them."""
    synonyms = {"synonyms": list(category.synonyms)} if category.synonyms else {}
    frequency = {"frequency": category.frequency} if category.frequency else {}
    return {"id": category.id, "name": category.name, "supercategory": category.supercategory} | synonyms | frequency


@dataclass(frozen=True, slots=True)
class FailuresOutput:
    """`failures.jsonl`: a line for each image that failed. Part of every reduce."""

    name: str = "failures"

    def render(self, labels: ShardLabels) -> Rendered:
        """Lines of the failed images."""
        failed = labels.images.filter(pc.equal(labels.images["status"], "failed"))
        lines = [
            dump_json({key: row[key] for key in ("image_id", "file_name", "reason")} | {"class": row["status_class"]})
            for row in failed.to_pylist()
        ]
        return Rendered({"lines": "".join(line + "\n" for line in lines).encode()})

    def assemble(self, parts: Parts) -> list[str]:
        """The file, which is empty when nothing failed."""
        with parts.open(FAILURES) as out:
            parts.copy("lines", out)
        return [FAILURES]
