"""Logits → masks → RLE, and cleaned masks, against loops, pycocotools and whole-tensor references."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from owlsam_ray.models.sam_frame import input_size_hw
from owlsam_ray.ops.masks import (
    clean_mask,
    decode_rle,
    encode_rle,
    logits_to_masks,
    mask_area,
    segments_from_logits,
    stability_score,
    tight_box,
    upsample_logits,
)
from tests.oracles import (
    clean_mask_loop,
    compress_runs,
    masks_whole_tensor,
    rle_runs,
    stability_loop,
    tight_box_loop,
    upsample_reference,
)

SIZES = [(48, 64), (100, 37), (128, 128), (200, 333), (1, 70), (70, 1), (9, 300)]


def named_masks() -> dict[str, NDArray[np.bool_]]:
    height, width = 70, 45
    places: dict[str, Any] = {
        "empty": np.s_[:0],
        "full": np.s_[:],
        "inner pixel": np.s_[31, 7],
        "top left": np.s_[0, 0],
        "top right": np.s_[0, -1],
        "bottom left": np.s_[-1, 0],
        "bottom right": np.s_[-1, -1],
        "first row": np.s_[0],
        "last row": np.s_[-1],
        "part of a row": np.s_[33, 5:40],
        "first column": np.s_[:, 0],
        "last column": np.s_[:, -1],
        "part of a column": np.s_[9:61, 20],
    }
    masks = {name: np.zeros((height, width), np.bool_) for name in places}
    for name, place in places.items():
        masks[name][place] = True
    masks["all but a pixel"] = ~masks["inner pixel"]
    masks["one by one"] = np.ones((1, 1), np.bool_)
    masks["one by one, empty"] = np.zeros((1, 1), np.bool_)
    masks["wide"] = np.eye(1, 200, 150, dtype=np.bool_)
    masks["tall"] = np.eye(200, 1, -150, dtype=np.bool_)
    masks["checkers"] = np.indices((65, 66)).sum(axis=0) % 2 == 0
    return masks


def smooth_logits(count: int, side: int, seed: int) -> Tensor:
    """Blobs of several sizes, some above and some below zero."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    coarse = 4 * torch.randn(count, 1, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[:, 0]


def check_mask(mask: NDArray[np.bool_]) -> None:
    """Against pycocotools, byte for byte, and against loops."""
    size_hw, counts = (mask.shape[0], mask.shape[1]), encode_rle(mask)
    official = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert counts == official["counts"] == compress_runs(rle_runs(mask))
    decoded = decode_rle(counts, size_hw)
    assert decoded.dtype == np.bool_
    np.testing.assert_array_equal(decoded, mask)
    np.testing.assert_array_equal(coco_mask.decode({"size": list(size_hw), "counts": counts}), mask)
    assert mask_area(mask) == coco_mask.area(official) == sum(map(bool, mask.ravel().tolist()))
    x0, y0, x1, y1 = tight_box(mask)
    assert [x0, y0, x1 - x0, y1 - y0] == coco_mask.toBbox(official).tolist()
    assert (x0, y0, x1, y1) == tight_box_loop(mask)


@pytest.mark.parametrize("name", named_masks())
def test_rle_area_and_box_of_special_masks(name: str) -> None:
    check_mask(named_masks()[name])


