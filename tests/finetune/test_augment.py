"""Augmentation: there and back bit for bit, boxes tight around masks, the same for the same generator."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from owlsam_ray.finetune.augment import AugmentSettings, augment, cut_out, flip, turn
from owlsam_ray.finetune.data import GRID, Sample
from owlsam_ray.ops.masks import tight_box

SEEDS = st.integers(0, 2**32)
EVERYTHING = AugmentSettings(
    horizontal_flip=0.5, rotate90=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
    cutout=0.7, cutout_rectangles=3, cutout_max_share=0.4,
)  # fmt: skip
OFF = AugmentSettings(horizontal_flip=0)


def draw_sample(seed: int, *, masks: bool = True, objects: int | None = None) -> Sample:
    """Blobs of noise with boxes tight around them; without masks, boxes anywhere on the grid."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(8, 40, 2))
    count = int(rng.integers(0, 6)) if objects is None else objects
    drawn = np.zeros((count, height, width), bool)
    boxes = np.zeros((count, 4), np.float32)
    for index in range(count):
        y, x = int(rng.integers(0, height - 4)), int(rng.integers(0, width - 4))
        h, w = int(rng.integers(2, height - y + 1)), int(rng.integers(2, width - x + 1))
        drawn[index, y : y + h, x : x + w] = rng.random((h, w)) < 0.6
        drawn[index, y, x] = True
        boxes[index] = tight_box(drawn[index])
        if not masks:
            low = rng.integers(0, [(width - 1) * GRID, (height - 1) * GRID])
            high = rng.integers(low + 1, [width * GRID + 1, height * GRID + 1])
            boxes[index] = np.concatenate([low, high]) / GRID
    return Sample(
        image_id=seed,
        pixels=rng.integers(0, 256, (height, width, 3), np.uint8),
        boxes_xyxy=boxes,
        labels=rng.integers(0, 80, count),
        masks=drawn if masks else None,
    )


def same_bits(a: Sample, b: Sample) -> bool:
    pairs: list[tuple[Any, Any]] = [(a.pixels, b.pixels), (a.boxes_xyxy, b.boxes_xyxy), (a.labels, b.labels)]
    if a.masks is not None and b.masks is not None:
        pairs.append((a.masks, b.masks))
    alike = all(x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)
    return alike and (a.masks is None) == (b.masks is None) and a.image_id == b.image_id


def is_sound(sample: Sample) -> bool:
    """Shapes agree, and every box has an area inside the picture."""
    height, width = sample.pixels.shape[:2]
    boxes = sample.boxes_xyxy
    count = len(boxes)
    return (
        boxes.shape == (count, 4)
        and boxes.dtype == np.float32
        and sample.labels.shape == (count,)
        and sample.pixels.dtype == np.uint8
        and sample.pixels.flags.c_contiguous
        and (sample.masks is None or sample.masks.shape == (count, height, width))
        and bool((boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all())
        and bool((boxes[:, 2:] <= [width, height]).all())
    )


def is_tight(sample: Sample) -> bool:
    assert sample.masks is not None
    return [tight_box(mask) for mask in sample.masks] == [tuple(box) for box in sample.boxes_xyxy.tolist()]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.booleans())
def test_two_flips_and_four_turns_give_the_input_back(seed: int, masks: bool) -> None:
    sample = draw_sample(seed, masks=masks)
    assert same_bits(flip(flip(sample)), sample)
    turned = sample
    for _ in range(4):
        turned = turn(turned, 1)
    assert same_bits(turned, sample)
    assert same_bits(turn(turn(sample, 1), 3), sample)
    assert same_bits(turn(turn(sample, 1), 1), turn(sample, 2))
    assert same_bits(turn(turn(sample, 2), 1), turn(sample, 3))


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_flips_and_turns_move_everything_as_numpy_does(seed: int) -> None:
    sample = draw_sample(seed)
    assert sample.masks is not None
    mirrored, turned = flip(sample), turn(sample, 1)
    assert mirrored.masks is not None
    assert turned.masks is not None
    assert np.array_equal(mirrored.pixels, sample.pixels[:, ::-1])
    assert np.array_equal(mirrored.masks, sample.masks[:, :, ::-1])
    assert np.array_equal(turned.pixels, np.rot90(sample.pixels))
    assert np.array_equal(turned.masks, np.rot90(sample.masks, axes=(1, 2)))
    for changed in (mirrored, turned):
        assert is_tight(changed)
        assert np.array_equal(changed.labels, sample.labels)
    width = sample.pixels.shape[1]
    x0, y0, x1, y1 = sample.boxes_xyxy.T
    assert np.array_equal(turned.boxes_xyxy, np.stack([y0, width - x1, y1, width - x0], axis=1))


