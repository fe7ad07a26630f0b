"""Write Label Studio tasks with pre-annotations, and the matching labelling configuration."""

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.config.vocabulary import Category
from owlsam_ray.reduce.formats.coco import write_lines
from owlsam_ray.reduce.formats.json_rows import LINE_END, column_of, dump_json, json_strings, literal
from owlsam_ray.reduce.formats.protocol import Head, Parts, Rendered
from owlsam_ray.reduce.formats.text_rows import Piece, join_rows, text_bytes
from owlsam_ray.reduce.labels import ShardLabels

TASKS, CONFIG = "label_studio", "label_studio_config.xml"
_PLAIN_URL = r"^[A-Za-z0-9._~/-]*$"
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class LabelStudioOutput:
    """Write `label_studio.json`, a task for each image that did not fail, and `label_studio_config.xml`.

    One region for each annotation: a polygon along the borders of the mask's pixels (parts and holes joined by
    zero-width cuts), or a rectangle where there is no mask; boxes are clipped to the image. Brush masks would be exact
    too, but Label Studio's own COCO export omits them. A region has the annotation's id and its score, a prediction the
    mean of these. `data` states the image and the run, so that the JSON export of the project is a file of corrections
    (label_studio_export.py).
    """

    categories: tuple[Category, ...]
    """(C,) categories of the output."""
    model_version: str
    run: dict[str, Any]
    """Fingerprint, K, layout hash."""
    url_prefix: str | None = None
    """Prepended to the quoted file name, makes the URL of an image; None: the manifest's URI, or for images in a tar or
    Parquet file the name alone."""
    name: str = "label_studio"

    def render(self, labels: ShardLabels) -> Rendered:
        """Render a line for each task."""
        images, table = labels.images, labels.annotations
        rows = table["image"].to_numpy()
        count = images.num_rows
        ends = np.searchsorted(rows, np.arange(count + 1))
        regions = self._regions(table, is_first=np.isin(np.arange(table.num_rows), ends))
        region_ends = np.frombuffer(regions.buffers()[1], np.int64)[ends]
        results = pa.LargeStringArray.from_buffers(count, pa.py_buffer(region_ends), regions.buffers()[2])
        numbers = np.bincount(rows, minlength=count)
        sums = np.bincount(rows, table["score"].to_numpy().astype(np.float64), minlength=count)
        means = pa.array((sums / np.maximum(numbers, 1)).astype(np.float32), mask=numbers == 0)
        pieces = [
            Piece('{"data": {"image": ', self._urls(images)),
            Piece(', "image_id": ', column_of(images, "image_id")),
            Piece(', "file_name": ', json_strings(column_of(images, "file_name"))),
            literal(
                f', "owlsam": {dump_json(self.run)}}}, "predictions": [{{"model_version": '
                f"{dump_json(self.model_version)}",
                count,
            ),
            Piece(', "score": ', means),
            Piece(', "result": [', results, "]}]}" + LINE_END),
        ]
        lines = join_rows(pieces, count).filter(pa.array(labels.is_labelled))
        return Rendered({"tasks": bytes(text_bytes(lines))})

    def assemble(self, parts: Parts) -> list[str]:
        """Write a list of tasks for each span, and the configuration."""
        names = []
        for span in parts.spans:
            names.append(span.name(TASKS, ".json"))
            with parts.open(names[-1]) as out:
                out.write(b"[\n")
                write_lines(out, "tasks", parts, span)
                out.write(b"]\n")
        with parts.open(CONFIG) as out:
            out.write(labelling_config(parts.head).encode())
        return [*names, CONFIG]

    def _urls(self, images: pa.Table) -> pa.Array:
        """(images,) URLs as JSON."""
        names = column_of(images, "file_name")
        if self.url_prefix is None:
            return json_strings(pc.coalesce(column_of(images, "uri"), names))
        if not pc.all(pc.match_substring_regex(names, _PLAIN_URL), min_count=0).as_py():
            names = pa.array([quote(name, errors="replace") for name in names.to_pylist()], pa.string())
        return json_strings(pc.binary_join_element_wise(self.url_prefix, names, ""))

    def _regions(self, table: pa.Table, is_first: NDArray[np.bool_]) -> pa.LargeStringArray:
        """(N,) JSON of each region, with a leading comma except for the first of its image."""
        # Imported here: other formats need neither OpenCV nor pycocotools.
        from owlsam_ray.reduce.formats.polygons import trace

        polygons = trace(table, join_parts=True, check=False)
        points = polygons.rows(_points(table, polygons.points, polygons.point_ends[polygons.polygon_ends]))
        has_polygon = pa.array(polygons.has_polygon)
        names = pa.array([dump_json(xml_text(category.name)) for category in self.categories], pa.string())
        labels = names.take(column_of(table, "category"))
        x, y, width, height = (pc.if_else(has_polygon, None, pa.array(each)) for each in _percent_boxes(table).T)
        in_box, in_polygon = (pc.if_else(which, labels, None) for which in (pc.invert(has_polygon), has_polygon))
        commas = pa.array(["", ", "], pa.string()).take(pa.array((~is_first).astype(np.int32)))
        kinds = pa.array(
            [f'"type": "{kind}labels", "from_name": "{kind}"' for kind in ("rectangle", "polygon")], pa.string()
        )
        pieces = [
            Piece("", commas),
            Piece('{"id": "', column_of(table, "id"), '", '),
            Piece("", kinds.take(pc.cast(has_polygon, pa.int32()))),
            Piece(', "to_name": "image", "original_width": ', column_of(table, "width")),
            Piece(', "original_height": ', column_of(table, "height")),
            Piece(', "image_rotation": 0, "score": ', column_of(table, "score")),
            Piece(', "value": {"x": ', x),
            Piece(', "y": ', y),
            Piece(', "width": ', width),
            Piece(', "height": ', height),
            Piece(', "rotation": 0, "rectanglelabels": [', in_box),
            Piece(', "value": {"points": [', pc.if_else(has_polygon, points, None), "]"),
            Piece(', "closed": true, "polygonlabels": [', in_polygon),
            literal("]}}", table.num_rows),
        ]
        return join_rows(pieces, table.num_rows)


