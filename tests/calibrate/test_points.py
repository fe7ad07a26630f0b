"""Pools, resamples against a loop, reliability against a loop, and rows without NaN."""

import io
import json
import logging
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from owlsam_ray.calibrate import bootstrap
from owlsam_ray.calibrate.bootstrap import spreads
from owlsam_ray.calibrate.curves import NOTHING, Target, blended, choose, counts_of, cuts_of
from owlsam_ray.calibrate.plots import draw_operating_points
from owlsam_ray.calibrate.points import Fitting, operating_points
from owlsam_ray.calibrate.pooling import ALL, GRID, Basis, bases
from owlsam_ray.calibrate.reliability import BINS, reliability
from owlsam_ray.calibrate.samples import Sample, pooled
from owlsam_ray.calibrate.table import operating_points_table
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import ConfigError
from tests.calibrate.test_curves import FLOOR, random_sample, sample_of

EMPTY = Sample.of(np.empty(0, np.float32), np.empty(0, np.bool_), np.empty(0, np.int32), np.empty(0, np.int32))
IMAGES = 20


def threshold_of(basis: Basis, target: Target) -> float:
    cut, _ = choose(basis.counts, target)
    return basis.cuts.threshold(int(cut))


def test_enough_examples_stand_alone_and_none_get_the_pools_threshold() -> None:
    many, rich, other = (random_sample(seed, detections=300) for seed in (1, 2, 3))
    target = Target("precision", 0.7)
    found, everything = bases([many, EMPTY, rich, other], [[]] * 4, FLOOR, enough=50, target="precision")
    assert [basis.pool is None for basis in found] == [True, False, True, True]
    together = pooled([many, rich, other])
    assert everything.sample.score.tolist() == together.score.tolist()
    alone, few = cuts_of(many.score, FLOOR), cuts_of(together.score, FLOOR, GRID)
    assert threshold_of(found[0], target) == alone.threshold(int(choose(counts_of(many, alone), target)[0]))
    assert threshold_of(found[1], target) == few.threshold(int(choose(counts_of(together, few), target)[0]))


@pytest.mark.parametrize(("own", "rest"), [(1, "pool"), (49, "own")])
def test_the_pool_fades_with_every_example(own: int, rest: str) -> None:
    """The category's own detections are right above 0.9 only, the others' above 0.2."""

    def sample(count: int, least: float) -> Sample:
        score = np.linspace(0.1, 0.99, 2 * count, dtype=np.float32)
        numbers = np.arange(2 * count, dtype=np.int32) % IMAGES
        return Sample.of(score, score > least, numbers, numbers[:count])

    found, _ = bases([sample(own, 0.9), sample(2000, 0.2)], [[], []], FLOOR, enough=50, target="f1")
    threshold = threshold_of(found[0], Target())
    assert found[0].weight == pytest.approx((50 - own) / 2000)
    assert threshold == pytest.approx(0.2 if rest == "pool" else 0.9, abs=0.06)


def test_the_narrowest_pool_that_is_large_enough() -> None:
    samples = [sample_of("xx", 2), *(random_sample(seed, detections=80) for seed in range(4))]
    groups = [["frequency r", "supercategory a"], ["frequency r"], ["supercategory a"], ["supercategory a"], []]
    for enough, name in ((10, "frequency r"), (90, "supercategory a"), (150, ALL), (10**6, ALL)):
        found, _ = bases(samples, groups, FLOOR, enough, target="f1")
        assert found[0].pool is not None
        assert found[0].pool.name == name
        assert 0 < found[0].weight <= 1


def test_a_blend_is_what_repeating_the_others_gives() -> None:
    """With the weight 2 each of the others is there twice, and both together tell as much as one."""
    own, other = random_sample(4), random_sample(5)
    pool = pooled([own, other])
    cuts = cuts_of(pool.score, FLOOR)
    counts = blended(counts_of(own, cuts), counts_of(pool, cuts), 2.0)
    repeated = counts_of(pooled([own, other, other]), cuts)
    for name in ("right", "found", "objects"):
        assert np.array_equal(getattr(counts, name), getattr(repeated, name))
    alone, others = counts_of(own, cuts).found, counts_of(other, cuts).found
    assert np.allclose(counts.evidence, (alone + 2 * others) ** 2 / (alone + 4 * others))


