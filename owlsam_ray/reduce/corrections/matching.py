"""Find the detection that each entry of a file of corrections refers to."""

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

    def meet(self, entries: list[Entry], places: dict[int, int]) -> None:
        """Find the detection that each entry refers to, and store it in the entry.

        A tool may have renumbered the entries, and an id that is in its image's range by chance means nothing. So an
        entry's content takes precedence over its id. The order of matching is: id and geometry agree; the entry equals
        another detection; only the category differs from the detection of its id; box and category equal those of a
        detection; and last, the id alone.

        Args:
            entries: entries of one image.
            places: det_index → position, for the detections of this image.
        """
        taken: set[int] = set()
        ordered = sorted(entries, key=lambda entry: entry.is_rejected)

        def claim(entry: Entry, place: int | None) -> None:
            if place is not None and place not in taken:
                entry.place = place
                taken.add(place)

        def left() -> list[Entry]:
            return [entry for entry in ordered if entry.place < 0]

        for entry in ordered:
            if self.is_own(entry, places):
                claim(entry, places[entry.det_index])
        renamed, is_numbered_anew = [], False
        for entry in left():
            own = places.get(entry.det_index)
            if own is not None and own not in taken and self.is_here(entry, own) and self.has_mask(own, entry):
                renamed.append(entry)
            else:
                claim(entry, self._alike(entry, places, taken, with_mask=True))
                is_numbered_anew |= entry.place >= 0
        for entry in renamed:
            if is_numbered_anew:  # then it may be a detection of that category in the same box
                claim(entry, self._alike(entry, places, taken, with_mask=True))
            if entry.place < 0:
                claim(entry, places[entry.det_index])
        for entry in left():
            claim(entry, self._alike(entry, places, taken, with_mask=False))
        for entry in left():
            claim(entry, places.get(entry.det_index))

    def is_own(self, entry: Entry, places: dict[int, int]) -> bool:
        """Whether an entry equals the detection that its id names."""
        own = places.get(entry.det_index)
        return (
            own is not None
            and self.is_here(entry, own)
            and bool(self._category[own] == entry.category)
            and self.has_mask(own, entry)
        )

    def _alike(self, entry: Entry, places: dict[int, int], taken: set[int], *, with_mask: bool) -> int | None:
        """Find an unclaimed detection with an entry's box and category, and with `with_mask` also its mask."""
        box = entry.shape.box_xyxy
        if not places or (box is None and (entry.shape.mask is None or not with_mask)):
            return None
        every = np.fromiter(places.values(), np.int64)
        near = every[self._category[every] == entry.category]
        if box is not None:
            near = near[same_boxes(box, self._seen_boxes[:, near]).any(axis=0)]
        alike = (
            place for place in near.tolist() if place not in taken and (not with_mask or self.has_mask(place, entry))
        )
        return next(alike, None)

    def is_here(self, entry: Entry, place: int) -> bool:
        """Whether an entry has a detection's box, before or after the settings apply; without a box, its mask."""
        if entry.shape.box_xyxy is None:
            return entry.shape.mask is not None and self.has_mask(place, entry)
        return bool(same_boxes(entry.shape.box_xyxy, self._seen_boxes[:, place]).any())
