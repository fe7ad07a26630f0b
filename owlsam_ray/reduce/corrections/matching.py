"""Find the detection that each entry of a file of corrections refers to.

The entries of an image are paired with its detections in three steps. A step takes the entries that are left, in the
order of the file, and each detection is paired at most once:

1. by id, in place: with the detection that the entry's id names, if the entry has its box. The category or the mask may
   have been edited.
2. by box and category: with any detection that has both. Tools that renumber annotations may give an id that belongs to
   another detection of the image, so this goes before an id that nothing else supports.
3. by id alone: with the detection that the id names. Its box was moved.

An entry that is left is a new annotation, and a detection that is left is missing from the file.

Ties: of several detections with an entry's box and category, the entry gets one with its mask, else any; of these the
lowest det_index, which has the highest score. Of several entries that a step would pair with one detection, the first
in the file gets it; the others go on to the next detection or step. So two entries that equal two detections in box and
category are paired by mask, and without masks in order.

Boxes are the same within `shapes.SAME_PX`, before or after the settings of this reduce apply. For an entry without a
box, as a polygon of Label Studio, the same mask counts as the same box.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.reduce.corrections.shapes import Shape, same_boxes, same_mask
from owlsam_ray.reduce.decisions import Columns
from owlsam_ray.reduce.labels import Found


@dataclass(slots=True)
class Entry:
    """An annotation of the file."""

    row: int
    """Row of the shard's images."""
    position: int
    file_id: int | None
    det_index: int
    category: int
    shape: Shape
    place: int = -1
    """Position of the detection that it refers to; -1: it is new."""
    is_rejected: bool = False
    """True if the reviewer says that there is no such object. Always refers to a detection, and may have no shape."""


class Matching:
    """The detections of a shard, and which of them entries refer to."""

    def __init__(self, found: Found, category: NDArray[np.int64], shown: Columns) -> None:
        """Prepare the detections of a shard for matching.

        Args:
            found: what inference found.
            category: (D,) index of the model's category into the output's categories; -1: left out.
            shown: what the settings show without corrections.
        """
        self._found, self._category = found, category
        self._masks = found.detections["rle_counts"].combine_chunks()
        boxes = [found.detections[axis].to_numpy() for axis in ("x0", "y0", "x1", "y1")]
        self.boxes: NDArray[np.float32] = np.stack(boxes, axis=1)
        self.det_index = found.detections["det_index"].to_numpy()
        # Suppression at reduce may move boxes; reviewers may have seen the moved ones.
        moved = self.boxes.copy()
        moved[shown.place] = shown.boxes_xyxy
        self._seen_boxes: NDArray[np.float32] = np.stack([self.boxes, moved])
        self._same_masks: dict[tuple[int, int], bool] = {}

    def size_hw(self, row: int) -> tuple[int, int]:
        """(H, W) of an image of the shard."""
        images = self._found.images
        return int(images["height"][row].as_py()), int(images["width"][row].as_py())

    def has_mask(self, place: int, entry: Entry) -> bool:
        """Whether a detection has an entry's mask; True if the entry has none."""
        if entry.shape.mask is None:
            return True
        key = (entry.position, place)
        if key not in self._same_masks:
            self._same_masks[key] = same_mask(entry.shape.mask, self.mask_of(place), self.size_hw(entry.row))
        return self._same_masks[key]

    def mask_of(self, place: int) -> bytes | None:
        """Compressed RLE of a detection's mask; None: it has none."""
        counts: bytes | None = self._masks[place].as_py()
        return counts

    def pair(self, entries: list[Entry], places: dict[int, int]) -> None:
        """Find the detection that each entry refers to, and store it in the entry.

        Args:
            entries: entries of one image, in the order of the file.
            places: det_index → position, for the detections of this image, ascending.
        """
        free = set(places.values())

        def by_id_in_place(entry: Entry) -> int | None:
            own = by_id(entry)
            return own if own is not None and self.is_here(entry, own) else None

        def by_box_and_category(entry: Entry) -> int | None:
            every = np.fromiter((place for place in places.values() if place in free), np.int64)
            near = every[self._category[every] == entry.category]
            if entry.shape.box_xyxy is not None:  # for all at once; `is_here` alone is slow in crowded images
                near = near[same_boxes(entry.shape.box_xyxy, self._seen_boxes[:, near]).any(axis=0)]
            alike = [place for place in near.tolist() if self.is_here(entry, place)]
            return min(alike, key=lambda place: not self.has_mask(place, entry), default=None)

        def by_id(entry: Entry) -> int | None:
            own = places.get(entry.det_index)
            return own if own in free else None

        for step in (by_id_in_place, by_box_and_category, by_id):
            for entry in entries:
                if entry.place < 0 and (place := step(entry)) is not None:
                    entry.place = place
                    free.discard(place)

    def is_equal(self, entry: Entry, place: int) -> bool:
        """Whether an entry has a detection's box, category and mask."""
        same_category = bool(self._category[place] == entry.category)
        return same_category and self.is_here(entry, place) and self.has_mask(place, entry)

    def is_here(self, entry: Entry, place: int) -> bool:
        """Whether an entry has a detection's box, before or after the settings apply; without a box, its mask."""
        if entry.shape.box_xyxy is None:
            return entry.shape.mask is not None and self.has_mask(place, entry)
        return bool(same_boxes(entry.shape.box_xyxy, self._seen_boxes[:, place]).any())