@pytest.mark.parametrize("target", [Target("precision", 0.6), Target("recall", 0.5), Target()], ids=str)
def test_resamples_equal_a_loop(target: Target) -> None:
    seed, resamples = 3, 40
    samples = [random_sample(7), random_sample(8), sample_of("x.xx", 3)]
    found, _ = bases(samples, [[]] * 3, FLOOR, enough=20, target=target.name)
    chosen = [(basis, int(choose(basis.counts, target)[0])) for basis in found]
    spread = spreads(chosen, target, num_images=IMAGES, resamples=resamples, seed=seed)
    assert spread == spreads(chosen, target, num_images=IMAGES, resamples=resamples, seed=seed)
    drawn = np.random.default_rng(seed).integers(IMAGES, size=(resamples, IMAGES))

    def again(sample: Sample, images: np.ndarray) -> Sample:
        rows = np.concatenate([np.flatnonzero(sample.image == each) for each in images])
        objects = np.concatenate([sample.object_image[sample.object_image == each] for each in images])
        return Sample.of(sample.score[rows], sample.right[rows], sample.image[rows], objects)

    for (basis, cut), got in zip(chosen, spread, strict=True):
        thresholds, precisions, recalls = [], [], []
        for images in drawn:
            counts = counts_of(again(basis.sample, images), basis.cuts)
            if basis.pool is not None:
                counts = blended(counts, counts_of(again(basis.pool.sample, images), basis.cuts), basis.weight)
            thresholds.append(basis.cuts.threshold(int(choose(counts, target)[0])))
            if counts.found[cut] > 0:
                precisions.append(counts.precision[cut])
            if counts.objects[0] > 0:
                recalls.append(counts.recall[cut])
        assert got.precision == pytest.approx(tuple(np.quantile(precisions, (0.025, 0.975))))
        assert got.recall == pytest.approx(tuple(np.quantile(recalls, (0.025, 0.975))))
        assert min(thresholds) <= got.threshold[0] <= got.threshold[1] <= max(thresholds)
        assert np.mean(np.array(thresholds) < got.threshold[0]) <= 0.05


def test_resamples_in_parts_and_with_many_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = random_sample(9, detections=3000)
    cuts = cuts_of(sample.score, FLOOR)
    counts = counts_of(sample, cuts)
    target = Target("precision", 0.8)
    cut = int(choose(counts, target)[0])
    chosen = [(Basis(0, sample, cuts, counts), cut)]
    (whole,) = spreads(chosen, target, num_images=IMAGES, resamples=200, seed=1)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 7 * IMAGES)
    assert spreads(chosen, target, num_images=IMAGES, resamples=200, seed=1) != []
    assert whole.precision is not None
    assert whole.precision[0] < float(counts.precision[cut]) < whole.precision[1]
    assert whole.threshold[0] <= cuts.threshold(cut) <= whole.threshold[1]
    (nothing,) = spreads([(chosen[0][0], NOTHING)], target, num_images=IMAGES, resamples=20, seed=1)
    assert (nothing.precision, nothing.recall) == (None, (0.0, 0.0))


@pytest.mark.parametrize("seed", range(5))
def test_reliability_equals_a_loop(seed: int) -> None:
    sample = random_sample(seed, digits=1 + seed)
    curve = reliability(sample)
    gap = 0.0
    rows = []
    for number in range(BINS):
        inside = [
            place for place, score in enumerate(sample.score.astype(np.float64))
            if number / BINS < score <= (number + 1) / BINS or (number == 0 and score == 0)
        ]  # fmt: skip
        if inside:
            mean, right = float(np.mean(sample.score[inside].astype(np.float64))), float(np.mean(sample.right[inside]))
            rows.append((number / BINS, len(inside), pytest.approx(mean), pytest.approx(right)))
            gap += abs(mean - right) * len(inside) / len(sample.score)
    assert [(each["low"], each["count"], each["mean_score"], each["precision"]) for each in curve["bins"]] == rows
    assert curve["ece"] == pytest.approx(gap)
    assert all(each["precision_interval"][0] <= each["precision"] <= each["precision_interval"][1]
               for each in curve["bins"])  # fmt: skip
    assert reliability(EMPTY) == {"ece": None, "bins": []}


