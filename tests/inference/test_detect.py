"""Scores → detections, against plain loops."""

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from owlsam_ray.config.inference import DetectorConfig
from owlsam_ray.errors import ImageError
from owlsam_ray.inference.detect import cap_detections, select_detections
from owlsam_ray.ops.boxes import clip_boxes, has_area

LABELS = np.array([0, 0, 1, 2], np.int64)
SIZE = (40, 60)


def settings(**fields: object) -> DetectorConfig:
    return DetectorConfig.model_validate({"weights": "unused", "score_floor": 0.3} | fields)


def drawn(seed: int, count: int = 40, queries: int = len(LABELS)) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes partly outside of the picture, and scores on a coarse grid, so that many are equal."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-20, 70, (count, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    scores = (rng.integers(0, 11, (count, queries)) / 10).astype(np.float32)
    return boxes, scores


def select_loop(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], labels: NDArray[np.int64], config: DetectorConfig
) -> list[tuple[Any, ...]]:
    """(-score, box, query, label, x0, y0, x1, y1) of everything above the floor, one by one."""
    height, width = SIZE
    found = []
    for box, row in enumerate(scores.tolist()):
        x0, y0, x1, y1 = boxes[box].tolist()
        if config.clip_boxes:
            x0, x1 = (min(max(x, 0.0), width) for x in (x0, x1))
            y0, y1 = (min(max(y, 0.0), height) for y in (y0, y1))
            if x1 <= x0 or y1 <= y0:
                continue
        # `max` and `index` take the first of equal values.
        queries = [max((q for q in range(len(row)) if labels[q] == label), key=row.__getitem__) for label in {*labels}]
        if config.labels == "best":
            queries = [row.index(max(row))]
        found += [
            (-row[q], box, q, int(labels[q]), x0, y0, x1, y1)
            for q in queries
            if row[q] > np.float32(config.score_floor)
        ]
    return sorted(found)[: config.max_candidates]


@pytest.mark.parametrize("labels", ["multi", "best"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("limit", [1000, 7])
@pytest.mark.parametrize(
    "query_labels",
    [
        [0, 0, 1, 2],
        [0, 1, 2, 3],  # one query each
        [1, 3, 3, 3, 3, 4, 4, 7],  # labels without a query, and several with many
        [5] * 6,
        [2],
    ],
)
def test_selection_equals_a_loop(labels: str, clip: bool, limit: int, query_labels: list[int]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    of_queries = np.array(query_labels, np.int64)
    for offset in range(20):
        boxes, scores = drawn(seed + offset, queries=len(of_queries))
        config = settings(labels=labels, clip_boxes=clip, max_candidates=limit)
        found = select_detections(boxes, scores, size_hw=SIZE, query_labels=of_queries, settings=config)
        expected = select_loop(boxes, scores, of_queries, config)
        assert found.scores.tolist() == [-row[0] for row in expected]
        assert found.prompt_ids.tolist() == [row[2] for row in expected]
        assert found.labels.tolist() == [row[3] for row in expected]
        assert found.boxes_xyxy.tolist() == [list(row[4:]) for row in expected]
        assert found.raw_scores.tolist() == found.scores.tolist()
        assert set(found.num_merged.tolist()) <= {1}
        assert found.prompt_ids.dtype == found.labels.dtype == np.int64


def test_several_queries_one_label() -> None:
    """Both queries of label 0 are above the floor on one box: it is one detection, at the better one."""
    boxes = np.array([[0, 0, 5, 5], [1, 1, 9, 9]], np.float32)
    scores = np.array([[0.4, 0.9, 0.8, 0.1], [0.6, 0.6, 0.1, 0.7]], np.float32)
    found = select_detections(boxes, scores, size_hw=SIZE, query_labels=LABELS, settings=settings())
    assert list(zip(found.labels.tolist(), found.prompt_ids.tolist(), strict=True)) == [(0, 1), (1, 2), (2, 3), (0, 0)]
    assert found.scores.tolist() == scores[[0, 0, 1, 1], [1, 2, 3, 0]].tolist()
    best = select_detections(boxes, scores, size_hw=SIZE, query_labels=LABELS, settings=settings(labels="best"))
    assert best.prompt_ids.tolist() == [1, 3]


def test_the_floor_itself_is_not_above_it() -> None:
    boxes = np.array([[0, 0, 5, 5]] * 2, np.float32)
    scores = np.array([[0.5, 0, 0, 0], [np.nextafter(np.float32(0.5), np.float32(1)), 0, 0, 0]], np.float32)
    found = select_detections(boxes, scores, size_hw=SIZE, query_labels=LABELS, settings=settings(score_floor=0.5))
    assert len(found) == 1


@pytest.mark.parametrize("where", ["boxes", "scores"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_fail_the_image(where: str, value: float) -> None:
    boxes, scores = drawn(0)
    (boxes if where == "boxes" else scores)[3, 1] = value
    with pytest.raises(ImageError, match="non_finite: the detector"):
        select_detections(boxes, scores, size_hw=SIZE, query_labels=LABELS, settings=settings())


def test_no_box_no_detection() -> None:
    none = np.zeros((0, 4), np.float32)
    for labels in ("multi", "best"):
        config = settings(labels=labels)
        found = select_detections(none, none, size_hw=SIZE, query_labels=LABELS, settings=config)
        assert len(found) == 0


def test_cap_keeps_the_best() -> None:
    found = select_detections(*drawn(1), size_hw=SIZE, query_labels=LABELS, settings=settings())
    assert len(found) > 5
    assert cap_detections(found, 5).scores.tolist() == found.scores[:5].tolist()
    assert len(cap_detections(found, 10_000)) == len(found)


def test_clipping() -> None:
    boxes = np.array([[-5, -5, 100, 100], [70, 10, 80, 20], [1, 2, 3, 4], [5, 5, 5, 9]], np.float32)
    clipped = clip_boxes(boxes, SIZE)
    assert clipped.tolist() == [[0, 0, 60, 40], [60, 10, 60, 20], [1, 2, 3, 4], [5, 5, 5, 9]]
    assert clipped.dtype == np.float32
    assert has_area(clipped).tolist() == [True, False, True, False]
