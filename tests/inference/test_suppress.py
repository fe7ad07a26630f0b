"""Suppression against plain loops, and on scenes that are made to show what a strategy is for."""

import itertools
import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from owlsam_ray.config.inference import SuppressConfig
from owlsam_ray.errors import InputError
from owlsam_ray.inference import suppress as module
from owlsam_ray.inference.suppress import label_thresholds, suppress
from owlsam_ray.ops import boxes
from owlsam_ray.records import Detections
from tests.oracles import suppress_loop

NAMES = ("cat", "dog", "toy")
EACH: dict[str, Any] = {"threshold": 0.5, "thresholds": {"dog": 0.0, "toy": 0.25}}
VARIANTS: dict[str, dict[str, Any]] = {
    "nms": {"threshold": 0.3},
    "nms-ios": {"threshold": 0.5, "overlap": "ios"},
    "nms-across": {"threshold": 0.25, "across_labels": True},
    "nms-each": EACH,
    "merge": {"strategy": "merge", "threshold": 0.25},
    "merge-across": {"strategy": "merge", "threshold": 0.5, "across_labels": True},
    "merge-each": {"strategy": "merge"} | EACH,
    "soft": {"strategy": "soft_nms"},
    "soft-ios-across": {"strategy": "soft_nms", "sigma": 0.3, "overlap": "ios", "across_labels": True},
    "soft-linear": {"strategy": "soft_nms", "decay": "linear", "threshold": 0.0},
    "soft-linear-each": {"strategy": "soft_nms", "decay": "linear"} | EACH,
    "none": {"strategy": "none"},
}
STRATEGIES = ("nms", "merge", "soft_nms", "none")


def detections(
    boxes_xyxy: Any, scores: Any, labels: Any = None, *, num_merged: Any = None, raw_scores: Any = None
) -> Detections:
    """A record whose prompt ids are places in it."""
    count = len(scores)
    values = np.asarray(scores, np.float32)
    return Detections(
        boxes_xyxy=np.asarray(boxes_xyxy, np.float32).reshape(count, 4),
        scores=values,
        raw_scores=values if raw_scores is None else np.asarray(raw_scores, np.float32),
        labels=np.zeros(count, np.int64) if labels is None else np.asarray(labels, np.int64),
        prompt_ids=np.arange(count),
        num_merged=np.ones(count, np.int64) if num_merged is None else np.asarray(num_merged, np.int64),
    )


def drawn(rng: np.random.Generator, count: int, side: int) -> Detections:
    """Everything on coarse grids: equal scores (0 too), equal boxes, boxes without area and ties of overlaps abound."""
    corners = np.sort(rng.integers(0, side, (count, 2, 2)), axis=1)
    return detections(
        corners.reshape(count, 4) + rng.choice([0.0, 0.5, 1e6]),
        -np.sort(-rng.integers(0, 9, count) / 8),
        rng.integers(0, len(NAMES), count),
        num_merged=rng.integers(1, 3, count),
        raw_scores=rng.random(count),
    )


@cache
def small_sets() -> tuple[int, list[Detections]]:
    """A seed, and 2,000 sets of 0 to 12 boxes."""
    seed = random.randrange(2**32)
    rng = np.random.default_rng(seed)
    return seed, [drawn(rng, int(rng.integers(0, 13)), 5) for _ in range(2_000)]


