"""Boxes of many images in calls of a fixed shape, equal ones once, one mask each."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.config.inference import SegmentConfig
from owlsam_ray.inference.segment import decode_boxes, pad_batch
from owlsam_ray.models.mobile_sam import MobileSam
from owlsam_ray.models.protocols import Segmenter
from owlsam_ray.models.sam import Sam
from tests import seeded_mobile_sam, seeded_sam
from tests.oracles import stability_loop

SIDE = 32
SINGLE = SegmentConfig(weights="w")


class EchoSegmenter:
    """The logits of a box are the box, its quality the value of its image's embedding."""

    device = torch.device("cpu")
    image_size = SIDE

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool, bool]] = []

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        raise NotImplementedError

    def encode(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(
        self,
        embeddings: Tensor,
        image_index: Tensor,
        boxes_xyxy: Tensor,
        *,
        multimask: bool,
        center_point: bool = False,
    ) -> tuple[Tensor, Tensor]:
        self.calls.append((len(boxes_xyxy), multimask, center_point))
        return boxes_xyxy.reshape(-1, 1, 2, 2), embeddings[image_index, 0, 0, 0][:, None]


class ScriptedSegmenter(EchoSegmenter):
    """Box (n, …) gets the n-th of given masks (K, m, m) and qualities (K,)."""

    def __init__(self, masks: Tensor, quality: Tensor) -> None:
        super().__init__()
        self.masks, self.quality = masks, quality

    def decode(
        self,
        embeddings: Tensor,
        image_index: Tensor,
        boxes_xyxy: Tensor,
        *,
        multimask: bool,
        center_point: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert multimask
        rows = boxes_xyxy[:, 0].long()
        return self.masks[rows], self.quality[rows]


def decode(segmenter: Segmenter, boxes: list[NDArray[np.float32]], **changes: Any) -> list[Any]:
    """Images of which each fills the whole sam frame, with embeddings that are their number."""
    arguments: dict[str, Any] = {
        "input_sizes_hw": [(SIDE, SIDE)] * len(boxes),
        "batch_size": 8,
        "settings": SINGLE,
    }
    embeddings = torch.arange(len(boxes) + 2.0)[:, None, None, None]  # the last two rows are padding
    return decode_boxes(segmenter, embeddings, boxes, **(arguments | changes))


@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [8], [16, 16], [0, 0, 5], [1, 1, 1]])
def test_boxes_find_back_to_their_images(counts: list[int]) -> None:
    segmenter = EchoSegmenter()
    boxes = [np.random.default_rng(n).random((count, 4), np.float32) for n, count in enumerate(counts)]
    result = decode(segmenter, boxes)
    assert segmenter.calls == [(8, False, False)] * -(-sum(counts) // 8)
    for image, masks in enumerate(result):
        np.testing.assert_array_equal(masks.logits.reshape(-1, 4).numpy(), boxes[image])
        assert masks.predicted_iou.tolist() == [image] * counts[image]
        assert (masks.index.dtype, masks.index.tolist()) == (np.int64, list(range(counts[image])))


def test_no_boxes_no_call() -> None:
    segmenter = EchoSegmenter()
    none = np.zeros((0, 4), np.float32)
    for masks in decode(segmenter, [none, none]):
        assert (masks.logits.shape, masks.predicted_iou.shape) == ((0, 1, 1), (0,))
        assert (masks.index.dtype, masks.index.shape) == (np.int64, (0,))
    assert segmenter.calls == []


def test_equal_boxes_of_an_image_are_decoded_once() -> None:
    a, b, c, d = np.random.default_rng(5).random((4, 4), np.float32)
    almost: NDArray[np.float32] = np.nextafter(a, np.float32(2))
    segmenter = EchoSegmenter()
    first, second, third = decode(
        segmenter, [np.stack([b, a, b, almost, a, b]), np.zeros((0, 4), np.float32), np.stack([a, c, d, c])]
    )
    assert len(segmenter.calls) == 1, "six different boxes of two images fit one call"
    np.testing.assert_array_equal(first.logits.reshape(-1, 4).numpy(), np.stack([b, a, almost]))
    assert first.index.tolist() == [0, 1, 0, 2, 1, 0]
    assert first.predicted_iou.tolist() == [0.0] * 3
    assert second.index.tolist() == []
    np.testing.assert_array_equal(third.logits.reshape(-1, 4).numpy(), np.stack([a, c, d]))
    assert third.index.tolist() == [0, 1, 2, 1]
    assert third.predicted_iou.tolist() == [2.0] * 3, "the same box of another picture is another box"


@pytest.mark.parametrize("prompt", ["box", "box_and_center"])
@pytest.mark.parametrize("masks", ["single", "best_of_three", "most_stable"])
def test_settings_reach_the_model(prompt: str, masks: str) -> None:
    segmenter = EchoSegmenter()
    settings = SegmentConfig.model_validate({"weights": "w", "prompt": prompt, "masks": masks})
    decode(segmenter, [np.ones((1, 4), np.float32)], settings=settings, batch_size=2)
    assert segmenter.calls == [(2, masks != "single", prompt == "box_and_center")]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
@pytest.mark.parametrize("by", ["best_of_three", "most_stable"])
def test_chosen_masks_equal_a_loop(by: str, batch_size: int) -> None:
    """Coarse values, so that many are equal; pictures of several shapes in one call."""
    seed = 7
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    counts, inputs_hw = [5, 0, 9, 12], [(32, 32), (32, 10), (17, 32), (32, 32)]
    total = sum(counts)
    masks = torch.randint(-2, 3, (total, 3, 4, 4), generator=generator).float()
    quality = torch.randint(0, 3, (total, 3), generator=generator) / 2
    boxes = [np.zeros((count, 4), np.float32) for count in counts]
    for box, number in zip(itertools.chain(*boxes), range(total), strict=True):
        box[0] = number
    result = decode(
        ScriptedSegmenter(masks, quality),
        boxes,
        input_sizes_hw=inputs_hw,
        batch_size=batch_size,
        settings=SegmentConfig.model_validate({"weights": "w", "masks": by}),
    )
    seen, row = set(), 0
    for count, input_hw, decoded in zip(counts, inputs_hw, result, strict=True):
        assert (len(decoded.logits), decoded.index.tolist()) == (count, list(range(count)))
        for place in range(count):
            stability = stability_loop(masks[row], input_hw=input_hw, image_size=SIDE)
            rating = [(stability[k] if by == "most_stable" else 0.0, float(quality[row, k])) for k in range(3)]
            best = max(range(3), key=lambda k: rating[k])  # the first of equals
            assert torch.equal(decoded.logits[place], masks[row, best])
            assert float(decoded.predicted_iou[place]) == float(quality[row, best])
            seen.add(best)
            row += 1
    assert seen == {0, 1, 2}


def test_padding_has_no_say_in_stability() -> None:
    """The first mask is the more stable one inside the picture, the second one over the whole frame."""
    masks = torch.full((1, 3, 4, 4), -5.0)
    masks[0, 0, :2] = 5.0  # stable inside, undecided below
    masks[0, 0, 2:] = 0.0
    masks[0, 1, :3] = 5.0
    masks[0, 1, 0, 0] = 0.0
    segmenter = ScriptedSegmenter(masks, torch.tensor([[0.1, 0.2, 0.9]]))
    settings = SegmentConfig(weights="w", masks="most_stable")
    box = [np.zeros((1, 4), np.float32)]
    (half,) = decode(segmenter, box, settings=settings, input_sizes_hw=[(16, 32)])
    (whole,) = decode(segmenter, box, settings=settings)
    assert torch.equal(half.logits[0], masks[0, 0])
    assert torch.equal(whole.logits[0], masks[0, 1])


@pytest.mark.parametrize("by", ["single", "best_of_three", "most_stable"])
@pytest.mark.parametrize("model", ["mobile_sam", "sam"])
def test_a_box_gets_the_same_bits_whatever_its_mates(tmp_path: Path, model: str, by: str) -> None:
    cpu = torch.device("cpu")
    segmenter: Segmenter
    if model == "sam":
        seeded_sam.write_tiny(tmp_path)
        segmenter = Sam.load(tmp_path, device=cpu, dtype=torch.float32)
    else:
        seeded_mobile_sam.write_tiny(tmp_path)
        segmenter = MobileSam.load(str(tmp_path), device=cpu, dtype=torch.float32)
    random = np.random.default_rng(3)
    embeddings = torch.randn(3, 64, 8, 8, generator=torch.Generator().manual_seed(3))
    corners = [np.sort(random.uniform(0, 128, (count, 2, 2)), axis=1) for count in (4, 1, 6)]
    boxes = [each.reshape(-1, 4).astype(np.float32) for each in corners]
    boxes[2][3] = boxes[2][0]
    sizes = [(128, 128), (64, 128), (128, 100)]
    settings = SegmentConfig.model_validate({"weights": "w", "masks": by})
    together = decode_boxes(segmenter, embeddings, boxes, input_sizes_hw=sizes, batch_size=8, settings=settings)
    assert together[2].index.tolist() == [0, 1, 2, 0, 3, 4]
    for image in range(3):
        (alone,) = decode_boxes(
            segmenter,
            embeddings[image : image + 1],
            boxes[image : image + 1],
            input_sizes_hw=sizes[image : image + 1],
            batch_size=8,
            settings=settings,
        )
        assert torch.equal(alone.logits, together[image].logits)
        assert torch.equal(alone.predicted_iou, together[image].predicted_iou)


def test_padding() -> None:
    inputs = [torch.ones(3, 2, 2), torch.full((3, 2, 2), 2.0)]
    padded = pad_batch(inputs, 4)
    assert padded.mean(dim=(1, 2, 3)).tolist() == [1, 2, 0, 0]
    with pytest.raises(ValueError, match="2 inputs do not fit a batch of 1"):
        pad_batch(inputs, 1)
