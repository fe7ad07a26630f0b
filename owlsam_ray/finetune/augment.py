"""Augment a training image: boxes and masks move along with the pixels.

Shapes: N objects of one image, H W pixels. All randomness comes from the caller's generator, never from torch's global
one, so that the same generator state gives the same image in any thread.
"""

import math
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from owlsam_ray.config.base import Fraction, PositiveInt, Section
from owlsam_ray.finetune.data import Sample
from owlsam_ray.ops.masks import tight_box

Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AugmentSettings(Section):
    """Augmentations of a training image, in the order given here."""

    horizontal_flip: Fraction = 0.5
    """Probability of mirroring left and right."""
    rotate90: Fraction = 0.0
    """Probability of a rotation by 90, 180 or 270 degrees, each equally likely."""
    brightness: Strength = 0.0
    """Largest relative change: 0.2 draws a factor from 0.8 to 1.2. Colour changes are applied in random order."""
    contrast: Strength = 0.0
    """Largest relative change, as for brightness."""
    saturation: Strength = 0.0
    """Largest relative change, as for brightness."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift, as a fraction of the colour circle."""
    cutout: Fraction = 0.0
    """Probability of erasing rectangles; they are filled with noise, which does not look like an object."""
    cutout_rectangles: PositiveInt = 1
    """Most rectangles erased from one image."""
    cutout_max_share: Fraction = 0.2
    """Largest fraction of the image that one rectangle covers."""
    min_visible: Fraction = 0.3
    """Smallest fraction of an object that must stay visible after cutout. Objects with less are dropped, and so are
    completely hidden ones."""


def augment(sample: Sample, settings: AugmentSettings, rng: np.random.Generator) -> Sample:
    """Return a changed copy of an image; the image itself when no change is drawn.

    Args:
        sample: not modified.
        settings: which augmentations to draw from.
        rng: a generator that no other thread uses at the same time.

    Returns:
        Objects in their order. Flips and rotations are exact for boxes on the grid of `TrainingImages.load`. After
        cutout, masks lack the erased pixels, and boxes that lost some are tight around the rest. Without masks, boxes
        stay as they were, since the location of the object inside its box is not known.
    """
    if rng.random() < settings.horizontal_flip:
        sample = flip(sample)
    if rng.random() < settings.rotate90:
        sample = turn(sample, int(rng.integers(1, 4)))
    sample = _jitter(sample, settings, rng)
    if rng.random() < settings.cutout:
        rectangles = _draw_rectangles(sample.pixels.shape[:2], settings, rng)
        sample = cut_out(sample, rectangles, min_visible=settings.min_visible, rng=rng)
    return sample


def flip(sample: Sample) -> Sample:
    """Mirror left and right."""
    image, boxes, masks = _to_tensors(sample)
    return _to_sample(
        sample,
        functional.horizontal_flip(image),
        functional.horizontal_flip(boxes),
        None if masks is None else functional.horizontal_flip(masks),
    )


def turn(sample: Sample, quarters: int) -> Sample:
    """Rotate counterclockwise by a number of quarter turns; the image becomes (W, H) if it is odd."""
    image, boxes, masks = _to_tensors(sample)
    angle = 90.0 * (quarters % 4)
    return _to_sample(
        sample,
        functional.rotate(image, angle, expand=True),
        functional.rotate(boxes, angle, expand=True),
        None if masks is None else functional.rotate(masks, angle, expand=True),
    )


def cut_out(sample: Sample, rectangles: NDArray[np.int64], *, min_visible: float, rng: np.random.Generator) -> Sample:
    """Erase rectangles.

    Args:
        sample: not modified.
        rectangles: (R, 4) xyxy whole pixels, inside the image, half-open.
        min_visible: objects left with a smaller fraction of their mask are dropped; without masks, the fraction is of
            the pixels that their box touches.
        rng: draws the noise.
    """
    image = tv_tensors.Image(_tensor(sample.pixels).permute(2, 0, 1))
    erased = np.zeros(sample.pixels.shape[:2], np.bool_)
    for x0, y0, x1, y1 in rectangles.tolist():
        noise = torch.from_numpy(rng.integers(0, 256, (3, y1 - y0, x1 - x0), np.uint8))
        image = functional.erase(image, y0, x0, y1 - y0, x1 - x0, noise)
        erased[y0:y1, x0:x1] = True
    boxes, masks = sample.boxes_xyxy.copy(), sample.masks
    if masks is None:
        visible = 1.0 - _covered_share(boxes, erased)
    else:
        left = masks & ~erased
        before, after = np.count_nonzero(masks, axis=(1, 2)), np.count_nonzero(left, axis=(1, 2))
        visible = after / np.maximum(before, 1)
        for index in np.flatnonzero((after < before) & (after > 0)).tolist():
            boxes[index] = tight_box(left[index])
        masks = left
    keep = (visible > 0) & (visible >= min_visible)
    return Sample(
        image_id=sample.image_id,
        pixels=_pixels(image),
        boxes_xyxy=boxes[keep],
        labels=sample.labels[keep],
        masks=None if masks is None else masks[keep],
    )


