"""Tiles cover every pixel, overlap enough, and their detections stand where the objects are."""

import random
from itertools import pairwise

import numpy as np
import pytest

from owlsam_ray.config.inference import TilingConfig
from owlsam_ray.inference.tile import View, merge_views, tile_views
from owlsam_ray.records import Detections


def detections(boxes: list[tuple[float, float, float, float]], scores: list[float]) -> Detections:
    count = len(scores)
    values = np.array(scores, np.float32)
    return Detections(
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        scores=values,
        raw_scores=values,
        labels=np.zeros(count, np.int64),
        prompt_ids=np.arange(count),
        num_merged=np.ones(count, np.int64),
    )


@pytest.mark.parametrize("size_hw", [(100, 100), (1, 1), (64, 100), (100, 7)])
def test_what_fits_one_tile_is_not_cut(size_hw: tuple[int, int]) -> None:
    whole = [View(0, 0, size_hw[1], size_hw[0])]
    assert tile_views(size_hw, TilingConfig(size=100)) == whole
    assert tile_views(size_hw, TilingConfig(size=100, full_image=False)) == whole
    assert tile_views((4000, 3000), TilingConfig()) == [View(0, 0, 3000, 4000)]


def test_tiles_of_a_known_picture() -> None:
    views = tile_views((60, 160), TilingConfig(size=100, overlap=0.25))
    assert views == [View(0, 0, 160, 60), View(0, 0, 100, 60), View(60, 0, 160, 60)]
    assert views[1].size_hw == (60, 100)


def test_tiles_cover_every_pixel_and_overlap_as_asked() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(300):
        height, width = (int(side) for side in rng.integers(1, 700, 2))
        settings = TilingConfig(
            size=int(rng.integers(32, 300)), overlap=float(rng.uniform(0, 0.9)), full_image=bool(rng.integers(2))
        )
        assert settings.size is not None
        views = tile_views((height, width), settings)
        if max(height, width) <= settings.size:
            continue
        if settings.full_image:
            assert views.pop(0) == View(0, 0, width, height)
        assert len(set(views)) == len(views)
        for low, high, length in ((0, 2, width), (1, 3, height)):
            spans = sorted({(view[low], view[high]) for view in views})
            assert (spans[0][0], spans[-1][1]) == (0, length)
            assert {end - start for start, end in spans} == {min(settings.size, length)}
            # Never less than asked for, up to the rounding to whole pixels.
            for (_, end), (start, _) in pairwise(spans):
                assert end - start >= settings.size * settings.overlap - 1
        covered = np.zeros((height, width), bool)
        for view in views:
            covered[view.y0 : view.y1, view.x0 : view.x1] = True
        assert covered.all()


def test_detections_of_tiles_stand_in_the_original_frame() -> None:
    views = [View(0, 0, 160, 60), View(0, 0, 100, 60), View(60, 0, 160, 60)]
    found = [
        detections([(10, 10, 20, 20)], [0.5]),
        Detections.empty(),
        detections([(0, 5, 10, 15), (30, 0, 40, 9)], [0.9, 0.5]),
    ]
    merged = merge_views(found, views, max_candidates=10)
    # By falling score; of equal scores the earlier view comes first.
    assert merged.boxes_xyxy.tolist() == [[60, 5, 70, 15], [10, 10, 20, 20], [90, 0, 100, 9]]
    assert merged.scores.tolist() == pytest.approx([0.9, 0.5, 0.5])
    assert merged.prompt_ids.tolist() == [0, 0, 1]
    assert merged.boxes_xyxy.dtype == np.float32
    assert len(merge_views(found, views, max_candidates=2)) == 2


def test_one_view_is_left_as_it_is() -> None:
    found = detections([(1, 2, 3, 4)], [0.5])
    assert merge_views([found], [View(0, 0, 10, 10)], max_candidates=5) is found
