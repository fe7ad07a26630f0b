"""Replace the model's annotations with reviewers' corrections, shard by shard (rules: corrections.py).

New annotations get an id in the range of their image: their own, if it is in that range and no detection has it, else
the free ones among K - 1, K - 2, …, in the order of the file. In an image whose detections use all ids, they get ids of
a second range, 2^52 + ordinal × K + 0, 1, …, which no detection has. These come after the others of their image, so ids
ascend within an image, and over the whole file where no second range was needed. All ids of a file are distinct. Ids
depend on the file and on the inference, not on the settings of `reduce`.

What a suppression of this reduce merges depends on all other settings. A box of the file counts as unchanged if it
equals the box under the current settings or the box that inference left; boxes merged under other settings count as
edited.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from owlsam_ray.errors import IncompleteError
from owlsam_ray.reduce.corrections.matching import Entry, Matching
from owlsam_ray.reduce.corrections.report import conflict_line, remark_line
from owlsam_ray.reduce.corrections.shapes import Shape, empty_part, read_shape, same_boxes
from owlsam_ray.reduce.corrections.store import read_rows
from owlsam_ray.reduce.decisions import Columns, Decisions, Pins, decide
from owlsam_ray.reduce.labels import ANNOTATION_SCHEMA, Found, ShardLabels
from owlsam_ray.storage.arrow_types import misfit_of

IMAGE, ENTRY, REJECTED, LISTED, SPARED = range(5)
"""Kinds of rows. IMAGE: this image has exactly the file's annotations. ENTRY: an annotation. REJECTED: a rejected one.
LISTED: one that reviewers saw, in a review list. SPARED: one whose entry is already a conflict."""

SECOND_IDS = 2**52
"""Start of the ids of drawn annotations in images whose own ids are all taken. With K ids each, all stay below 2^53,
which every JSON reader supports."""

CORRECTION_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),  # of the image
        pa.field("kind", pa.int8(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),  # among the file's annotations; -1: not one of them
        pa.field("file_id", pa.int64()),
        pa.field(
            "det_index", pa.int64(), nullable=False
        ),  # from the id; K and above: second range; -1: the id is not of this image
        pa.field("category", pa.int64(), nullable=False),  # index into the output's categories; -1: left out
        pa.field("shape", pa.binary()),  # see shapes.py
    ]
)


_MACHINE_COLUMNS = ("x0", "y0", "x1", "y1", "score", "num_merged")


def annotation_id(ordinal: int, det_index: int, ids_per_image: int) -> int:
    """Id of a detection (det_index below K), or of a drawn annotation."""
    start = SECOND_IDS - ids_per_image if det_index >= ids_per_image else 0
    return start + ordinal * ids_per_image + det_index


def image_of_id(own_id: int, ids_per_image: int) -> tuple[int, int]:
    """Split an id into (ordinal, det_index), the inverse of `annotation_id`."""
    if own_id < SECOND_IDS:
        return divmod(own_id, ids_per_image)
    ordinal, index = divmod(own_id - SECOND_IDS, ids_per_image)
    return ordinal, index + ids_per_image


@dataclass(frozen=True, slots=True)
class StoredOverlay:
    """Corrections of a run, stored in a file of `CORRECTION_SCHEMA` by shard."""

    url: str
    ids_per_image: int

    def review(self, found: Found, decisions: Decisions) -> "ShardReview | None":
        """Read the corrections of a shard; None: it has none."""
        rows = read_rows(self.url, found.shard)
        if rows is None:
            return None
        if (wrong := misfit_of(rows.schema, CORRECTION_SCHEMA)) is not None:
            raise IncompleteError(f"{self.url} is not what this reduce wrote ({wrong}): call it again")
        return ShardReview(found, decisions, self.ids_per_image, rows)


class ShardReview:
    """Corrections of one shard: first their effect on the decisions, then the annotations that they replace or add."""

    def __init__(self, found: Found, decisions: Decisions, ids_per_image: int, rows: pa.RecordBatch) -> None:
        self._found, self._decisions, self._ids_per_image = found, decisions, ids_per_image
        self._counts: Counter[str] = Counter()
        self._conflicts: list[bytes] = []
        self._applied: list[bytes] = []
        self._confirmed: list[int] = []
        self._entries: list[Entry] = []
        count = len(found.image)
        label = found.detections["label"].to_numpy()
        self.pins = Pins(
            kept=np.zeros(count, np.bool_),
            dropped=np.zeros(count, np.bool_),
            category=decisions.target[label].astype(np.int64),
        )
        self._machine_category = self.pins.category.copy()
        self._shown, _ = decide(found.detections, found.image, decisions)
        self._shown_at: NDArray[np.int64] = np.full(count, -1)
        self._shown_at[self._shown.place] = np.arange(len(self._shown))
        self._match = Matching(found, self._machine_category, self._shown)
        by_image: dict[int, list[dict[str, Any]]] = {}
        for row in rows.to_pylist():
            by_image.setdefault(row["ordinal"] - found.first_ordinal, []).append(row)
        for image in sorted(by_image):
            self._review_image(image, by_image[image])

    def _review_image(self, image: int, rows: list[dict[str, Any]]) -> None:
        """Match the rows of one image to its detections."""
        if self._found.images["status"][image].as_py() == "failed":
            for row in rows:
                if row["kind"] in (ENTRY, REJECTED):
                    self._conflict(image, row["position"], row["file_id"], "image: it failed in the run")
            return
        start, end = (int(np.searchsorted(self._found.image, image, side)) for side in ("left", "right"))
        places = dict(zip(self._match.det_index[start:end].tolist(), range(start, end), strict=True))
        spared = {places[row["det_index"]] for row in rows if row["kind"] == SPARED and row["det_index"] in places}
        """Detections whose entry is a conflict: they stay as the settings have them."""
        entries: list[Entry] = []
        for row in rows:
            if row["kind"] not in (ENTRY, REJECTED):
                continue
            is_rejected = row["kind"] == REJECTED
            try:
                shape = read_shape(row["shape"], self._match.size_hw(image)) if row["shape"] else Shape(None, None)
            except ValueError as error:
                if not is_rejected:
                    self._conflict(image, row["position"], row["file_id"], f"geometry: {error}")
                    spared.add(places.get(row["det_index"], -1))
                    continue
                shape = Shape(None, None)
            own = (row["position"], row["file_id"], row["det_index"], row["category"])
            entries.append(Entry(image, *own, shape, is_rejected=is_rejected))
        self._match.pair(entries, places)
        entries = self._sound(image, entries, places)
        entries = self._number(image, self._visible(image, entries, spared), places)
        self._pin(image, rows, entries, places, spared)
        self._entries += [entry for entry in entries if not entry.is_rejected]

    def _visible(self, image: int, entries: list[Entry], spared: set[int]) -> list[Entry]:
        """Drop entries with an empty shape, except entries that equal the model's annotation."""
        size_hw, visible = self._match.size_hw(image), []
        for entry in entries:
            empty = None if entry.is_rejected else empty_part(entry.shape, size_hw)
            is_here = entry.place >= 0 and self._match.is_here(entry, entry.place)
            if empty is None or (is_here and self._match.has_mask(entry.place, entry)):
                visible.append(entry)
            else:
                self._conflict(image, entry.position, entry.file_id, f"geometry: {empty}")
                spared.add(entry.place)
        return visible

    def _sound(self, image: int, entries: list[Entry], places: dict[int, int]) -> list[Entry]:
        """Drop entries that repeat another one, and rejections of detections that do not exist."""
        sound = []
        for entry in entries:
            own = places.get(entry.det_index)
            if entry.place < 0 and entry.is_rejected:
                self._conflict(image, entry.position, entry.file_id, "no_detection: it rejects what the run lacks")
            elif entry.place < 0 and own is not None and self._match.is_equal(entry, own):
                self._conflict(image, entry.position, entry.file_id, "repeated: another entry has its id and its box")
            else:
                sound.append(entry)
        return sound

    def _number(self, image: int, entries: list[Entry], places: dict[int, int]) -> list[Entry]:
        """Give new entries a free det_index; drop those for which none is left."""
        taken = set(places)
        for entry in entries:
            if entry.place >= 0:
                entry.det_index = int(self._match.det_index[entry.place])
            elif entry.det_index in taken:
                entry.det_index = -1
            elif entry.det_index >= 0:
                taken.add(entry.det_index)
        most = self._ids_per_image
        free = (each for each in (*range(most - 1, -1, -1), *range(most, 2 * most)) if each not in taken)
        numbered = []
        for entry in entries:
            if entry.det_index < 0:
                entry.det_index = next(free, -1)
            if entry.det_index >= 0:
                numbered.append(entry)
                continue
            reason = f"no_free_id: all {2 * most} ids that its image can have are used"
            self._conflict(image, entry.position, entry.file_id, reason)
        return numbered

    def _pin(
        self, image: int, rows: list[dict[str, Any]], entries: list[Entry], places: dict[int, int], spared: set[int]
    ) -> None:
        """Record what the decisions need to know."""
        pins = self.pins
        about = {entry.place for entry in entries} | spared
        shown = {place for place in places.values() if self._shown_at[place] >= 0}
        self._counts["shown"] += len(shown)
        listed = {places.get(row["det_index"], -1) for row in rows if row["kind"] == LISTED}
        missing = {*places.values()} if any(row["kind"] == IMAGE for row in rows) else listed & {*places.values()}
        missing -= about
        pins.dropped[sorted(missing)] = True
        # In a reviewed image, annotations that the settings would not show do not count as deleted.
        for place in sorted(missing & (shown | listed)):
            self._tell("deleted", -1, self._id(image, int(self._match.det_index[place])))
            self._counts["shown.deleted"] += place in shown
        for entry in entries:
            if entry.is_rejected:
                pins.dropped[entry.place] = True
                self._tell("rejected", entry.position, self._id(image, entry.det_index))
            elif entry.place >= 0:
                pins.category[entry.place] = entry.category
                pins.kept[entry.place] = entry.category >= 0

    def apply(self, labels: ShardLabels, kept: Columns) -> ShardLabels:
        """Return the shard with reviewers' annotations in place of the model's."""
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
                row = self._compared(entry, labels.annotations, place, kept)
                if row is not None:
                    replaced[place] = True
                    people.append(row)
        machine = labels.annotations.filter(pa.array(~replaced)) if replaced.any() else labels.annotations
        table = machine
        if people:
            table = pa.concat_tables([machine, pa.Table.from_pylist(people, ANNOTATION_SCHEMA)])
            order = np.lexsort((table["id"].to_numpy(), table["image"].to_numpy()))
            table = table.take(pa.array(order)).combine_chunks()
        counts = replace(
            labels.counts,
            annotations=table.num_rows,
            masks=table.num_rows - table["rle_counts"].null_count,
            corrections=self._counts,
        )
        remarks = {"applied": b"".join(self._applied), "conflicts": b"".join(self._conflicts)}
        confirmed = np.array(self._confirmed, np.int64)
        return replace(labels, annotations=table, counts=counts, remarks=remarks, confirmed=confirmed)

    def _compared(self, entry: Entry, annotations: pa.Table, place: int, kept: Columns) -> dict[str, Any] | None:
        """Return the row that replaces an annotation of the model; None: the annotation stays."""
        shape, box = entry.shape, entry.shape.box_xyxy
        seen = self._as_seen(entry)
        changed = ["bbox"] if seen is None and box is not None else []
        if self._machine_category[entry.place] != entry.category:
            changed.append("category_id")
        # A file without masks comes from a tool without masks, but moving the box removes the model's mask.
        moved_mask = shape.mask is None and "bbox" in changed and self._match.mask_of(entry.place) is not None
        if moved_mask or not self._match.has_mask(entry.place, entry):
            changed.append("segmentation")
        is_kept = seen is None or seen == _machine_columns(kept, place)
        if not changed:
            self._counts["confirmed"] += 1
            self._confirmed.append(self._id(entry.row, entry.det_index))
            if is_kept:
                return None
        row: dict[str, Any] = annotations.slice(place, 1).to_pylist()[0] | (seen or {})
        if not changed:
            return row
        row |= {"corrected": True, "score": 1.0}
        if "bbox" in changed or ("segmentation" in changed and box is None):
            row |= shape.box_columns()
        if "segmentation" in changed:
            row |= shape.mask_columns()
        self._tell("edited", entry.position, self._id(entry.row, entry.det_index), changed=changed)
        return row

    def _as_seen(self, entry: Entry) -> dict[str, Any] | None:
        """Box, score and num_merged of the model's annotation that an entry shows; None: it shows none.

        As the settings have it without corrections (suppression at reduce moves boxes and scores), else as inference
        left it.
        """
        box, at = entry.shape.box_xyxy, int(self._shown_at[entry.place])
        if at >= 0 and (box is None or same_boxes(box, self._shown.boxes_xyxy[at])):
            return _machine_columns(self._shown, at)
        if box is not None and same_boxes(box, self._match.boxes[entry.place]):
            detections = self._found.detections
            return {name: detections[name][entry.place].as_py() for name in _MACHINE_COLUMNS}
        return None

    def _drawn(self, entry: Entry) -> dict[str, Any]:
        """A row of `ANNOTATION_SCHEMA` for a new annotation."""
        height, width = self._match.size_hw(entry.row)
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
        return annotation_id(self._found.first_ordinal + row, det_index, self._ids_per_image)

    def _image_id(self, row: int) -> int:
        return int(self._found.images["image_id"][row].as_py())

    def _conflict(self, image: int, position: int, file_id: int | None, reason: str) -> None:
        self._counts[f"conflict.{reason.partition(':')[0]}"] += 1
        self._conflicts.append(conflict_line(position, file_id, self._image_id(image), reason))

    def _tell(self, what: str, position: int, annotation_id: int, **more: Any) -> None:
        self._counts[what] += 1
        self._applied.append(remark_line(what, position, annotation_id, **more))


def _machine_columns(columns: Columns, place: int) -> dict[str, Any]:
    values = (*columns.boxes_xyxy[place].tolist(), float(columns.score[place]), int(columns.num_merged[place]))
    return dict(zip(_MACHINE_COLUMNS, values, strict=True))
