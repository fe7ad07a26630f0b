"""The stand-ins: the same boxes for the same pixels, other ones for others, and nothing heavy to load."""

import subprocess
import sys

import numpy as np
import torch

from owlsam_ray.models.fakes import FakeDetector, FakeSegmenter, fake_query

SEED = 11


def pictures(count: int) -> list[np.ndarray]:
    print("seed", SEED)
    chance = np.random.default_rng(SEED)
    return [chance.integers(0, 256, (8, 6 + number % 3, 3), np.uint8) for number in range(count)]


def test_pixels_decide_everything() -> None:
    detector, queries = FakeDetector(), torch.zeros(5, 16)
    batch = torch.stack([detector.preprocess(picture) for picture in pictures(400)])
    boxes, scores = detector.detect(batch, queries)
    assert boxes.shape == (400, 6, 4)
    assert scores.shape == (400, 6, 5)
    order = torch.randperm(400)
    again = detector.detect(batch[order], queries)
    assert torch.equal(again[0], boxes[order])
    assert torch.equal(again[1], scores[order])
    assert float(boxes.min()) > 0
    assert float(scores.max()) < 1
    counts = (scores.amax(dim=2) > 0).sum(dim=1)
    assert set(counts.tolist()) == set(range(7)), "pictures without a box, and with many"
    assert len({tuple(row) for row in boxes.reshape(-1, 4).tolist()}) == 2400
    labels = scores.argmax(dim=2)[scores.amax(dim=2) > 0]
    assert set(labels.tolist()) == set(range(5))


def test_shape_counts_as_well() -> None:
    detector, flat = FakeDetector(), np.zeros((4, 6, 3), np.uint8)
    assert not torch.equal(detector.preprocess(flat), detector.preprocess(flat.reshape(6, 4, 3)))


def test_masks_fill_their_boxes() -> None:
    segmenter = FakeSegmenter()
    boxes = torch.tensor([[0, 0, 32, 32], [4, 8, 20, 16], [0, 0, 0, 0]], dtype=torch.float32)
    logits, quality = segmenter.decode(
        torch.zeros(1, 3, 1, 1), torch.zeros(3, dtype=torch.int64), boxes, multimask=True
    )
    assert (logits.shape, quality.shape) == ((3, 3, 16, 16), (3, 3))
    areas = (logits > 0).sum(dim=(2, 3))
    assert (areas[:, 0] >= areas[:, 1]).all()
    inside = logits[1, 0] > 0
    assert inside[4:8, 2:10].sum() == inside.sum() > 10
    single, _ = segmenter.decode(torch.zeros(1, 3, 1, 1), torch.zeros(3, dtype=torch.int64), boxes, multimask=False)
    assert torch.equal(single[:, 0], logits[:, 0])


def test_prompts_are_told_apart() -> None:
    one, other = fake_query(["a cat"]), fake_query(["a cat", "cats"])
    assert torch.equal(one, fake_query(["a cat"]))
    assert not torch.equal(one, other)
    assert abs(float(one.norm()) - 1) < 1e-6


def test_nothing_heavy_is_loaded() -> None:
    heavy = {"transformers", "timm", "torchvision", "huggingface_hub"}
    code = (
        "import sys, owlsam_ray.inference.engine, owlsam_ray.inference.queries\n"
        "import owlsam_ray.models.fakes, owlsam_ray.models.load\n"
        f"print(*({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