@pytest.mark.parametrize("seed", range(40))
def test_rle_area_and_box_of_random_masks(seed: int) -> None:
    """Noise of several densities, and a rectangle somewhere."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 150, 2)
    check_mask(random.random((height, width)) < random.choice([0.001, 0.1, 0.5, 0.95]))
    rectangle = np.zeros((height, width), np.bool_)
    (top, bottom), (left, right) = np.sort(random.integers(0, [[height + 1], [width + 1]], (2, 2)))
    rectangle[top:bottom, left:right] = True
    check_mask(rectangle)


@pytest.mark.parametrize("view", ["transposed", "stepped", "fortran"])
def test_rle_of_strided_masks(view: str) -> None:
    base = np.random.default_rng(5).random((130, 80)) < 0.3
    check_mask({"transposed": base.T, "stepped": base[::2, 1::3], "fortran": np.asfortranarray(base)}[view])


@pytest.mark.parametrize(
    "counts", [b"", b"0", b"\x00", b"~", b"P", b"P" * 20 + b"1", encode_rle(np.eye(6, dtype=np.bool_))]
)
def test_damaged_counts_are_refused(counts: bytes) -> None:
    with pytest.raises(ValueError, match="RLE"):
        decode_rle(counts, (5, 6))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_decoding_equals_pycocotools_on_large_runs() -> None:
    print("seed 7")
    edges = np.cumsum(np.random.default_rng(7).integers(1, 9000, 60))
    mask = (np.searchsorted(edges, np.arange(300_000), side="right") % 2 == 1).reshape(600, 500).T
    counts = encode_rle(mask)
    expected = coco_mask.decode({"size": [500, 600], "counts": counts})
    np.testing.assert_array_equal(decode_rle(counts, (500, 600)), expected.astype(np.bool_))
    np.testing.assert_array_equal(mask, expected.astype(np.bool_))


def draw(text: str) -> NDArray[np.bool_]:
    return np.array([[letter == "#" for letter in line] for line in text.split()])


def test_small_holes_are_filled() -> None:
    """Not those that the border cuts, not what is open at a corner, and not those that are large enough."""
    mask = draw("""
        ########.##
        #.####..###
        ########.##
        ##..###.###
        ##..#######
        ########...
        .##########
        """)
    assert clean_mask(mask, fill_holes=0, remove_islands=0) is mask
    one = clean_mask(mask, fill_holes=2, remove_islands=0)
    assert [tuple(place) for place in np.argwhere(one & ~mask).tolist()] == [(1, 1)]
    all_holes = clean_mask(mask, fill_holes=5, remove_islands=0)
    added = {tuple(place) for place in np.argwhere(all_holes & ~mask).tolist()}
    assert added == {(1, 1), (3, 2), (3, 3), (4, 2), (4, 3)}
    assert (clean_mask(mask, fill_holes=100, remove_islands=0) == all_holes).all()
    assert (clean_mask(~mask, fill_holes=100, remove_islands=0) == ~mask).all(), "its rings are open or at the border"


def test_small_islands_are_removed_but_never_the_largest() -> None:
    mask = draw("""
        ##....#
        ##...#.
        ....#..
        #..##..
        """)
    assert (clean_mask(mask, fill_holes=0, remove_islands=1) == mask).all()
    without_dot = clean_mask(mask, fill_holes=0, remove_islands=2)
    assert [tuple(place) for place in np.argwhere(mask & ~without_dot).tolist()] == [(3, 0)]
    # Corners connect: the diagonal and the pair below it are one part of five pixels, the square has four.
    assert without_dot.sum() == 9
    for threshold in (5, 6, 1000):
        kept = clean_mask(mask, fill_holes=0, remove_islands=threshold)
        assert kept.sum() == 5
        assert kept[2, 4]


def test_the_first_of_equally_large_islands_stays() -> None:
    mask = draw("""
        .......#.
        .#.....##
        ##..##...
        """)
    kept = clean_mask(mask, fill_holes=0, remove_islands=50)
    assert {tuple(place) for place in np.argwhere(kept).tolist()} == {(0, 7), (1, 7), (1, 8)}
    turned = clean_mask(np.ascontiguousarray(mask[::-1]), fill_holes=0, remove_islands=50)
    assert {tuple(place) for place in np.argwhere(turned).tolist()} == {(0, 0), (0, 1), (1, 1)}


def test_holes_are_filled_before_islands_are_counted() -> None:
    mask = draw("""
        ###.....
        #.#..##.
        ###..##.
        .....##.
        .....##.
        .....##.
        """)
    assert clean_mask(mask, fill_holes=2, remove_islands=9)[:3, :3].all()
    assert not clean_mask(mask, fill_holes=0, remove_islands=9)[:3, :3].any(), "eight pixels, with the hole nine"


@pytest.mark.parametrize("seed", range(60))
def test_cleaning_equals_flood_fills(seed: int) -> None:
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 40, 2)
    mask = random.random((height, width)) < random.choice([0.05, 0.3, 0.5, 0.7, 0.95])
    before = mask.copy()
    for fill_holes, remove_islands in [(0, 3), (3, 0), (2, 2), (5, 20), (20, 5), (10**6, 10**6)]:
        fast = clean_mask(mask, fill_holes=fill_holes, remove_islands=remove_islands)
        assert fast.dtype == np.bool_
        assert fast.shape == mask.shape
        np.testing.assert_array_equal(fast, clean_mask_loop(mask, fill_holes=fill_holes, remove_islands=remove_islands))
    np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize("name", named_masks())
def test_cleaning_of_special_masks(name: str) -> None:
    mask = named_masks()[name]
    fast = clean_mask(mask, fill_holes=9, remove_islands=9)
    np.testing.assert_array_equal(fast, clean_mask_loop(mask, fill_holes=9, remove_islands=9))
    assert (fast.sum() > 0) == (mask.sum() > 0)


def test_tight_box_is_half_open() -> None:
    mask = np.zeros((10, 20), np.bool_)
    mask[2:5, 7:11] = True
    assert tight_box(mask) == (7, 2, 11, 5)
    assert tight_box(np.zeros((10, 20), np.bool_)) == (0, 0, 0, 0)


@pytest.mark.parametrize("size_hw", SIZES)
def test_upsampling_equals_the_float64_twin(size_hw: tuple[int, int]) -> None:
    low_res, input_hw = smooth_logits(3, 32, seed=1), input_size_hw(size_hw, 128)
    fast = upsample_logits(low_res, size_hw=size_hw, input_hw=input_hw, image_size=128).numpy()
    slow = upsample_reference(low_res, size_hw=size_hw, input_hw=input_hw, image_size=128)
    np.testing.assert_allclose(fast, slow, rtol=0, atol=5e-5)  # measured: 1.2e-5 on logits up to 10


@pytest.mark.parametrize("size_hw", SIZES)
def test_masks_one_by_one_equal_the_whole_tensor(size_hw: tuple[int, int]) -> None:
    low_res, input_hw = smooth_logits(5, 32, seed=2), input_size_hw(size_hw, 128)
    masks = list(logits_to_masks(low_res, size_hw=size_hw, input_hw=input_hw, image_size=128))
    whole = masks_whole_tensor(low_res, size_hw=size_hw, input_hw=input_hw, image_size=128)
    assert len(masks) == 5
    assert 0 < whole.mean() < 1
    np.testing.assert_array_equal(np.stack(masks), whole)


@pytest.mark.parametrize("size_hw", SIZES)
def test_segments_equal_the_plain_reference(size_hw: tuple[int, int]) -> None:
    low_res, input_hw = smooth_logits(4, 32, seed=3), input_size_hw(size_hw, 128)
    quality = torch.tensor([0.9, -0.1, 0.5, 1.2])
    segments = segments_from_logits(low_res, quality, size_hw=size_hw, input_hw=input_hw, image_size=128)
    masks = masks_whole_tensor(low_res, size_hw=size_hw, input_hw=input_hw, image_size=128)
    assert [segment.rle_counts for segment in segments] == [compress_runs(rle_runs(mask)) for mask in masks]
    assert [segment.area for segment in segments] == [int(mask.sum()) for mask in masks]
    assert [segment.box_xyxy for segment in segments] == [tight_box_loop(mask) for mask in masks]
    assert [segment.predicted_iou for segment in segments] == quality.tolist()
    expected = stability_loop(low_res, input_hw=input_hw, image_size=128)
    assert [segment.stability for segment in segments] == pytest.approx(expected, abs=1e-7)


def test_segments_do_not_depend_on_their_mates_or_on_threads() -> None:
    low_res, size_hw = smooth_logits(8, 64, seed=4), (150, 211)
    quality, input_hw = torch.linspace(0, 1, 8), input_size_hw(size_hw, 256)

    def run(rows: list[int]) -> list[object]:
        return list(
            segments_from_logits(low_res[rows], quality[rows], size_hw=size_hw, input_hw=input_hw, image_size=256)
        )

    together = run(list(range(8)))
    assert [run([row])[0] for row in range(8)] == together
    assert run([6, 1, 3]) == [together[6], together[1], together[3]]
    with ThreadPoolExecutor(4) as pool:
        assert all(result == together for result in pool.map(run, [list(range(8))] * 8))


def test_no_logits_no_segments() -> None:
    none = torch.zeros(0, 1, 1)
    assert segments_from_logits(none, torch.zeros(0), size_hw=(5, 7), input_hw=(92, 128), image_size=128) == []
    assert list(logits_to_masks(none, size_hw=(5, 7), input_hw=(92, 128), image_size=128)) == []
    assert stability_score(none, input_hw=(92, 128), image_size=128).shape == (0,)


def test_each_mask_needs_its_predicted_iou() -> None:
    with pytest.raises(ValueError, match="shorter"):
        segments_from_logits(torch.ones(2, 8, 8), torch.ones(1), size_hw=(4, 4), input_hw=(32, 32), image_size=32)


def test_empty_and_full_masks() -> None:
    low_res = torch.stack([torch.full((8, 8), -3.0), torch.full((8, 8), 3.0), torch.full((8, 8), 0.0)])
    segments = segments_from_logits(low_res, torch.zeros(3), size_hw=(20, 30), input_hw=(21, 32), image_size=32)
    assert [segment.area for segment in segments] == [0, 600, 0]
    assert [segment.box_xyxy for segment in segments] == [(0, 0, 0, 0), (0, 0, 30, 20), (0, 0, 0, 0)]
    assert [segment.stability for segment in segments] == [0.0, 1.0, 0.0]  # 0/0, all/all, none/all


def test_padding_has_no_say() -> None:
    """What the logits say below and right of the picture changes neither mask nor stability."""
    size_hw, input_hw = (60, 128), (60, 128)
    low_res = smooth_logits(2, 32, seed=6)
    other = low_res.clone()
    # 60 rows are 15 cells; row 16 is the first that no pixel of the picture is interpolated from.
    other[:, 16:] = 50.0
    results = [
        segments_from_logits(logits, torch.ones(2), size_hw=size_hw, input_hw=input_hw, image_size=128)
        for logits in (low_res, other)
    ]
    assert results[0] == results[1]


def test_stability_counts_the_cells_that_the_picture_touches() -> None:
    low_res = torch.full((1, 4, 4), 5.0)
    low_res[0, 2] = 0.0  # between the thresholds
    low_res[0, 3] = -5.0
    # 17 of 32 pixels reach into the third of four rows: 8 of 12 cells are above +1.
    assert stability_score(low_res, input_hw=(17, 32), image_size=32).tolist() == pytest.approx([8 / 12])
    assert stability_score(low_res, input_hw=(16, 32), image_size=32).tolist() == [1.0]