@pytest.mark.parametrize("size_hw", [(3, 30_000), (30_000, 3), (65_000, 2)])
def test_coordinates_stay_exact_in_the_largest_pictures(size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    rng = np.random.default_rng(0)
    low = rng.integers(0, [(width - 1) * GRID, (height - 1) * GRID], (200, 2))
    high = rng.integers(low + 1, [width * GRID + 1, height * GRID + 1])
    boxes = (np.concatenate([low, high], axis=1) / GRID).astype(np.float32)
    sample = Sample(1, np.zeros((height, width, 3), np.uint8), boxes, np.zeros(200, np.int64), None)
    turned = turn(turn(flip(flip(sample)), 1), 3)
    assert turned.boxes_xyxy.tobytes() == boxes.tobytes()


def test_boxes_that_stick_out_are_not_cut() -> None:
    boxes = np.array([[-5, -2.5, 40, 9]], np.float32)
    sample = Sample(1, np.zeros((8, 30, 3), np.uint8), boxes, np.zeros(1, np.int64), None)
    assert flip(sample).boxes_xyxy.tolist() == [[-10, -2.5, 35, 9]]
    assert turn(sample, 1).boxes_xyxy.tolist() == [[-2.5, -10, 9, 35]]


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.booleans())
def test_everything_together_leaves_sound_samples(seed: int, masks: bool) -> None:
    sample = draw_sample(seed, masks=masks)
    changed = augment(sample, EVERYTHING, np.random.default_rng(seed))
    assert is_sound(changed)
    assert (changed.masks is None) != masks
    if masks:
        assert is_tight(changed)
    assert same_bits(sample, draw_sample(seed, masks=masks))  # not written to


def test_labels_follow_their_objects() -> None:
    for seed in range(40):
        drawn = draw_sample(seed, objects=4)
        assert drawn.masks is not None
        sample = Sample(seed, drawn.pixels, drawn.boxes_xyxy, np.arange(4), drawn.masks)
        moved = augment(sample, EVERYTHING.model_copy(update={"cutout": 0.0}), np.random.default_rng(seed))
        cut = augment(sample, EVERYTHING, np.random.default_rng(seed))
        assert moved.masks is not None
        assert cut.masks is not None
        assert moved.labels.tolist() == [0, 1, 2, 3]
        assert cut.labels.tolist() == sorted(set(cut.labels.tolist()))
        for before, after in zip(drawn.masks, moved.masks, strict=True):
            assert before.sum() == after.sum()
        for label, mask in zip(cut.labels.tolist(), cut.masks, strict=True):
            assert not (mask & ~moved.masks[label]).any()