@pytest.mark.parametrize("target", [Target("precision", 0.8), Target("recall", 0.5), Target()], ids=str)
def test_rows(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    """No objects, no detections, neither, nothing right: numbers or None, never NaN."""
    caplog.set_level(logging.INFO)
    nothing_right = sample_of("." * 200, 80)
    only_objects = Sample.of(EMPTY.score, EMPTY.right, EMPTY.image, np.zeros(60, np.int32))
    no_objects = sample_of("." * 60, 0)
    samples = [random_sample(1, detections=400, share=0.9), EMPTY, only_objects, no_objects, nothing_right]
    categories = [Category(id=10 + place, name=f"$ thing {place}") for place in range(5)]

    def fit(seed: int) -> dict[str, object]:
        fitting = Fitting(seed=seed, resamples=100)
        return operating_points(samples, categories, [[]] * 5, target, fitting, num_images=200, floor=FLOOR)

    result = fit(0)
    assert fit(0) == result
    assert fit(1) != result
    json.dumps(result, allow_nan=False)
    rows = result["categories"]
    assert isinstance(rows, list)
    assert [row["category_id"] for row in rows] == [10, 11, 12, 13, 14]
    alone = {"precision": [3], "recall": [2], "f1": []}[target.name]  # with as many detections, or objects
    assert [row["pool"] is None for row in rows] == [place in (0, *alone, 4) for place in range(5)]
    assert all(FLOOR <= row["threshold"] <= 1 for row in rows)
    assert (rows[0]["reached"], rows[4]["reached"]) == (True, False)
    assert f"{sum(not row['reached'] for row in rows)} of 5 categories cannot be shown" in caplog.text
    assert f"{3 - len(alone)} of 5 categories have fewer than 50 examples" in caplog.text
    if target.name != "recall":
        assert (rows[4]["num_kept"], rows[4]["precision"], rows[4]["recall"]) == (0, None, 0.0)
        assert rows[4]["threshold"] == 1.0
    leaning = [row["reached"] and not row["reached_alone"] for row in rows]
    assert leaning[1] == rows[1]["reached"]
    assert not leaning[0]
    assert not any(leaning[place] for place in alone)
    overall = result["overall"]
    assert isinstance(overall, dict)
    assert overall["num_reached"] == sum(row["reached"] for row in rows)
    assert overall["num_reached_only_with_pool"] == sum(leaning)
    told = f"{sum(leaning)} of the {overall['num_reached']} categories that reach it do so only with"
    assert (told in caplog.text) == any(leaning)
    for row in rows:
        low, high = row["threshold_interval"]
        assert FLOOR <= low <= high
        for name in ("precision", "recall"):
            if row[name] is not None:
                assert row[f"{name}_interval"][0] <= row[name] <= row[f"{name}_interval"][1]
    aim = {"name": target.name, "shape": "box", "iou_threshold": 0.5} | (
        {} if target.value is None else {"value": target.value}
    )
    assert draw_operating_points(result | {"target": aim}).startswith(b"\x89PNG")


@pytest.mark.parametrize("detections", [5, 30, 49, 80])
@pytest.mark.parametrize("objects", [0, 3])
def test_no_precision_is_reached_against_a_categorys_own_detections(detections: int, objects: int) -> None:
    """Nothing of one category is right; what it could borrow from reaches the target easily."""
    target = Target("precision", 0.7)
    score = np.linspace(0.95, 0.06, detections, dtype=np.float32)
    numbers = np.arange(detections, dtype=np.int32)
    wrong = Sample.of(score, np.zeros(detections, np.bool_), numbers, np.arange(objects, dtype=np.int32))
    samples = [wrong, *(random_sample(seed, detections=400, share=0.9) for seed in (1, 2))]
    categories = [Category(id=place, name=f"thing {place}") for place in range(3)]
    result = operating_points(
        samples, categories, [[]] * 3, target, Fitting(resamples=20), num_images=100, floor=FLOOR
    )  # fmt: skip
    row, *others = result["categories"]
    assert all(each["reached_alone"] for each in others)
    if detections in (5, 80):  # of the borrowed much is right, but these are too many; or nothing is borrowed
        assert row["pool"] is None
        assert (row["threshold"], row["precision"]) == (1.0, None)
    assert (row["reached"], row["reached_alone"], row["num_kept"]) == (False, False, 0)
    assert result["overall"]["num_reached"] == 2


def test_a_recall_is_not_reached_against_a_categorys_own_objects() -> None:
    """Ten objects, and no detection or a few right ones, in a pool that finds all."""
    rich = sample_of("x" * 200, 200)
    nothing = Sample.of(EMPTY.score, EMPTY.right, EMPTY.image, np.arange(10, dtype=np.int32))
    for own, kept in ((nothing, 0), (sample_of("xx", 10), 2)):
        result = operating_points(
            [own, rich], [Category(id=1, name="a"), Category(id=2, name="b")], [[]] * 2, Target("recall", 0.8),
            Fitting(resamples=20), num_images=200, floor=FLOOR,
        )  # fmt: skip
        row = result["categories"][0]
        assert (row["reached"], row["pool"], row["num_kept"], row["threshold"]) == (False, None, kept, FLOOR)
        assert row["recall"] == kept / 10


def test_what_rests_on_a_pool_is_told() -> None:
    """A few right ones do not contradict what is borrowed, and show nothing alone; enough right ones do."""
    rich = sample_of("x" * 300 + "." * 100, 310)
    for right, alone in ((4, False), (30, True)):
        result = operating_points(
            [sample_of("x" * right, right), rich], [Category(id=1, name="a"), Category(id=2, name="b")], [[]] * 2,
            Target("precision", 0.7), Fitting(resamples=20), num_images=400, floor=FLOOR,
        )  # fmt: skip
        row = result["categories"][0]
        assert row["pool"] is not None
        assert (row["reached"], row["reached_alone"]) == (True, alone)
        assert result["overall"]["num_reached_only_with_pool"] == (not alone)


def fitted(own: Sample, rich: Sample, target: Target) -> dict[str, Any]:
    """The row of one category beside another one that has a lot."""
    categories = [Category(id=1, name="a"), Category(id=2, name="b")]
    result = operating_points(
        [own, rich], categories, [[]] * 2, target, Fitting(resamples=20), num_images=400, floor=FLOOR
    )
    row: dict[str, Any] = result["categories"][0]
    assert result["overall"]["num_reached"] == 1 + row["reached"]
    return row


@pytest.mark.parametrize("target", [Target("precision", 0.7), Target("recall", 0.7), Target()], ids=str)
def test_what_keeps_nothing_of_its_own_reaches_nothing(target: Target) -> None:
    """A category without examples gets the threshold of others, and none of their numbers."""
    rich = sample_of("x" * 300 + "." * 60, 310)
    row = fitted(EMPTY, rich, target)
    assert row["pool"] is not None
    assert (row["num_kept"], row["num_right"]) == (0, 0)
    assert (row["reached"], row["reached_alone"], row["too_few_examples"]) == (False, False, True)
    for name in ("precision", "precision_interval", "recall", "recall_interval"):
        assert row[name] is None
    low = Sample.of(
        np.full(3, 0.051, np.float32), np.ones(3, np.bool_), np.arange(3, dtype=np.int32), EMPTY.object_image
    )
    row = fitted(low, rich, target)
    if row["num_kept"] == 0:
        assert (row["reached"], row["precision"]) == (False, None)


@pytest.mark.parametrize(
    ("flags", "objects", "target", "too_few"),
    [
        ("x" * 19, 19, Target("precision", 0.9), True),
        ("x" * 19, 19, Target("recall", 0.9), True),
        ("x" * 6, 6, Target("precision", 0.6), True),
        ("x" * 45 + "." * 15, 60, Target("precision", 0.95), True),
        ("x." * 30, 30, Target("precision", 0.7), False),
        ("." * 30, 30, Target("precision", 0.9), False),
        ("x" * 3, 30, Target("recall", 0.9), False),
    ],
)
def test_too_few_examples_are_told_from_a_target_that_is_missed(
    flags: str, objects: int, target: Target, too_few: bool, caplog: pytest.LogCaptureFixture
) -> None:
    poor = sample_of("." * 24, 24)
    categories = [Category(id=1, name="few"), Category(id=2, name="poor")]
    result = operating_points(
        [sample_of(flags, objects), poor], categories, [[]] * 2, target, Fitting(min_examples=1, resamples=20),
        num_images=100, floor=FLOOR,
    )  # fmt: skip
    row = result["categories"][0]
    assert (row["reached"], row["too_few_examples"]) == (False, too_few)
    assert ("have too few examples to show it, but no evidence against it" in caplog.text) == too_few
    named = {"name": target.name, "value": target.value, "shape": "box", "iou_threshold": 0.5}
    counts = {"images_used": 1, "objects": 1, "detections": 1, "images_not_in_the_run": 0, "images_not_labelled": 0}
    table = operating_points_table(
        result | {"target": named, "counts": counts | {"images_failed": 0}, "score_floor": FLOOR}
    )
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table)
    assert ("not reached: too few examples to show it" in console.export_text()) == too_few


def test_fitting_that_cannot_be() -> None:
    for values in ({"min_examples": 0}, {"resamples": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match="too small"):
            Fitting(**values)
