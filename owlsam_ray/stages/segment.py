"""Boxes of many images → low-resolution mask logits, in calls of a fixed shape."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.models.protocols import Segmenter


def pad_batch(inputs: Sequence[Tensor], batch_size: int) -> Tensor:
    """Stack model inputs and fill up with zeros to a fixed batch size.

    Args:
        inputs: 1…batch_size tensors of one shape (C, S, S).
        batch_size: rows of the result.

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
    batch_size: int,
    best_of_three: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Decode the boxes of several images together.

    Args:
        segmenter: the model.
        embeddings: (B, C, h, w) of the segmenter's encoder.
        boxes_per_image: for each of the first images of `embeddings`, (N_i, 4) float32 in the sam frame.
        batch_size: boxes of one decoder call; the last call is filled up with boxes of no interest.
        best_of_three: see `Segmenter.decode`.

    Returns:
        Per image: logits (N_i, m, m) float32 and predicted IoU (N_i,) float32, on the CPU. No boxes, no decoder call.
    """
    counts = [len(boxes) for boxes in boxes_per_image]
    total = sum(counts)
    if total == 0:
        return [(torch.zeros(0, 1, 1), torch.zeros(0)) for _ in counts]
    boxes = torch.from_numpy(np.concatenate(boxes_per_image).astype(np.float32, copy=False))
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    padding = -total % batch_size
    boxes = torch.cat([boxes, torch.zeros(padding, 4)])
    owner = torch.cat([owner, torch.zeros(padding, dtype=torch.int64)])

    logits, predicted_iou = [], []
    for start in range(0, total, batch_size):
        part = slice(start, start + batch_size)
        low_res, quality = segmenter.decode(embeddings, owner[part], boxes[part], best_of_three=best_of_three)
        logits.append(low_res.cpu())
        predicted_iou.append(quality.cpu())
    return list(
        zip(torch.cat(logits)[:total].split(counts), torch.cat(predicted_iou)[:total].split(counts), strict=True)
    )
