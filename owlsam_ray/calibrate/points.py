"""Fit an operating point for each category, as JSON values: undefined numbers are None, never NaN."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from owlsam_ray.calibrate.bootstrap import Spread, spreads
from owlsam_ray.calibrate.curves import NOTHING, CurveCounts, Target, agrees, choose, counts_of, wilson
from owlsam_ray.calibrate.pooling import Basis, bases
from owlsam_ray.calibrate.reliability import reliability
from owlsam_ray.calibrate.samples import Sample
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import ConfigError

_log = logging.getLogger(__name__)
_NAMED = 8
"""Most names in a log line."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """How thresholds are fitted."""

    min_examples: int = 50
    """Categories with fewer examples are pooled. Examples are detections for a precision, objects for a recall, and for
    F1 whichever are fewer."""
    resamples: int = 1000
    """Number of resamples of the images, for the intervals."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        """Reject invalid values."""
        for name, least in (("min_examples", 1), ("resamples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)} is too small: give at least {least}")


def operating_points(
    samples: Sequence[Sample],
    categories: Sequence[Category],
    groups: Sequence[Sequence[str]],
    target: Target,
    fitting: Fitting,
    *,
    num_images: int,
    floor: float,
) -> dict[str, Any]:
    """Fit the operating points of all categories.

    Args:
        samples: one sample for each category; at least one detection in total, and all scores above the floor.
        categories: the categories, in the same order.
        groups: for each category, names of pools, the narrowest first.
        target: what thresholds are chosen for.
        fitting: how they are fitted.
        num_images: number of images of the samples.
        floor: the lowest threshold.

    Returns:
        `enough_examples`: number of examples from which a category is not pooled, enough to show that the target is
        reached. `overall`: detections and precision `before` (everything above the floor) and `after`, and recall; how
        many categories reach the target, and how many of these only with their pool. `reliability` of all categories
        together. `categories`: rows of `category_id`, `name`, `threshold`, `threshold_interval`, `reached` (safely,
        with pooled counts, and not contradicted by the category's own detections and objects), `reached_alone` (the
        category's own counts alone show it at this threshold), `too_few_examples` (not reached, but its own counts do
        not contradict the target), `pool` (None, or its `name`, `categories`, and the `weight` of each of the others'
        detections and objects), `precision`, `precision_interval`, `recall`, `recall_interval`, `f1` (estimates, with
        pooled counts), `num_objects`, `num_detections`, `num_kept`, `num_right` (of its own images), `reliability`.

        A category of which nothing is kept never reaches the target, whatever its pool, and takes no precision or
        recall from it. A category whose own detections and objects contradict the threshold that its pool would give it
        is fitted alone.

        Intervals are 95 %. That of a threshold is the bootstrap's. Those of precision and recall, above the chosen
        threshold, are the hull of the bootstrap's and Wilson's: the bootstrap accounts for detections of one image
        being correlated, Wilson's for the uncertainty that a unanimous sample does not show.
    """
    enough = max(fitting.min_examples, target.fewest_examples)
    found, everything = bases(samples, groups, floor, enough, target=target.name)
    chosen: list[tuple[Basis, int]] = []
    reached: list[tuple[bool, bool]] = []
    for basis in found:
        used, cut, is_reached = _choose(basis, target, floor)
        chosen.append((used, cut))
        reached.append(is_reached)
    spread = spreads(chosen, target, num_images=num_images, resamples=fitting.resamples, seed=fitting.seed)
    rows = [
        {"category_id": category.id, "name": category.name} | _row(basis, cut, is_reached, each, target)
        for category, (basis, cut), is_reached, each in zip(categories, chosen, reached, spread, strict=True)
    ]
    _log_outcome(rows, target, enough)
    return {
        "enough_examples": enough,
        "overall": _overall(rows, everything.sample),
        "reliability": reliability(everything.sample),
        "categories": rows,
    }


def _choose(basis: Basis, target: Target, floor: float) -> tuple[Basis, int, tuple[bool, bool]]:
    """Return the basis, the cut, and whether the target is reached: with the pool, and by the category alone."""
    if len(basis.cuts.lowest) == 0:
        return basis, NOTHING, (False, False)
    chosen, fits = choose(basis.counts, target)
    cut, is_reached = int(chosen), bool(fits)
    if basis.pool is None or cut == NOTHING:
        return basis, cut, (is_reached, is_reached)
    own = counts_of(basis.sample, basis.cuts).at(cut)
    if not agrees(own, target):
        return _choose(Basis.alone(basis.place, basis.sample, floor), target, floor)
    return basis, cut, (is_reached, bool(is_reached and choose(own, target)[1]))


def _too_few(sample: Sample, kept: int, right: int, target: Target) -> bool:
    """Whether a category's own counts do not contradict the target, and are only too few to show that it is reached.

    True if there are none; or if there are fewer than would show the target with all of them right, and the bare ratio
    of what is kept is at least the target.
    """
    found, objects = len(sample.score), len(sample.object_image)
    if target.value is None:
        return found == objects == 0
    if (found if target.name == "precision" else objects) == 0:
        return True
    whole = kept if target.name == "precision" else objects
    is_few = sample.num_examples(target.name) < target.fewest_examples
    return is_few and whole > 0 and right / whole >= target.value


def _row(basis: Basis, cut: int, reached: tuple[bool, bool], spread: Spread, target: Target) -> dict[str, Any]:
    threshold = basis.cuts.threshold(cut)
    kept, right = basis.sample.numbers_at(threshold)
    pool = basis.pool
    if cut == NOTHING:
        estimates = _of_nothing(basis.counts)
    elif kept == 0 and pool is not None:
        # What others show above a threshold that keeps none of this category's detections says nothing about it.
        reached = (False, False)
        estimates = _of_nothing(counts_of(basis.sample, basis.cuts))
    else:
        estimates = _estimates(basis.counts.at(cut), spread)
    return {
        "threshold": threshold,
        "threshold_interval": list(spread.threshold),
        "reached": reached[0],
        "reached_alone": reached[1],
        "too_few_examples": not reached[0] and _too_few(basis.sample, kept, right, target),
        "pool": None
        if pool is None
        else {"name": pool.name, "categories": len(pool.members), "weight": float(basis.weight)},
        **estimates,
        "num_objects": len(basis.sample.object_image),
        "num_detections": len(basis.sample.score),
        "num_kept": kept,
        "num_right": right,
        "reliability": reliability(basis.sample),
    }


def _estimates(counts: CurveCounts, spread: Spread) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, ratio, evidence, whole, resampled in (
        ("precision", counts.precision, counts.evidence, counts.found, spread.precision),
        ("recall", counts.recall, counts.object_evidence, counts.objects, spread.recall),
    ):
        value = float(ratio[0]) if whole[0] > 0 else None
        values[name] = value
        values[f"{name}_interval"] = None
        if value is not None:
            ends = [float(end[0]) for end in wilson(ratio, evidence)] + list(resampled or ())
            values[f"{name}_interval"] = [min(ends), max(ends)]
    f1 = float(counts.f1[0]) if counts.found[0] + counts.objects[0] > 0 else None
    return values | {"f1": f1}


def _of_nothing(counts: CurveCounts) -> dict[str, Any]:
    """Estimates for a threshold that keeps nothing."""
    recall, interval = None, None
    if counts.objects[0] > 0:
        low, high = wilson(np.zeros(1), counts.object_evidence)
        recall, interval = 0.0, [float(low[0]), float(high[0])]
    return {"precision": None, "precision_interval": None, "recall": recall, "recall_interval": interval, "f1": recall}


def _overall(rows: list[dict[str, Any]], everything: Sample) -> dict[str, Any]:
    """Sum the own detections of all categories."""
    objects, kept, right = (sum(row[f"num_{name}"] for row in rows) for name in ("objects", "kept", "right"))
    return {
        "num_objects": objects,
        "num_reached": sum(row["reached"] for row in rows),
        "num_reached_only_with_pool": sum(row["reached"] and not row["reached_alone"] for row in rows),
        "before": _numbers(len(everything.score), int(np.count_nonzero(everything.right)), objects),
        "after": _numbers(kept, right, objects),
    }


def _numbers(found: int, right: int, objects: int) -> dict[str, Any]:
    return {
        "detections": found,
        "right": right,
        "precision": right / found if found else None,
        "recall": right / objects if objects else None,
    }


def _log_outcome(rows: list[dict[str, Any]], target: Target, enough: int) -> None:
    missed = [row["name"] for row in rows if not row["reached"]]
    if missed:
        wanted = "any F1 above 0" if target.value is None else f"{target.name} {target.value:g}"
        _log.warning(
            "%d of %d categories cannot be shown to reach %s: they get the threshold that comes nearest, or one that "
            "keeps nothing (`reached` is false): %s", len(missed), len(rows), wanted, _some(missed),
        )  # fmt: skip
    unshown = [row["name"] for row in rows if row["too_few_examples"]]
    if unshown:
        _log.warning(
            "%d of these have too few examples to show it, but no evidence against it (`too_few_examples`): %s",
            len(unshown), _some(unshown),
        )  # fmt: skip
    few = [row["name"] for row in rows if row["pool"] is not None]
    if few:
        _log.info("%d of %d categories have fewer than %d examples and are pooled with others: %s",
                  len(few), len(rows), enough, _some(few))  # fmt: skip
    leaning = [row["name"] for row in rows if row["reached"] and not row["reached_alone"]]
    if leaning:
        _log.warning("%d of the %d categories that reach it do so only with pooled examples (`reached_alone` is "
                     "false): %s", len(leaning), len(rows) - len(missed), _some(leaning))  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
