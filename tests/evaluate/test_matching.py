"""Precision, recall, mIoU and Dice against plain loops over pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owlsam_ray.config.evaluate import EvaluateConfig
from owlsam_ray.evaluate.average_precision import Kind
from owlsam_ray.evaluate.run import evaluate_files
from owlsam_ray.evaluate.sizes import size_ranges
from tests.evaluate.random_sets import GROUPS, dense, random_ground_truth, random_results


def overlap(prediction: dict[str, Any], truth: dict[str, Any], kind: str) -> tuple[float, float, float]:
    """Intersection, the prediction's area, the object's area."""
    if kind == "segm":
        a, b = dense(prediction["segmentation"]), dense(truth["segmentation"])
        return float((a & b).sum()), float(a.sum()), float(b.sum())
    (ax, ay, aw, ah), (bx, by, bw, bh) = prediction["bbox"], truth["bbox"]
    wide, high = min(ax + aw, bx + bw) - max(ax, bx), min(ay + ah, by + bh) - max(ay, by)
    return max(wide, 0.0) * max(high, 0.0), aw * ah, bw * bh


def box_side(entry: dict[str, Any]) -> float:
    if "bbox" in entry:
        return float(np.sqrt(entry["bbox"][2] * entry["bbox"][3]))
    rows, columns = np.nonzero(dense(entry["segmentation"]))
    return float(np.sqrt((np.ptp(rows) + 1) * (np.ptp(columns) + 1)))


def match_loop(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str, *, score: float, iou: float
) -> list[tuple[str, int, float, float, float]]:
    """(what, category, side in px, IoU, Dice) of every pair, miss and false prediction."""
    rows: list[tuple[str, int, float, float, float]] = []
    taken: set[int] = set()
    for prediction in sorted(results, key=lambda each: -each["score"]):
        if prediction["score"] < score:
            continue
        best, best_iou, best_dice, ignored = None, 0.0, 0.0, False
        for index, annotation in enumerate(truth["annotations"]):
            if any(annotation[key] != prediction[key] for key in ("image_id", "category_id")):
                continue
            both, mine, theirs = overlap(prediction, annotation, kind)
            if annotation["iscrowd"]:
                ignored |= both / mine >= iou
            elif index not in taken and both / (mine + theirs - both) > best_iou:
                best, best_iou = index, both / (mine + theirs - both)
                best_dice = 2 * both / (mine + theirs)
        if best is not None and best_iou >= iou:
            taken.add(best)
            annotation = truth["annotations"][best]
            rows.append(("pair", annotation["category_id"], box_side(annotation), best_iou, best_dice))
        elif not ignored:
            rows.append(("false", prediction["category_id"], box_side(prediction), 0.0, 0.0))
    for index, annotation in enumerate(truth["annotations"]):
        if index not in taken and not annotation["iscrowd"]:
            rows.append(("miss", annotation["category_id"], box_side(annotation), 0.0, 0.0))
    return rows


def row_loop(
    rows: list[tuple[str, int, float, float, float]], categories: set[int], low: float, high: float
) -> dict[str, Any]:
    chosen = [row for row in rows if row[1] in categories and low <= row[2] < high]
    pairs = [row for row in chosen if row[0] == "pair"]
    false, misses = (sum(row[0] == what for row in chosen) for what in ("false", "miss"))
    return {
        "miou": sum(row[3] for row in pairs) / len(pairs) if pairs else None,
        "dice": sum(row[4] for row in pairs) / len(pairs) if pairs else None,
        "precision": len(pairs) / (len(pairs) + false) if len(pairs) + false else None,
        "recall": len(pairs) / (len(pairs) + misses) if len(pairs) + misses else None,
        "num_objects": len(pairs) + misses,
        "num_matched": len(pairs),
        "num_false": false,
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize(("score", "iou"), [(0.3, 0.5), (0.7, 0.3)])
def test_rows_equal_a_loop(tmp_path: Path, seed: int, kind: Kind, score: float, iou: float) -> None:
    truth = random_ground_truth(seed)
    results = random_results(seed, truth, kind=kind)
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "dt.json").write_text(json.dumps(results))
    settings = EvaluateConfig(score_threshold=score, iou_threshold=iou, size_edges_px=(10, 18))
    evaluation = evaluate_files(str(tmp_path / "gt.json"), str(tmp_path / "dt.json"), kind, settings)
    rows = match_loop(truth, results, kind, score=score, iou=iou)
    assert {row[0] for row in rows} == {"pair", "false", "miss"}
    sides = {"all": (0.0, 1e5), "<10": (0.0, 10.0), "10-18": (10.0, 18.0), ">=18": (18.0, 1e5)}
    for group, sizes in evaluation["groups"].items():
        members = {each for each, name in GROUPS.items() if group in ("all", name)}
        for size, row in sizes.items():
            expected = row_loop(rows, members, *sides[size])
            if kind == "bbox":
                assert row["box_miou"] == pytest.approx(expected["miou"], abs=1e-9)
                assert (row["box_precision"], row["box_recall"]) == (row["precision"], row["recall"])
                expected |= {"miou": None, "dice": None}  # of masks
            assert {key: row[key] for key in expected} == pytest.approx(expected, abs=1e-9), (group, size)
    for category in evaluation["categories"]:
        expected = row_loop(rows, {category["id"]}, 0.0, 1e5)
        assert category["sizes"]["all"]["recall"] == pytest.approx(expected["recall"])
        assert category["sizes"]["all"]["precision"] == pytest.approx(expected["precision"])


def test_size_ranges_are_half_open_and_complete() -> None:
    assert size_ranges([]) == {"all": (0.0, 1e10)}
    assert size_ranges([32]) == {"all": (0.0, 1e10), "<32": (0.0, 1024.0), ">=32": (1024.0, 1e10)}
    assert list(size_ranges([12.5, 32, 96])) == ["all", "<12.5", "12.5-32", "32-96", ">=96"]
