"""The comparison of strategies: its average precision is the evaluator's, for pictures and for resamples of them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owlsam_ray.coco_files.regions import Region
from owlsam_ray.evaluate.average_precision import Kind, precision_recall
from owlsam_ray.evaluate.ground_truth import GroundTruth, load_ground_truth
from owlsam_ray.evaluate.matching import match
from owlsam_ray.evaluate.predictions import load_predictions
from tests.bench.bootstrap import (
    IOU_THRESHOLDS,
    Ints,
    average_precision,
    match_categories,
    mean_matched_iou,
    resamples,
)
from tests.bench.strategies import BASELINE, METRICS, VARIANTS, compare, main, table
from tests.evaluate.random_sets import random_ground_truth, random_results

FEW = tuple(
    variant
    for variant in VARIANTS
    if variant.name in {BASELINE, "nms 0.3", "merge 0.6", "nms 0.6, best of three masks"}
)


def random_set(directory: Path, seed: int, kind: Kind) -> tuple[GroundTruth, list[Region]]:
    """Without crowd regions; many scores are equal."""
    truth = random_ground_truth(seed, crowds=False)
    results = random_results(seed, truth, kind=kind)
    for name, tree in (("gt", truth), ("dt", results)):
        (directory / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
    gt = load_ground_truth(str(directory / "gt.json"), masks=True)
    return gt, load_predictions(str(directory / "dt.json"), gt, masks=True).regions


def repeated(truth: GroundTruth, regions: list[Region], weights: Ints) -> tuple[GroundTruth, list[Region]]:
    """The resample as pictures of its own: copies get new ids, side by side."""
    ids = dict(zip(sorted(truth.images), weights.tolist(), strict=True))

    def copies(side: list[Region]) -> list[Region]:
        return [
            replace(each, image_id=100 * each.image_id + copy) for each in side for copy in range(ids[each.image_id])
        ]

    images = {100 * each + copy: truth.images[each] for each, times in ids.items() for copy in range(times)}
    return replace(truth, images=images, objects=copies(truth.objects)), copies(regions)


def without_ties_in_a_picture(regions: list[Region]) -> list[Region]:
    """Equal scores stay between pictures. Within one, copies side by side would order them in another way."""
    earlier: Counter[tuple[int, int]] = Counter()
    result = []
    for each in regions:
        result.append(replace(each, score=each.score - 0.001 * earlier[each.image_id, each.category_id]))
        earlier[each.image_id, each.category_id] += 1
    return result


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_equals_the_evaluator_on_pictures_and_on_resamples(
    tmp_path: Path, seed: int, kind: Kind
) -> None:
    truth, tied = random_set(tmp_path, seed, kind)
    weights = resamples(len(truth.images), 12, seed=seed)
    counted = precision_recall(truth, tied, kind)
    by_threshold = [counted.ap(iou=threshold) for threshold in IOU_THRESHOLDS]
    assert average_precision(match_categories(truth, tied, kind), weights)[:, 0] == pytest.approx(
        by_threshold, abs=1e-9
    )
    regions = without_ties_in_a_picture(tied)
    own = average_precision(match_categories(truth, regions, kind), weights)
    assert own.shape == (10, 13)
    assert np.ptp(own, axis=1).max() > 0.02
    for index in range(13):
        expected = precision_recall(*repeated(truth, regions, weights[:, index]), kind)
        by_threshold = [expected.ap(iou=threshold) for threshold in IOU_THRESHOLDS]
        assert own[:, index] == pytest.approx(by_threshold, abs=1e-9)
        assert own[:, index].mean() == pytest.approx(expected.ap(), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_matched_iou_equals_the_evaluation_on_pictures_and_on_resamples(tmp_path: Path, seed: int) -> None:
    truth, regions = random_set(tmp_path, seed, "segm")
    weights = resamples(len(truth.images), 5, seed=seed)
    own = mean_matched_iou(truth, regions, weights)
    for index in range(6):
        some, found = repeated(truth, regions, weights[:, index])
        matches = match(some, found, "mask", score_threshold=0.5, iou_threshold=0.5)
        assert own[index] == pytest.approx(matches.tally(None, (0, 1e10)).miou, abs=1e-12)


def test_nothing_found_scores_nothing(tmp_path: Path) -> None:
    truth, regions = random_set(tmp_path, 0, "segm")
    weights = resamples(len(truth.images), 3, seed=0)
    assert not average_precision(match_categories(truth, [], "bbox"), weights).any()
    assert np.isnan(mean_matched_iou(truth, [], weights)).all()
    only_wrong = [replace(each, box_xywh=(0.0, 0.0, 1.0, 1.0)) for each in regions]
    assert not average_precision(match_categories(truth, only_wrong, "bbox"), weights).any()


def test_crowd_regions_are_refused(tmp_path: Path) -> None:
    truth, regions = random_set(tmp_path, 0, "bbox")
    crowd = replace(truth, objects=[replace(each, is_crowd=True) for each in truth.objects])
    with pytest.raises(ValueError, match="crowd regions"):
        match_categories(crowd, regions, "bbox")


def test_resamples_begin_with_the_pictures_and_draw_as_many() -> None:
    drawn = resamples(30, 200, seed=4)
    assert (drawn[:, 0] == 1).all()
    assert (drawn.sum(axis=0) == 30).all()
    assert drawn[:, 1:].mean(axis=1) == pytest.approx(1, abs=0.4)  # each picture as often as the others
    assert (resamples(30, 200, seed=4) == drawn).all()
    assert (resamples(30, 200, seed=5) != drawn).any()


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return compare(4, seed=3, count=30, variants=FEW)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(compared: dict[str, Any]) -> None:
    again = compare(4, seed=3, count=30, variants=FEW)
    assert again | {"seconds": {}} == compared | {"seconds": {}}
    other = compare(4, seed=8, count=30, variants=FEW)
    assert other["variants"] != compared["variants"]


@pytest.mark.slow
def test_the_baseline_differs_from_itself_by_nothing(compared: dict[str, Any]) -> None:
    rows = compared["variants"]
    assert list(rows) == [variant.name for variant in FEW]
    for metric in METRICS:
        assert [rows[BASELINE][metric][key] for key in ("difference", "low", "high")] == [0, 0, 0]
    # Other masks, the same boxes; other boxes, other numbers.
    masks = rows["nms 0.6, best of three masks"]
    for metric in ("box AP", "box AP50", "box AP75"):
        assert masks[metric] == rows[BASELINE][metric]
    assert masks["mask AP"]["value"] != rows[BASELINE]["mask AP"]["value"]
    assert rows["merge 0.6"]["box AP"]["value"] != rows[BASELINE]["box AP"]["value"]
    for row in rows.values():
        for metric in METRICS:
            assert row[metric]["low"] <= row[metric]["high"]
            assert 0 < row[metric]["value"] <= 100


def test_suppression_that_is_stricter_leaves_fewer(compared: dict[str, Any]) -> None:
    rows = compared["variants"]
    assert rows["nms 0.3"]["predictions"] < rows[BASELINE]["predictions"]
    assert rows["merge 0.6"]["predictions"] == rows[BASELINE]["predictions"]
    assert rows["nms 0.3"]["box AP50"]["value"] < rows[BASELINE]["box AP50"]["value"]


def test_the_table_has_a_row_for_each_variant(compared: dict[str, Any]) -> None:
    rows = [line for line in table(compared).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(FEW)
    assert {row.count("|") for row in rows} == {2 + len(METRICS)}
    baseline = next(row for row in rows if BASELINE + "**" in row)
    assert "[" not in baseline
    assert rows[-1].count("[=]") == 3


def test_all_variants_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    main(["--images", "2", "--resamples", "5", "--out", str(out)])
    written = json.loads(out.read_text())
    assert list(written["variants"]) == [variant.name for variant in VARIANTS]
    assert len(VARIANTS) == len({variant.name for variant in VARIANTS}) == 16
    printed = capsys.readouterr()
    assert printed.out.strip() == table(written)
    assert "2/2 pictures" in printed.err


def test_without_companions_hardly_anything_is_close(compared: dict[str, Any]) -> None:
    apart = compare(4, seed=3, count=2, companions=0.0, variants=FEW[:2])
    assert apart["pictures"]["share_with_close_neighbour_of_same_label"] < 0.05
    assert compared["pictures"]["share_with_close_neighbour_of_same_label"] > 0.25


def test_no_picture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--images", "0"])
    assert "at least one picture" in capsys.readouterr().err
