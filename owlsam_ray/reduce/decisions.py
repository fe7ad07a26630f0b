"""Decide which detections of a shard become annotations, vectorized over columns.

Steps apply in this order, each to what the previous one left: categories (a subset, a mapping), score thresholds, mask
area, predicted IoU, stability, rejections by reviewers, suppression (followed by the score thresholds again, on decayed
scores), the maximum per image. A detection without a mask passes the three mask steps. What reviewers confirmed passes
all steps.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from owlsam_ray.config.inference import SuppressConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.inference.suppress import suppress
from owlsam_ray.records import Detections

STEPS = (
    "category",
    "score",
    "small_mask",
    "predicted_iou",
    "stability",
    "rejected",
    "suppressed",
    "over_max",
)
"""Names of the steps that leave detections out, in order."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """Settings of a reduce, resolved for the categories of the run."""

    categories: tuple[Category, ...]
    """(C,) categories of the output."""
    target: NDArray[np.int32]
    """(L,) label of the run → index into `categories`; -1: left out."""
    thresholds: NDArray[np.float64]
    """(L,) by label of the run; scores must be greater; -inf keeps all."""
    min_mask_area: int = 0
    """In pixels; masks with fewer are left out."""
    min_predicted_iou: float = -np.inf
    min_stability: float = -np.inf
    suppress: SuppressConfig | None = None
    suppress_thresholds: NDArray[np.float64] | None = None
    """(C,) thresholds for `suppress`, by output category."""
    max_per_image: int | None = None


@dataclass(frozen=True, slots=True)
class Pins:
    """What reviewers decided about the D detections of a shard."""

    kept: NDArray[np.bool_]
    """(D,) kept, whatever the settings say. Takes part in the suppression of others."""
    dropped: NDArray[np.bool_]
    """(D,) dropped before it can suppress another detection."""
    category: NDArray[np.int64]
    """(D,) index into the output's categories; -1: left out. Detections without a correction have the model's category.
    """


@dataclass(frozen=True, slots=True)
class Columns:
    """The remaining detections of one shard: by image, then by ascending det_index."""

    image: NDArray[np.int64]
    """(N,) row of the shard."""
    place: NDArray[np.int64]
    """(N,) position among the shard's detections."""
    det_index: NDArray[np.int64]
    label: NDArray[np.int64]
    category: NDArray[np.int64]
    """(N,) index into the output's categories."""
    score: NDArray[np.float32]
    boxes_xyxy: NDArray[np.float32]
    """(N, 4) original pixels."""
    num_merged: NDArray[np.int64]
    pinned: NDArray[np.bool_]
    """(N,) confirmed by reviewers."""

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> "Columns":
        """Select rows by index or mask."""
        return Columns(*(getattr(self, name)[index] for name in self.__slots__))

    def __len__(self) -> int:
        return len(self.place)


def decide(
    detections: pa.Table, image: NDArray[np.int64], decisions: Decisions, pins: Pins | None = None
) -> tuple[Columns, dict[str, int]]:
    """Apply the decisions to the detections of a shard.

    Args:
        detections: (D rows) the list columns of `PREDICTION_SCHEMA`, flattened.
        image: (D,) row of the shard that each detection belongs to, ascending.
        decisions: resolved settings of the output.
        pins: what reviewers decided; None: nothing.

    Returns:
        The detections that are kept, and for each of `STEPS` the number it left out.
    """
    left_out = dict.fromkeys(STEPS, 0)
    label = detections["label"].to_numpy().astype(np.int64)
    columns = Columns(
        image=image,
        place=np.arange(len(image)),
        det_index=detections["det_index"].to_numpy().astype(np.int64),
        label=label,
        category=decisions.target[label].astype(np.int64) if pins is None else pins.category,
        score=detections["score"].to_numpy(),
        boxes_xyxy=np.stack([detections[axis].to_numpy() for axis in ("x0", "y0", "x1", "y1")], axis=1),
        num_merged=detections["num_merged"].to_numpy().astype(np.int64),
        pinned=np.zeros(len(image), np.bool_) if pins is None else pins.kept,
    )

    def keep(step: str, passes: NDArray[np.bool_]) -> None:
        nonlocal columns
        passes = passes | columns.pinned
        left_out[step] += len(passes) - int(np.count_nonzero(passes))
        if not passes.all():
            columns = columns.take(passes)

    keep("category", columns.category >= 0)
    keep("score", columns.score > decisions.thresholds[columns.label])
    for step, name, least in (
        ("small_mask", "mask_area", decisions.min_mask_area),
        ("predicted_iou", "predicted_iou", decisions.min_predicted_iou),
        ("stability", "stability", decisions.min_stability),
    ):
        values = detections[name].to_numpy()[columns.place]  # NaN without a mask
        keep(step, np.isnan(values) | (values >= least))
    if pins is not None:
        keep("rejected", ~pins.dropped[columns.place])
    if decisions.suppress is not None and decisions.suppress.strategy != "none":
        before = columns
        columns = _suppress(columns, decisions.suppress, decisions.suppress_thresholds)
        columns = columns.take(columns.score > decisions.thresholds[columns.label])
        columns = _with_lost_pins(columns, before)
        left_out["suppressed"] = len(before) - len(columns)
    if decisions.max_per_image is not None:
        keep("over_max", _ranks(columns) < decisions.max_per_image)
    return columns, left_out


def _suppress(columns: Columns, settings: SuppressConfig, thresholds: NDArray[np.float64] | None) -> Columns:
    """Run the final suppression, image by image, within output categories."""
    starts = np.flatnonzero(np.diff(columns.image, prepend=-1))
    ends = np.append(starts[1:], len(columns))[: len(starts)]
    score, boxes, merged = columns.score.copy(), columns.boxes_xyxy.copy(), columns.num_merged.copy()
    kept = np.zeros(len(columns), np.bool_)
    for start, end in zip(starts, ends, strict=True):
        if end - start == 1:
            kept[start] = True
            continue
        order = start + np.argsort(-columns.score[start:end], kind="stable")
        found = suppress(
            Detections(
                boxes_xyxy=columns.boxes_xyxy[order],
                scores=columns.score[order],
                raw_scores=columns.score[order],
                labels=columns.category[order],
                prompt_ids=order,  # unused by suppress: maps results back to rows
                num_merged=columns.num_merged[order],
            ),
            settings,
            thresholds=thresholds,
        )
        places = found.prompt_ids
        kept[places] = True
        score[places], boxes[places], merged[places] = found.scores, found.boxes_xyxy, found.num_merged
    return replace(columns, score=score, boxes_xyxy=boxes, num_merged=merged).take(kept)


def _with_lost_pins(columns: Columns, before: Columns) -> Columns:
    """Add back the confirmed detections of `before` that suppression left out, unchanged."""
    lost = before.take(before.pinned & ~np.isin(before.place, columns.place))
    if not len(lost):
        return columns
    both = Columns(*(np.concatenate([getattr(columns, name), getattr(lost, name)]) for name in columns.__slots__))
    return both.take(np.argsort(both.place))


def _ranks(columns: Columns) -> NDArray[np.int64]:
    """(N,) rank within the image: confirmed detections first, then by descending score, ties by det_index."""
    order = np.lexsort((columns.det_index, -columns.score.astype(np.float64), ~columns.pinned, columns.image))
    image = columns.image[order]
    starts = np.flatnonzero(np.diff(image, prepend=-1))
    within = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = within
    return ranks
