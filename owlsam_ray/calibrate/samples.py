"""What was found in the images of a ground truth, and whether it is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TargetName = Literal["precision", "recall", "f1"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one category, or of several together. D detections, O objects; images are numbered from 0."""

    score: NDArray[np.float32]
    """(D,) falling."""
    right: NDArray[np.bool_]
    """(D,) whether it found an object, matched by falling score. Since a match depends on higher scores only, these
    flags hold for every threshold: a higher one cuts the end off."""
    image: NDArray[np.int32]
    """(D,)"""
    object_image: NDArray[np.int32]
    """(O,) of each object, found or not."""

    @staticmethod
    def of(
        score: NDArray[np.float32],
        right: NDArray[np.bool_],
        image: NDArray[np.int32],
        object_image: NDArray[np.int32],
    ) -> "Sample":
        """The same columns in any order; of equal scores the lower image comes first."""
        order = np.lexsort((image, -score.astype(np.float64)))
        return Sample(score[order], right[order], image[order], np.sort(object_image))

    def num_examples(self, target: TargetName) -> int:
        """How much there is to learn from.

        For a precision detections, right or not: many of which none is right say that there is no threshold. For a
        recall objects, found or not. For F1, which needs both, whichever are fewer.
        """
        detections, objects = len(self.score), len(self.object_image)
        return {"precision": detections, "recall": objects, "f1": min(detections, objects)}[target]

    def numbers_at(self, threshold: float) -> tuple[int, int]:
        """Detections that score more, and how many of them are right."""
        kept = self.score.astype(np.float64) > threshold  # as `reduce` compares
        return int(np.count_nonzero(kept)), int(np.count_nonzero(self.right & kept))


def pooled(samples: Sequence[Sample]) -> Sample:
    """Several categories as if they were one; at least one."""
    return Sample.of(
        *(
            np.concatenate([getattr(each, name) for each in samples])
            for name in ("score", "right", "image", "object_image")
        )
    )
