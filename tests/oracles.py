"""Slow plain twins of the fast paths (law 8): loops and whole tensors, no care for memory or time."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.config.inference import SuppressConfig
from owlsam_ray.records import Detections


def rle_runs(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed RLE: lengths of runs down the columns, beginning with a run of zeros (maybe of length 0)."""
    runs, current, length = [], False, 0
    height, width = mask.shape
    for x in range(width):
        for y in range(height):
            if bool(mask[y, x]) == current:
                length += 1
            else:
                runs.append(length)
                current, length = not current, 1
    return [*runs, length]


def compress_runs(runs: list[int]) -> bytes:
    """COCO's compressed RLE: from the fourth run on the difference to the run two before, 5 bits and a flag a byte."""
    data = bytearray()
    for index, run in enumerate(runs):
        value, more = (run - runs[index - 2] if index > 2 else run), True
        while more:
            low = value & 0x1F
            value >>= 5
            more = value != (-1 if low & 0x10 else 0)
            data.append(48 + (low | 0x20 if more else low))
    return bytes(data)


def tight_box_loop(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Half-open box around the set pixels."""
    pixels = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    if not pixels:
        return (0, 0, 0, 0)
    xs, ys = [x for x, _ in pixels], [y for _, y in pixels]
    return (min(xs), min(ys), max(xs) + 1, max(ys) + 1)


def stability_loop(low_res: Tensor, *, input_hw: tuple[int, int], image_size: int) -> list[float]:
    """Share of the pixels above -1 that are also above +1, inside the picture."""
    height, width = (math.ceil(length * low_res.shape[-1] / image_size) for length in input_hw)
    result = []
    for logits in low_res.tolist():
        values = [value for row in logits[:height] for value in row[:width]]
        loose = sum(value > -1 for value in values)
        result.append(sum(value > 1 for value in values) / loose if loose else 0.0)
    return result


def resize_bilinear(image: NDArray[np.float64], size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Bilinear resize of (H, W) with pixel centres at halves and the border repeated."""

    def positions(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        centre = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0)
        low = np.minimum(np.floor(centre).astype(np.int64), source - 1)
        return low, np.minimum(low + 1, source - 1), centre - low

    top, bottom, down = positions(image.shape[0], size_hw[0])
    left, right, across = positions(image.shape[1], size_hw[1])
    rows = image[top] * (1 - down)[:, None] + image[bottom] * down[:, None]
    return rows[:, left] * (1 - across) + rows[:, right] * across


def upsample_reference(
    low_res: Tensor, *, size_hw: tuple[int, int], input_hw: tuple[int, int], image_size: int
) -> NDArray[np.float64]:
    """(N, H, W) logits in float64 for (N, m, m): to the sam frame, cut the padding off, to the picture."""
    result = np.zeros((len(low_res), *size_hw))
    for index, logits in enumerate(low_res.double().numpy()):
        frame = resize_bilinear(logits, (image_size, image_size))
        result[index] = resize_bilinear(frame[: input_hw[0], : input_hw[1]], size_hw)
    return result


def masks_whole_tensor(
    low_res: Tensor, *, size_hw: tuple[int, int], input_hw: tuple[int, int], image_size: int
) -> NDArray[np.bool_]:
    """(N, H, W) masks by one torch call over all of them."""
    frame = torch.nn.functional.interpolate(low_res[:, None], (image_size, image_size), mode="bilinear")
    cut = frame[:, :, : input_hw[0], : input_hw[1]]
    whole: NDArray[np.bool_] = (torch.nn.functional.interpolate(cut, size_hw, mode="bilinear")[:, 0] > 0).numpy()
    return whole


def clean_mask_loop(mask: NDArray[np.bool_], *, fill_holes: int, remove_islands: int) -> NDArray[np.bool_]:
    """Flood fills: small background parts that do not touch the border become mask, then small parts of the mask go."""
    height, width = mask.shape
    result = mask.copy()
    for part in _parts(~result):
        inside = all(0 < y < height - 1 and 0 < x < width - 1 for y, x in part)
        if inside and len(part) < fill_holes:
            for y, x in part:
                result[y, x] = True
    parts = _parts(result)
    largest = max(parts, key=len, default=[])  # the first of equals
    for part in parts:
        if part is not largest and len(part) < remove_islands:
            for y, x in part:
                result[y, x] = False
    return result


def _parts(mask: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """Pixels of each 8-connected part, in order of its first pixel by rows."""
    left = {(y, x) for y, x in np.argwhere(mask).tolist()}
    parts = []
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        part = [start]
        for y, x in part:  # grows while it is walked
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            part += near
        parts.append(part)
    return parts


def overlap_plain(a: list[float], b: list[float], kind: str) -> float:
    """IoU or IoS of two xyxy boxes; 0 when one of them has no area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (areas[0] + areas[1] - width * height if kind == "iou" else min(areas))


def suppress_loop(
    found: Detections, settings: SuppressConfig, thresholds: list[float], score_floor: float
) -> list[tuple[int, list[float], float, int]]:
    """Index of the pick, box, score and num_merged of each detection that is left: group by group, pick by pick."""
    boxes, labels, merged = found.boxes_xyxy.tolist(), found.labels.tolist(), found.num_merged.tolist()
    scores = found.scores.tolist()
    sigma = 0.5 if settings.sigma is None else settings.sigma
    result = []
    for group in [set(labels)] if settings.across_labels else [{label} for label in set(labels)]:
        remaining = [i for i in range(len(labels)) if labels[i] in group]
        while remaining:
            pick = max(remaining, key=lambda i: scores[i])  # the first of equals
            remaining.remove(pick)
            overlaps = {i: overlap_plain(boxes[pick], boxes[i], settings.overlap) for i in remaining}
            close = [i for i in remaining if overlaps[i] > thresholds[labels[pick]]]
            box, members = boxes[pick], [pick]
            if settings.strategy == "soft_nms":
                for i in close if settings.decay == "linear" else remaining:
                    # numpy's exp: that of other libraries may differ in the last bit, which can decide a tie.
                    exponential = float(np.exp(-(overlaps[i] * overlaps[i]) / sigma))
                    factor = 1 - overlaps[i] if settings.decay == "linear" else exponential
                    scores[i] *= factor
                    if factor < 1 and scores[i] <= score_floor:
                        remaining = [other for other in remaining if other != i]
            elif settings.strategy in ("nms", "merge"):
                remaining = [i for i in remaining if i not in close]
            if settings.strategy == "merge":
                members = sorted([pick, *close])
                total = sum(scores[i] for i in members)
                if total > 0:
                    box = [sum(scores[i] * boxes[i][corner] for i in members) / total for corner in range(4)]
            result.append((pick, box, scores[pick], sum(merged[i] for i in members)))
    return sorted(result, key=lambda row: (-row[2], row[0]))
