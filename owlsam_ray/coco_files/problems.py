"""Counts what is wrong in a file by kind, and quotes the first examples of each kind."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

_QUOTED = 5


class Problem(StrEnum):
    """Kinds of problems. A file with them can still be read; each description states the effect on the counts."""

    NO_IMAGES = "no_images"
    """The file has no list `images`."""
    NO_CATEGORIES = "no_categories"
    """The file has no list `categories`."""
    NO_ANNOTATIONS = "no_annotations"
    """The file has no list `annotations`, which is normal for files of test images."""
    ODD_CATEGORY = "odd_category"
    """The category has no integer id, or no name; without an id it is left out."""
    DUPLICATE_CATEGORY_ID = "duplicate_category_id"
    """All but the first are left out."""
    DUPLICATE_CATEGORY_NAME = "duplicate_category_name"
    """Counted separately, by id."""
    IMAGE_WITHOUT_ID = "image_without_id"
    """Counted as an image without annotations."""
    DUPLICATE_IMAGE_ID = "duplicate_image_id"
    """Annotations are assigned to the first image."""
    ODD_IMAGE_SIZE = "odd_image_size"
    """Height or width is not a whole number of pixels, or only one of them is stated; excluded from the size counts."""
    IMAGE_WITHOUT_SIZE = "image_without_size"
    """Neither height nor width is stated (null, 0 or -1); excluded from the size counts."""
    ANNOTATION_WITHOUT_ID = "annotation_without_id"
    """The annotation is counted."""
    DUPLICATE_ANNOTATION_ID = "duplicate_annotation_id"
    """The annotations are counted."""
    UNKNOWN_IMAGE = "unknown_image"
    """Excluded from all counts per image."""
    UNKNOWN_CATEGORY = "unknown_category"
    """Excluded from all counts per category."""
    NO_BOX = "no_box"
    """`bbox` is missing or empty."""
    ODD_BOX = "odd_box"
    """Not four finite numbers, without width or height, or of a shape beyond the float range; has no aspect ratio."""
    BOX_OUTSIDE = "box_outside"
    """The box extends beyond its image by more than a pixel."""
    ODD_AREA = "odd_area"
    """The stated area is not positive or not finite, such as the area of an empty mask; excluded from the sizes."""
    ODD_CROWD = "odd_crowd"
    """`iscrowd` is neither 0 nor 1, nor true or false; counted as a crowd."""
    ODD_SCORE = "odd_score"
    """The score is not from 0 to 1; a score that is not finite is not counted."""


class Problems:
    """Counts and quotes of each kind of problem."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(Problem, 0)
        self._quotes: dict[Problem, list[str]] = {problem: [] for problem in Problem}

    def add(self, problem: Problem, quote: str) -> None:
        """Count one problem."""
        self._counts[problem] += 1
        if len(self._quotes[problem]) < _QUOTED:
            self._quotes[problem].append(quote)

    def add_many(self, problem: Problem, where: NDArray[np.bool_], quote: Callable[[int], str]) -> None:
        """Count the rows of a block that have a problem.

        Args:
            problem: its kind.
            where: (N,) mask of the rows of the block.
            quote: describes a row; called for the first ones only.
        """
        count = int(np.count_nonzero(where))
        if count:
            self._counts[problem] += count
            wanted = _QUOTED - len(self._quotes[problem])
            self._quotes[problem] += [quote(int(row)) for row in np.flatnonzero(where)[:wanted]]

    def as_dict(self) -> dict[str, Any]:
        """Count and first quotes of every kind, including zeros."""
        return {
            str(problem): {"count": count, "examples": self._quotes[problem]} for problem, count in self._counts.items()
        }
