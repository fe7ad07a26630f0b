"""What is odd in a file: counted by kind, the first of each kind quoted."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

_QUOTED = 5


class Problem(StrEnum):
    """Kinds of oddities. Files with them can be read; what they mean for the numbers is said here."""

    NO_IMAGES = "no_images"
    """The file has no list `images`."""
    NO_CATEGORIES = "no_categories"
    """The file has no list `categories`."""
    NO_ANNOTATIONS = "no_annotations"
    """The file has no list `annotations`, as files of test images have none."""
    ODD_CATEGORY = "odd_category"
    """No integer id, or no name; without an id it is left out."""
    DUPLICATE_CATEGORY_ID = "duplicate_category_id"
    """Left out, but for the first."""
    DUPLICATE_CATEGORY_NAME = "duplicate_category_name"
    """Counted apart, by their ids."""
    IMAGE_WITHOUT_ID = "image_without_id"
    """Counted as an image without annotations."""
    DUPLICATE_IMAGE_ID = "duplicate_image_id"
    """The first gets the annotations."""
    ODD_IMAGE_SIZE = "odd_image_size"
    """Height or width is no whole number of pixels, or only one of them is stated; counts among no sizes."""
    IMAGE_WITHOUT_SIZE = "image_without_size"
    """Neither height nor width is stated (null, 0 or -1); counts among no sizes."""
    ANNOTATION_WITHOUT_ID = "annotation_without_id"
    """Counted."""
    DUPLICATE_ANNOTATION_ID = "duplicate_annotation_id"
    """Counted."""
    UNKNOWN_IMAGE = "unknown_image"
    """Not counted in any number by image."""
    UNKNOWN_CATEGORY = "unknown_category"
    """Not counted in any number by category."""
    NO_BOX = "no_box"
    """`bbox` is not stated, or empty."""
    ODD_BOX = "odd_box"
    """Not four finite numbers, without width or height, or of a shape beyond all floats; has no aspect ratio."""
    BOX_OUTSIDE = "box_outside"
    """Leaves its image by more than a pixel."""
    ODD_AREA = "odd_area"
    """The stated area is not positive, or not finite, as that of an empty mask; has no size."""
    ODD_CROWD = "odd_crowd"
    """`iscrowd` is neither 0 nor 1, nor true or false; counted as a crowd."""
    ODD_SCORE = "odd_score"
    """Not from 0 to 1; one that is not finite is not counted as a score."""


class Problems:
    """Counts and quotes of each kind."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(Problem, 0)
        self._quotes: dict[Problem, list[str]] = {problem: [] for problem in Problem}

    def add(self, problem: Problem, quote: str) -> None:
        """Count one."""
        self._counts[problem] += 1
        if len(self._quotes[problem]) < _QUOTED:
            self._quotes[problem].append(quote)

    def add_many(self, problem: Problem, where: NDArray[np.bool_], quote: Callable[[int], str]) -> None:
        """Count those of a block.

        Args:
            problem: its kind.
            where: (N,) which rows of the block.
            quote: what to say of a row; asked for the first ones only.
        """
        count = int(np.count_nonzero(where))
        if count:
            self._counts[problem] += count
            wanted = _QUOTED - len(self._quotes[problem])
            self._quotes[problem] += [quote(int(row)) for row in np.flatnonzero(where)[:wanted]]

    def as_dict(self) -> dict[str, Any]:
        """Count and the first few quotes of every kind, zero or not."""
        return {
            str(problem): {"count": count, "examples": self._quotes[problem]} for problem, count in self._counts.items()
        }
