"""Calibrate a labelled run on a ground truth of some of its images; `reduce` applies the result."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from owlsam_ray import storage
from owlsam_ray.calibrate.collect import Rules, collect
from owlsam_ray.calibrate.curves import CONFIDENCE, Target
from owlsam_ray.calibrate.points import Fitting, operating_points
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.config.run import RunConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import ConfigError, InputError
from owlsam_ray.evaluate.ground_truth import NO_GROUP, GroundTruth, load_ground_truth
from owlsam_ray.evaluate.matching import Shape
from owlsam_ray.reduce.operating_points import OperatingPoints
from owlsam_ray.reduce.resolve import resolve_decisions, settings_in_use
from owlsam_ray.run.paths import OPERATING_POINTS_FILE
from owlsam_ray.run.proof import ShardRules
from owlsam_ray.run.run import open_labelled_run
from owlsam_ray.terminal import Show, silent
from owlsam_ray.vocabulary.names import fold_category

_log = logging.getLogger(__name__)
_APART: dict[str, Any] = {
    "score_threshold": None, "score_thresholds": {}, "operating_points": None, "mapping": None, "corrections": None,
}  # fmt: skip
"""Settings of `reduce` that are ignored: those being fitted, and those applied after them."""


@dataclass(frozen=True, slots=True)
class MatchRule:
    """When a detection counts as right."""

    shape: Shape = "box"
    """Shape whose IoU is compared."""
    iou_threshold: float = 0.5
    """Minimum IoU with an object."""

    def __post_init__(self) -> None:
        """Reject invalid values."""
        if not 0 < self.iou_threshold <= 1:
            raise ConfigError(f"an IoU threshold of {self.iou_threshold} is invalid: give a number above 0, at most 1")


def calibrate_run(
    config: RunConfig,
    target: Target,
    ground_truth: str | None = None,
    *,
    matching: MatchRule | None = None,
    fitting: Fitting | None = None,
    out: str | None = None,
    show: Show = silent,
) -> dict[str, Any]:
    """Fit score thresholds to what `reduce` would show of the images that a ground truth lists, without a model.

    The section `reduce` applies as it does there (subset, mask area, predicted IoU, stability, suppression, most per
    image), except score thresholds, mapping and corrections.

    Args:
        config: the run's configuration, whose section `reduce` applies.
        target: what thresholds are chosen for.
        ground_truth: path or fsspec URL of a COCO or LVIS file of some of the run's images, in which all objects (of
            the categories that were queried) are annotated; default: `evaluate.ground_truth`, else `data.annotations`.
        matching: when a detection is right; default: boxes, IoU 0.5.
        fitting: how thresholds are fitted; default: pools below 50 examples, 1,000 resamples.
        out: path or URL of the JSON; a PNG is written beside it. Default: `RUN/operating_points.json`.
        show: called with ("calibrated", shards so far, shards with a listed image).

    Returns:
        The content of the file: `version`, `fingerprint`, `target`, `ground_truth`, `matching`, `fitting`, `settings`
        (of `reduce`), `score_floor`, `counts` (images, objects, detections by outcome), and what `operating_points`
        returns.

    Raises:
        InputError: there is no run, no ground truth, or they do not fit each other.
        GuardError: the run was made with other settings.
        IncompleteError: nothing of it is labelled, or a shard cannot be trusted.
        OSError: storage refused.
    """
    matching, fitting = matching or MatchRule(), fitting or Fitting()
    run = open_labelled_run(config)
    record = run.record
    truth = _load_truth(config, ground_truth, matching.shape)
    floor = float((record.fingerprint_parts or {})["config"]["detector"]["score_floor"])
    settings = config.reduce.model_copy(update=_APART)
    _warn(settings)
    decisions = resolve_decisions(settings, record, floor, None)
    decisions = replace(decisions, thresholds=np.full(len(record.categories), floor))
    rules = ShardRules.of(record)
    found = collect(run.manifest, truth, Rules(rules, decisions, matching.shape, matching.iou_threshold), show)
    fitted = operating_points(
        found.samples,
        decisions.categories,
        _groups(decisions.categories, truth),
        target,
        fitting,
        num_images=found.num_images,
        floor=floor,
    )
    stated = {} if target.value is None else {"value": target.value}
    result: dict[str, Any] = {
        "version": 1,
        "fingerprint": record.fingerprint,
        "target": {"name": target.name, **stated, "shape": matching.shape, "iou_threshold": matching.iou_threshold},
        "ground_truth": truth.url,
        "confidence": CONFIDENCE,
        "fitting": {"min_examples": fitting.min_examples, "resamples": fitting.resamples, "seed": fitting.seed},
        "settings": settings_in_use(settings, None),
        "score_floor": floor,
        "counts": found.counts,
        **fitted,
    }
    _write(result, out or storage.join(run.url, OPERATING_POINTS_FILE))
    return result


def _load_truth(config: RunConfig, given: str | None, shape: Shape) -> GroundTruth:
    url = given or config.evaluate.ground_truth or config.data.annotations
    if url is None:
        raise InputError(
            "no ground truth: give --ground-truth FILE, or set evaluate.ground_truth, a COCO or LVIS JSON file with "
            "the objects of some of the run's images"
        )
    truth = load_ground_truth(url, masks=shape == "mask")
    if shape == "mask" and not truth.has_masks:
        raise InputError(f"{url} has no segmentations: calibrate on boxes (--kind box)")
    return truth


def _groups(categories: Sequence[Category], truth: GroundTruth) -> list[list[str]]:
    """Names of each category's pools: LVIS's frequency, supercategory; the ground truth's if it has the category."""
    by_name = {fold_category(each.name): each for each in truth.categories.values()}
    found = []
    for category in categories:
        there = by_name.get(fold_category(category.name))
        frequency = (there.frequency if there else None) or category.frequency
        group = there.group if there else category.supercategory
        names = [f"frequency {frequency}"] if frequency else []
        found.append(names + ([f"supercategory {group}"] if group and group != NO_GROUP else []))
    return found


def _warn(settings: ReduceConfig) -> None:
    """Warn where a threshold does more than drop the lowest scores."""
    late = settings.suppress
    for name, matters in (
        ("suppress.strategy: merge", late is not None and late.strategy == "merge"),
        ("suppress.across_labels", late is not None and late.across_labels),
        ("max_per_image", settings.max_per_image is not None),
    ):
        if matters:
            _log.warning(
                "reduce.%s changes labels after the score thresholds are applied: precision and recall hold "
                "approximately, not exactly", name,
            )  # fmt: skip


def _write(result: dict[str, Any], url: str) -> None:
    OperatingPoints.model_validate(result)
    from owlsam_ray.calibrate.plots import draw_operating_points

    text = json.dumps(result, indent=1, allow_nan=False)
    storage.write_atomic(f"{url.removesuffix('.json')}.png", draw_operating_points(result))
    storage.write_atomic(url, text.encode())
