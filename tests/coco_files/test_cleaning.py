"""Cleaning: every rule by itself, the sums, and what a file may not contradict."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pydantic import ValidationError

from owlsam_ray.coco_files.annotations import read_objects
from owlsam_ray.coco_files.cleaning import Change, Cleaned, CleaningSettings, Removal, Rule, clean
from owlsam_ray.coco_files.outlines import BadSegmentationError, read_outline
from owlsam_ray.errors import InputError
from owlsam_ray.ops.masks import decode_rle, encode_rle

HW = (100, 200)
SQUARE = [[10, 10, 50, 10, 50, 50, 10, 50]]
HUGE = 10**400  # an integer beyond all floats


def annotation(number: int = 1, **fields: Any) -> dict[str, Any]:
    base = {"id": number, "image_id": 7, "category_id": 3, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    return {**base, "segmentation": SQUARE, **fields}


def run(*annotations: dict[str, Any], size_hw: tuple[float, float] = HW, **fields: Any) -> Cleaned:
    """Clean annotations of image 7; image 8 has none."""
    tree = json.loads(json.dumps({"annotations": annotations}))
    objects = read_objects(tree, url="list.json", image_ids=[7, 8], category_ids=[3, 4])
    sizes = np.array([size_hw, size_hw], np.float64)
    return clean(objects, image_ids=[7, 8], sizes_hw=sizes, settings=CleaningSettings(**fields))


def test_a_good_object_stays_as_it_is() -> None:
    cleaned = run(annotation())
    assert cleaned.kept.tolist() == [0]
    assert cleaned.boxes_xyxy.tolist() == [[10, 10, 50, 50]]
    assert cleaned.outlines[0] is not None
    assert cleaned.images.tolist() == [0, 1]
    assert (cleaned.report.removed, cleaned.report.changed) == ((), ())


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"iscrowd": 1}, Rule.CROWD),
        ({"iscrowd": 1, "bbox": [0, 0, -1, 0]}, Rule.CROWD),
        ({"iscrowd": 1, "segmentation": "mask.png"}, Rule.CROWD),
        ({"bbox": []}, Rule.NO_BOX),
        ({"bbox": None}, Rule.NO_BOX),
        ({"bbox": [10, 10, HUGE, 40]}, Rule.NON_FINITE),
        ({"bbox": [-HUGE, 10, 40, 40]}, Rule.NON_FINITE),
        ({"bbox": [1.7e308, 10, 1.7e308, 40]}, Rule.NON_FINITE),
        ({"area": HUGE}, Rule.NON_FINITE),
        ({"bbox": [10, 10, 0, 40]}, Rule.ZERO_AREA),
        ({"bbox": [10, 10, 40, -40]}, Rule.ZERO_AREA),
        ({"bbox": [1e17, 10, 4, 40]}, Rule.ZERO_AREA),
        ({"area": 0}, Rule.ZERO_AREA),
        ({"area": -5.0}, Rule.ZERO_AREA),
        ({"bbox": [200, 10, 40, 40]}, Rule.OUTSIDE),
        ({"bbox": [10, -40, 40, 40]}, Rule.OUTSIDE),
        ({"bbox": [10, 500, 40, 40]}, Rule.OUTSIDE),
        ({"bbox": [10, 10, 9.9, 10]}, Rule.SMALL),
        ({"area": 99.9}, Rule.SMALL),
        ({"bbox": [195, 10, 40, 19], "area": 500}, Rule.SMALL),
        ({"segmentation": []}, Rule.EMPTY_SEGMENTATION),
        ({"segmentation": [[]]}, Rule.EMPTY_SEGMENTATION),
        ({"segmentation": [[10, 10, 50, 50]]}, Rule.EMPTY_SEGMENTATION),
        ({"segmentation": [[10, 20, 50, 60, 30, 40]]}, Rule.EMPTY_SEGMENTATION),
        ({"segmentation": [[1.1, 3.3, 2.2, 6.6, 7.7, 23.1]]}, Rule.EMPTY_SEGMENTATION),
        ({"segmentation": {"size": [*HW], "counts": [20_000]}}, Rule.EMPTY_SEGMENTATION),
        ({"segmentation": {"size": [*HW], "counts": encode_rle(np.zeros(HW, bool)).decode()}}, Rule.EMPTY_SEGMENTATION),
        ({"segmentation": [[10, 10, 50, 10, 50]]}, Rule.BAD_SEGMENTATION),
        ({"segmentation": [10, 10, 50, 10, 50, 50]}, Rule.BAD_SEGMENTATION),
        ({"segmentation": [["10", 10, 50, 10, 50, 50]]}, Rule.BAD_SEGMENTATION),
        ({"segmentation": [[10, 10, HUGE, 10, 50, 50]]}, Rule.BAD_SEGMENTATION),
        ({"segmentation": "mask.png"}, Rule.BAD_SEGMENTATION),
        ({"segmentation": {}}, Rule.BAD_SEGMENTATION),
        ({"segmentation": {"size": [*HW], "counts": [0, 19_999]}}, Rule.BAD_SEGMENTATION),
        ({"segmentation": {"size": [*HW], "counts": [-1, 20_001]}}, Rule.BAD_SEGMENTATION),
        ({"segmentation": {"size": [*HW], "counts": [0, 20_000.0]}}, Rule.BAD_SEGMENTATION),
        ({"segmentation": {"size": [200, 100], "counts": [0, 20_000]}}, Rule.BAD_SEGMENTATION),
        ({"segmentation": {"size": [HUGE, 100], "counts": [0, 20_000]}}, Rule.BAD_SEGMENTATION),
        ({"segmentation": {"size": [*HW], "counts": ""}}, Rule.BAD_SEGMENTATION),
        ({"segmentation": {"size": [*HW], "counts": "P"}}, Rule.BAD_SEGMENTATION),
        ({"segmentation": {"size": [*HW], "counts": "ä\ud800"}}, Rule.BAD_SEGMENTATION),
    ],
)
def test_an_object_goes_by_its_rule(fields: dict[str, Any], rule: Rule) -> None:
    cleaned = run(annotation(1, **fields), annotation(2, category_id=4))
    assert cleaned.kept.tolist() == [1]
    assert cleaned.report.removed == (Removal(7, 1, rule),)
    assert cleaned.report.as_dict()["removed"][rule] == 1


def test_boxes_that_stick_out_are_cut_or_left() -> None:
    out = annotation(bbox=[-10.5, 60, 40, 80])
    assert run(out).boxes_xyxy.tolist() == [[0, 60, 29.5, 100]]
    assert run(out).report.changed == (Removal(7, 1, Change.CLIPPED_BOX),)
    left = run(out, clip_boxes=False)
    assert left.boxes_xyxy.tolist() == [[-10.5, 60, 29.5, 140]]
    assert left.report.changed == ()


def test_an_unstated_size_leaves_the_far_borders_open() -> None:
    cleaned = run(annotation(bbox=[-10, 60, 4000, 80]), size_hw=(np.inf, np.inf))
    assert cleaned.boxes_xyxy.tolist() == [[0, 60, 3990, 140]]


def test_degenerate_polygons_go_alone_where_others_are_left() -> None:
    cleaned = run(annotation(segmentation=[[1, 1, 2, 2], *SQUARE, [5, 5, 6, 6, 7, 7]]))
    outline = cleaned.outlines[0]
    assert isinstance(outline, tuple)
    assert [polygon.tolist() for polygon in outline] == SQUARE
    assert cleaned.report.changed == (Removal(7, 1, Change.DROPPED_POLYGON),)


def test_bad_masks_may_go_without_their_boxes() -> None:
    entries = [annotation(1, segmentation=[]), annotation(2, category_id=4, segmentation=[[1]]), annotation(3)]
    cleaned = run(*entries, drop_bad_masks=False, duplicate_iou=None)
    assert len(cleaned.kept) == 3
    assert [outline is None for outline in cleaned.outlines] == [True, True, False]
    assert cleaned.report.as_dict()["changed"][Change.DROPPED_MASK] == 2


def test_files_of_boxes_only_are_taken() -> None:
    """Some state no segmentation, some an empty list everywhere."""
    bare = annotation(2, category_id=4)
    del bare["segmentation"]
    assert len(run(annotation(1, segmentation=[]), bare).kept) == 2
    assert len(run(annotation(1), bare).kept) == 2  # states none, so none is wrong
    assert len(run(annotation(1, segmentation=[]), annotation(2, category_id=4)).kept) == 1


def test_area_is_the_boxs_where_none_is_stated() -> None:
    assert len(run(annotation(area=None, bbox=[0, 0, 10, 10])).kept) == 1
    assert len(run(annotation(area=None, bbox=[0, 0, 10, 9.99])).kept) == 0
    assert len(run(annotation(area=3, bbox=[0, 0, 10, 9.99]), min_area=0).kept) == 1


def test_the_lowest_id_of_duplicates_stays() -> None:
    boxes = [annotation(5), annotation(2, bbox=[10, 10, 40, 41]), annotation(9, category_id=4), annotation(8)]
    cleaned = run(*boxes)
    assert cleaned.kept.tolist() == [1, 2]
    assert {(line.annotation_id, line.rule) for line in cleaned.report.removed} == {(5, "duplicate"), (8, "duplicate")}
    assert len(run(*boxes, duplicate_iou=None).kept) == 4
    assert len(run(*boxes, duplicate_iou=1.0).kept) == 4  # nothing is greater


def test_removed_objects_make_no_duplicates() -> None:
    assert run(annotation(1, iscrowd=1), annotation(2)).kept.tolist() == [1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 12), st.sampled_from([0.3, 0.5, 0.9]))
def test_duplicates_equal_a_plain_loop(seed: int, count: int, iou: float) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(count)
    entries = [
        annotation(int(i), bbox=[*rng.integers(0, 8, 2).tolist(), *rng.integers(10, 20, 2).tolist()], area=None,
                   category_id=int(rng.integers(3, 5)), image_id=int(rng.integers(7, 9)))
        for i in ids
    ]  # fmt: skip
    stays: list[dict[str, Any]] = []
    for entry in sorted(entries, key=lambda entry: int(entry["id"])):
        same = [e for e in stays if (e["image_id"], e["category_id"]) == (entry["image_id"], entry["category_id"])]
        if not any(plain_iou(entry["bbox"], other["bbox"]) > iou for other in same):
            stays.append(entry)
    cleaned = run(*entries, duplicate_iou=iou)
    expected = sorted(stays, key=lambda entry: (int(entry["image_id"]), int(entry["id"])))
    assert [entries[index]["id"] for index in cleaned.kept] == [entry["id"] for entry in expected]


def plain_iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def test_images_without_annotations_go_on_request() -> None:
    assert run(annotation()).images.tolist() == [0, 1]
    cleaned = run(annotation(), drop_empty_images=True)
    assert cleaned.images.tolist() == [0]
    assert cleaned.report.removed == (Removal(8, None, Rule.EMPTY_IMAGE),)
    assert (cleaned.report.images_in, cleaned.report.images_out) == (2, 1)
    assert run(annotation(iscrowd=1), drop_empty_images=True).images.tolist() == []


def test_no_annotation_at_all() -> None:
    cleaned = run()
    assert len(cleaned.kept) == 0
    assert cleaned.boxes_xyxy.shape == (0, 4)
    assert cleaned.report.summary().startswith("training uses 0 of 0 annotations and 2 of 2 images")


NUMBER = st.one_of(st.floats(-50, 250), st.sampled_from([0, 1e-300, 1e300, HUGE, -HUGE, 100, 200]))
POLYGON = st.lists(NUMBER, max_size=9)
SEGMENTATION = st.one_of(
    st.none(),
    st.just(SQUARE),
    st.lists(POLYGON, max_size=3),
    st.builds(lambda counts: {"size": [*HW], "counts": counts}, st.text("0123456789Pab[", max_size=6)),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "bbox": st.one_of(st.none(), st.lists(NUMBER, min_size=4, max_size=4)),
                "area": st.one_of(st.none(), NUMBER),
                "iscrowd": st.integers(0, 1),
                "segmentation": SEGMENTATION,
            }
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_whatever_comes_in_is_counted_once_and_what_stays_is_sound(entries: list[dict[str, Any]], drop: bool) -> None:
    cleaned = run(*(annotation(i, **entry) for i, entry in enumerate(entries)), drop_empty_images=drop)
    report = cleaned.report
    gone = [line for line in report.removed if line.annotation_id is not None]
    assert report.annotations_in == len(entries) == report.annotations_out + len(gone)
    assert report.images_in == 2 == report.images_out + report.as_dict()["removed"]["empty_image"]
    assert sum(report.as_dict()["removed"].values()) == len(report.removed)
    assert {line.annotation_id for line in report.changed} <= set(cleaned.kept.tolist())
    boxes = cleaned.boxes_xyxy
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= [HW[1], HW[0]]).all()
    assert ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) >= 100).all()
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_id": 99}, "image_id 99 is not among the 2 images of the file"),
        ({"image_id": None}, "image_id None"),
        ({"category_id": 5}, "category_id 5 is not among the 2 categories of the file"),
        ({"category_id": True}, "category_id True"),
        ({"id": None}, "id None is not an integer"),
        ({"id": "1"}, "id '1' is not an integer"),
        ({"id": 2**63}, "is not an integer"),
        ({"id": 2}, "id 2 is given twice"),
        ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3] is not [x, y, width, height]"),
        ({"bbox": [1, 2, 3, "4"]}, "is not [x, y, width, height]"),
        ({"bbox": "no"}, "is not [x, y, width, height]"),
        ({"area": "12"}, "area '12' is not a number"),
        ({"iscrowd": 2}, "iscrowd 2 is neither 0 nor 1"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        run(annotation(2), annotation(1, **fields))
    assert words in str(caught.value)
    assert "list.json cannot be trained on as it is" in str(caught.value)
    assert "annotations[1]" in str(caught.value)


def test_first_offences_are_named() -> None:
    with pytest.raises(InputError, match=r"8 problems(.|\n)*… and 3 more"):
        run(*(annotation(i, category_id=90 + i) for i in range(8)))


@pytest.mark.parametrize("tree", [{}, {"annotations": {}}, {"annotations": None}])
def test_files_without_annotations_are_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"list\.json holds no annotations"):
        read_objects(tree, url="list.json", image_ids=[], category_ids=[])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20), st.floats(0.05, 0.95))
def test_both_kinds_of_rle_give_the_same(seed: int, height: int, width: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    compressed = encode_rle(mask)
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    for counts in (compressed.decode(), runs):
        outline, _ = read_outline({"size": [height, width], "counts": counts}, (height, width))
        assert outline == (compressed if mask.any() else None)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.binary(min_size=1, max_size=3))
def test_a_damaged_rle_never_gets_through(seed: int, cuts: int, junk: bytes) -> None:
    """It is refused, or refused when it is drawn, or describes a mask of the size."""
    rng = np.random.default_rng(seed)
    counts = bytearray(encode_rle(rng.random((13, 17)) < 0.5))
    for _ in range(cuts):
        at = int(rng.integers(0, len(counts) + 1))
        counts[at : at + int(rng.integers(0, 3))] = junk
    try:
        outline, _ = read_outline({"size": [13, 17], "counts": counts.decode("latin-1")}, (13, 17))
    except BadSegmentationError:
        return
    if isinstance(outline, bytes):
        try:
            mask: NDArray[np.bool_] = decode_rle(outline, (13, 17))
        except ValueError:
            return
        assert mask.shape == (13, 17)
        assert np.array_equal(mask, coco_mask.decode({"size": [13, 17], "counts": outline}))


@pytest.mark.parametrize(
    "fields",
    [{"duplicate_iou": 1.5}, {"min_area": -1}, {"min_area": float("inf")}, {"min_areas": 3}, {"clip_boxes": "x"}],
)
def test_settings_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CleaningSettings(**fields)


def test_cleaning_loads_no_torch() -> None:
    code = "import sys, owlsam_ray.coco_files.cleaning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
