"""Decode the boxes of several images to low-resolution mask logits, in calls of a fixed shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.config.inference import SegmentConfig
from owlsam_ray.models.protocols import Segmenter
from owlsam_ray.ops.masks import stability_score


@dataclass(frozen=True, slots=True)
class DecodedMasks:
    """Output of the segmenter for the N boxes of one image, on the CPU; U of the boxes are distinct."""

    logits: Tensor
    """(U, m, m) float32 low-resolution logits; m is 1 if U is 0."""
    predicted_iou: Tensor
    """(U,) float32."""
    index: NDArray[np.int64]
    """(N,) index of each box's mask among the U masks."""


def pad_batch(inputs: Sequence[Tensor], batch_size: int) -> Tensor:
    """Stack model inputs and pad with zeros to a fixed batch size.

    Args:
        inputs: 1…batch_size tensors of the same shape (C, S, S).
        batch_size: size of the padded batch.

    Returns:
        (batch_size, C, S, S). Padding keeps the shape of a call, hence its arithmetic, the same for every batch.
    """
    missing = batch_size - len(inputs)
    if missing < 0:
        raise ValueError(f"{len(inputs)} inputs do not fit a batch of {batch_size}")
    return torch.stack([*inputs, *(torch.zeros_like(inputs[0]) for _ in range(missing))])


def decode_boxes(
    segmenter: Segmenter,
    embeddings: Tensor,
    boxes_per_image: Sequence[NDArray[np.float32]],
    *,
    input_sizes_hw: Sequence[tuple[int, int]],
    batch_size: int,
    settings: SegmentConfig,
) -> list[DecodedMasks]:
    """Decode the boxes of several images together; equal boxes of an image are decoded once.

    Args:
        segmenter: the model that decodes.
        embeddings: (B, C, h, w) output of the segmenter's encoder.
        boxes_per_image: for each of the first images of `embeddings`, (N_i, 4) float32 boxes in the sam frame.
        input_sizes_hw: for each of these images, the (h', w') that it occupies in the sam frame.
        batch_size: boxes per decoder call; the last call is filled up with padding boxes.
        settings: prompt, and which of SAM's masks to take.

    Returns:
        One result per image. Without boxes the decoder is not called.
    """
    distinct = [_distinct(boxes) for boxes in boxes_per_image]
    counts = [len(boxes) for boxes, _ in distinct]
    total = sum(counts)
    if total == 0:
        return [DecodedMasks(torch.zeros(0, 1, 1), torch.zeros(0), index) for _, index in distinct]
    boxes = torch.from_numpy(np.concatenate([boxes for boxes, _ in distinct]))
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    padding = -total % batch_size
    boxes = torch.cat([boxes, torch.zeros(padding, 4)])
    padded_owner = torch.cat([owner, torch.zeros(padding, dtype=torch.int64)])

    logits, predicted_iou = [], []
    for start in range(0, total, batch_size):
        part = slice(start, start + batch_size)
        low_res, quality = segmenter.decode(
            embeddings,
            padded_owner[part],
            boxes[part],
            multimask=settings.masks != "single",
            center_point=settings.prompt == "box_and_center",
        )
        of_image = owner[part]  # without the padding
        chosen = _choose(
            low_res[: len(of_image)],
            quality[: len(of_image)],
            by=settings.masks,
            inputs_hw=[input_sizes_hw[image] for image in of_image.tolist()],
            image_size=segmenter.image_size,
        )
        logits.append(chosen[0].cpu())
        predicted_iou.append(chosen[1].cpu())
    parts = zip(torch.cat(logits).split(counts), torch.cat(predicted_iou).split(counts), distinct, strict=True)
    return [DecodedMasks(low_res, quality, index) for low_res, quality, (_, index) in parts]


def _distinct(boxes: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Reduce (N, 4) boxes to (U, 4) distinct ones in order of first occurrence, and (N,) the index of each box."""
    places: dict[tuple[float, ...], int] = {}
    index = np.array([places.setdefault(tuple(box), len(places)) for box in boxes.tolist()], np.int64)
    return np.array(list(places), np.float32).reshape(-1, 4), index


def _choose(
    logits: Tensor,
    predicted_iou: Tensor,
    *,
    by: Literal["single", "best_of_three", "most_stable"],
    inputs_hw: Sequence[tuple[int, int]],
    image_size: int,
) -> tuple[Tensor, Tensor]:
    """Choose one mask per box: (M, K, m, m) and (M, K) to (M, m, m) and (M,).

    It runs on the model's device, so that only the chosen masks are copied. Ties in predicted IoU: the first mask; ties
    in stability: the mask with the highest predicted IoU.
    """
    if by == "single":
        return logits[:, 0], predicted_iou[:, 0]
    rating = predicted_iou
    if by == "most_stable":
        stability = torch.empty_like(predicted_iou)
        for input_hw in set(inputs_hw):
            rows = [row for row, each in enumerate(inputs_hw) if each == input_hw]
            masks = logits[rows].flatten(0, 1)
            stability[rows] = stability_score(masks, input_hw=input_hw, image_size=image_size).reshape(len(rows), -1)
        rating = predicted_iou.where(stability == stability.amax(dim=1, keepdim=True), -torch.inf)
    best = rating.argmax(dim=1)
    every = torch.arange(len(best), device=best.device)
    return logits[every, best], predicted_iou[every, best]
