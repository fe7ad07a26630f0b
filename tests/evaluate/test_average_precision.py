"""Average precision: the official numbers, and pycocotools on random sets with crowds and ties."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from owlsam_ray.config.evaluate import EvaluateConfig
from owlsam_ray.evaluate.average_precision import Kind, coco_numbers, precision_recall
from owlsam_ray.evaluate.ground_truth import load_ground_truth
from owlsam_ray.evaluate.predictions import load_predictions
from owlsam_ray.evaluate.run import evaluate_files
from tests.evaluate.random_sets import GROUPS, random_ground_truth, random_results

COCO_NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
COCO_NAMES += ["AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100"]


def write(path: Path, tree: Any) -> str:
    path.write_text(json.dumps(tree), encoding="utf-8")
    return str(path)


def official(truth: dict[str, Any], results: list[dict[str, Any]], kind: str, **settings: Any) -> Any:
    """pycocotools' evaluation; `areas` replaces the ranges, `box_areas` what is compared with them."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(json.dumps(truth))
        gt.createIndex()
        dt = gt.loadRes(json.loads(json.dumps(results)))
        if settings.get("box_areas"):
            for annotation in [*gt.dataset["annotations"], *dt.dataset["annotations"]]:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        evaluator = COCOeval(gt, dt, kind)
        if "areas" in settings:
            evaluator.params.areaRng = [[0, 1e10], *settings["areas"]]
            evaluator.params.areaRngLbl = [str(index) for index in range(len(evaluator.params.areaRng))]
        evaluator.evaluate()
        evaluator.accumulate()
        if "areas" not in settings:
            evaluator.summarize()
    return evaluator