def test_the_same_generator_gives_the_same_in_any_thread() -> None:
    samples = [draw_sample(seed, objects=3) for seed in range(40)]
    once = [augment(sample, EVERYTHING, np.random.default_rng(sample.image_id)) for sample in samples]
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        again = list(pool.map(lambda s: augment(s, EVERYTHING, np.random.default_rng(s.image_id)), samples))
    assert all(same_bits(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    other = [augment(sample, EVERYTHING, np.random.default_rng(99 + sample.image_id)) for sample in samples]
    assert not all(same_bits(a, b) for a, b in zip(once, other, strict=True))


def test_nothing_on_gives_the_sample_itself() -> None:
    sample = draw_sample(3)
    assert augment(sample, OFF, np.random.default_rng(0)) is sample


def test_probabilities_are_kept_to() -> None:
    sample = draw_sample(4, masks=False)
    rng = np.random.default_rng(0)
    half = AugmentSettings(horizontal_flip=0.5)
    flips = sum(augment(sample, half, rng) is not sample for _ in range(400))
    assert 150 < flips < 250
    assert all(same_bits(augment(sample, AugmentSettings(horizontal_flip=1), rng), flip(sample)) for _ in range(20))
    turns = [augment(sample, AugmentSettings(horizontal_flip=0, rotate90=1), rng) for _ in range(60)]
    kinds = [turn(sample, quarters) for quarters in (1, 2, 3)]
    found = [sum(same_bits(turned, kind) for turned in turns) for kind in kinds]
    assert sum(found) == 60
    assert min(found) > 8


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_changes_leave_geometry_alone(name: str) -> None:
    sample = draw_sample(5, objects=3)
    settings: dict[str, Any] = {"horizontal_flip": 0, name: 0.4}
    changed = augment(sample, AugmentSettings(**settings), np.random.default_rng(1))
    assert not np.array_equal(changed.pixels, sample.pixels)
    assert same_bits(replace(changed, pixels=sample.pixels), sample)


def test_hue_turns_the_colour_circle() -> None:
    red = Sample(1, np.full((4, 4, 3), [255, 0, 0], np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, int), None)
    half = AugmentSettings(horizontal_flip=0, hue=0.5)
    colours = np.array([augment(red, half, np.random.default_rng(i)).pixels[0, 0] for i in range(100)])
    assert (colours.max(axis=1) == 255).all()
    assert (colours.min(axis=1) == 0).all()
    assert all((colours[:, channel] == 255).any() for channel in range(3))


def test_brightness_scales_pixels() -> None:
    sample = Sample(1, np.full((4, 4, 3), 100, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), None)
    brighter = AugmentSettings(horizontal_flip=0, brightness=0.3)
    values = [int(augment(sample, brighter, np.random.default_rng(i)).pixels[0, 0, 0]) for i in range(200)]
    assert min(values) >= 69
    assert max(values) <= 130
    assert max(values) - min(values) > 45


def board(masks: bool) -> Sample:
    """Two squares of 20 × 20 in a black picture of 40 × 60."""
    drawn = np.zeros((2, 40, 60), bool)
    drawn[0, 5:25, 5:25] = True
    drawn[1, 10:30, 35:55] = True
    boxes = np.array([tight_box(mask) for mask in drawn], np.float32)
    return Sample(1, np.zeros((40, 60, 3), np.uint8), boxes, np.array([7, 8]), drawn if masks else None)


def cut(sample: Sample, *rectangles: tuple[int, int, int, int], min_visible: float = 0.3) -> Sample:
    return cut_out(sample, np.array(rectangles), min_visible=min_visible, rng=np.random.default_rng(0))


def test_cutout_with_masks_takes_pixels_and_tightens_boxes() -> None:
    changed = cut(board(True), (0, 0, 15, 40))
    assert changed.masks is not None
    assert changed.labels.tolist() == [7, 8]
    assert changed.boxes_xyxy.tolist() == [[15, 5, 25, 25], [35, 10, 55, 30]]
    assert changed.masks.sum(axis=(1, 2)).tolist() == [200, 400]
    assert changed.pixels[:, 15:].max() == 0
    assert changed.pixels[:, :15].std() > 60  # noise


def test_cutout_without_masks_leaves_boxes() -> None:
    changed = cut(board(False), (0, 0, 15, 40))
    assert changed.boxes_xyxy.tolist() == [[5, 5, 25, 25], [35, 10, 55, 30]]


@pytest.mark.parametrize("masks", [True, False])
def test_cutout_drops_what_it_mostly_hides(masks: bool) -> None:
    sample = board(masks)
    assert cut(sample, (0, 0, 19, 40)).labels.tolist() == [7, 8]  # 6 of 20 columns are left: 0.3
    assert cut(sample, (0, 0, 20, 40)).labels.tolist() == [8]
    assert cut(sample, (0, 0, 24, 40), min_visible=0).labels.tolist() == [7, 8]
    assert cut(sample, (0, 0, 25, 40), min_visible=0).labels.tolist() == [8]
    assert cut(sample, (0, 0, 6, 6), min_visible=1).labels.tolist() == [8]
    # Two rectangles that overlap hide their union, not their sum.
    assert cut(sample, (5, 5, 15, 25), (5, 5, 15, 25), min_visible=0.5).labels.tolist() == [7, 8]
    assert cut(sample, (5, 5, 15, 25), (15, 5, 25, 25), min_visible=0.5).labels.tolist() == [8]
    gone = cut(sample, (0, 0, 60, 40))
    assert gone.boxes_xyxy.shape == (0, 4)
    assert is_sound(gone)


def test_cutout_rectangles_keep_to_their_share() -> None:
    sample = Sample(1, np.zeros((50, 80, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), None)
    one = AugmentSettings(horizontal_flip=0, cutout=1, cutout_max_share=0.1)
    shares = [augment(sample, one, np.random.default_rng(i)).pixels.any(axis=2).mean() for i in range(200)]
    assert min(shares) > 0
    assert 0.08 < max(shares) < 0.12
    whole = AugmentSettings(horizontal_flip=0, cutout=1, cutout_max_share=1)
    assert all(is_sound(augment(sample, whole, np.random.default_rng(i))) for i in range(50))


@pytest.mark.parametrize("masks", [True, False])
def test_samples_without_objects(masks: bool) -> None:
    for seed in range(20):
        sample = draw_sample(seed, masks=masks, objects=0)
        changed = augment(sample, EVERYTHING, np.random.default_rng(seed))
        assert is_sound(changed)
        assert len(changed.labels) == 0
        assert turn(sample, 1).pixels.shape[:2] == sample.pixels.shape[1::-1]


def test_read_only_arrays_are_taken() -> None:
    sample = draw_sample(6, objects=2)
    for array in (sample.pixels, sample.boxes_xyxy, sample.masks):
        assert array is not None
        array.flags.writeable = False
    assert is_sound(augment(sample, EVERYTHING.model_copy(update={"horizontal_flip": 1.0}), np.random.default_rng(0)))


@pytest.mark.parametrize(
    "fields", [{"horizontal_flip": 1.1}, {"hue": 0.6}, {"brightness": -1}, {"cutout_rectangles": 0}, {"flip": 1}]
)
def test_settings_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AugmentSettings(**fields)