def _covered_share(boxes_xyxy: NDArray[np.float32], erased: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(N,) fraction of the pixels touched by a box that are erased; 0 for a box that touches none."""
    low, high = np.floor(boxes_xyxy[:, :2]).astype(int).clip(0), np.ceil(boxes_xyxy[:, 2:]).astype(int).clip(0)
    windows = [erased[y0:y1, x0:x1] for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist(), strict=True)]
    return np.array([window.mean() if window.size else 0.0 for window in windows], np.float64)


def _draw_rectangles(
    size_hw: tuple[int, int], settings: AugmentSettings, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(R, 4) xyxy inside the image: area fractions uniform up to the largest, aspect ratios up to 2 : 1 either way."""
    height, width = size_hw
    rectangles = []
    for _ in range(int(rng.integers(1, settings.cutout_rectangles + 1))):
        area = rng.uniform(0, settings.cutout_max_share) * height * width
        ratio = math.sqrt(2.0 ** rng.uniform(-1, 1))
        h = min(max(round(math.sqrt(area) * ratio), 1), height)
        w = min(max(round(math.sqrt(area) / ratio), 1), width)
        y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        rectangles.append((x, y, x + w, y + h))
    return np.array(rectangles, np.int64)


def _jitter(sample: Sample, settings: AugmentSettings, rng: np.random.Generator) -> Sample:
    """Change the colours, in random order; the same sample when every strength is 0."""
    strengths = {
        functional.adjust_brightness: settings.brightness,
        functional.adjust_contrast: settings.contrast,
        functional.adjust_saturation: settings.saturation,
    }
    steps = [
        (adjust, rng.uniform(max(0.0, 1 - strength), 1 + strength))
        for adjust, strength in strengths.items()
        if strength > 0
    ]
    if settings.hue > 0:
        steps.append((_adjust_hue, rng.uniform(-settings.hue, settings.hue)))
    if not steps:
        return sample
    image = tv_tensors.Image(_tensor(sample.pixels).permute(2, 0, 1))
    for place in rng.permutation(len(steps)).tolist():
        adjust, amount = steps[place]
        image = adjust(image, amount)
    return Sample(sample.image_id, _pixels(image), sample.boxes_xyxy, sample.labels, sample.masks)


def _adjust_hue(image: torch.Tensor, shift: float) -> torch.Tensor:
    """Shift the hue of a (3, H, W) image in Pillow's 8-bit HSV: a quarter of the time of torchvision on tensors."""
    picture = functional.adjust_hue(Image.fromarray(_pixels(image)), shift)
    return tv_tensors.Image(torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def _to_tensors(sample: Sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Pixels (3, H, W), boxes (N, 4) in float64 and masks (N, H, W) as torchvision's tensor types."""
    height, width = sample.pixels.shape[:2]
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(sample.boxes_xyxy.astype(np.float64)),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(height, width),
        clamping_mode=None,
    )
    image = tv_tensors.Image(_tensor(sample.pixels).permute(2, 0, 1))
    return image, boxes, None if sample.masks is None else tv_tensors.Mask(_tensor(sample.masks))


def _to_sample(sample: Sample, image: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor | None) -> Sample:
    # Rotations go through sines and cosines: rounding to 2^-16 px removes their errors near zero. Adding 0 turns -0
    # into 0.
    exact = np.round(np.asarray(boxes, np.float64) * 2**16) / 2**16 + 0.0
    return Sample(
        image_id=sample.image_id,
        pixels=_pixels(image),
        boxes_xyxy=exact.astype(np.float32),
        labels=sample.labels,
        masks=None if masks is None else np.ascontiguousarray(masks.numpy()),
    )


def _pixels(image: torch.Tensor) -> NDArray[np.uint8]:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _tensor(array: NDArray[np.generic]) -> torch.Tensor:
    """Make a tensor that shares the array's memory if torch allows it: torch does not accept read-only arrays."""
    return torch.from_numpy(np.require(array, requirements="W"))