def undefined_as_none(values: Any) -> list[float | None]:
    return [None if value == -1 else float(value) for value in values]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_official_coco_numbers(shared: Path, kind: Kind) -> None:
    folder = shared / "data" / "cocoapi_100"
    evaluation = evaluate_files(
        str(folder / "instances_val2014_100.json"),
        str(folder / f"instances_val2014_fake{kind}100_results.json"),
        kind,
        EvaluateConfig(),
    )
    shape, other = ("box", "mask") if kind == "bbox" else ("mask", "box")
    assert list(evaluation[shape]) == COCO_NAMES
    assert evaluation[other] is None
    expected = json.loads((folder / "expected.json").read_text())[kind]
    assert list(evaluation[shape].values()) == pytest.approx(expected, abs=1e-9)
    assert evaluation["groups"]["all"]["all"][f"{shape}_ap"] == pytest.approx(expected[0], abs=1e-9)
    assert evaluation["groups"]["all"]["all"][f"{shape}_ap50"] == pytest.approx(expected[1], abs=1e-9)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_official_lvis_numbers(shared: Path, kind: Kind) -> None:
    folder = shared / "data" / "lvis"
    evaluation = evaluate_files(
        str(folder / "lvis_val_100.json"), str(folder / "synthetic_results_100.json"), kind, EvaluateConfig()
    )
    expected = json.loads((folder / "synthetic_results_100_expected.json").read_text())[kind]
    assert evaluation["style"] == "lvis"
    assert evaluation["box" if kind == "bbox" else "mask"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_twelve_numbers_equal_pycocotools(tmp_path: Path, seed: int, kind: Kind) -> None:
    truth = random_ground_truth(seed)
    results = random_results(seed, truth, kind=kind)
    assert any(annotation["iscrowd"] for annotation in truth["annotations"])
    gt = load_ground_truth(write(tmp_path / "gt.json", truth), masks=kind == "segm")
    dt = load_predictions(write(tmp_path / "dt.json", results), gt, masks=kind == "segm")
    numbers = coco_numbers(precision_recall(gt, dt.regions, kind))
    expected = undefined_as_none(official(truth, results, kind).stats)
    assert list(numbers.values()) == pytest.approx(expected, abs=1e-12)
    one_at_a_time = coco_numbers(precision_recall(gt, dt.regions, kind, categories_at_once=1))
    assert one_at_a_time == pytest.approx(numbers, abs=1e-15)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_images_of_both_sides_alone_are_scored(tmp_path: Path, seed: int, kind: Kind) -> None:
    """The truth lists images that were not labelled, the labels some that it lacks: pycocotools on the common ones."""
    everything = random_ground_truth(seed, images=18)
    results = random_results(seed, everything, kind=kind)
    listed, labelled = set(range(1, 13)), set(range(6, 19))
    truth = everything | {
        "images": [each for each in everything["images"] if each["id"] in listed],
        "annotations": [each for each in everything["annotations"] if each["image_id"] in listed],
    }
    # Other ids on the other side, and folders in the names.
    labels = {
        "images": [
            each | {"id": each["id"] + 100, "file_name": f"set/{each['file_name']}"}
            for each in everything["images"]
            if each["id"] in labelled
        ],
        "categories": everything["categories"],
        "annotations": [
            each | {"id": place, "image_id": each["image_id"] + 100}
            for place, each in enumerate(results)
            if each["image_id"] in labelled
        ],
    }
    found = evaluate_files(
        write(tmp_path / "gt.json", truth), write(tmp_path / "dt.json", labels), kind, EvaluateConfig()
    )
    both = listed & labelled
    part = {key: [each for each in truth[key] if each.get("image_id", each["id"]) in both] for key in
            ("images", "annotations")}  # fmt: skip
    expected = official(truth | part, [each for each in results if each["image_id"] in both], kind)
    numbers = found["box" if kind == "bbox" else "mask"]
    assert list(numbers.values()) == pytest.approx(undefined_as_none(expected.stats), abs=1e-12)
    counts = found["counts"]
    assert (counts["images"], counts["images_not_labelled"]) == (len(both), 5)
    assert counts["images_not_in_the_ground_truth"] == 6
    assert counts["predictions_left_out"] == sum(each["image_id"] > 12 for each in results)


def test_labels_with_boxes_and_masks_count_as_each_of_them_alone(tmp_path: Path) -> None:
    """The area of a prediction is its box's among boxes and its mask's among masks."""
    truth = random_ground_truth(8)
    masks = random_results(8, truth, kind="segm")
    boxes = [entry["bbox"] for entry in random_results(8, truth, kind="bbox")]
    for entry in (labels := [dict(entry) for entry in masks]):
        entry["bbox"] = boxes.pop()
    tree = {key: truth[key] for key in ("images", "categories")} | {"annotations": labels}
    gt = load_ground_truth(write(tmp_path / "gt.json", truth), masks=True)
    dt = load_predictions(write(tmp_path / "dt.json", tree), gt, masks=True)
    areas = {"small": (0.0, 120.0), "medium": (120.0, 400.0), "large": (400.0, 1e10)}
    kinds: tuple[tuple[Kind, str], ...] = (("bbox", "bbox"), ("segm", "segmentation"))
    for kind, key in kinds:
        alone = [{name: entry[name] for name in ("image_id", "category_id", "score", key)} for entry in labels]
        counted = precision_recall(gt, dt.regions, kind, ranges=areas)
        expected = official(truth, alone, kind, areas=[list(area) for area in areas.values()])
        np.testing.assert_allclose(counted.precision, expected.eval["precision"], atol=1e-12)
        np.testing.assert_allclose(counted.recall, expected.eval["recall"], atol=1e-12)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_groups_sizes_and_categories_equal_pycocotools(tmp_path: Path, kind: Kind) -> None:
    truth = random_ground_truth(21, images=30)
    for annotation in truth["annotations"][:4]:
        annotation["bbox"][2:] = [12.0, 12.0]  # exactly at the edge: belongs to the upper size only
    results = random_results(21, truth, kind=kind)
    settings = EvaluateConfig(size_edges_px=(12, 20))
    files = write(tmp_path / "gt.json", truth), write(tmp_path / "dt.json", results)
    evaluation = evaluate_files(*files, kind, settings)
    areas = [[0, np.nextafter(144.0, 0)], [144.0, np.nextafter(400.0, 0)], [400.0, 1e10]]
    reference = official(truth, results, kind, areas=areas, box_areas=True)
    precision, ids = reference.eval["precision"], reference.params.catIds
    shape = "box" if kind == "bbox" else "mask"

    def expected(categories: set[int], size: int, thresholds: slice) -> float | None:
        chosen = [index for index, each in enumerate(ids) if each in categories]
        values = precision[thresholds, :, :, size, -1][:, :, chosen]
        values = values[values > -1]
        return float(values.mean()) if values.size else None

    assert list(evaluation["groups"]) == ["all", "cold", "empty", "warm"]
    checked = 0
    for group, sizes in evaluation["groups"].items():
        members = {each for each, name in GROUPS.items() if group in ("all", name)}
        assert list(sizes) == ["all", "<12", "12-20", ">=20"]
        for index, row in enumerate(sizes.values()):
            for key, thresholds in ((f"{shape}_ap", slice(None)), (f"{shape}_ap50", slice(1))):
                assert row[key] == pytest.approx(expected(members, index, thresholds), abs=1e-12), (group, index)
                checked += row[key] is not None
    assert checked == 3 * 4 * 2  # all but "empty"
    assert [category["id"] for category in evaluation["categories"]] == [1, 2, 4, 7]
    for category in evaluation["categories"]:
        for index, row in enumerate(category["sizes"].values()):
            assert row[f"{shape}_ap"] == pytest.approx(expected({category["id"]}, index, slice(None)), abs=1e-12)


def test_annotation_ids_do_not_matter(tmp_path: Path) -> None:
    """pycocotools takes an object with the id 0 for unmatched, and loses objects whose ids repeat."""
    truth = random_ground_truth(3)
    results = random_results(3, truth, kind="bbox")
    right = official(truth, results, "bbox").stats
    for annotation in truth["annotations"]:
        annotation["id"] = 0
    evaluation = evaluate_files(
        write(tmp_path / "gt.json", truth), write(tmp_path / "dt.json", results), "bbox", EvaluateConfig()
    )
    assert list(evaluation["box"].values()) == pytest.approx(undefined_as_none(right), abs=1e-12)


def test_lvis_caps_each_image_and_leaves_unjudged_categories_out(tmp_path: Path) -> None:
    def box(x: float) -> list[float]:
        return [x, 0.0, 10.0, 10.0]

    image = {"id": 1, "height": 50, "width": 4000, "neg_category_ids": [2], "not_exhaustive_category_ids": [3]}
    truth = {
        "images": [image],
        "categories": [{"id": each, "name": f"c{each}", "frequency": "rcff"[each - 1]} for each in (1, 2, 3, 4)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": box(0), "area": 100},
            {"id": 2, "image_id": 1, "category_id": 3, "bbox": box(0), "area": 100},
        ],
    }

    def found(category_id: int, x: float, score: float) -> dict[str, Any]:
        return {"image_id": 1, "category_id": category_id, "bbox": box(x), "score": score}

    results = [
        found(1, 500, 0.9),  # false
        found(1, 0, 0.8),
        found(3, 500, 0.9),  # not every object is listed: ignored
        found(3, 0, 0.8),
        found(4, 0, 0.9),  # nobody looked for it: left out
        found(2, 0, 0.9),  # known to be absent: false, but without an object there is no AP
    ]
    files = write(tmp_path / "gt.json", truth), tmp_path / "dt.json"
    evaluation = evaluate_files(files[0], write(files[1], results), "bbox", EvaluateConfig())
    assert (evaluation["box"]["APr"], evaluation["box"]["APc"], evaluation["box"]["APf"]) == (0.5, None, 1.0)
    row = evaluation["groups"]["all"]["all"]
    assert (row["num_matched"], row["num_false"], row["recall"]) == (2, 2, 1.0)
    crowded = [found(2, 10 * index, 0.95) for index in range(298)] + results
    evaluation = evaluate_files(files[0], write(files[1], crowded), "bbox", EvaluateConfig())
    # 300 places: 298 + the first two with 0.9; both objects' finders are cut.
    assert (evaluation["box"]["APr"], evaluation["box"]["APf"]) == (0.0, 0.0)