def _percent_boxes(table: pa.Table) -> NDArray[np.float32]:
    """(N, 4) x, y, width, height in percent of the image."""
    boxes = np.stack([table[side].to_numpy() for side in ("x0", "y0", "x1", "y1")], axis=1)
    sizes = np.stack([table[side].to_numpy() for side in ("width", "height")], axis=1).astype(np.float32)
    corners = np.clip(boxes, 0, np.tile(sizes, 2)) * np.float32(100) / np.tile(sizes, 2)
    return np.ascontiguousarray(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1))


def _points(table: pa.Table, points: NDArray[np.int64], ends: NDArray[np.int64]) -> pa.LargeStringArray:
    """(P,) `[x, y]` in percent, with a leading comma except for the first of its annotation.

    Args:
        table: (N rows) annotations.
        points: (P, 2) pixels.
        ends: (N + 1,) start of each annotation's points, and the end of the last.
    """
    lengths = np.diff(ends)
    sizes = np.stack([table[side].to_numpy() for side in ("width", "height")], axis=1)
    percent = (points * 100 / np.repeat(sizes, lengths, axis=0)).astype(np.float32)
    starts = np.ones(len(points), np.int32)
    starts[ends[:-1][lengths > 0]] = 0
    pieces = [
        Piece("", pa.array(["[", ", ["], pa.string()).take(pa.array(starts))),
        Piece("", pa.array(np.ascontiguousarray(percent[:, 0]))),
        Piece(", ", pa.array(np.ascontiguousarray(percent[:, 1])), "]"),
    ]
    return join_rows(pieces, len(points))


def labelling_config(head: Head) -> str:
    """XML for the project: rectangles and polygons, with the output's categories and their ids."""

    def labels(attributes: str) -> str:
        return "".join(
            f"    <Label value={quoteattr(xml_text(category.name))}{attributes.format(category.id)}/>\n"
            for category in head.categories
        )

    return (
        "<View>\n"
        '  <Image name="image" value="$image" zoom="true" zoomControl="true"/>\n'
        '  <RectangleLabels name="rectangle" toName="image">\n'
        # Label Studio's converter lists a category for each tag with an id.
        + labels(' category="{}"')
        + '  </RectangleLabels>\n  <PolygonLabels name="polygon" toName="image">\n'
        + labels("")
        + "  </PolygonLabels>\n</View>\n"
    )


def xml_text(text: str) -> str:
    """Replace characters that XML does not allow by U+FFFD."""
    return _NO_XML.sub("\ufffd", text)
