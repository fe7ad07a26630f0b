"""Draws one image of coloured shapes on a textured background, with exact masks of the visible pixels.

An image depends only on (seed, split, index). Shapes: H W pixels, N objects. A mask holds the pixels that an object
covers by at least half and that no later object covers; its box is tight around it, half-open.
"""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from owlsam_ray.config.vocabulary import Category

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

COLOURS = {"red": 0.0, "yellow": 0.15, "green": 0.34, "cyan": 0.5, "blue": 0.64, "magenta": 0.83}
"""Name → hue, as a fraction of a full turn."""
MIN_SIDE, MAX_OBJECTS = 12, 12
_SIDES = (256, 384)


class Split(IntEnum):
    """Part of the dataset; the value enters the seed."""

    TRAIN = 0
    VAL = 1
    TEST = 2


def _circle(u: Floats, v: Floats) -> Bools:
    return np.asarray(u * u + v * v <= 1)


def _square(u: Floats, v: Floats) -> Bools:
    return np.asarray(np.maximum(np.abs(u), np.abs(v)) <= 0.88)


def _triangle(u: Floats, v: Floats) -> Bools:
    return np.asarray((v <= 0.85) & (np.abs(u) * 1.85 <= v + 1.0))


def _star(u: Floats, v: Floats) -> Bools:
    # Fold the plane into half of one star point: outer corner at angle 0, inner corner at 36 degrees.
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    inner_x, inner_y = 0.46 * np.cos(sector / 2), 0.46 * np.sin(sector / 2)
    return np.asarray((x - 1) * inner_y - y * (inner_x - 1) <= 0)


def _ring(u: Floats, v: Floats) -> Bools:
    squared = u * u + v * v
    return np.asarray((squared <= 1) & (squared >= 0.3))


def _cross(u: Floats, v: Floats) -> Bools:
    wide, high = np.abs(u), np.abs(v)
    return np.asarray((np.minimum(wide, high) <= 0.32) & (np.maximum(wide, high) <= 1))


def _heart(u: Floats, v: Floats) -> Bools:
    x, y = 1.2 * u, 0.2 - 1.15 * v
    return np.asarray((x * x + y * y - 1) ** 3 <= x * x * y**3)


SHAPES: dict[str, Callable[[Floats, Floats], Bools]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
}
"""Name → which points of [-1, 1]² are inside; v grows downwards."""

WITHHELD_SHAPE = "heart"
SEEN, WITHHELD_PAIR, UNKNOWN_SHAPE = "seen pair", "withheld pair", "withheld shape"


def _group(shape: int, colour: int) -> str:
    if list(SHAPES)[shape] == WITHHELD_SHAPE:
        return UNKNOWN_SHAPE
    return WITHHELD_PAIR if shape == colour else SEEN


CATEGORIES = tuple(
    Category(id=1 + shape * len(COLOURS) + colour, name=f"{name} {form}", supercategory=_group(shape, colour))
    for shape, form in enumerate(SHAPES)
    for colour, name in enumerate(COLOURS)
)
"""Every pair of shape and colour, by ascending id from 1; `supercategory` says which pairs training never sees."""
_BY_GROUP = {
    group: [index for index, category in enumerate(CATEGORIES) if category.supercategory == group]
    for group in (SEEN, WITHHELD_PAIR, UNKNOWN_SHAPE)
}


@dataclass(frozen=True, slots=True)
class Crowd:
    """How many objects an image holds, and how closely they are packed."""

    objects: tuple[int, int] = (1, MAX_OBJECTS)
    """Minimum and maximum number of objects to place; an object that does not fit is left out."""
    max_box_iou: float = 0.5
    """Maximum IoU of the boxes of any two unoccluded objects; 0.5 so that suppression cannot be blamed."""
    min_visible: float = 0.6
    """Share of an object that later objects must leave visible."""
    companions: float = 0.0
    """Share of objects that get a companion: the next object has the same label and about the same size and place."""
    withheld: float = 0.25
    """Share of the test images that also show pairs withheld from training."""
    tries: int = 4
    """Number of places tried for each object."""


