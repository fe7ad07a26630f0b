"""Fake models for tests: boxes and masks computed from the pixels, and images that kill their process.

An image's checksum decides everything: the number of boxes, their places, labels and scores. Rows are therefore as
reproducible as a real model's, at almost no cost. Shapes as in `protocols`; u are numbers in [0, 1).

With `fakes.poison`, an image whose first pixel is one of `POISON` does to its process what a broken decoder would.
"""

import ctypes
import hashlib
import time
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PROPOSALS = 6
_IMAGE_SIZE = 32
_MASK_SIDE = 16
_DIMENSIONS = 16
_BITS = 11
"""Bits of a checksum in one float32, which holds them exactly."""
SEGFAULT, ALLOCATE, HANG, HANG_MODEL = 251, 252, 253, 254
POISON = {(255, 0, blue): blue for blue in (SEGFAULT, ALLOCATE, HANG, HANG_MODEL)}
"""First pixel (R, G, B) → what happens: a segmentation fault, unlimited memory use, decoding that never ends, or a
model call that never ends, if the image is part of it."""
_CPU = torch.device("cpu")


class FakeDetector:
    """A detector of up to six boxes per image; one image in seven has none."""

    def __init__(self, *, delay_s: float = 0.0, poison: bool = False) -> None:
        """Create the detector.

        Args:
            delay_s: seconds that each call sleeps.
            poison: whether images may kill the process.
        """
        self._delay_s, self._poison = delay_s, poison

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return _CPU

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to its checksum, (3, 1, 1) float32."""
        if self._poison:
            found = POISON.get(tuple(pixels[0, 0].tolist()), 0)
            if found == HANG_MODEL:
                return torch.full((3, 1, 1), -1.0)
            _misbehave(found)
        return _checksum(pixels)

    def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """See `protocols.Detector`; (B, 6, 4) and (B, 6, Q)."""
        if self._delay_s:
            time.sleep(self._delay_s)
        if bool((batch < 0).any()):
            _misbehave(HANG)
        num_queries = len(query_embeddings)
        numbers = _numbers(batch)  # (B,)
        u = _random(numbers[:, None], _PROPOSALS * 6).reshape(len(batch), _PROPOSALS, 6)
        centres = 0.15 + 0.7 * u[..., 0:2]
        sizes = 0.1 + 0.5 * u[..., 2:4]
        boxes = np.concatenate([centres, sizes], axis=-1).astype(np.float32)
        labels = (u[..., 4] * num_queries).astype(np.int64)
        counts = numbers % (_PROPOSALS + 1)
        there = np.arange(_PROPOSALS) < counts[:, None]
        scores = np.zeros((len(batch), _PROPOSALS, num_queries), np.float32)
        np.put_along_axis(scores, labels[..., None], (there * (0.1 + 0.89 * u[..., 5]))[..., None], axis=-1)
        return torch.from_numpy(boxes), torch.from_numpy(scores)

    def unscale(self, boxes_cxcywh: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Scale boxes as for an image that is squashed to a square."""
        boxes = boxes_cxcywh.numpy()
        centres, halves = boxes[:, :2], boxes[:, 2:] / 2
        scale = np.array([size_hw[1], size_hw[0]] * 2, np.float32)
        return torch.from_numpy(np.concatenate([centres - halves, centres + halves], axis=1) * scale)


class FakeSegmenter:
    """A segmenter that fills every box with an ellipse."""

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return _CPU

    @property
    def image_size(self) -> int:
        """32, so that masks are small."""
        return _IMAGE_SIZE

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to (3, 1, 1) zeros: masks depend on boxes alone."""
        return torch.zeros(3, 1, 1)

    def encode(self, batch: Tensor) -> Tensor:
        """Return (B, 3, 1, 1) unchanged."""
        return batch

    def decode(
        self,
        embeddings: Tensor,
        image_index: Tensor,
        boxes_xyxy: Tensor,
        *,
        multimask: bool,
        center_point: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `protocols.Segmenter`; the first of the three masks is the largest."""
        places = (torch.arange(_MASK_SIDE, dtype=torch.float32) + 0.5) * (_IMAGE_SIZE / _MASK_SIDE)
        centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
        radii = ((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) / 2).clamp_min(1.0)
        across = ((places - centres[:, :1]) / radii[:, :1]) ** 2  # (M, m)
        down = ((places - centres[:, 1:]) / radii[:, 1:]) ** 2
        inside = 1.0 - (down[:, :, None] + across[:, None, :])  # (M, m, m)
        shrink = torch.tensor([0.0, 0.3, 0.6] if multimask else [0.0])
        logits = 4.0 * (inside[:, None] - shrink[:, None, None])
        quality = (0.9 - 0.2 * shrink).expand(len(boxes_xyxy), -1)
        return logits, quality


def fake_query(texts: Sequence[str]) -> Tensor:
    """(16,) float32 of length 1 that represents some prompts, or an exemplar."""
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    vector = np.frombuffer(digest[:_DIMENSIONS], np.uint8).astype(np.float32) - 127.5
    return torch.from_numpy(vector / np.linalg.norm(vector))


def _checksum(pixels: NDArray[np.uint8]) -> Tensor:
    height, width, _ = pixels.shape
    checksum = zlib.crc32(np.ascontiguousarray(pixels).data, height * 65_537 + width)
    parts = [(checksum >> shift) & (2**_BITS - 1) for shift in (0, _BITS, 2 * _BITS)]
    return torch.tensor(parts, dtype=torch.float32).reshape(3, 1, 1)


def _numbers(batch: Tensor) -> NDArray[np.uint64]:
    """(B, 3, 1, 1) from `_checksum` back to (B,) integers."""
    parts = batch[:, :, 0, 0].numpy().astype(np.uint64)
    joined: NDArray[np.uint64] = parts[:, 0] | parts[:, 1] << np.uint64(_BITS) | parts[:, 2] << np.uint64(2 * _BITS)
    return joined


def _random(seeds: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """(B, 1) seeds to (B, count) numbers in [0, 1), different for each seed and position.

    Source: the output function of SplitMix64 (Steele, Lea, Flood 2014).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    state: NDArray[np.uint64]
    with np.errstate(over="ignore"):
        state = np.multiply(seeds * np.uint64(count + 1) + np.arange(1, count + 1, dtype=np.uint64), golden)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def _misbehave(what: int) -> None:
    """Crash, allocate or hang, and never return; return at once only for 0."""
    if what == SEGFAULT:
        ctypes.string_at(0)
    held = []
    while what == ALLOCATE:
        held.append(bytearray(2**24))
        time.sleep(0.002)
    while what in (HANG, HANG_MODEL):
        time.sleep(3600)
