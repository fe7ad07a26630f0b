"""Hold the detections found in the images of a ground truth, and whether each is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TargetName = Literal["precision", "recall", "f1"]


@dataclass(frozen=True, slots=True)
class Sample:
    """The sample of one category, or of several combined. D detections, O objects; images are numbered from 0."""

    score: NDArray[np.float32]
    """(D,) descending."""
    right: NDArray[np.bool_]
    """(D,) whether it found an object, matched by descending score. Since a match depends only on higher scores, these
    flags are valid for every threshold: a higher one cuts the end off."""
    image: NDArray[np.int32]
    """(D,)"""
    object_image: NDArray[np.int32]
    """(O,) image of each object, found or not."""

    @staticmethod
    def of(
        score: NDArray[np.float32],
        right: NDArray[np.bool_],
        image: NDArray[np.int32],
        object_image: NDArray[np.int32],
    ) -> "Sample":
        """Sort columns in any order by descending score; ties by ascending image."""
        order = np.lexsort((image, -score.astype(np.float64)))
        return Sample(score[order], right[order], image[order], np.sort(object_image))

    def num_examples(self, target: TargetName) -> int:
        """Return the number of examples for a target.

        For a precision, detections, right or wrong: many wrong ones show that there is no threshold. For a recall,
        objects, found or not. For F1, which needs both, whichever are fewer.
        """
        detections, objects = len(self.score), len(self.object_image)
        return {"precision": detections, "recall": objects, "f1": min(detections, objects)}[target]

    def numbers_at(self, threshold: float) -> tuple[int, int]:
        """Return the number of detections with a higher score, and how many of them are right."""
        kept = self.score.astype(np.float64) > threshold  # compares like `reduce`
        return int(np.count_nonzero(kept)), int(np.count_nonzero(self.right & kept))


def pooled(samples: Sequence[Sample]) -> Sample:
    """Combine several categories (at least one) as if they were one."""
    return Sample.of(
        *(
            np.concatenate([getattr(each, name) for each in samples])
            for name in ("score", "right", "image", "object_image")
        )
    )