PLAIN = Crowd()
"""The drawn dataset."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image and the objects on it."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    masks: Bools
    """(N, H, W), disjoint, none empty."""
    labels: NDArray[np.int64]
    """(N,) index into `CATEGORIES`."""


def draw(seed: int, split: Split, index: int, *, crowd: Crowd = PLAIN) -> Drawing:
    """Draw one image.

    A quarter of the test images also show pairs that training withholds; all other images show seen pairs only.

    Args:
        seed: seed of the dataset.
        split: part of the dataset; equal indices of two splits are different images.
        index: from 0.
        crowd: number and density of objects; the default is that of the dataset.
    """
    random = np.random.default_rng([seed, int(split), index])
    height, width = (int(side) for side in random.integers(_SIDES[0], _SIDES[1] + 1, 2))
    canvas = _background(random, height, width)
    owner = np.full((height, width), -1, np.int16)
    mixed = split is Split.TEST and random.random() < crowd.withheld
    areas: list[int] = []
    labels: list[int] = []
    boxes: list[tuple[int, int, int, int]] = []
    single = False
    # Crowded images teach more in the same time: training takes the larger of two draws.
    fewest, most = crowd.objects
    wanted = random.integers(fewest, most + 1, 2 if split is Split.TRAIN else 1).max()
    for _ in range(int(wanted)):
        group = SEEN
        if mixed and random.random() < 0.5:
            group = WITHHELD_PAIR if random.random() < 0.5 else UNKNOWN_SHAPE
        label, beside = int(random.choice(_BY_GROUP[group])), None
        # No third companion: the middle one could not be distinguished.
        if crowd.companions and single and random.random() < crowd.companions:
            label, beside = labels[-1], boxes[-1]
        for _ in range(crowd.tries):
            placed = _place(random, label, owner, areas, boxes, crowd=crowd, beside=beside)
            if placed is not None:
                top, left, coverage, box = placed
                inside = owner[top : top + len(coverage), left : left + coverage.shape[1]]
                inside[coverage >= 0.5] = len(areas)
                areas.append(int(np.count_nonzero(coverage >= 0.5)))
                labels.append(label)
                boxes.append(box)
                _paint(random, canvas, label, top, left, coverage)
                break
        single = placed is not None and beside is None
    canvas += random.integers(-128, 128, canvas.shape, dtype=np.int8) * np.float32(random.uniform(0.01, 0.09))
    return Drawing(
        pixels=np.clip(canvas, 0, 255).astype(np.uint8),
        masks=owner[None] == np.arange(len(areas), dtype=np.int16)[:, None, None],
        labels=np.array(labels, np.int64),
    )


def _place(
    random: np.random.Generator,
    label: int,
    owner: NDArray[np.int16],
    areas: list[int],
    boxes: list[tuple[int, int, int, int]],
    *,
    crowd: Crowd,
    beside: tuple[int, int, int, int] | None,
) -> tuple[int, int, Floats, tuple[int, int, int, int]] | None:
    """Find a place for one more object: top, left, coverage (h, w) in [0, 1], box; None when it does not fit."""
    height, width = owner.shape
    longest = min(height, width) / 2
    if beside is None:
        side = float(np.exp(random.uniform(np.log(MIN_SIDE + 2), np.log(longest))))
    else:
        side = math.sqrt((beside[2] - beside[0]) * (beside[3] - beside[1])) * float(np.exp(random.uniform(-0.2, 0.2)))
    stretch = float(np.exp(random.uniform(-0.15, 0.15)))
    w, h = (round(min(max(value, MIN_SIDE + 2), longest)) for value in (side * stretch, side / stretch))
    if beside is None:
        left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
    else:
        apart_x, apart_y = random.uniform(-0.25, 0.25, 2) * (beside[2] - beside[0], beside[3] - beside[1])
        left = round(min(max((beside[0] + beside[2] - w) / 2 + apart_x, 0), width - w))
        top = round(min(max((beside[1] + beside[3] - h) / 2 + apart_y, 0), height - h))
    coverage = _coverage(random, label, h, w)
    mask = coverage >= 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE or any(_iou(box, other) > crowd.max_box_iou for other in boxes):
        return None
    under = owner[top : top + h, left : left + w]
    covered = np.bincount(under[mask & (under >= 0)], minlength=len(areas))
    for index in np.flatnonzero(covered):
        visible = np.count_nonzero(owner == index) - covered[index]
        if visible < crowd.min_visible * areas[index]:
            return None
    return top, left, coverage, box


def _coverage(random: np.random.Generator, label: int, h: int, w: int) -> Floats:
    """(h, w) share of each pixel that the shape covers, estimated from four points per pixel."""
    inside = SHAPES[list(SHAPES)[label // len(COLOURS)]]
    angle = float(random.uniform(-0.12, 0.12))
    v, u = np.meshgrid(
        (np.arange(2 * h, dtype=np.float32) + 0.5) / h - 1, (np.arange(2 * w, dtype=np.float32) + 0.5) / w - 1,
        indexing="ij",
    )  # fmt: skip
    # Rotate slightly, and scale the coordinates up to match, so that the shape stays inside its window.
    grow = np.float32(abs(np.cos(angle)) + abs(np.sin(angle)))
    cos, sin = np.float32(np.cos(angle)) * grow, np.float32(np.sin(angle)) * grow
    points = inside((cos * u - sin * v).astype(np.float32), (sin * u + cos * v).astype(np.float32))
    shares: Floats = points.reshape(h, 2, w, 2).mean((1, 3), dtype=np.float32)
    return shares


def _paint(random: np.random.Generator, canvas: Floats, label: int, top: int, left: int, coverage: Floats) -> None:
    hue = list(COLOURS.values())[label % len(COLOURS)] + random.uniform(-0.02, 0.02)
    rgb = colorsys.hsv_to_rgb(hue % 1.0, random.uniform(0.75, 1.0), random.uniform(0.65, 1.0))
    h, w = coverage.shape
    slope = random.uniform(-0.12, 0.12, 2)
    light = 1 + slope[0] * np.linspace(-1, 1, h, dtype=np.float32)[:, None] + slope[1] * np.linspace(-1, 1, w)[None]
    colour = 255 * np.array(rgb, np.float32) * light.astype(np.float32)[..., None]
    window = canvas[top : top + h, left : left + w]
    window += coverage[..., None] * (colour - window)


def _background(random: np.random.Generator, height: int, width: int) -> Floats:
    """(H, W, 3) float32 in 0…255: two muted colours mixed by a gradient, stripes, a checkerboard or blobs."""
    colours = [
        255 * np.array(colorsys.hsv_to_rgb(random.random(), random.uniform(0, 0.3), random.uniform(0.15, 0.95)))
        for _ in range(2)
    ]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = random.uniform(0, 2 * np.pi), random.uniform(12, 120)
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    kind = int(random.integers(4))
    if kind == 0:
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 1:
        mix = 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / period))
    elif kind == 2:
        mix = ((x // period + y // period) % 2).astype(np.float32)
    else:
        coarse = random.integers(0, 256, (int(random.integers(3, 14)), int(random.integers(3, 14))), dtype=np.uint8)
        mix = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    strength = np.float32(random.uniform(0.2, 1.0))
    first, second = (colour.astype(np.float32) for colour in colours)
    return first + (strength * mix)[..., None] * (second - first)


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    shared = wide * high
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