def check(found: Detections, config: SuppressConfig, thresholds: NDArray[np.float64], floor: float) -> int:
    """Compare with the loop; returns how many boxes went, or changed their scores."""
    result = suppress(found, config, thresholds=thresholds, score_floor=floor)
    expected = suppress_loop(found, config, thresholds.tolist(), floor)
    kept = [row[0] for row in expected]
    assert result.prompt_ids.tolist() == kept
    assert result.num_merged.tolist() == [row[3] for row in expected]
    assert result.labels.tolist() == found.labels[kept].tolist()
    assert result.raw_scores.tolist() == found.raw_scores[kept].tolist()
    # The loop does the same arithmetic in the same order: nothing is left to tolerate but the rounding to float32.
    assert result.scores.tolist() == np.array([row[2] for row in expected], np.float32).tolist()
    assert result.boxes_xyxy.tolist() == np.array([row[1] for row in expected], np.float32).reshape(-1, 4).tolist()
    assert result.scores.dtype == result.boxes_xyxy.dtype == np.float32
    return len(found) - int((result.scores == found.scores[kept]).sum())


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_loop_on_small_sets(variant: str) -> None:
    seed, sets = small_sets()
    print(f"seed {seed}")
    config = SuppressConfig.model_validate(VARIANTS[variant])
    thresholds = label_thresholds(config, NAMES)
    touched = sum(check(found, config, thresholds, index % 3 / 8) for index, found in enumerate(sets))
    assert touched > len(sets) / 4 or variant == "none"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("round_cost", [0, 5000, 10**9])
