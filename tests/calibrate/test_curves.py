"""Thresholds against loops over every threshold; what "safely" is worth; that a threshold only cuts the end off."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlsam_ray.calibrate.curves import (
    NOTHING,
    SAFE_Z,
    CurveCounts,
    Cuts,
    Target,
    between,
    choose,
    counts_of,
    cuts_of,
    wilson,
)
from owlsam_ray.calibrate.samples import Sample, pooled
from owlsam_ray.coco_files.regions import Region
from owlsam_ray.errors import ConfigError
from owlsam_ray.evaluate.ground_truth import EvaluatedCategory, EvaluatedImage, GroundTruth
from owlsam_ray.evaluate.matching import FALSE, match, pair_cell

FLOOR = 0.05
TARGETS = [Target("precision", 0.6), Target("precision", 0.9), Target("recall", 0.3), Target("recall", 0.8), Target()]


def random_sample(seed: int, *, detections: int = 60, digits: int = 7, share: float = 0.6) -> Sample:
    """Right ones score more; few digits make ties."""
    random = np.random.default_rng(seed)
    right = random.random(detections) < share
    score = np.clip(random.beta(np.where(right, 4, 2), 3), 0.06, 1).round(digits).astype(np.float32)
    image = random.integers(0, 20, detections).astype(np.int32)
    objects = random.integers(0, 20, int(right.sum()) + int(random.integers(0, 20))).astype(np.int32)
    return Sample.of(score, right, image, objects)


def low_end(part: float, whole: float) -> float:
    """The lower p of |part / whole - p| = z √(p (1 - p) / whole), by halving."""
    if part == 0:
        return 0.0
    low, high = 0.0, part / whole
    for _ in range(200):
        p = (low + high) / 2
        low, high = (p, high) if part / whole - p > SAFE_Z * math.sqrt(p * (1 - p) / whole) else (low, p)
    return high


def loop(sample: Sample, target: Target) -> tuple[set[float], bool]:
    """Scores that the chosen threshold keeps, and whether the target is reached; every threshold tried."""
    found: list[tuple[float, set[float]]] = []
    numbers = []
    for lowest in sorted({float(each) for each in sample.score}, reverse=True):
        kept = sample.score >= np.float32(lowest)
        numbers.append((int(sample.right[kept].sum()), int(kept.sum()), {float(each) for each in sample.score[kept]}))
    objects = len(sample.object_image)
    for right, count, kept_scores in numbers:
        whole = count if target.name == "precision" else objects
        if target.value is None:
            found.append((float(Fraction(2 * right, count + objects)), kept_scores))
        elif low_end(right, whole) >= target.value:
            found.append((0.0, kept_scores))
    if target.value is None:
        best = max(value for value, _ in found)
        return min((kept for value, kept in found if value == best), key=len), True
    if not found:
        return set(), False
    return (max if target.name == "precision" else min)((kept for _, kept in found), key=len), True


@pytest.mark.parametrize("digits", [7, 1])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_thresholds_equal_a_loop(target: Target, digits: int) -> None:
    reached_times = 0
    for seed in range(40):
        sample = random_sample(seed, detections=150, digits=digits, share=0.5 + 0.45 * (seed % 2))
        cuts = cuts_of(sample.score, FLOOR)
        cut, reached = choose(counts_of(sample, cuts), target)
        wanted, is_reached = loop(sample, target)
        assert bool(reached) == is_reached, f"seed {seed}"
        reached_times += is_reached
        if is_reached:
            threshold = cuts.threshold(int(cut))
            assert {score for score in sample.score.tolist() if score > threshold} == wanted, f"seed {seed}"
            assert threshold >= FLOOR
    assert reached_times > 3


def sample_of(flags: str, objects: int) -> Sample:
    """Right (x) and false (.) detections by falling score, each in an image of its own."""
    score = np.linspace(0.9, 0.1, len(flags), dtype=np.float32)
    right = np.array([each == "x" for each in flags])
    numbers = np.arange(len(flags), dtype=np.int32)
    return Sample.of(score, right, numbers, np.arange(objects, dtype=np.int32))


def numbers_at(sample: Sample, target: Target) -> tuple[int, int, bool]:
    cuts = cuts_of(sample.score, FLOOR)
    cut, reached = choose(counts_of(sample, cuts), target)
    return *sample.numbers_at(cuts.threshold(int(cut))), bool(reached)


def test_what_cannot_be_reached() -> None:
    # Too few to show it: the longest row of right ones is nearest.
    assert numbers_at(sample_of("xxxxxxxxxx.........", 12), Target("precision", 0.9)) == (10, 10, False)
    # Nothing near it: keep nothing, be a right one somewhere or not.
    assert numbers_at(sample_of("...." * 20 + "x", 12), Target("precision", 0.9)) == (0, 0, False)
    assert numbers_at(sample_of("....", 12), Target("precision", 0.9)) == (0, 0, False)
    assert numbers_at(sample_of("....", 12), Target()) == (0, 0, False)
    # Recall: all there is.
    assert numbers_at(sample_of("x..x", 12), Target("recall", 0.9)) == (4, 2, False)
    assert numbers_at(sample_of("....", 12), Target("recall", 0.9)) == (4, 0, False)
    # And what can: 49 right ones show 0.9, 48 do not.
    assert numbers_at(sample_of("x" * 49, 49), Target("precision", 0.9)) == (49, 49, True)
    assert numbers_at(sample_of("x" * 48, 48), Target("precision", 0.9))[2] is False
    assert Target("precision", 0.9).fewest_examples == 49


@pytest.mark.parametrize("value", [None, 0.0, 1.0, -0.1, float("nan")])
def test_targets_that_no_data_can_show(value: float | None) -> None:
    for name in ("precision", "recall"):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            Target(name, value)
    with pytest.raises(ConfigError, match="best F1"):
        Target("f1", 0.5)


@given(st.floats(0.0, 1.0, width=32), st.floats(0.0, 1.0, width=32), st.integers(0, 2))
def test_a_threshold_lies_between_scores(one: float, other: float, steps: int) -> None:
    """Float32 scores, neighbours among them, against a float64 threshold."""
    low = np.float32(min(one, other))
    high = low
    if steps:
        for _ in range(steps):
            high = np.nextafter(high, np.float32(2))
    else:
        high = np.float32(max(one, other))
    if low == high:
        return
    threshold = between(float(low), float(high))
    scores = np.array([low, high], np.float32)
    assert (scores.astype(np.float64) > threshold).tolist() == [False, True]
    assert (scores > np.array([threshold])).tolist() == [False, True]  # as `reduce` compares
    assert (scores > np.float32(threshold)).tolist() == [False, True]


def test_thresholds_are_short_and_not_below_the_floor() -> None:
    assert between(0.1234, 0.9) == 0.51
    assert between(0.50, 0.51) == 0.505
    assert between(float(np.float32(0.55)), float(np.float32(0.56))) == 0.555  # not 0.56, which is below the latter
    cuts = cuts_of(np.array([0.9, 0.5, 0.5, 0.051], np.float32), FLOOR)
    assert cuts.lowest.tolist() == [float(np.float32(each)) for each in (0.9, 0.5, 0.051)]
    assert [cuts.threshold(cut) for cut in range(3)] == [0.7, 0.28, FLOOR]
    assert cuts.threshold(NOTHING) == 1.0  # other images may have a higher score than these
    assert Cuts(np.empty(0), np.empty(0), FLOOR).threshold(NOTHING) == FLOOR


def test_few_of_many_cuts() -> None:
    score = np.sort(np.random.default_rng(1).random(5000).astype(np.float32) * 0.9 + 0.06)[::-1]
    all_of_them, few = cuts_of(score, FLOOR), cuts_of(score, FLOOR, 100)
    assert 50 < len(few.lowest) <= 100
    assert set(zip(few.lowest, few.below, strict=True)) < set(zip(all_of_them.lowest, all_of_them.below, strict=True))
    assert (few.lowest[0], few.lowest[-1]) == (all_of_them.lowest[0], all_of_them.lowest[-1])


def test_what_safely_is_worth() -> None:
    """A reached target is missed by the truth in one case of a hundred or so, and by another set in one of twenty."""
    random = np.random.default_rng(5)
    times, detections, target = 400, 1000, Target("precision", 0.8)
    truth = 0.995 / (1 + np.exp((np.linspace(0, 1, detections) - 0.5) * 8))
    true_precision = np.cumsum(truth) / np.arange(1, detections + 1)
    found = np.broadcast_to(np.arange(1.0, detections + 1), (times, detections))
    draws = [np.cumsum(random.random((times, detections)) < truth, axis=1).astype(np.float64) for _ in range(2)]
    objects = np.full((times, 1), truth.sum())
    cut, reached = choose(CurveCounts.plain(draws[0], found, objects), target)
    assert reached.all()
    held_out = draws[1][np.arange(times), cut] / (cut + 1)
    assert np.mean(true_precision[cut] < 0.8) <= 0.03
    assert np.mean(held_out < 0.8) <= 0.08
    # The bare ratio, for comparison.
    bare = detections - 1 - (draws[0] / found >= 0.8)[:, ::-1].argmax(axis=1)
    assert np.mean(draws[1][np.arange(times), bare] / (bare + 1) < 0.8) > 0.35


def test_wilson() -> None:
    low, high = wilson(np.array([0.0, 1.0, 0.3, 0.0]), np.array([10.0, 10.0, 50.0, 0.0]))
    assert (low[0], high[1], low[3], high[3]) == (0, 1, 0, 1)
    assert (low[2], high[2]) == (pytest.approx(0.1910, abs=1e-4), pytest.approx(0.4375, abs=1e-4))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("iou", [0.3, 0.6])
def test_a_threshold_only_cuts_the_end_off(seed: int, iou: float) -> None:
    """Matched once, at the lowest threshold, or again at each: the same ones are right."""
    random = np.random.default_rng(seed)

    def regions(count: int, *, crowds: bool) -> list[Region]:
        corners = random.random((count, 2)) * 20
        scores = random.integers(1, 9, count) / 8  # many ties
        return [
            Region(1, 1, (float(x), float(y), 12.0, 12.0), 144.0, None, float(score), crowds and random.random() < 0.2)
            for (x, y), score in zip(corners, scores, strict=True)
        ]

    objects, found = regions(6, crowds=True), regions(15, crowds=False)
    found.sort(key=lambda region: -region.score)
    exhaustive = seed % 4 > 0
    image = EvaluatedImage((), None, not_exhaustive=frozenset() if exhaustive else frozenset({1}))
    truth = GroundTruth("t", {1: image}, {1: EvaluatedCategory("c", "g", None)}, objects, False, False)
    outcomes, _ = pair_cell(objects, found, "box", iou_threshold=iou, exhaustive=exhaustive)
    scores = np.array([region.score for region in found])
    for threshold in sorted(set(scores)):
        tally = match(truth, found, "box", score_threshold=threshold, iou_threshold=iou).tally(None, (0.0, 1e9))
        kept = outcomes[scores >= threshold]
        assert (tally.num_matched, tally.num_false) == ((kept >= 0).sum(), (kept == FALSE).sum())


def test_categories_together() -> None:
    one, other = random_sample(1), random_sample(2, digits=1)
    both = pooled([one, other])
    assert sorted(both.score.tolist()) == sorted([*one.score.tolist(), *other.score.tolist()])
    assert (np.diff(both.score) <= 0).all()
    assert both.numbers_at(0.4) == tuple(
        a + b for a, b in zip(one.numbers_at(0.4), other.numbers_at(0.4), strict=True)
    )  # fmt: skip
    objects = len(one.object_image) + len(other.object_image)
    assert [both.num_examples(target) for target in ("precision", "recall", "f1")] == [120, objects, min(120, objects)]
