"""Section `evaluate`: how labels are scored against a ground truth."""

from itertools import pairwise
from typing import Annotated

from pydantic import (
    Field,
    field_validator,
)

from owlsam_ray.config.base import Fraction, Name, Section
from owlsam_ray.config.vocabulary import MappingName


class EvaluateConfig(Section):
    """How predictions are scored against a ground truth."""

    ground_truth: Name | None = None
    """A COCO or LVIS JSON file with annotations; default: `data.annotations` if that is given."""
    score_threshold: Fraction = 0.3
    """Precision, recall, mIoU and Dice use the predictions whose score is at least this. AP uses all."""
    iou_threshold: Fraction = 0.5
    """A prediction matches an object when their IoU is at least this."""
    size_edges_px: tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...] = (32.0, 96.0)
    """Increasing sides in pixels that separate the size groups. An object's side is the square root of its w × h."""
    mapping: MappingName | None = None
    """Score predictions of one dataset's categories on another's ground truth: LVIS v1 and COCO are matched by synset
    (79 of COCO's 80), Objects365 v2 is mapped to COCO by a table of names. Predictions of categories without a
    counterpart are left out and counted."""

    @field_validator("size_edges_px")
    @classmethod
    def _edges_rise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(high <= low for low, high in pairwise(value)):
            raise ValueError("each edge must be greater than the one before")
        return value
