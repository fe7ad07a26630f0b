"""Write YOLO: a folder with a text file of boxes or outlines for each image."""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from numpy.typing import NDArray

from owlsam_ray.errors import shown
from owlsam_ray.reduce.formats.json_rows import column_of, dump_json, literal
from owlsam_ray.reduce.formats.protocol import Bytes, Parts, Rendered
from owlsam_ray.reduce.formats.safe_paths import label_path, safe_path
from owlsam_ray.reduce.formats.text_rows import Piece, join_rows, text_bytes
from owlsam_ray.reduce.labels import ShardLabels

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class YoloOutput:
    """Write the folder `yolo` or `yolo_segment`: `labels/<name of the image>.txt`, `train.txt`, `data.yaml`.

    A line for each annotation has the class, counted from 0 in the order of the output's categories, then centre and
    size of the box, or the corners of the outline, as fractions of the image's width and height. Boxes are clipped to
    the image; those without any area left are left out. An outline is one polygon along the borders of the mask's
    pixels, with parts and holes joined by zero-width cuts: one line for each object, however many parts it has. Cuts
    are visible when the outline is drawn as a line. A detection without a mask, or whose mask has no pixel, gets its
    box as the outline.

    An empty image has an empty file. A failed one has none, and is not in `train.txt`, which expects the images, or a
    link to their folder, at `images` beside it. Names that are not safe paths, or whose ending readers do not know, are
    rewritten (see `safe_path`); names that would share a label file with an earlier one get a number; all of these are
    listed in `renamed.jsonl`. `data.yaml` names `train.txt` for `train`, and the configured value for `val`.
    """

    outlines: bool = False
    numbered: Mapping[str, str] = field(default_factory=dict)
    """See `numbered_paths`."""
    val: str | None = None

    @property
    def name(self) -> str:
        """Also the name of the folder."""
        return "yolo_segment" if self.outlines else "yolo"

    def render(self, labels: ShardLabels) -> Rendered:
        """Render a file for each image."""
        table = labels.annotations
        boxes = _shares(table)
        has_area = (boxes[:, 2:] > 0).all(axis=1)
        counts = {"no_area": int(np.count_nonzero(~has_area))}
        if not has_area.all():
            table, boxes = table.filter(pa.array(has_area)).combine_chunks(), boxes[has_area]
        numbers: list[Piece] = [Piece(" ", _column(boxes, side)) for side in range(4)]
        if self.outlines:
            outlines, counts["box_for_mask"] = _outlines(table, boxes)
            numbers = [Piece("", outlines)]
        rows = join_rows(
            [Piece("", column_of(table, "category")), *numbers, literal("\n", table.num_rows)], table.num_rows
        )
        row_ends = np.frombuffer(rows.buffers()[1], np.int64)
        firsts = np.searchsorted(table["image"].to_numpy(), np.arange(labels.images.num_rows + 1))
        ends, text = row_ends[firsts].tolist(), text_bytes(rows)
        files: dict[str, Bytes] = {}
        num_numbered = 0
        paths, renamed = [], []
        images = (labels.images[name].to_pylist() for name in ("image_id", "file_name"))
        for row, (image_id, name) in enumerate(zip(*images, strict=True)):
            if not labels.is_labelled[row]:
                continue
            num_numbered += name in self.numbered
            path = self.numbered.get(name) or safe_path(name)
            file = label_path(path)
            files[f"labels/{file}"] = text[ends[row] : ends[row + 1]]
            paths.append(f"./images/{path}\n")
            if path != name:
                renamed.append(dump_json({"image_id": image_id, "file_name": name, "path": path}) + "\n")
        return Rendered(
            {"train": "".join(paths).encode(), "renamed": "".join(renamed).encode()},
            files,
            counts | {"renamed": len(renamed), "numbered": num_numbered},
        )

    def assemble(self, parts: Parts) -> list[str]:
        """Write the folder."""
        train, renamed = _bytes(parts, "train"), _bytes(parts, "renamed")
        names = {number: category.name for number, category in enumerate(parts.head.categories)}
        content: dict[str, Any] = {"train": "train.txt", **({} if self.val is None else {"val": self.val})}
        content |= {"nc": len(names), "names": names}
        more = {"train.txt": train} | ({"renamed.jsonl": renamed} if renamed else {})
        # Written last: its presence means that the rest is complete.
        more["data.yaml"] = yaml.safe_dump(content, sort_keys=False).encode()
        parts.install_folder(self.name, more)
        counts = parts.head.format_counts.get(self.name, {})
        for key, words in (
            ("no_area", "annotations left out, because their boxes have no area inside the image"),
            ("box_for_mask", "annotations without a mask got their box as the outline"),
            ("renamed", "images got another name, see renamed.jsonl"),
        ):
            if counts.get(key):
                _log.info("%s: %d %s", self.name, counts[key], words)
        if counts.get("numbered"):
            first, path = next(iter(self.numbered.items()))
            _log.warning(
                "%s: %d images would share a label file with another image and got a number, see renamed.jsonl (%s "
                "is now %s)", self.name, counts["numbered"], shown(first), shown(path),
            )  # fmt: skip
        return [self.name]


def _shares(table: pa.Table) -> NDArray[np.float32]:
    """(N, 4) x and y of the centre, width and height of the clipped boxes, as fractions of the image's sides."""
    x0, x1 = _cut(table, "x0", "width"), _cut(table, "x1", "width")
    y0, y1 = _cut(table, "y0", "height"), _cut(table, "y1", "height")
    return np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], axis=1).astype(np.float32)


def _cut(table: pa.Table, side: str, length: str) -> NDArray[np.float64]:
    return np.clip(table[side].to_numpy().astype(np.float64) / table[length].to_numpy(), 0.0, 1.0)


def _outlines(table: pa.Table, boxes: NDArray[np.float32]) -> tuple[pa.Array, int]:
    """(N,) ` x y x y …` of the masks, or of the boxes; and the number of the latter."""
    # Imported here: boxes need neither OpenCV nor pycocotools.
    from owlsam_ray.reduce.formats.polygons import trace

    polygons = trace(table, join_parts=True, check=False)
    sides = np.stack([table["width"].to_numpy(), table["height"].to_numpy()], axis=1)
    counts = np.diff(polygons.point_ends[polygons.polygon_ends])
    shares = (polygons.points / np.repeat(sides, counts, axis=0)).astype(np.float32)
    masks = polygons.rows(_points(shares, len(shares)))
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    corners = np.stack([low[:, 0], low[:, 1], high[:, 0], low[:, 1], high[:, 0], high[:, 1], low[:, 0], high[:, 1]], 1)
    around = _points(np.clip(corners, 0, 1), len(corners))
    return pc.if_else(pa.array(polygons.has_polygon), masks, around), int(np.count_nonzero(~polygons.has_polygon))


def _points(numbers: NDArray[np.float32], num_rows: int) -> pa.LargeStringArray:
    return join_rows([Piece(" ", _column(numbers, place)) for place in range(numbers.shape[1])], num_rows)


def _column(values: NDArray[np.float32], place: int) -> pa.Array:
    return pa.array(np.ascontiguousarray(values[:, place]))


def _bytes(parts: Parts, section: str) -> bytes:
    file = io.BytesIO()
    parts.copy(section, file)
    return file.getvalue()
