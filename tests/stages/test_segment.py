"""Boxes of many images in calls of a fixed shape."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.stages.segment import decode_boxes, pad_batch


class EchoSegmenter:
    """The logits of a box are the box, its quality the value of its image's embedding."""

    device = torch.device("cpu")
    image_size = 32

    def __init__(self) -> None:
        self.calls: list[int] = []

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        raise NotImplementedError

    def encode(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(
        self, embeddings: Tensor, image_index: Tensor, boxes_xyxy: Tensor, *, best_of_three: bool
    ) -> tuple[Tensor, Tensor]:
        self.calls.append(len(boxes_xyxy))
        return boxes_xyxy.reshape(-1, 2, 2), embeddings[image_index, 0, 0, 0]


@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [8], [16, 16], [0, 0, 5], [1, 1, 1]])
def test_boxes_find_back_to_their_images(counts: list[int]) -> None:
    segmenter = EchoSegmenter()
    boxes = [np.random.default_rng(n).random((count, 4), np.float32) for n, count in enumerate(counts)]
    embeddings = torch.arange(len(counts) + 2.0)[:, None, None, None]  # the last two rows are padding
    result = decode_boxes(segmenter, embeddings, boxes, batch_size=8, best_of_three=False)
    assert segmenter.calls == [8] * -(-sum(counts) // 8)
    for image, (logits, quality) in enumerate(result):
        np.testing.assert_array_equal(logits.reshape(-1, 4).numpy(), boxes[image])
        assert quality.tolist() == [image] * counts[image]


def test_no_boxes_no_call() -> None:
    segmenter = EchoSegmenter()
    result = decode_boxes(
        segmenter, torch.zeros(2, 1, 1, 1), [np.zeros((0, 4), np.float32)] * 2, batch_size=8, best_of_three=True
    )
    assert [len(logits) for logits, _ in result] == [0, 0]
    assert segmenter.calls == []


def test_padding() -> None:
    inputs = [torch.ones(3, 2, 2), torch.full((3, 2, 2), 2.0)]
    padded = pad_batch(inputs, 4)
    assert padded.mean(dim=(1, 2, 3)).tolist() == [1, 2, 0, 0]
    with pytest.raises(ValueError, match="2 inputs do not fit a batch of 1"):
        pad_batch(inputs, 1)
