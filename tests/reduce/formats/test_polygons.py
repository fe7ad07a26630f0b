"""Outlines of masks: what pycocotools and a plain even-odd test draw from them is the mask."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.ops.masks import decode_rle, encode_rle
from owlsam_ray.reduce.formats.coco import CocoOutput
from owlsam_ray.reduce.formats.polygons import polygon_json, trace
from tests.reduce.made_runs import random_run, reduce_shards

Mask = NDArray[np.bool_]


def annotations(masks: list[Mask | None]) -> pa.Table:
    counts = [None if mask is None else encode_rle(mask) for mask in masks]
    sizes = [(1, 1) if mask is None else mask.shape for mask in masks]
    return pa.table(
        {
            "rle_counts": pa.array(counts, pa.binary()),
            "height": pa.array([size[0] for size in sizes], pa.int32()),
            "width": pa.array([size[1] for size in sizes], pa.int32()),
        }
    )


def polygons_of(mask: Mask, *, join_parts: bool = False) -> list[list[int]]:
    found = trace(annotations([mask]), join_parts=join_parts)
    assert found.pixels_off == 0
    text = polygon_json(found).to_pylist()[0]
    return [] if text is None else json.loads(text)


def drawn(polygons: list[list[int]], mask: Mask) -> Mask:
    """As pycocotools draws them."""
    height, width = mask.shape
    merged = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return decode_rle(merged["counts"], (height, width))


def odd_centres(polygons: list[list[int]], mask: Mask) -> Mask:
    """Pixels whose centre a ray to the right leaves through an odd number of sides of one of the polygons."""
    inside = np.zeros(mask.shape, np.bool_)
    y, x = (each + 0.5 for each in np.indices(mask.shape))
    for polygon in polygons:
        odd = np.zeros(mask.shape, np.bool_)
        points = np.array(polygon, float).reshape(-1, 2)
        for (x0, y0), (x1, y1) in pairwise([*points, points[0]]):
            if y0 != y1:
                crosses = ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
                odd ^= crosses
        inside |= odd
    return inside


def from_text(*rows: str) -> Mask:
    return np.array([[letter == "#" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("mask", "parts"),
    [
        (from_text("#"), 1),
        (from_text("...", ".#.", "..."), 1),
        (from_text("##", "##"), 1),
        (from_text("#.", ".#"), 1),  # touching at a corner
        (from_text("#..", "...", "..#"), 2),
        (from_text("###", "#.#", "###"), 1),  # a hole
        (from_text("#####", "#...#", "#.#.#", "#...#", "#####"), 2),  # an island in it
        (from_text("##.", "#.#", ".##"), 1),  # a hole that touches the outside at corners
        (from_text("####.####", "#..#.#..#", "####.####"), 2),
    ],
)
def test_small_masks(mask: Mask, parts: int) -> None:
    polygons = polygons_of(mask)
    assert len(polygons) == parts
    assert all(len(polygon) >= 8 for polygon in polygons)
    assert (drawn(polygons, mask) == mask).all()
    assert (odd_centres(polygons, mask) == mask).all()
    joined = polygons_of(mask, join_parts=True)
    assert len(joined) == 1
    assert (drawn(joined, mask) == mask).all()


def test_a_rectangle_is_its_four_corners() -> None:
    mask = np.zeros((9, 12), np.bool_)
    mask[2:6, 3:11] = True
    (polygon,) = polygons_of(mask)
    assert sorted(zip(polygon[::2], polygon[1::2], strict=True)) == [(3, 2), (3, 6), (11, 2), (11, 6)]


def test_nothing_comes_of_no_mask_and_of_none_with_a_pixel() -> None:
    table = annotations([None, np.zeros((3, 4), np.bool_), np.ones((3, 4), np.bool_), None])
    found = trace(table)
    assert found.has_polygon.tolist() == [False, False, True, False]
    assert [text is None for text in polygon_json(found).to_pylist()] == [True, True, False, True]
    assert polygon_json(trace(table.slice(0, 0))).to_pylist() == []


def test_random_masks_are_drawn_as_they_were() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    numbers = np.random.default_rng(seed)
    for _ in range(300):
        height, width = (int(side) for side in numbers.integers(1, 30, 2))
        mask = numbers.random((height, width)) < numbers.choice([0.03, 0.3, 0.5, 0.7, 0.97, 1.0])
        if not mask.any():
            continue
        for join_parts in (False, True):
            polygons = polygons_of(mask, join_parts=join_parts)
            assert (drawn(polygons, mask) == mask).all()
            assert (odd_centres(polygons, mask) == mask).all()
            assert len(polygons) == 1 or not join_parts


def test_winding_leaves_holes_open_too() -> None:
    y, x = np.indices((40, 40)) - 20
    ring = (x**2 + y**2 < 300) & (x**2 + y**2 > 60)
    (polygon,) = polygons_of(ring)
    centres = np.stack([each.ravel() for each in np.indices((40, 40))[::-1]], axis=1) + 0.5
    outline = Outline(np.array(polygon, float).reshape(-1, 2))
    assert (outline.contains_points(centres).reshape(40, 40) == ring).all()


def test_masks_of_photographs_lose_nothing(shared: Path) -> None:
    tree = json.loads((shared / "data" / "coco_mini" / "instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in tree["images"]}
    masks = []
    for each in tree["annotations"]:
        height, width = sizes[each["image_id"]]
        found = coco_mask.frPyObjects(each["segmentation"], height, width)
        merged = coco_mask.merge(found) if isinstance(found, list) else found
        masks.append(decode_rle(merged["counts"], (height, width)))
    table = annotations([*masks])
    for join_parts in (False, True):
        found = trace(table, join_parts=join_parts)
        assert found.pixels_off == 0
        assert found.has_polygon.tolist() == [bool(mask.any()) for mask in masks]


def test_the_loss_is_counted_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from owlsam_ray.reduce.formats import polygons

    mask = np.zeros((20, 20), np.bool_)
    mask[5:15, 5:15] = True
    smaller = np.array([[6, 5], [15, 5], [15, 15], [6, 15]], np.int64)
    monkeypatch.setattr(polygons, "_polygons", lambda rings, *, join_parts: [smaller])
    assert trace(annotations([mask, mask])).pixels_off == 20
    assert trace(annotations([mask]), check=False).pixels_off == 0


def test_labels_with_polygons_say_what_those_with_rle_say(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 12, num_images=40, shard_size=7)

    def tree(*, polygons: bool) -> dict[str, list[dict[str, object]]]:
        settings = ReduceConfig(min_mask_area=0)
        reduce_shards(str(tmp_path), manifest, settings, outputs=(CocoOutput(polygons=polygons),))
        return json.loads((tmp_path / "coco" / "annotations.json").read_text(encoding="ascii"))

    plain, traced = tree(polygons=False), tree(polygons=True)
    kinds = set()
    for ours, theirs in zip(plain["annotations"], traced["annotations"], strict=True):
        rle, outline = ours.pop("segmentation", None), theirs.pop("segmentation", None)
        assert ours == theirs
        kinds.add(type(outline))
        if isinstance(outline, list):
            assert isinstance(rle, dict)
            mask = decode_rle(rle["counts"].encode(), tuple(rle["size"]))
            assert (drawn(outline, mask) == mask).all()
        else:
            assert outline == rle
            assert rle is None or ours["area"] == 0
    assert kinds == {list, dict, type(None)}