def test_equals_a_loop_on_large_sets(variant: str, round_cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rounds alone, by both, by pairs alone (after one round); and with a sweep in many pieces."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(module, "_ROUND_COST", round_cost)
    monkeypatch.setattr(boxes, "_SWEEP_PAIRS", 500)
    config = SuppressConfig.model_validate(VARIANTS[variant])
    for side in (12, 100):
        assert check(drawn(rng, 300, side), config, label_thresholds(config, NAMES), 0.05) > 0 or variant == "none"


def test_thresholds_by_default() -> None:
    config = SuppressConfig(thresholds={"dog": 0.2})
    assert label_thresholds(config, NAMES).tolist() == [0.7, 0.2, 0.7]
    assert label_thresholds(SuppressConfig(threshold=0.4), NAMES).tolist() == [0.4] * 3
    assert label_thresholds(SuppressConfig(), ()).shape == (0,)
    rng = np.random.default_rng(3)
    for strategy, found in itertools.product(STRATEGIES, [drawn(rng, 40, 5) for _ in range(5)]):
        settings = SuppressConfig.model_validate({"strategy": strategy})
        plain, stated = suppress(found, settings), suppress(found, settings, thresholds=np.full(3, 0.7))
        assert plain.prompt_ids.tolist() == stated.prompt_ids.tolist()
        assert plain.scores.tolist() == stated.scores.tolist()
    with pytest.raises(ValueError, match="need the thresholds of label_thresholds"):
        suppress(found, config)


def test_unknown_categories_are_named_with_the_nearest() -> None:
    config = SuppressConfig(thresholds={"cot": 0.5, "cat": 0.4, "zebra": 0.3})
    with pytest.raises(InputError) as caught:
        label_thresholds(config, NAMES)
    message = str(caught.value)
    assert "'cot' (did you mean 'cat'" in message
    assert "'zebra' (there are 'cat', 'dog', 'toy')" in message


@pytest.mark.parametrize(("strategy", "across"), [*itertools.product(STRATEGIES, [False]), ("nms", True),
                                                  ("merge", True), ("soft_nms", True)])  # fmt: skip
def test_nothing_to_suppress(strategy: str, across: bool) -> None:
    config = SuppressConfig.model_validate({"strategy": strategy, "across_labels": across})
    assert len(suppress(Detections.empty(), config)) == 0
    flat = detections([[3, 3, 3, 9], [3, 3, 9, 3], [5, 5, 5, 5], [5, 5, 5, 5], [0, 0, 9, 9]], [0.9, 0.8, 0.7, 0.7, 0.1])
    apart = detections([[0, 0, 5, 5], [5, 0, 9, 5], [0, 5, 5, 9]], [0.5, 0.5, 0.0])  # edges touch, half-open
    for found in (flat, apart, flat.take(np.arange(1)), apart.take(np.arange(1))):
        result = suppress(found, config)
        assert result.prompt_ids.tolist() == found.prompt_ids.tolist()
        assert result.scores.tolist() == found.scores.tolist()
        assert result.boxes_xyxy.tolist() == found.boxes_xyxy.tolist()


@pytest.mark.parametrize("strategy", ["nms", "merge", "soft_nms"])
def test_labels_compete_only_when_told_to(strategy: str) -> None:
    found = detections([[1e6, 1e6, 1e6 + 8, 1e6 + 8]] * 4, [0.5] * 4, [2, 0, 1, 0])
    config = SuppressConfig.model_validate({"strategy": strategy})
    result = suppress(found, config, score_floor=0.1)
    assert result.prompt_ids.tolist() == [0, 1, 2]  # 0.5 · exp(-2) = 0.07
    assert result.num_merged.tolist() == ([1, 2, 1] if strategy == "merge" else [1, 1, 1])
    result = suppress(found, config.model_copy(update={"across_labels": True}), score_floor=0.1)
    assert (result.prompt_ids.tolist(), result.labels.tolist()) == ([0], [2])
    assert result.num_merged.tolist() == ([4] if strategy == "merge" else [1])


def test_overlap_equal_to_the_threshold_is_not_above_it() -> None:
    found = detections([[0, 0, 4, 4], [0, 0, 4, 2], [2, 2, 6, 4]], [0.9, 0.8, 0.7])  # IoU 1/2 and 1/5; IoS 1 and 1/2
    for overlap, threshold, kept in (("iou", 0.5, [0, 1, 2]), ("iou", 0.49, [0, 2]), ("iou", 0.2, [0, 2]),
                                     ("ios", 0.5, [0, 2]), ("ios", 0.49, [0]), ("ios", 1.0, [0, 1, 2])):  # fmt: skip
        config = SuppressConfig.model_validate({"overlap": overlap, "threshold": threshold})
        assert suppress(found, config).prompt_ids.tolist() == kept


def test_a_decayed_score_equal_to_the_floor_goes() -> None:
    found = detections([[0, 0, 4, 4], [0, 0, 4, 2], [9, 9, 10, 10]], [0.75, 0.5, 0.25])
    config = SuppressConfig(strategy="soft_nms", decay="linear", threshold=0.1)
    below = float(np.nextafter(0.25, 0))
    assert suppress(found, config, score_floor=below).scores.tolist() == [0.75, 0.25, 0.25]
    # What was never decayed stays, floor or not.
    assert suppress(found, config, score_floor=0.25).prompt_ids.tolist() == [0, 2]


def test_soft_nms_by_hand() -> None:
    found = detections([[0, 0, 4, 4], [0, 0, 4, 2], [0, 1, 4, 3]], [0.9, 0.8, 0.7])
    result = suppress(found, SuppressConfig(strategy="soft_nms", sigma=0.4))
    # Both lose exp(-0.25 / 0.4); then the second, still better, takes exp(-(1/9) / 0.4) from the third.
    second, third = 0.8 * np.exp(-0.625), 0.7 * np.exp(-0.625) * np.exp(-1 / 3.6)
    np.testing.assert_allclose(result.scores, [0.9, second, third], rtol=1e-6)
    np.testing.assert_array_equal(result.raw_scores, np.array([0.9, 0.8, 0.7], np.float32))
    linear = suppress(found, SuppressConfig(strategy="soft_nms", decay="linear", threshold=0.4))
    np.testing.assert_allclose(linear.scores, [0.9, 0.4, 0.35], rtol=1e-6)


def test_soft_nms_reorders() -> None:
    """What overlaps the pick is picked later than what scored less at first."""
    found = detections([[0, 0, 4, 4], [0, 0, 4, 3], [20, 20, 24, 24]], [0.9, 0.8, 0.5])
    result = suppress(found, SuppressConfig(strategy="soft_nms"))
    assert result.prompt_ids.tolist() == [0, 2, 1]
    assert (np.diff(result.scores) <= 0).all()


@pytest.mark.parametrize("sigma", [5e-324, 1e-300, 1e300])
def test_extreme_sigmas(sigma: float) -> None:
    found = detections([[0, 0, 4, 4], [0, 0, 4, 2]], [0.9, 0.8])
    result = suppress(found, SuppressConfig(strategy="soft_nms", sigma=sigma))
    assert result.prompt_ids.tolist() == ([0] if sigma < 1 else [0, 1])


def test_merge_by_hand() -> None:
    corners = [[0, 0, 4, 4], [1, 0, 5, 4], [0, 1, 4, 5]]
    found = detections(corners, [0.75, 0.5, 0.25], num_merged=[2, 1, 4], raw_scores=[1, 2, 3])
    result = suppress(found, SuppressConfig(strategy="merge", threshold=0.5))
    third = 1 / 3
    np.testing.assert_allclose(result.boxes_xyxy, [[third, third / 2, 4 + third, 4 + third / 2]], rtol=1e-6)
    assert (result.scores.tolist(), result.raw_scores.tolist(), result.num_merged.tolist()) == ([0.75], [1], [7])
    # Members that all score 0 have no weights: the pick's own box stays.
    nothing = suppress(replace(found, scores=np.zeros(3, np.float32)), SuppressConfig(strategy="merge", threshold=0.5))
    assert (nothing.boxes_xyxy.tolist(), nothing.num_merged.tolist()) == ([[0, 0, 4, 4]], [7])


@pytest.mark.parametrize("strategy", ["nms", "merge", "soft_nms"])
def test_a_crowd_of_all_candidates_on_one_object(strategy: str) -> None:
    """The most that the defaults let in, all overlapping: 499,500 pairs."""
    rng = np.random.default_rng(5)
    corners = np.array([100, 100, 300, 300]) + rng.uniform(-20, 20, (1000, 4))
    found = detections(corners, -np.sort(-rng.random(1000)))
    result = suppress(found, SuppressConfig.model_validate({"strategy": strategy}), score_floor=0.05)
    assert 1 <= len(result) < 200
    assert result.prompt_ids[0] == 0
    if strategy == "merge":
        assert result.num_merged.sum() == 1000


def test_soft_nms_keeps_a_neighbour_that_nms_drops() -> None:
    """Two true objects side by side with IoU 0.54, and a duplicate of the first with IoU 0.92."""
    first, neighbour, duplicate = [0, 0, 100, 100], [30, 0, 130, 100], [2, 2, 102, 102]
    found = detections([first, neighbour, duplicate], [0.9, 0.8, 0.7])
    usable = 0.2
    assert suppress(found, SuppressConfig(threshold=0.5)).prompt_ids.tolist() == [0]
    for decay in ({"decay": "exponential"}, {"decay": "linear", "threshold": 0.5}):
        config = SuppressConfig.model_validate({"strategy": "soft_nms"} | decay)
        result = suppress(found, config, score_floor=0.01)
        scores = dict(zip(result.prompt_ids.tolist(), result.scores.tolist(), strict=True))
        assert scores[0] > usable
        assert scores[1] > usable
        assert scores.get(2, 0.0) < usable / 2


def test_merging_halves_the_box_error_of_nms() -> None:
    """Twelve boxes around each true one, each corner off by 3 % of the side, whatever the score."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    errors: dict[str, list[float]] = {"nms": [], "merge": []}
    for _ in range(300):
        side = rng.uniform(20, 300)
        start = rng.uniform(0, 1000, 2)
        truth = np.concatenate([start, start + side])
        found = detections(truth + rng.normal(0, 0.03 * side, (12, 4)), -np.sort(-rng.uniform(0.2, 0.9, 12)))
        for strategy, of_strategy in errors.items():
            result = suppress(found, SuppressConfig.model_validate({"strategy": strategy, "threshold": 0.5}))
            assert result.num_merged.tolist() == [12 if strategy == "merge" else 1]
            of_strategy.append(float(np.abs(result.boxes_xyxy[0] - truth).mean() / side))
    assert np.mean(errors["merge"]) < np.mean(errors["nms"]) / 2
