"""Records that flow through the actor: encoded images in, detections, masks and predictions out.

Shapes: N detections of one image, H W original pixels. Boxes are half-open: x1 and y1 are the right and bottom edges.
All arrays are on the CPU. Pixels and dense masks are deliberately absent: they never leave a stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.errors import FailureClass, ImageError


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image as storage returned it: the input of the engine."""

    image_id: int
    data: bytes | memoryview | None
    """The file's bytes; None when fetching failed."""
    stated_hw: tuple[int, int] | None = None
    """(H, W) as stated by the source; None when it states none."""
    failure: tuple[str, FailureClass] | None = None
    """Reason and class when fetching failed."""
    note: str | None = None
    """A remark from the fetch, such as a size that contradicts the listing."""

    @classmethod
    def of(
        cls,
        outcome: bytes | memoryview | ImageError,
        *,
        image_id: int,
        height: int | None = None,
        width: int | None = None,
        note: str | None = None,
    ) -> Self:
        """Create the image from what came of fetching it: the file's bytes, or the error.

        A size counts as stated only if the source states both `height` and `width`.
        """
        stated = (height, width) if height is not None and width is not None else None
        if isinstance(outcome, ImageError):
            return cls(image_id, None, stated, failure=(outcome.reason, outcome.failure_class), note=note)
        return cls(image_id, outcome, stated, note=note)


@dataclass(frozen=True, slots=True)
class Detections:
    """Boxes of one image, by falling score."""

    boxes_xyxy: NDArray[np.float32]
    """(N, 4) original pixels."""
    scores: NDArray[np.float32]
    """(N,) after suppression (a decayed or merged score may differ from the raw one)."""
    raw_scores: NDArray[np.float32]
    """(N,) as returned by the detector."""
    labels: NDArray[np.int64]
    """(N,) index into the categories."""
    prompt_ids: NDArray[np.int64]
    """(N,) index into the queries: the query that matched."""
    num_merged: NDArray[np.int64]
    """(N,) number of boxes merged into this one; 1 without merging."""

    def __post_init__(self) -> None:
        n = len(self.scores)
        if self.boxes_xyxy.shape != (n, 4):
            raise ValueError(f"boxes_xyxy must be ({n}, 4), not {self.boxes_xyxy.shape}")
        for name in ("scores", "raw_scores", "labels", "prompt_ids", "num_merged"):
            if getattr(self, name).shape != (n,):
                raise ValueError(f"{name} must be ({n},), not {getattr(self, name).shape}")

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, index: NDArray[np.int64]) -> "Detections":
        """The detections at `index` (K,), in that order."""
        return Detections(
            boxes_xyxy=self.boxes_xyxy[index],
            scores=self.scores[index],
            raw_scores=self.raw_scores[index],
            labels=self.labels[index],
            prompt_ids=self.prompt_ids[index],
            num_merged=self.num_merged[index],
        )

    def moved(self, offset_xy: NDArray[np.float32]) -> "Detections":
        """The same detections, with the boxes shifted by `offset_xy` (2,) pixels."""
        return replace(self, boxes_xyxy=self.boxes_xyxy + np.concatenate([offset_xy, offset_xy]))

    @staticmethod
    def concatenate(parts: Sequence["Detections"]) -> "Detections":
        """Join the parts in order; without parts, the result is empty. The caller sorts the result."""
        if not parts:
            return Detections.empty()
        return Detections(
            **{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Detections)}
        )

    @staticmethod
    def empty() -> "Detections":
        """Zero detections."""
        none = np.zeros(0, np.int64)
        return Detections(
            boxes_xyxy=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            raw_scores=np.zeros(0, np.float32),
            labels=none,
            prompt_ids=none,
            num_merged=none,
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """The mask of one detection."""

    rle_counts: bytes
    """COCO RLE of an (H, W) mask, compressed as pycocotools does."""
    area: int
    """Number of mask pixels."""
    box_xyxy: tuple[int, int, int, int]
    """Tight half-open box; (0, 0, 0, 0) for an empty mask."""
    predicted_iou: float
    """SAM's own estimate of the mask's IoU."""
    stability: float
    """IoU of the mask at logits > +1 with the mask at logits > -1, on the low-resolution logits."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The engine's result for one image."""

    image_id: int
    size_hw: tuple[int, int] | None = None
    """(H, W) of the decoded image; None when it could not be decoded."""
    detections: Detections = field(default_factory=Detections.empty)
    segments: tuple[Segment | None, ...] = ()
    """One per detection; None where the score is below the mask floor."""
    failure: tuple[str, FailureClass] | None = None
    """Reason and class when the image failed."""
    note: str | None = None
    """A remark on a labelled image, such as a stated size that the file contradicts."""

    def __post_init__(self) -> None:
        if len(self.segments) != len(self.detections):
            raise ValueError(f"{len(self.segments)} segments for {len(self.detections)} detections")

    @property
    def status(self) -> str:
        """`ok`, `empty` or `failed`."""
        if self.failure is not None:
            return "failed"
        return "ok" if len(self.detections) else "empty"
