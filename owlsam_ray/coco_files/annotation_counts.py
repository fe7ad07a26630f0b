"""Counts the annotations of a COCO file in columns, block by block.

Memory grows by 8 bytes for each annotation's id, 8 for each pair of image and category that occurs, and 16 for each
image.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.coco_files.document import Block
from owlsam_ray.coco_files.fields import flag_field
from owlsam_ray.coco_files.histograms import RATIO_EDGES, SCORE_EDGES, SIDE_EDGES, Histogram, share
from owlsam_ray.coco_files.problems import Problem, Problems
from owlsam_ray.errors import shown
from owlsam_ray.ops.arrays import repeats

SIZE_EDGES_PX = (32, 96)
"""COCO's limits: an object is small below 32² px, and large from 96² px."""
THRESHOLDS = tuple(round(step / 20, 2) for step in range(20))
_OUTSIDE_PX = 1.0
_PAIRS_PENDING = 2**22
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("image_id", pa.int64()),
        ("category_id", pa.int64()),
        ("bbox", pa.list_(pa.float64())),
        ("area", pa.float64()),
        flag_field("iscrowd"),
        ("score", pa.float64()),
    ]
)
_SEGMENTATION = re.compile(rb'"segmentation"\s*:\s*(\[\s*\]|\{|\[|null)')
"""Matches how its value begins, and an empty list completely. As a column it would need a single type."""


