"""People's corrections in the place of the machine's annotations, shard by shard; what they mean: see corrections.py.

New annotations get an id in the range of their image, where ids rise with the others': their own, if it lies there and
no detection has it, else K - 1, K - 2, … of those that are free, in the order of the file. So ids depend on the file
and on the inference, not on what is decided.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from owlsam_ray.reduce.corrections_report import conflict_line, remark_line
from owlsam_ray.reduce.decisions import Columns, Decisions, Pins
from owlsam_ray.reduce.labels import ANNOTATION_SCHEMA, Found, ShardLabels
from owlsam_ray.reduce.overlay_store import read_rows
from owlsam_ray.reduce.shapes import Shape, empty_part, read_shape, same_box, same_mask

IMAGE, ENTRY, REJECTED, DELETED, SPARED = range(5)
"""Kinds of rows: this image has exactly the file's annotations; an annotation; a rejected one; a listed one that is
missing; one whose entry is a conflict already."""

CORRECTION_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),  # of the image
        pa.field("kind", pa.int8(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),  # among the file's annotations; -1: not one of them
        pa.field("file_id", pa.int64()),
        pa.field("det_index", pa.int64(), nullable=False),  # as the id tells; -1: it tells none of this image
        pa.field("category", pa.int64(), nullable=False),  # index into the output's categories; -1: left out
        pa.field("shape", pa.binary()),  # see shapes.py
    ]
)


@dataclass(frozen=True, slots=True)
class StoredOverlay:
    """Corrections of a run, in a file of `CORRECTION_SCHEMA` by shard."""

    url: str
    ids_per_image: int

    def review(self, found: Found, decisions: Decisions) -> "ShardReview | None":
        """What people said about a shard."""
        rows = read_rows(self.url, found.shard)
        return None if rows is None else ShardReview(found, decisions, self.ids_per_image, rows)


@dataclass(slots=True)
class _Entry:
    """An annotation of the file."""

    row: int
    """Of the shard's images."""
    position: int
    file_id: int | None
    det_index: int
    category: int
    shape: Shape
    place: int = -1
    """Of the detection that it is about; -1: it is new."""