class Index:
    """Finds the positions of ids in a list; of a repeated id, the first."""

    def __init__(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Prepare for look-ups.

        Args:
            ids: (N,) in the list's order.
            positions: (N,) position of each id in the list.
        """
        self._ids, first = np.unique(ids, return_index=True)
        self._positions = positions[first]

    def of(self, ids: NDArray[np.int64], known: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(N,) positions of N ids; -1 where an id is not in the list, or `known` (N,) is false."""
        if not len(self._ids):
            return np.full(len(ids), -1, np.int64)
        places = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(known & (self._ids[places] == ids), self._positions[places], -1)


class AnnotationCounts:
    """Counts over the blocks of `annotations` added so far."""

    def __init__(self, *, images: Index, categories: Index, sizes_wh: NDArray[np.float64], num_categories: int) -> None:
        """Start with no annotations.

        Args:
            images: images of the file.
            categories: categories of the file.
            sizes_wh: (M, 2) stated pixels of the images, infinite where a side is not known.
            num_categories: C.
        """
        self._images, self._categories = images, categories
        # The last row, at index -1, represents unknown images.
        self._limits = np.concatenate([sizes_wh, [[np.inf, np.inf]]]) + _OUTSIDE_PX
        self.number = self.crowds = 0
        self.per_image = np.zeros(len(sizes_wh), np.int64)
        self.per_category = np.zeros(num_categories, np.int64)
        self._best = np.full(len(sizes_wh), -np.inf)
        self._ids: list[NDArray[np.int64]] = []
        self._pairs: list[NDArray[np.int64]] = []
        self._sides, self._ratios, self._scores = map(Histogram, (SIDE_EDGES, RATIO_EDGES, SCORE_EDGES))
        self._scored = 0
        self._sizes_counted = np.zeros(len(SIZE_EDGES_PX) + 1, np.int64)
        self._areas_of_boxes = 0
        self._above = np.zeros(len(THRESHOLDS), np.int64)
        self._segmentations: Counter[bytes] = Counter()

    def add(self, block: Block, problems: Problems) -> None:
        """Count a block.

        Raises:
            InputError: an element is not an object, or a field has a wrong type.
        """
        table = block.table(_SCHEMA).combine_chunks()
        self._segmentations.update(_SEGMENTATION.findall(block.text))
        self.number += len(table)
        rows = _Rows(table, block.first, problems)
        ids, has_id = rows.integers("id")
        rows.note(Problem.ANNOTATION_WITHOUT_ID, ~has_id, "id")
        self._ids.append(np.where(has_id, ids, np.iinfo(np.int64).min))
        image = self._images.of(*rows.integers("image_id"))
        rows.note(Problem.UNKNOWN_IMAGE, image < 0, "image_id")
        category = self._categories.of(*rows.integers("category_id"))
        rows.note(Problem.UNKNOWN_CATEGORY, category < 0, "category_id")
        np.add.at(self.per_image, image[image >= 0], 1)
        np.add.at(self.per_category, category[category >= 0], 1)
        both = (image >= 0) & (category >= 0)
        self._add_pairs(image[both] * len(self.per_category) + category[both])
        crowd, _ = rows.integers("iscrowd")
        odd = (crowd != 0) & (crowd != 1)
        stated = block.decode() if odd.any() else []  # the column holds codes instead of the values
        rows.note(Problem.ODD_CROWD, odd, "iscrowd", lambda row: stated[row]["iscrowd"])
        self.crowds += int(np.count_nonzero(crowd))
        self._add_boxes(rows, image)
        self._add_scores(rows, image)

    def images_per_category(self) -> NDArray[np.int64]:
        """(C,) number of images that contain each category."""
        return np.bincount(self._all_pairs() % max(1, len(self.per_category)), minlength=len(self.per_category))

    def categories_per_image(self) -> NDArray[np.int64]:
        """(M,) number of categories that each image contains."""
        return np.bincount(self._all_pairs() // max(1, len(self.per_category)), minlength=len(self.per_image))

    def record_repeats(self, problems: Problems) -> None:
        """Record repeated annotation ids."""
        ids = np.concatenate(self._ids) if self._ids else np.empty(0, np.int64)
        if (ids[1:] > ids[:-1]).all():
            return
        later, first = repeats(ids)
        stated = ids[later] != np.iinfo(np.int64).min
        later, first = later[stated], first[stated]
        problems.add_many(
            Problem.DUPLICATE_ANNOTATION_ID,
            np.ones(len(later), np.bool_),
            lambda row: f"annotations[{later[row]}]: id {ids[later[row]]} is also that of annotations[{first[row]}]",
        )

    def objects(self) -> dict[str, Any]:
        """Crowds, masks, areas, aspect ratios as plain JSON values."""
        small, medium, large = self._sizes_counted.tolist()
        known = small + medium + large
        polygons, rle = self._segmentations[b"["], self._segmentations[b"{"]
        return {
            "crowds": {"number": self.crowds, "share": share(self.crowds, self.number)},
            "masks": {
                "number": polygons + rle,
                "share": share(polygons + rle, self.number),
                "polygons": polygons,
                "rle": rle,
            },
            "areas": {
                "known": known,
                "of_boxes": self._areas_of_boxes,
                "small": {"number": small, "share": share(small, known)},
                "medium": {"number": medium, "share": share(medium, known)},
                "large": {"number": large, "share": share(large, known)},
                "side_px": self._sides.as_dict(),
            },
            "aspect_ratios": self._ratios.as_dict(),
        }

    def scores(self) -> dict[str, Any] | None:
        """Scores as plain JSON values; None when there are none."""
        if not self._scored:
            return None
        best = np.sort(self._best)
        images = len(best) - np.searchsorted(best, THRESHOLDS, side="right")
        above = zip(THRESHOLDS, self._above.tolist(), images.tolist(), strict=True)
        return {
            "number": self._scored,
            "histogram": self._scores.as_dict(),
            "above": [
                {"threshold": threshold, "annotations": number, "images": shown} for threshold, number, shown in above
            ],
        }

    def _add_pairs(self, pairs: NDArray[np.int64]) -> None:
        self._pairs.append(np.unique(pairs))
        if sum(map(len, self._pairs[1:])) > max(_PAIRS_PENDING, len(self._pairs[0])):
            self._all_pairs()

    def _all_pairs(self) -> NDArray[np.int64]:
        """Distinct values of image position × C + category position."""
        self._pairs = [np.unique(np.concatenate([*self._pairs, np.empty(0, np.int64)]))]
        return self._pairs[0]

    def _add_boxes(self, rows: "_Rows", image: NDArray[np.int64]) -> None:
        boxes, stated = rows.boxes()
        rows.note(Problem.NO_BOX, ~stated, "bbox")
        with np.errstate(all="ignore"):
            good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
            ratios, products = boxes[:, 2] / boxes[:, 3], boxes[:, 2] * boxes[:, 3]
            for value in (ratios, products):  # both can overflow, or become 0
                good &= np.isfinite(value) & (value > 0)
            rows.note(Problem.ODD_BOX, stated & ~good, "bbox")
            corners = boxes[:, :2] + boxes[:, 2:]
            outside = (boxes[:, :2] < -_OUTSIDE_PX) | (corners > self._limits[image])  # (N, 2)
            rows.note(Problem.BOX_OUTSIDE, good & (outside[:, 0] | outside[:, 1]), "bbox")
            self._ratios.add(ratios[good])
            area = rows.floats("area")
            known = np.isfinite(area) & (area > 0)
            unstated = np.isnan(area)
            rows.note(Problem.ODD_AREA, ~(unstated | known), "area")
            of_box = unstated & good
            area = np.where(of_box, products, area)[known | of_box]
        self._areas_of_boxes += int(np.count_nonzero(of_box))
        self._sides.add(np.sqrt(area))
        bins = np.searchsorted([edge * edge for edge in SIZE_EDGES_PX], area, side="right")
        self._sizes_counted += np.bincount(bins, minlength=len(self._sizes_counted))

    def _add_scores(self, rows: "_Rows", image: NDArray[np.int64]) -> None:
        scores = rows.floats("score")
        scored = ~np.isnan(scores)
        if not scored.any():
            return
        rows.note(Problem.ODD_SCORE, scored & ~((scores >= 0) & (scores <= 1)), "score")
        scored &= np.isfinite(scores)
        known = scores[scored]
        self._scored += len(known)
        self._scores.add(known)
        self._above += len(known) - np.searchsorted(np.sort(known), THRESHOLDS, side="right")
        placed = scored & (image >= 0)
        np.maximum.at(self._best, image[placed], scores[placed])


class _Rows:
    """Columns of one block as arrays."""

    def __init__(self, table: pa.Table, first: int, problems: Problems) -> None:
        self._table, self._first, self._problems = table, first, problems

    def integers(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(N,) values, 0 where missing; (N,) whether there is a value."""
        column = self._table[name]
        return pc.fill_null(column, 0).to_numpy(), column.is_valid().to_numpy()

    def floats(self, name: str) -> NDArray[np.float64]:
        """(N,) values, NaN where missing."""
        values: NDArray[np.float64] = self._table[name].to_numpy()  # null becomes NaN
        return values

    def boxes(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(N, 4) xywh, NaN unless there are four numbers; (N,) whether the box is neither missing nor empty."""
        column = self._table["bbox"]
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        boxes = np.full((len(lengths), 4), np.nan)
        four = lengths == 4
        boxes[four] = pc.list_flatten(column.filter(pa.array(four))).to_numpy().reshape(-1, 4)
        return boxes, lengths > 0

    def note(
        self,
        problem: Problem,
        where: NDArray[np.bool_],
        field: str,
        value_of: Callable[[int], Any] | None = None,
    ) -> None:
        """Count the rows with a problem; quotes give position, id and one field, from its column or from `value_of`."""

        def quote(row: int) -> str:
            number = self._table["id"][row].as_py()
            value = value_of(row) if value_of is not None else self._table[field][row].as_py()
            return f"annotations[{self._first + row}] (id {number}): {field} {shown(value, 80)}"

        self._problems.add_many(problem, where, quote)