class ShardReview:
    """Corrections of one shard: first what they mean for the decisions, then what they put in the place of the rest."""

    def __init__(self, found: Found, decisions: Decisions, ids_per_image: int, rows: pa.RecordBatch) -> None:
        self._found, self._decisions, self._ids_per_image = found, decisions, ids_per_image
        self._counts: Counter[str] = Counter()
        self._conflicts: list[bytes] = []
        self._applied: list[bytes] = []
        self._entries: list[_Entry] = []
        count = len(found.image)
        label = found.detections["label"].to_numpy()
        self.pins = Pins(
            kept=np.zeros(count, np.bool_),
            dropped=np.zeros(count, np.bool_),
            category=decisions.target[label].astype(np.int64),
        )
        self._machine_category = self.pins.category.copy()
        self._masks = found.detections["rle_counts"].combine_chunks()
        boxes = [found.detections[axis].to_numpy() for axis in ("x0", "y0", "x1", "y1")]
        self._boxes: NDArray[np.float32] = np.stack(boxes, axis=1)
        self._det_index = found.detections["det_index"].to_numpy()
        by_image: dict[int, list[dict[str, Any]]] = {}
        for row in rows.to_pylist():
            by_image.setdefault(row["ordinal"] - found.first_ordinal, []).append(row)
        for image in sorted(by_image):
            self._review_image(image, by_image[image])

    def _review_image(self, image: int, rows: list[dict[str, Any]]) -> None:
        """Find out what the rows of one image are about."""
        start, end = (int(np.searchsorted(self._found.image, image, side)) for side in ("left", "right"))
        places = dict(zip(self._det_index[start:end].tolist(), range(start, end), strict=True))
        rows = [row for row in rows if self._is_usable(image, row, places)]
        if self._found.images["status"][image].as_py() == "failed":
            return
        named = Counter(row["det_index"] for row in rows if row["kind"] in (ENTRY, REJECTED))
        entries: list[_Entry] = []
        spared = {places[row["det_index"]] for row in rows if row["kind"] == SPARED and row["det_index"] in places}
        """Detections that a conflict is about: as the settings have them."""
        for row in rows:
            place = places.get(row["det_index"], -1) if row["kind"] in (ENTRY, REJECTED) else -1
            if place >= 0 and named[row["det_index"]] > 1:
                reason = "repeated_id: several entries are about the same detection"
                self._conflict(image, row["position"], row["file_id"], reason)
                spared.add(place)
            elif row["kind"] == ENTRY:
                try:
                    shape = read_shape(row["shape"], self._size_hw(image))
                except ValueError as error:
                    self._conflict(image, row["position"], row["file_id"], f"geometry: {error}")
                    spared.add(place)
                    continue
                own = (row["position"], row["file_id"], row["det_index"], row["category"])
                entries.append(_Entry(image, *own, shape, place))
        rejected = {places[row["det_index"]] for row in rows if row["kind"] == REJECTED}
        self._meet_by_box(entries, range(start, end), spared | rejected)
        entries = self._number(image, self._visible(image, entries, spared), places)
        self._pin(image, rows, entries, places, spared)
        self._entries += entries

    def _visible(self, image: int, entries: list[_Entry], spared: set[int]) -> list[_Entry]:
        """Without those of which nothing could be seen; what equals the machine's may be like that, as it is."""
        size_hw, visible = self._size_hw(image), []
        for entry in entries:
            empty = empty_part(entry.shape, size_hw)
            box = entry.shape.box_xyxy
            if empty is None or (
                entry.place >= 0
                and (box is None or same_box(box, self._boxes[entry.place]))
                and self._has_mask(entry.place, entry.shape, size_hw)
            ):
                visible.append(entry)
            else:
                self._conflict(image, entry.position, entry.file_id, f"geometry: {empty}")
                spared.add(entry.place)
        return visible

    def _has_mask(self, place: int, shape: Shape, size_hw: tuple[int, int]) -> bool:
        """Whether a detection has the mask of a shape, if it has one."""
        return shape.mask is None or same_mask(shape.mask, self._mask_of(place), size_hw)

    def _mask_of(self, place: int) -> bytes | None:
        counts: bytes | None = self._masks[place].as_py()
        return counts

    def _is_usable(self, image: int, row: dict[str, Any], places: dict[int, int]) -> bool:
        """Whether the image has labels, and a rejected detection is there."""
        if self._found.images["status"][image].as_py() == "failed":
            if row["kind"] in (ENTRY, REJECTED):
                self._conflict(image, row["position"], row["file_id"], "image: it failed in the run")
            return False
        if row["kind"] == REJECTED and row["det_index"] not in places:
            self._conflict(
                image, row["position"], row["file_id"], "no_detection: it rejects what the run does not have"
            )
            return False
        return True

    def _meet_by_box(self, entries: list[_Entry], places: range, taken: set[int]) -> None:
        """Entries whose ids a tool has changed: the detection of the same box and category, if it is left."""
        taken = taken | {entry.place for entry in entries}
        for entry in entries:
            shape, box = entry.shape, entry.shape.box_xyxy
            if entry.place >= 0 or box is None:
                continue
            near = [
                place
                for place in places
                if place not in taken
                and self.pins.category[place] == entry.category
                and same_box(box, self._boxes[place])
            ]
            if len(near) > 1:
                near.sort(key=lambda place: not self._has_mask(place, shape, self._size_hw(entry.row)))
            if near:
                entry.place = near[0]
                taken.add(entry.place)

    def _number(self, image: int, entries: list[_Entry], places: dict[int, int]) -> list[_Entry]:
        """Give new entries a det_index that is free; without those for which there is none."""
        taken = set(places)
        for entry in entries:
            if entry.place >= 0:
                entry.det_index = int(self._det_index[entry.place])
            elif entry.det_index in taken:
                entry.det_index = -1
            elif entry.det_index >= 0:
                taken.add(entry.det_index)
        free = (each for each in range(self._ids_per_image - 1, -1, -1) if each not in taken)
        numbered = []
        for entry in entries:
            if entry.det_index < 0:
                entry.det_index = next(free, -1)
            if entry.det_index >= 0:
                numbered.append(entry)
                continue
            reason = f"no_free_id: all {self._ids_per_image} ids of its image are used"
            self._conflict(image, entry.position, entry.file_id, reason)
        return numbered

    def _pin(
        self, image: int, rows: list[dict[str, Any]], entries: list[_Entry], places: dict[int, int], spared: set[int]
    ) -> None:
        """What the decisions need to know."""
        pins = self.pins
        about = {entry.place for entry in entries} | spared
        for row in rows:
            if row["kind"] == IMAGE:
                pins.dropped[[place for place in places.values() if place not in about]] = True
            elif row["kind"] == REJECTED and places[row["det_index"]] not in spared:
                pins.dropped[places[row["det_index"]]] = True
                self._tell("rejected", row["position"], self._id(image, row["det_index"]))
            elif row["kind"] == DELETED and places.get(row["det_index"], -1) not in about | {-1}:
                pins.dropped[places[row["det_index"]]] = True
                self._tell("deleted", row["position"], self._id(image, row["det_index"]))
        for entry in entries:
            if entry.place >= 0:
                pins.category[entry.place] = entry.category
                pins.kept[entry.place] = entry.category >= 0

    def apply(self, labels: ShardLabels, kept: Columns) -> ShardLabels:
        """The shard with people's annotations in place of the machine's."""
        replaced = np.zeros(len(kept), np.bool_)
        people: list[dict[str, Any]] = []
        for entry in self._entries:
            if entry.category < 0:
                self._counts["left_out"] += 1
            elif entry.place < 0:
                people.append(self._drawn(entry))
                self._tell("added", entry.position, self._id(entry.row, entry.det_index), file_id=entry.file_id)
            else:
                place = int(np.searchsorted(kept.place, entry.place))
                row = self._compared(entry, labels.annotations, place, kept.boxes_xyxy[place])
                if row is not None:
                    replaced[place] = True
                    people.append(row)
        machine = labels.annotations.filter(pa.array(~replaced)) if replaced.any() else labels.annotations
        table = machine
        if people:
            table = pa.concat_tables([machine, pa.Table.from_pylist(people, ANNOTATION_SCHEMA)])
            table = table.take(pa.array(np.argsort(table["id"].to_numpy()))).combine_chunks()
        counts = replace(
            labels.counts,
            annotations=table.num_rows,
            masks=table.num_rows - table["rle_counts"].null_count,
            corrections=self._counts,
        )
        remarks = {"applied": b"".join(self._applied), "conflicts": b"".join(self._conflicts)}
        return replace(labels, annotations=table, counts=counts, remarks=remarks)

    def _compared(
        self, entry: _Entry, annotations: pa.Table, place: int, decided: NDArray[np.float32]
    ) -> dict[str, Any] | None:
        """What stands in the place of an annotation of the machine; None: that one itself."""
        shape, box = entry.shape, entry.shape.box_xyxy
        is_decided = box is None or same_box(box, decided)
        is_raw = not is_decided and box is not None and same_box(box, self._boxes[entry.place])
        changed = [] if is_decided or is_raw else ["bbox"]
        if self._machine_category[entry.place] != entry.category:
            changed.append("category_id")
        # Without a mask in the file: a tool that knows none. But a box elsewhere takes the machine's mask away.
        moved_mask = shape.mask is None and "bbox" in changed and self._mask_of(entry.place) is not None
        if moved_mask or not self._has_mask(entry.place, shape, self._size_hw(entry.row)):
            changed.append("segmentation")
        if is_decided and not changed:
            self._counts["confirmed"] += 1
            return None
        row: dict[str, Any] = annotations.slice(place, 1).to_pylist()[0]
        if is_raw:  # a suppression of this reduce has moved it; people saw it as inference left it
            names = ("x0", "y0", "x1", "y1", "score", "num_merged")
            row |= {name: self._found.detections[name][entry.place].as_py() for name in names}
        if not changed:
            self._counts["confirmed"] += 1
            return row
        row |= {"corrected": True, "score": 1.0}
        if "bbox" in changed or ("segmentation" in changed and box is None):
            row |= shape.box_columns()
        if "segmentation" in changed:
            row |= shape.mask_columns()
        self._tell("edited", entry.position, self._id(entry.row, entry.det_index), changed=changed)
        return row

    def _drawn(self, entry: _Entry) -> dict[str, Any]:
        """A row of `ANNOTATION_SCHEMA` of a new annotation."""
        height, width = self._size_hw(entry.row)
        return {
            "id": self._id(entry.row, entry.det_index),
            "image": entry.row,
            "image_id": self._image_id(entry.row),
            "category": entry.category,
            "category_id": self._decisions.categories[entry.category].id,
            "score": 1.0,
            "height": height,
            "width": width,
            "corrected": True,
            **entry.shape.box_columns(),
            **entry.shape.mask_columns(),
        }

    def _id(self, row: int, det_index: int) -> int:
        return (self._found.first_ordinal + row) * self._ids_per_image + det_index

    def _image_id(self, row: int) -> int:
        return int(self._found.images["image_id"][row].as_py())

    def _size_hw(self, row: int) -> tuple[int, int]:
        images = self._found.images
        return int(images["height"][row].as_py()), int(images["width"][row].as_py())

    def _conflict(self, image: int, position: int, file_id: int | None, reason: str) -> None:
        self._counts[f"conflict.{reason.partition(':')[0]}"] += 1
        self._conflicts.append(conflict_line(position, file_id, self._image_id(image), reason))

    def _tell(self, what: str, position: int, annotation_id: int, **more: Any) -> None:
        self._counts[what] += 1
        self._applied.append(remark_line(what, position, annotation_id, **more))
